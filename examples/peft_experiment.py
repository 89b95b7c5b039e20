"""A plan as an experiment of PEFT's own comparison, in method_comparison/MetaMathQA of its repository."""

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
parser.add_argument("--model", default="meta-llama/Llama-3.2-3B")
parser.add_argument("--data", help="a .jsonl file of query and response, in place of meta-math/MetaMathQA")
parser.add_argument("--budget", default="60%", help="bytes, or a share of what plain LoRA takes")
parser.add_argument("--length", type=int, default=768, help="tokens of a row at most")
parser.add_argument("--output", type=Path, default=Path("experiments/lora/llama-3.2-3B-rankpilot-60"))
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def encode(row):
    """As the comparison writes a row."""
    text = f"Question: {row['query']} Think step by step.\nAnswer:{row['response']}"
    return tokenizer(text, truncation=True, max_length=options.length)


data = load_dataset("json", data_files=options.data) if options.data else load_dataset("meta-math/MetaMathQA")
rows = data["train"].map(encode, remove_columns=data["train"].column_names)
loader = DataLoader(rows, 4, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, device_map="auto")
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
config = rankpilot.allocate(model, loader, budget=options.budget, learning_rate=1e-4, total_steps=5000)
config.base_model_name_or_path = None  # the comparison names it
config.save_pretrained(options.output)
settings = {"optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1}}
(options.output / "training_params.json").write_text(json.dumps(settings))
print(f"{options.output}: ranks {sorted({*config.rank_pattern.values(), config.r})}")
