"""A run that goes on where it was killed, if it is started again: python examples/resume.py --budget 80%."""

import argparse

from peft import LoraConfig, get_peft_model
from rankpilot import attach, fetch_asset, last_checkpoint, load_packaged_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a Hugging Face id or a folder; all-MiniLM-L6-v2 by default")
parser.add_argument("--budget", default="80%", help="may be another one than before: it counts at once")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--save-steps", type=int, default=20)
parser.add_argument("--output", default="runs/resumed")
options = parser.parse_args()

set_seed(0)  # the classifier starts anew in each process
base = options.model or fetch_asset("all-minilm-l6-v2")
tokenizer = AutoTokenizer.from_pretrained(base)
data = load_packaged_dataset("rotten-tomatoes")["train"]
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=48), batched=True)
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS"))

settings = {"max_steps": options.steps, "save_steps": options.save_steps, "learning_rate": 1e-3}
args = TrainingArguments(options.output, per_device_train_batch_size=16, **settings)
trainer = Trainer(model, args, train_dataset=data, processing_class=tokenizer)
attach(trainer, budget=options.budget)
last = last_checkpoint(options.output)  # passes over one that was cut off
trainer.train(resume_from_checkpoint=last)
print(f"went on from {last}" if last else "began", f"and trained {trainer.state.global_step} steps")
model.save_pretrained(f"{options.output}/adapter")
