# %% [markdown]
# # Fit an 8B on your card, and train
#
# First this notebook asks what an 8B takes of a card of 24 GiB: from its configuration, on any computer, without a
# download. Then it does the same with a tiny model that ships with the package, and trains that one for real.
#
# It is plain Python in jupytext's percent format, and runs on a CPU in some minutes. Run it with
# `python docs/notebooks/fit_8b.py`, or turn it into a notebook with `jupytext --to ipynb docs/notebooks/fit_8b.py`.
# Files go to a new temporary folder, which is printed, or to the folder in `RANKPILOT_NOTEBOOK`.

# %%
import os
import tempfile
from pathlib import Path

import rankpilot
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

folder = Path(os.environ.get("RANKPILOT_NOTEBOOK") or tempfile.mkdtemp(prefix="rankpilot-fit-"))
print("Everything is written to", folder)

# %% [markdown]
# ## Ask before you download
#
# Name the model and the card. `best` adapts the most layers, and checkpoints the fewest of those, that fit.

# %%
MODEL, CARD = "llama-3.1-8b", "RTX 4090"
outlook = rankpilot.memory_of(MODEL, CARD, batch_size=2, max_length=1024)
best = outlook.best
print(f"{MODEL} on {CARD}: {best.layers} layers, {len(best.checkpointed)} of them checkpointed")
print(f"{best.use.total_bytes / 2**30:.2f} GiB on the card: it {best.use.verdict}")
print(f"A step takes {best.time:.2f} of plain LoRA's time")

# %% [markdown]
# ## Which batches fit
#
# Rows and tokens, with the layers to checkpoint; None means that the batch does not fit.

# %%
for cell in outlook.grid:
    print(f"  {cell.shape.rows:2d} rows of {cell.shape.length:5,d} tokens: {cell.checkpointed}")

# %% [markdown]
# ## Train inside a budget
#
# The same line serves the 8B on the card (`budget="23GiB"`) and this small classifier, which gets 60 % of the bytes
# that rank 8 on all modules takes.

# %%
base = rankpilot.fetch_asset("all-minilm-l6-v2")
tokenizer = AutoTokenizer.from_pretrained(base)
data = rankpilot.load_packaged_dataset("rotten-tomatoes")
data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=48))
torch.manual_seed(0)
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS"))
trainer = Trainer(
    model=model,
    args=TrainingArguments(str(folder / "run"), max_steps=30, per_device_train_batch_size=16, report_to="none"),
    train_dataset=data["train"],
    processing_class=tokenizer,
)
pilot = rankpilot.attach(trainer, budget="60%", learning_rate="auto")
trainer.train()
highest = max(peak for _, peak in pilot.peaks)
print(f"Highest peak {highest / 2**20:.1f} MiB, of a budget of {pilot.limit / 2**20:.1f} MiB")

# %% [markdown]
# ## Load it with plain PEFT

# %%
model.save_pretrained(folder / "adapter")
loaded = AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter", num_labels=2)
print("Ranks:", dict(sorted(loaded.peft_config["default"].rank_pattern.items())[:4]), "...")
