"""A loop in plain PyTorch, three calls a step: python examples/plain_loop.py --budget 80%."""

import argparse
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from rankpilot import RankPilot, TrainingRun, fetch_asset, load_packaged_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a Hugging Face id or a folder; all-MiniLM-L6-v2 by default")
parser.add_argument("--budget", default="80%")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output", type=Path, default="runs/plain")
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
options = parser.parse_args()
options.output.mkdir(parents=True, exist_ok=True)
base = options.model or fetch_asset("all-minilm-l6-v2")
tokenizer = AutoTokenizer.from_pretrained(base)
data = load_packaged_dataset("rotten-tomatoes")["train"].rename_column("label", "labels")
data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=48), remove_columns="text")
loader = torch.utils.data.DataLoader(data, 16, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")).train()
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
run = TrainingRun.of_loader(model, optimizer, loader, total_steps=options.steps, in_parts=True)
pilot, checkpoint, done = RankPilot(budget=options.budget, tell=print), options.output / "checkpoint.pt", 0
if options.resume:
    saved = torch.load(checkpoint)
    set_peft_model_state_dict(model, saved["adapter"])
    optimizer.load_state_dict(saved["optimizer"])
    done = pilot.load_state_dict(run, saved["pilot"])
else:
    pilot.begin(run)
for step, batch in enumerate(islice(chain.from_iterable(repeat(loader)), options.steps - done), done + 1):
    pilot.before_step(batch)
    loss = torch.zeros(())
    for part, share in pilot.parts(batch):  # each padded to its own longest row
        (of_part := share * model(**part).loss).backward()
        loss += of_part.detach()
    pilot.before_optimizer_step(loss)
    optimizer.step()
    optimizer.zero_grad()
    pilot.after_step()
    if step % 50 == 0 or step == options.steps:
        saved = {"adapter": get_peft_model_state_dict(model), "optimizer": optimizer.state_dict()}
        torch.save(saved | {"pilot": pilot.state_dict()}, checkpoint)
pilot.finish()
model.save_pretrained(options.output / "adapter")
