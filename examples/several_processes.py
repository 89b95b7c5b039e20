"""Several GPUs, or processes on a CPU: torchrun --nproc-per-node 2 examples/several_processes.py --budget 80%."""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from rankpilot import attach, fetch_asset, last_checkpoint, load_packaged_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a Hugging Face id or a folder; all-MiniLM-L6-v2 by default")
parser.add_argument("--budget", default="80%", help="of each process")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--save-steps", type=int, default=20)
parser.add_argument("--output", default="runs/several")
options = parser.parse_args()

set_seed(0)
base = options.model or fetch_asset("all-minilm-l6-v2")
tokenizer = AutoTokenizer.from_pretrained(base)
data = load_packaged_dataset("rotten-tomatoes")["train"]
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=48), batched=True)
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS"))

settings = {"max_steps": options.steps, "save_steps": options.save_steps, "learning_rate": 1e-3}
settings |= {"use_cpu": not torch.cuda.is_available(), "ddp_find_unused_parameters": False}
args = TrainingArguments(options.output, per_device_train_batch_size=8, **settings)
trainer = Trainer(model, args, train_dataset=data, processing_class=tokenizer)
callback = attach(trainer, budget=options.budget)
# With `torchrun --max-restarts 3` the run goes on from there after a process has died.
trainer.train(resume_from_checkpoint=last_checkpoint(options.output))
if trainer.is_world_process_zero():
    print(f"{args.world_size} processes, highest peak {max(peak for _, peak in callback.peaks) / 2**20:.1f} MiB each")
    model.save_pretrained(f"{options.output}/adapter")
