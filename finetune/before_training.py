"""What the callback does with a Trainer's own data before the first step: largest batch, byte model, probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainingArguments

from ..allocation.probe import ProbeResult, probe
from ..allocation.schedule import DecisionSchedule
from ..data.batches import Collate, _rows, to_batch
from ..errors import DataError
from ..lora.resize import reset_adapters
from ..lora.targets import TargetModule, other_trainable


def precision(args: TrainingArguments) -> AbstractContextManager[Any]:
    """The autocast context in which the Trainer runs its forward passes."""
    if args.bf16 or args.fp16:
        return torch.autocast(args.device.type, torch.bfloat16 if args.bf16 else torch.float16)
    return nullcontext()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put torch's random state back afterwards, so that the run's own draws are as if nothing had happened.

    A compiled model runs uncompiled meanwhile: each plan tried here would take one of the few graphs that torch keeps.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        yield


def run_probe(
    model: nn.Module,
    targets: Sequence[TargetModule],
    dataset: Any,
    collate: Collate,
    args: TrainingArguments,
    schedule: DecisionSchedule,
    seed: int,
) -> ProbeResult:
    """The probe on the run's own data, with its own optimiser; weights outside the adapter are put back.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
        DataError: the model returns no loss.
    """
    others = other_trainable(model, targets)
    before = [parameter.detach().clone() for parameter in others]
    parameters = [*others, *(w for target in targets for w in (target.weight_a, target.weight_b))]
    reset_adapters(targets, 1, seed)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    batches = _probe_batches(dataset, collate, schedule, seed)

    def loss_of(rows: list[Any]) -> torch.Tensor:
        with precision(args):
            loss = model(**to_batch(collate(rows), args.device)).loss
        if loss is None:
            raise DataError("The model returned no loss: the training set needs labels.")
        return loss.mean()  # type: ignore[no-any-return]

    try:
        return probe(targets, optimizer, (partial(loss_of, rows) for rows in batches), seed=seed)
    finally:
        with torch.no_grad():
            for parameter, value in zip(others, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None


def _probe_batches(dataset: Any, collate: Collate, schedule: DecisionSchedule, seed: int) -> Iterator[list[Any]]:
    steps, rows = schedule.probe_steps, schedule.probe_batch
    if hasattr(dataset, "__len__"):
        order = np.random.default_rng(seed).permutation(len(dataset))
        picked = np.resize(order, (steps, rows))
        return (_rows(dataset, indices.tolist()) for indices in picked)
    examples = list(islice(iter(dataset), steps * rows))
    return (examples[i % len(examples) :][:rows] for i in range(0, steps * rows, rows))
