"""Stores what fixed runs, questions and examples give, so that a rewrite can show that nothing else changed.

    python -m tools.same_runs before.json            # before
    python -m tools.same_runs after.json             # after
    python -m tools.same_runs after.json --compare before.json

Sixteen short runs of tiny models (SFT, DPO, GRPO and classification at 400 % and 60 % of their bytes, a plain loop, two
resumed runs, four with other policies, rates and goals) keep losses, measured peaks, limits, ranks and a checksum of
the adapter; thirty questions to `rankpilot memory` keep bytes and verdicts.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

TEXTS = [f"the number {i} comes after {i - 1} and before {i + 1} " * (1 + i % 3) for i in range(1, 65)]
STEPS, ROWS = 8, 4
MODELS = ("llama-3.1-8b", "qwen3-8b", "mistral-7b-v0.3", "smollm2-135m", "gpt-oss-20b")
SETTINGS = (
    "--device-memory 24GiB",
    "--device-memory 80GiB --batch-size 8 --max-length 4096",
    "--device-memory 16GiB --quantize nf4 --batch-size 1 --max-length 512",
    "--device-memory 48GiB --rank 64 --batch-size 2 --max-length 2048",
    "--device-memory 12GiB --quantize nf4 --gradient-checkpointing True",
    "--device-memory 40GiB --no-exact-savers --batch-size 4",
)


def tokenizer() -> Any:
    """A tokenizer with one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[UNK]", "[PAD]", "<s>", "</s>"]
    words.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=special))
    named = dict(zip(("unk_token", "pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=words, **named)


def llama(**options: Any) -> Any:
    """A Llama of two layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "vocab_size": len(tokenizer())}
    return LlamaForCausalLM(LlamaConfig(**sizes, **special, num_key_value_heads=2, max_position_embeddings=128))


def settings(**options: Any) -> dict[str, Any]:
    """Arguments of every Trainer."""
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    return quiet | {
        "max_steps": STEPS, "per_device_train_batch_size": ROWS, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "no", "seed": 0,
    } | options  # fmt: skip


def lora(**options: Any) -> Any:
    """Rank 8 on all linear modules."""
    from peft import LoraConfig

    return LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | options)


def trl(kind: str, folder: Path, **options: Any) -> Any:
    """A Trainer of TRL on the texts."""
    import torch
    import trl as library
    from datasets import Dataset

    rows: list[dict[str, Any]] = [{"text": text} for text in TEXTS]
    further: dict[str, Any] = {"max_length": 48, "gradient_checkpointing": False, "bf16": False}
    more: dict[str, Any] = {}
    if kind == "DPO":
        rows = [{"prompt": "after ", "chosen": x, "rejected": " ".join(x.split()[::-1])} for x in TEXTS]
    if kind == "GRPO":
        rows = [{"prompt": " ".join(text.split()[:-2])} for text in TEXTS[:8]]
        further = {"num_generations": 2, "max_completion_length": 12, "bf16": False}
        more = {"reward_funcs": lambda completions, **_: [-float(len(text)) for text in completions]}
    args = getattr(library, f"{kind}Config")(str(folder), **settings(**further) | options)
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer(), "peft_config": lora()}
    torch.manual_seed(1)
    return getattr(library, f"{kind}Trainer")(llama(), args=args, **data, **more)


def bert() -> Any:
    """A BERT of two layers with LoRA, for three classes."""
    import torch
    from peft import get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=len(tokenizer()), num_labels=3, pad_token_id=1)
    modules = {"target_modules": ["query", "key", "value", "dense"], "exclude_modules": ["bert.pooler.dense"]}
    return get_peft_model(BertForSequenceClassification(config), lora(**modules, modules_to_save=["classifier"]))


def rows() -> list[dict[str, Any]]:
    """The texts as tokens with classes."""
    encoded = tokenizer()(TEXTS, truncation=True, max_length=48, return_token_type_ids=False)
    return [{key: encoded[key][i] for key in encoded} | {"labels": i % 3} for i in range(len(TEXTS))]


def classification(folder: Path, **options: Any) -> Any:
    """A Trainer of transformers that sorts the texts."""
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    args = TrainingArguments(str(folder), **settings(**options))
    collator = DataCollatorWithPadding(tokenizer())
    return Trainer(bert(), args, train_dataset=Dataset.from_list(rows()), data_collator=collator)


def checksum(model: Any) -> str:
    """Eight digits of what the adapter holds."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        if "lora_" in name or "modules_to_save" in name:
            digest.update(name.encode() + tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def told(pilot: Any, model: Any, losses: list[float]) -> dict[str, Any]:
    """What is kept of a run."""
    ranks = {name: tensor.shape[0] for name, tensor in model.named_parameters() if "lora_A" in name}
    return {
        "losses": losses, "limit": float(pilot.limit), "peaks": [int(peak) for _, peak in pilot.peaks],
        "ranks": hashlib.sha256(json.dumps(ranks).encode()).hexdigest()[:8], "adapter": checksum(model),
    }  # fmt: skip


def trained(make: Callable[..., Any], folder: Path, resumed: bool = False, **options: Any) -> dict[str, Any]:
    """A run of a Trainer, whole or killed in the middle and resumed."""
    import rankpilot

    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": STEPS // 2} if resumed else {}
    trainer = make(folder, **saved)
    pilot = rankpilot.attach(trainer, **options)
    trainer.train()
    if resumed:
        trainer = make(folder, **saved)
        pilot = rankpilot.attach(trainer, **options)
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}"))
    return told(pilot, trainer.model, [row["loss"] for row in trainer.state.log_history if "loss" in row])


def loop(folder: Path, **options: Any) -> dict[str, Any]:
    """A loop in plain PyTorch."""
    import torch
    from rankpilot import RankPilot, TrainingRun
    from transformers import DataCollatorWithPadding

    model = bert().train()
    data: Any = rows()
    loader: Any = torch.utils.data.DataLoader(data, ROWS, collate_fn=DataCollatorWithPadding(tokenizer()))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    run = TrainingRun.of_loader(model, optimizer, loader, total_steps=STEPS, in_parts=True)
    pilot = RankPilot(**options)
    pilot.begin(run)
    losses = []
    for batch in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), STEPS):
        pilot.before_step(batch)
        loss = torch.zeros(())
        for part, share in pilot.parts(batch):
            (of_part := share * model(**part).loss).backward()
            loss += of_part.detach()
        pilot.before_optimizer_step(loss)
        optimizer.step()
        optimizer.zero_grad()
        pilot.after_step()
        losses.append(float(loss))
    pilot.finish()
    return told(pilot, model, losses)


KINDS: dict[str, Callable[..., Any]] = {
    "sft": partial(trl, "SFT"), "dpo": partial(trl, "DPO"), "grpo": partial(trl, "GRPO"), "classes": classification
}  # fmt: skip
RUNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    f"{name} {budget}": partial(trained, make, budget=budget)
    for name, make in KINDS.items()
    for budget in ("400%", "60%")
}
RUNS |= {f"loop {budget}": partial(loop, budget=budget) for budget in ("400%", "60%")}
RUNS |= {f"resumed {name}": partial(trained, KINDS[name], resumed=True, budget="60%") for name in ("sft", "classes")}
RUNS |= {
    "sft signal-mean 1k params": partial(trained, KINDS["sft"], policy="signal-mean", budget="1k params"),
    "sft auto rate": partial(trained, KINDS["sft"], budget="70%", learning_rate="auto"),
    "sft goal bytes": partial(trained, KINDS["sft"], budget="100%", goal="bytes"),
    "classes checkpointed": partial(trained, KINDS["classes"], budget="100%", gradient_checkpointing=True),
}


