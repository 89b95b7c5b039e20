"""The texts of Python and of packages that benchmarks train on, and fine-tunes of small byte models on them."""

from __future__ import annotations

import math
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from rankpilot.data.corpora import docstrings, load_corpus, scattered, standard_library
from rankpilot.data.task import KINDS
from rankpilot.env.bases import load_base_model
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.lora.peft_config import fresh_adapters
from rankpilot.lora.spec import REFERENCE_RANK
from torch.utils.data import DataLoader

LENGTH = 48
"""Bytes of a row."""

ROWS, HELD_OUT = 4000, 384
"""Distinct rows that runs train on, and those on which their loss is told."""

WARMUP = 0.1
"""Share of the steps in which the learning rate rises along a line; from then on it falls along one, to 0."""

Row = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TextTask:
    """One fine-tune of a causal language model that reads bytes.

    Attributes:
        model: a proxy base.
        text: a name of `CORPORA`.
        steps: optimizer steps.
        rows: rows of a batch, each of `LENGTH` bytes.
    """

    model: str
    text: str
    steps: int
    rows: int


@lru_cache(maxsize=2)
def load_rows(text: str) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and those held out; the same on each machine (code: with each version of Python).

    Raises:
        UnknownNameError: no such corpus.
        AssetError: a package is neither cached nor downloadable.
    """
    return tuple(map(_windows, load_corpus(text), (ROWS, HELD_OUT)))  # type: ignore[return-value]


def _windows(data: NDArray[np.uint8], count: int) -> list[Row]:
    """Windows of bytes, evenly spread over a text."""
    starts = np.linspace(0, len(data) - LENGTH, count).astype(np.int64)
    rows = torch.from_numpy(data[starts[:, None] + np.arange(LENGTH)].astype(np.int64))
    return [{"input_ids": row, "labels": row} for row in rows]


def instructions() -> list[str]:
    """Questions what a function of the running Python does, each with the start of its docstring."""
    root, answers = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in standard_library():
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for name, text in docstrings(path.read_text(encoding="utf-8", errors="ignore")):
            if name:
                answers[f"What does {module}.{name} do in Python?"] = text.split("\n\n")[0]
    rows = [f"{question}\n{' '.join(answers[question].split())}" for question in scattered(answers)]
    return rows[: len(rows) * 9 // 10]


def adapted_model(task: TextTask, seed: int) -> PeftModel:
    """The task's model in fp32 and training mode, with fresh LoRA adapters of rank 8 on all linear modules.

    Args:
        task: decides the model.
        seed: of the adapters.
    """
    plan: dict[str, Any] = {"target_modules": "all-linear", "r": REFERENCE_RANK, "lora_alpha": 2 * REFERENCE_RANK}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = load_base_model(task.model)
        return fresh_adapters(base, task.model, KINDS["causal-lm"].peft_type, new_head=False, **plan).train()


def new_loader(task: TextTask, seed: int) -> DataLoader[Any]:
    """The batches of a run, the same for each method: whole passes over the rows, each in an order of its own."""
    generator, wanted = np.random.default_rng([seed, 7]), task.steps * task.rows
    passes = [generator.permutation(ROWS) for _ in range(math.ceil(wanted / ROWS))]
    return DataLoader(load_rows(task.text)[0], task.rows, sampler=np.concatenate(passes)[:wanted].tolist())  # type: ignore[arg-type]


def factor_at(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, as a share of its peak."""
    warm = max(1, round(WARMUP * steps))
    return min((step + 1) / warm, (steps - step) / max(steps - warm, 1), 1.0)


def training_run(task: TextTask, model: PeftModel, rate: float, seed: int) -> TrainingRun:
    """A run that is about to begin, as a plain loop gives it to rankpilot."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    return TrainingRun.of_loader(model, optimizer, new_loader(task, seed), total_steps=task.steps)


@torch.no_grad()
def held_out_loss(model: PeftModel, task: TextTask) -> float:
    """Mean loss of a byte of the held-out rows."""
    model.eval()
    loader: DataLoader[Any] = DataLoader(load_rows(task.text)[1], 2 * task.rows)  # type: ignore[arg-type]
    losses = [float(model(**batch).loss) for batch in loader]
    model.train()
    return sum(losses) / len(losses)
