"""Train an adapter further on other data: python examples/continue_adapter.py runs/trainer/adapter."""

import argparse

import rankpilot
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer, Trainer, TrainingArguments

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("adapter", help="a folder; the adapter of examples/trainer.py, for instance")
parser.add_argument("--budget", default="100%")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output", default="runs/continued")
options = parser.parse_args()

model = AutoPeftModelForSequenceClassification.from_pretrained(options.adapter, is_trainable=True, num_labels=2)
tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
data = rankpilot.load_packaged_dataset("imdb")
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=48), batched=True)

trainer = Trainer(
    model=model,
    args=TrainingArguments(options.output, max_steps=options.steps, per_device_train_batch_size=16, learning_rate=5e-4),
    train_dataset=data["train"],
    eval_dataset=data["validation"].select(range(200)),
    processing_class=tokenizer,
)
rankpilot.attach(trainer, budget=options.budget)  # what the adapter has learned is kept
print(f"held-out loss before {trainer.evaluate()['eval_loss']:.3f}")
trainer.train()
print(f"held-out loss after {trainer.evaluate()['eval_loss']:.3f}")
model.save_pretrained(f"{options.output}/adapter")
