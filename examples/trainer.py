"""The transformers Trainer under a policy: python examples/trainer.py --budget 80%."""

import argparse

from peft import LoraConfig, get_peft_model
from rankpilot import attach, fetch_asset, load_packaged_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a Hugging Face id or a folder; all-MiniLM-L6-v2 by default")
parser.add_argument("--budget", default="80%")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output", default="runs/trainer")
options = parser.parse_args()

base = options.model or fetch_asset("all-minilm-l6-v2")
tokenizer = AutoTokenizer.from_pretrained(base)
data = load_packaged_dataset("rotten-tomatoes")
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=48), batched=True)
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS"))

trainer = Trainer(
    model=model,
    args=TrainingArguments(options.output, max_steps=options.steps, per_device_train_batch_size=16, learning_rate=1e-3),
    train_dataset=data["train"],
    eval_dataset=data["validation"].select(range(200)),
    processing_class=tokenizer,
)
attach(trainer, budget=options.budget)
trainer.train()
print(f"held-out loss {trainer.evaluate()['eval_loss']:.3f}")
model.save_pretrained(f"{options.output}/adapter")
