# %% [markdown]
# # SFT inside a memory budget
#
# How much memory does a LoRA fine-tune take, and how do you keep it below what your GPU has? This notebook asks before
# anything is downloaded, trains with `SFTTrainer` inside the answer, and looks at what was decided. It is written for a
# T4. (A draft for TRL's examples/notebooks, as `sft_memory_budget.ipynb`: `jupytext --to ipynb` converts this file.
# Nobody has run it on a T4 or another GPU yet. We ran it on a CPU: the question as it is, and three steps of
# SmolLM2-135M with `bf16=False` on film reviews. rankpilot is not on PyPI yet.)

# %% [markdown]
# ```bash
# pip install -e ".[trl]"  # in a clone of rankpilot
# ```

# %%
import rankpilot
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

MODEL, DATA = "Qwen/Qwen3-0.6B", "trl-lib/Capybara"

# %% [markdown]
# ## Ask
#
# The configuration is enough: no weights, no GPU.

# %%
best = rankpilot.memory_of(MODEL, "T4", batch_size=4, max_length=1024).best
print(f"{best.use.total_bytes / 2**30:.1f} GiB on the card: it {best.use.verdict}")
print(f"{len(best.checkpointed)} of {best.layers} layers checkpointed, {best.time:.2f} of the time of plain LoRA")

# %% [markdown]
# ## Train
#
# `attach` is the one line that is new. It measures a few small steps, checkpoints as few layers as the budget needs,
# runs each batch in parts without padding, and corrects the learning rate while it trains. TRL checkpoints all layers
# unless it is told not to.

# %%
trainer = SFTTrainer(
    MODEL,
    args=SFTConfig("sft", max_steps=100, per_device_train_batch_size=4, max_length=1024, gradient_checkpointing=False),
    train_dataset=load_dataset(DATA, split="train[:2000]"),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
pilot = rankpilot.attach(trainer, budget="14GiB", learning_rate="auto")
trainer.train()
print(f"Highest peak of a step: {max(peak for _, peak in pilot.peaks) / 2**30:.2f} GiB")

# %% [markdown]
# ## Look, and load
#
# The page explains each decision. The adapter is plain PEFT.

# %%
trainer.save_model("sft/adapter")

# %% [markdown]
# ```bash
# rankpilot study sft --output study.html
# ```
