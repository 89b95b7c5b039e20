"""Where the bytes of a LoRA training step go on a user's model, and what each choice would save."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...allocation.placements import top_down, top_layers
from ...allocation.plan import check_budget, uniform_ranks
from ...allocation.problem import AllocationProblem
from ...common.arrays import IntArray
from ...data.task import Task
from ...errors import UnsupportedError
from ...memory.batch_shape import BatchShape, reshaped
from ...memory.breakdown import Breakdown, break_down, frozen_bytes
from ...memory.budget import Budget, Limit, reference_cost
from ...memory.calibration import beside_model, highest_ranks, limited_cost
from ...memory.cost import Cost, plan_cost
from ...memory.model import MemoryModel
from ...memory.recording import Batch
from .config import MemoryConfig
from .measured_step import MeasuredStep, measure_step
from .setup import StepSetup, Tell, set_up

AlternativeKind = Literal["asked", "rank", "layers", "batch", "checkpointing", "budget"]

RANKS = (1, 4, 8, 16, 32)
"""Ranks on all modules that are shown beside the one that was asked for."""


@dataclass(frozen=True, eq=False)
class Alternative:
    """Another choice.

    Attributes:
        kind: what is changed.
        label: the choice, for people.
        breakdown: the peak of a training step under it.
        ranks: the plan, (modules,).
        fits: whether it keeps to the budget; None without a budget.
    """

    kind: AlternativeKind
    label: str
    breakdown: Breakdown
    ranks: IntArray
    fits: bool | None = None

    @property
    def peak_bytes(self) -> float:
        """Bytes at the peak of a training step."""
        return self.breakdown.total


@dataclass(frozen=True, eq=False)
class MemoryUse:
    """Where the bytes of a training step go.

    Attributes:
        config: what was asked for.
        task: the task of the model's head.
        device: "cpu" or "cuda".
        shape: the shape of the batch.
        modules: the names of the target modules.
        frozen_bytes: the bytes of the loaded model, which no budget counts.
        reference_bytes: the peak with rank 8 on all target modules, of which budgets are shares.
        alternatives: the plan that was asked for, then others.
        notes: what could not be shown, and why.
        limit_bytes: the budget; None without a budget, or if it counts parameters.
        measured: a real step, if it was asked for.
    """

    config: MemoryConfig
    task: Task
    device: str
    shape: BatchShape
    modules: tuple[str, ...]
    frozen_bytes: int
    reference_bytes: float
    alternatives: tuple[Alternative, ...]
    notes: tuple[str, ...]
    limit_bytes: float | None
    measured: MeasuredStep | None

    @property
    def breakdown(self) -> Breakdown:
        """The peak of what was asked for."""
        return self.alternatives[0].breakdown


def memory_use(config: MemoryConfig, tell: Tell) -> MemoryUse:
    """Predict where the bytes of a training step go, and what other choices would take.

    `tell` is called with a few words on what happens next.

    Raises:
        RankPilotError: see `set_up`; also if checkpointing is asked for and the model does not support it.
        BudgetError: no plan fits the budget.
    """
    setup = set_up(config, tell)
    notes: list[str] = []
    memory = _calibrated(setup, tell, "with gradient checkpointing" if config.checkpointing else "")
    plans = _Plans(setup, memory)
    rules = tuple(plans.rules())  # first, since it may raise that no plan fits
    if config.measure:
        tell("measuring real steps")
    measured = measure_step(setup) if config.measure else None
    batches = tuple(plans.by_batch(tell))
    switched = None  # the other choice of checkpointing
    try:
        setup.switch_checkpointing()
        switched = _calibrated(setup, tell, f"{'without' if config.checkpointing else 'with'} gradient checkpointing")
    except UnsupportedError as error:
        notes.append(f"Without a figure for gradient checkpointing: {error}")
    return MemoryUse(
        config=config,
        task=setup.task,
        device=setup.run.device.type,
        shape=memory.shape,
        modules=tuple(target.name for target in setup.targets),
        frozen_bytes=frozen_bytes(setup.model),
        reference_bytes=plans.reference_bytes,
        alternatives=(*plans.by_rank(), *plans.by_layers(), *batches, *plans.switched(switched), *rules),
        notes=tuple(notes),
        limit_bytes=plans.limit_bytes,
        measured=measured,
    )


def _calibrated(setup: StepSetup, tell: Tell, how: str, batch: Batch | None = None) -> MemoryModel:
    tell(f"calibrating on a few small steps {how}".rstrip())
    return setup.measure_memory(batch)


class _Plans:
    """Predicts the bytes of the choices that a user has."""

    def __init__(self, setup: StepSetup, memory: MemoryModel) -> None:
        self._setup, self._config, self._targets, self._memory = setup, setup.config, setup.targets, memory
        self._max_ranks = highest_ranks(setup.targets)
        self._asked = np.minimum(setup.config.rank, self._max_ranks)
        cost: Cost = memory.cost()
        self.reference_bytes = reference_cost(cost, self._max_ranks)
        self._budget = Budget.parse(setup.config.budget) if setup.config.budget else None
        self._limit: Limit | None = None
        if self._budget:
            cost, self._limit = limited_cost(beside_model(self._budget, setup.model), setup.targets, memory)
        self._problem = AllocationProblem.of(setup.targets, cost, self._limit.value if self._limit else math.inf)

    @property
    def limit_bytes(self) -> float | None:
        """The budget; None without a budget, or if it counts parameters."""
        return self._limit.value if self._limit and self._limit.unit == "bytes" else None

    def by_rank(self) -> Iterator[Alternative]:
        """The rank that was asked for, and other ranks on all modules."""
        yield self._alternative("asked", f"rank {self._config.rank} on all modules, as asked", self._asked)
        for rank in RANKS:
            if rank != self._config.rank:
                yield self._alternative("rank", f"rank {rank} on all modules", np.minimum(rank, self._max_ranks))

    def by_layers(self) -> Iterator[Alternative]:
        """The rank that was asked for on the top half and on the top third of the layers."""
        layers = len(np.unique(self._problem.blocks))
        for name, parts in (("half", 2), ("third", 3)):
            count = round(layers / parts)
            if 0 < count < layers:
                ranks = np.where(top_layers(self._problem, count, 1) > 0, self._asked, 0)
                label = f"rank {self._config.rank} on the top {name} ({count} of {layers} layers)"
                yield self._alternative("layers", label, ranks)

    def by_batch(self, tell: Tell) -> Iterator[Alternative]:
        """Half the rows, and half the tokens. Where the operations depend on the data, the step is calibrated anew."""
        shape = self._memory.shape
        fewer = BatchShape(max(1, shape.rows // 2), shape.length)
        shorter = BatchShape(shape.rows, -(-shape.length // 2))
        for name, half in (("half the batch", fewer), ("half the length", shorter)):
            if half == shape:
                continue
            try:
                yield self._alternative("batch", f"{name} ({half})", self._asked, shape=half)
            except UnsupportedError:
                memory = _calibrated(self._setup, tell, f"of {name}", reshaped(self._setup.batch, half))
                yield self._alternative("batch", f"{name} ({half})", self._asked, memory)

    def switched(self, memory: MemoryModel | None) -> Iterator[Alternative]:
        """Gradient checkpointing on, or off if it was asked for."""
        if memory is not None:
            word = "without" if self._config.checkpointing else "with"
            yield self._alternative("checkpointing", f"{word} gradient checkpointing", self._asked, memory)

    def rules(self) -> Iterator[Alternative]:
        """The plans of the placement rules inside the budget; BudgetError if no plan fits."""
        if self._budget is None:
            return
        check_budget(self._problem, [target.name for target in self._targets], self._budget.share)
        for name, rule in (("uniform", uniform_ranks), ("top-down", top_down)):
            yield self._alternative("budget", f"{name} inside {self._config.budget}", rule(self._problem))

    def _alternative(
        self,
        kind: AlternativeKind,
        label: str,
        ranks: IntArray,
        memory: MemoryModel | None = None,
        shape: BatchShape | None = None,
    ) -> Alternative:
        breakdown = break_down(memory or self._memory, self._targets, ranks, shape)
        fits = None
        if self._limit:
            in_bytes = self._limit.unit == "bytes"
            fits = (breakdown.total if in_bytes else plan_cost(self._problem.cost, ranks)) <= self._limit.value
        return Alternative(kind, label, breakdown, ranks, fits)
