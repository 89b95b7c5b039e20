"""Probe of a run's modules for a policy that reads signals; for any other, a few rows are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from ..common.errors import DataError, NonFiniteError
from ..common.text import plural
from ..cost.batch_shape import shape_of
from ..data.batches import count_predictions, predicted_share
from ..decide.applier import ProbeResult, probe
from ..decide.settings import DecisionSchedule
from ..lora.adapters import SIGNALS
from ..lora.peft_config import reference_scaling
from ..lora.resize import reset_adapters
from ..lora.targets import TargetModule, other_trainable
from .step.run import FIRST_ROWS, FirstRows, TrainingRun

Item = TypeVar("Item")
Progress = Callable[[Iterable[Item], str, int], Iterable[Item]]
"""Shows the progress of an iterable: the iterable, its label, its length."""

PROBE_SHARE = 0.0175
"""Maximum number of examples of the probe, as a share of those of the run. An example costs up to 1.6 times as much in
the probe as under a plan, because all modules have adapters and batches are small. With the steps that measure the cost
of plans (1 to 2 % of 100 steps of 16 rows) about 5 % of such a run precede its first step."""

LEAST_PROBE_STEPS = 8
"""Minimum number of steps of the probe in short runs, up to those of the schedule."""


def probe_steps(run: TrainingRun, schedule: DecisionSchedule) -> int:
    """Return the steps of the probe before a run: those of the schedule, or fewer before a short run."""
    examples = run.total_steps * run.accumulation * run.rows
    affordable = int(PROBE_SHARE * examples / schedule.probe_batch)
    return min(schedule.probe_steps, max(affordable, LEAST_PROBE_STEPS))


def first_signals(
    run: TrainingRun,
    targets: Sequence[TargetModule],
    schedule: DecisionSchedule,
    seed: int,
    first_rows: FirstRows | None,
    *,
    keeps: bool,
    progress: Progress[Any] | None,
) -> ProbeResult:
    """Probe the modules, unless rows were read instead; then reset adapters that are not kept.

    Args:
        run: the run.
        targets: the target modules of its model.
        schedule: see `run_probe`.
        seed: seed of the choice of rows, and of fresh adapters, which have rank 1.
        first_rows: the result of `TrainingRun.read_first_rows`, for a policy without signals.
        keeps: True to keep the adapters.
        progress: shows the progress of the probe.
    """
    if not keeps:
        reset_adapters(targets, 1, seed)
    with nullcontext() if keeps else reference_scaling(targets):
        if first_rows is None:
            result = run.measured(lambda: run_probe(run, targets, schedule, seed, progress=progress))
        else:
            result = unprobed(first_rows, len(targets))
    if not keeps:
        reset_adapters(targets, 1, seed)
    return result


def run_probe(
    run: TrainingRun,
    targets: Sequence[TargetModule],
    schedule: DecisionSchedule,
    seed: int,
    *,
    progress: Progress[Any] | None = None,
) -> ProbeResult:
    """Run the probe on the data of the run, with a new optimizer. All weights are restored afterwards.

    Args:
        run: the run.
        targets: the target modules of its model, with the adapters to probe.
        schedule: the maximum number of steps of the probe, and their rows; see `probe_steps`.
        seed: seed of the choice of rows.
        progress: shows the progress of the probe.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
        DataError: the labels of all rows read are masked, or rows have one token and no loss.
    """
    pairs = [w for target in targets if target.rank > 0 for w in (target.weight_a, target.weight_b)]
    parameters = [*other_trainable(run.model, targets), *pairs]
    optimizer = torch.optim.AdamW(parameters, lr=run.learning_rate, weight_decay=0.0)
    steps = probe_steps(run, schedule)
    batches: Iterable[Any] = run.small_batches(steps, schedule.probe_batch, seed)
    if progress:
        batches = progress(batches, "probing modules", steps)
    counts, length = [], 0

    def losses() -> Iterator[Callable[[], torch.Tensor]]:
        nonlocal length
        for batch in batches:
            counted, length = count_predictions(batch), shape_of(batch).length
            if counted[0] > 0:  # the loss of fully masked rows is 0 / 0
                counts.append(counted)
                yield partial(run.loss, batch)
        if not counts:
            raise _all_masked(steps * schedule.probe_batch)

    with _restored(parameters):
        try:
            result = probe(targets, optimizer, losses())
        except NonFiniteError as error:
            if length > 1:
                raise
            raise _too_short(length) from error
    return replace(result, predicted=predicted_share(counts))


def unprobed(first_rows: FirstRows, modules: int) -> ProbeResult:
    """Return facts from some rows without a training step: the loss, and its share of counted tokens; no signals.

    Args:
        first_rows: the result of `TrainingRun.read_first_rows`.
        modules: number of modules in the run.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
        DataError: see `run_probe`.
    """
    loss, all_counts = first_rows
    counts = [counted for counted in all_counts if counted[0] > 0]
    if not counts:
        raise _all_masked(FIRST_ROWS)
    if not math.isfinite(loss):
        if max(tokens for _, tokens in counts) <= 2:  # two rows a batch
            raise _too_short(1)
        raise NonFiniteError(f"The loss before training is {loss}. Check the data and the model.")
    return ProbeResult(np.zeros((modules, len(SIGNALS))), loss, predicted=predicted_share(counts))


def _all_masked(rows: int) -> DataError:
    return DataError(
        f"All labels of the {rows} rows tried are masked (-100), so there is no loss. Check what masks "
        "them: a response template that is not found, or truncated texts."
    )


def _too_short(length: int) -> DataError:
    return DataError(
        f"The loss of rows of {plural(length, 'token')} is not finite: a language model needs at least "
        "two tokens, one to read and one to predict. Remove such rows, or raise the length at which "
        "texts are truncated."
    )


@contextmanager
def _restored(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Restore the values of these parameters afterwards, without gradients."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None