def asked(model: str, options: str) -> dict[str, Any]:
    """What `rankpilot memory` says."""
    command = [sys.executable, "-m", "rankpilot", "memory", model, *options.split(), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip()
    try:
        return {"status": done.returncode, "answer": json.loads(lines)}
    except ValueError:
        return {"status": done.returncode, "answer": (lines + done.stderr)[-400:]}


def compared(now: Any, then: Any, place: str) -> list[str]:
    """Where two stored answers differ, in words."""
    if isinstance(now, dict) and isinstance(then, dict):
        rows = [compared(now.get(key), then.get(key), f"{place}/{key}") for key in sorted({*now, *then})]
        return list(itertools.chain.from_iterable(rows))
    return [] if now == then else [f"{place}: {str(then)[:150]} -> {str(now)[:150]}"]


def main() -> int:
    """Run all, store it, compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--compare", type=Path, metavar="BEFORE")
    parser.add_argument("--only", default="", help="runs and questions whose name holds this")
    given = parser.parse_args()
    found = json.loads(given.output.read_text()) if given.output.exists() else {}
    for name, run in RUNS.items():
        if given.only in name and name not in found:
            folder = Path(tempfile.mkdtemp())
            found[name] = run(folder)
            shutil.rmtree(folder)
            given.output.write_text(json.dumps(found, indent=1))
            print(name, found[name]["losses"][-1], found[name]["limit"], found[name]["adapter"], flush=True)  # noqa: T201
    for model, options in itertools.product(MODELS, SETTINGS):
        name = f"{model} {options}"
        if given.only in name and name not in found:
            found[name] = asked(model, options)
            given.output.write_text(json.dumps(found, indent=1))
            print(name, found[name]["status"], flush=True)  # noqa: T201
    different = compared(found, json.loads(given.compare.read_text()), "") if given.compare else []
    print(*different, sep="\n")  # noqa: T201
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
