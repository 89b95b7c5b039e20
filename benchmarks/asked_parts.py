"""What tests of real batches take, of runs in parts whose loss is not known; a part of `python -m benchmarks parts`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from peft import LoraConfig, get_peft_model
from rankpilot.common.arrays import IntArray
from rankpilot.data.models import load_model, load_tokenizer
from rankpilot.decide.rules import AsConfigured
from rankpilot.finetune.callback import attach
from rankpilot.finetune.step.watched_parts import Watch
from rich.console import Console
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from .harness import Figures

MODEL, ROWS = "all-minilm-l6-v2", 16


class _OwnLoss(Trainer):  # type: ignore[misc]
    """A Trainer whose loss nobody knows."""

    def compute_loss(self, *inputs: Any, **options: Any) -> Any:
        return super().compute_loss(*inputs, **options)


def asked_steps(steps: int, rows: Sequence[IntArray], console: Console) -> Figures:
    """Runs of MiniLM on rows of token ids, whole and in parts that a user asks for: CPU seconds, and those of tests."""
    texts = [{"input_ids": ids, "labels": int(ids[1] % 2)} for ids in rows]
    tests = list[float]()
    real = Watch.reason

    def timed(watch: Watch, *given: Any) -> str:
        begun = time.process_time()
        found = real(watch, *given)
        tests.append(time.process_time() - begun)
        return found

    train = partial(_seconds, steps, texts)
    whole = train(Trainer, parts="off")
    with patch.object(Watch, "reason", timed):
        asked = train(_OwnLoss, parts="on")
    own = sum(tests)
    console.print(
        f"{steps} steps of MiniLM under a loss that is not known: {asked / whole:.3f} of the time of whole steps, of "
        f"which tests of batches take {own / whole:.3f}."
    )
    return {"asked.steps": steps, "asked.share": asked / whole, "asked.tests": own / whole}


def _seconds(steps: int, texts: list[Any], kind: Callable[..., Trainer], *, parts: Any) -> float:
    """CPU seconds of a run, from its first step on."""
    tokenizer = load_tokenizer(MODEL)
    base = load_model(MODEL, "classification", ("no", "yes"), tokenizer)
    targets = ["query", "key", "value", "dense"]
    model = get_peft_model(base, LoraConfig(r=8, target_modules=targets, modules_to_save=["classifier"]))
    own: dict[str, Any] = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    with TemporaryDirectory() as folder:
        args = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=ROWS, seed=0, **own)
        trainer = kind(model, args, DataCollatorWithPadding(tokenizer), texts)
        attach(trainer, AsConfigured(), budget="100%", parts=parts, keep_rate=True)
        begun = time.process_time()
        trainer.train()
        return time.process_time() - begun
