"""What the callback does with a Trainer's own data before the first step: largest batch, byte model, probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainingArguments

from ..env.controller import ProbeResult, budget_limit, probe
from ..env.schedule import DecisionSchedule
from ..errors import DataError
from ..lora.budget import Budget
from ..lora.calibration import calibrate
from ..lora.cost import Cost, ParameterCost
from ..lora.held_state import signal_buffer_bytes
from ..lora.memory import MemoryModel
from ..lora.ranks import reset_adapters
from ..lora.recording import Batch
from ..lora.shape import MASK, padded
from ..lora.targets import TargetModule, other_trainable

LOOP_BYTES = 1024
"""Room for the few scalars that a training loop adds to the graph, such as a loss divided by a token count."""

Collate = Callable[[list[Any]], Any]


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


def _rows(dataset: Any, indices: Sequence[int]) -> list[Any]:
    return [dataset[int(index)] for index in indices]


def largest_batch(dataset: Any, collate: Collate, rows: int, device: torch.device) -> Batch:
    """A batch of the longest examples, so that no later batch is larger, with padding where there may be any.

    Args:
        dataset: map-style or iterable; the length of `input_ids` decides, the first rows where there is none.
        collate: the data loader's.
        rows: batch size.
        device: of the model.

    Raises:
        DataError: the data set is empty, or the collator returns no tensors by name.
    """
    names = getattr(dataset, "column_names", None) or ()
    lengths: list[int] = []
    if not hasattr(dataset, "__len__"):
        chosen = list(islice(iter(dataset), rows))
    else:
        lengths = [len(ids) for ids in dataset["input_ids"]] if "input_ids" in names else []
        order = np.argsort(-np.asarray(lengths), kind="stable") if lengths else np.arange(len(dataset))
        chosen = _rows(dataset, order[:rows].tolist())
    if not chosen:
        raise DataError("The training set is empty. Check its path, split and filters.")
    chosen = [chosen[index % len(chosen)] for index in range(rows)]
    batch = to_batch(collate(chosen), device)
    # The longest rows may need no padding where others do; rows of one length without a mask need none.
    never = len(set(lengths)) == 1 and MASK not in names
    return batch if never else padded(batch)


def to_batch(collated: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a collated batch, on the device.

    Raises:
        DataError: there are none.
    """
    items = collated.items() if hasattr(collated, "items") else ()
    batch = {name: value.to(device) for name, value in items if isinstance(value, torch.Tensor)}
    if not batch:
        raise DataError(f"The data collator returned {type(collated).__name__} without tensors by name.")
    return batch


@dataclass(frozen=True, eq=False)
class Prices:
    """What plans may cost.

    Attributes:
        cost: price of a plan.
        limit: the budget, in the unit of `cost`.
        memory: predicts other batch shapes; None under a budget of parameters.
    """

    cost: Cost
    limit: float
    memory: MemoryModel | None


def measure_memory(
    targets: Sequence[TargetModule],
    model: nn.Module,
    batch: Batch,
    optimizer: Any,
    *,
    signals: bool,
    accumulates: bool,
) -> MemoryModel:
    """`calibrate` for a training loop, with room for the scalars that it adds."""
    memory = calibrate(model, targets, batch, optimizer, signal_bytes=signals, accumulates=accumulates)
    return replace(memory, held=replace(memory.held, others=memory.held.others + LOOP_BYTES))


def price_plans(
    budget: Budget,
    targets: Sequence[TargetModule],
    model: nn.Module,
    batch: Batch,
    optimizer: Any,
    *,
    signals: bool = True,
    accumulates: bool = False,
) -> Prices:
    """The price of plans on this model and batch, and the limit in the same unit.

    A share is a share of what *plain* LoRA of uniform rank 8 takes, without our signal buffers.

    Args:
        budget: the limit.
        targets: target modules of the model.
        model: the PEFT model, on its device.
        batch: as large as the largest that training will see.
        optimizer: decides the bytes of state.
        signals: whether plans pay for signal buffers.
        accumulates: whether gradients are kept over several micro-batches.
    """
    budget = budget.on(targets[0].weight_a.device)
    max_ranks = np.array([target.max_rank for target in targets], dtype=np.int64)
    if budget.kind == "parameters":
        counted = ParameterCost.of(targets)
        return Prices(counted, budget_limit(budget, counted, max_ranks), None)
    memory = measure_memory(targets, model, batch, optimizer, signals=False, accumulates=accumulates)
    cost = memory.cost()
    limit = budget_limit(budget, cost, max_ranks)
    if signals:
        memory = replace(memory, held=replace(memory.held, signals=signal_buffer_bytes(targets)))
        cost = memory.cost()
    return Prices(cost, limit, memory)


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
