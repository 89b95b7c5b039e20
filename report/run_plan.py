"""The first plan of a run under rankpilot, from a step recorded from a model's configuration.

A run that keeps its LoRA resolves its budget against the step as configured. Then it takes what loses nothing, in this
order: exact savers, parts of a batch, a streamed base, selective checkpointing, as few checkpointed layers as fit. Only
then do ranks shrink. The order and the arithmetic are those of `finetune/piloted_run.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from ..common.arrays import IntArray
from ..common.errors import BudgetError
from ..common.text import format_bytes, plural
from ..cost.budget import Budget, Limit
from ..cost.cards import MOST_WORKSPACE_BYTES
from ..cost.cost import ParameterCost, UntimedCost, plan_cost
from ..cost.forecast.card_use import CardUse
from ..cost.forecast.outlook import Outlook
from ..cost.forecast.what_else import with_streamed
from ..cost.model import MemoryModel, checkpointed_cost, fewest_checkpointed
from ..cost.recording import BatchShape
from ..cost.savers.prices import TILES, Priced, free_savers, price_savers, price_within
from ..cost.streaming import BUS_SHARE, kept_layers
from ..decide.plan.plan import STAY_ROOM, check_budget, least_cost, outcome_text, project
from ..decide.plan.problem import AllocationProblem, floor_of_experts, rank_bounds
from ..finetune.options import OptionsInFile
from ..lora.spec import on_ladder


@dataclass(frozen=True, eq=False)
class RunPlan:
    """The first plan of a run.

    Attributes:
        asked: the options of the run.
        budget: its budget.
        names: names of the target modules.
        passed: ranks of the LoRA as configured, int64 (modules,).
        limit: limit of a step's bytes or of the adapter's parameters; None if the budget does not hold the model.
        ranks: ranks of the plan, int64 (modules,); None if a policy chooses them when the run begins, or none fit.
        savers: names of its exact savers.
        checkpointed: number of checkpointed layers.
        layers: number of layers that could be.
        in_parts: whether batches run in parts; a step is then priced with one row.
        streamed: number of layers whose frozen weights stream from main memory.
        step_bytes: predicted peak of a step, excluding the frozen model; None without ranks.
        use: the card's memory use; None without ranks, or without a card.
        problem: why no plan fits; empty if one does.
    """

    asked: OptionsInFile
    budget: Budget
    names: tuple[str, ...]
    passed: IntArray
    limit: Limit | None = None
    ranks: IntArray | None = None
    savers: tuple[str, ...] = ()
    checkpointed: int = 0
    layers: int = 0
    in_parts: bool = False
    streamed: int = 0
    step_bytes: float | None = None
    use: CardUse | None = None
    problem: str = ""

    @property
    def fits(self) -> bool:
        """True if the plan fits the budget and the card, as far as they are known."""
        return not self.problem and (self.use is None or self.use.verdict != "does not fit")

    @property
    def keeps_ranks(self) -> bool | None:
        """True if the LoRA stays as configured; None if that is not known."""
        return None if self.ranks is None else bool(np.array_equal(self.ranks, self.passed))

    def text(self) -> str:
        """Describe the plan in a few sentences."""
        return f"Under rankpilot: {' '.join(self._sentences())}"

    def _sentences(self) -> Iterator[str]:
        if self.limit:
            yield self.budget.told(self.limit)
        if self.problem:
            yield self.problem
        if self.ranks is None:
            if not self.problem:
                yield "The ranks are chosen when the run begins, so its plan is not known yet."
            return
        yield outcome_text(self.passed, self.ranks)
        told = [", ".join(self.savers)] if self.savers else []
        told += ["batches in parts"] if self.in_parts else []
        told += [f"{self.checkpointed} of {plural(self.layers, 'layer')} checkpointed"] if self.layers else []
        told += [f"{plural(self.streamed, 'layer')} streamed from main memory"] if self.streamed else []
        assert self.step_bytes is not None, "there is a plan"
        how = f" ({'; '.join(told)})" if told else ""
        yield f"A step takes at most {format_bytes(self.step_bytes, up=True)} on top of the frozen model{how}."
        if self.use:
            spare = self.use.spare_bytes
            left = f"{format_bytes(spare)} to spare" if spare >= 0 else f"{format_bytes(-spare, up=True)} too much"
            yield f"On this card: {self.use.verdict}, with {left}."

    def figures(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        whole = self.limit.whole if self.limit else None
        return {
            "budget": str(self.budget),
            "unit": self.limit.unit if self.limit else None,
            "reference": whole,
            "limit": self.limit.value if self.limit else None,
            "keeps_ranks": self.keeps_ranks,
            "ranks": None if self.ranks is None else dict(zip(self.names, self.ranks.tolist(), strict=True)),
            "savers": list(self.savers),
            "checkpointed": self.checkpointed,
            "layers": self.layers,
            "in_parts": self.in_parts,
            "streamed": self.streamed,
            "step_bytes": self.step_bytes,
            "total_bytes": self.use and self.use.total_bytes,
            "fits": self.fits,
            "problem": self.problem or None,
        }


def plan_of_run(outlook: Outlook, asked: OptionsInFile, *, sums: bool) -> RunPlan:
    """Return the first plan of a run with these options.

    Args:
        outlook: the step as the trainer runs it, without exact savers.
        asked: the options of the run.
        sums: True if the trainer's loss is known to be a sum over rows or tokens, so that batches may run in parts.
    """
    budget, passed = asked.options.budget_read, np.full(len(outlook.step.targets), outlook.rank)
    empty = RunPlan(asked, budget, tuple(target.name for target in outlook.step.targets), passed)
    try:
        priced = _Priced.of(outlook, asked, budget, passed, sums=sums)
        if not asked.keeps_ranks:
            return replace(empty, limit=priced.limit)
        return priced.plan(empty)
    except BudgetError as error:
        return replace(empty, problem=str(error))


@dataclass(frozen=True, eq=False)
class _Priced:
    """The costs of plans of a run, and its limit.

    Attributes:
        outlook: the step, with the layers that stream.
        asked: the options.
        passed: ranks of the LoRA as configured, int64 (modules,).
        limit: the limit.
        memory: byte model of the step with its savers.
        savers: their names.
        alone: shape of the row that plans are priced with; None for the whole batch.
        chooses: True if the plan decides which layers are checkpointed.
    """

    outlook: Outlook
    asked: OptionsInFile
    passed: IntArray
    limit: Limit
    memory: MemoryModel
    savers: tuple[str, ...]
    alone: BatchShape | None
    chooses: bool

    @classmethod
    def of(cls, outlook: Outlook, asked: OptionsInFile, budget: Budget, passed: IntArray, *, sums: bool) -> _Priced:
        """Price a run, with its base streamed if the LoRA does not fit beside all of it."""
        options, card = asked.options, outlook.card
        if isinstance(options.stream, int):
            outlook = with_streamed(outlook, options.stream)
        reference = passed if asked.keeps_ranks else on_ladder(passed, outlook.step.targets)
        priced = partial(cls._priced, asked=asked, budget=budget, passed=reference, sums=sums)
        movable = options.stream == "auto" and budget.kind == "total" and card and not outlook.streamed
        movable = movable and bool(outlook.base.layer_bytes) and outlook.shards.gpus == 1
        try:
            found = priced(outlook)
            if not movable or found.memory.peak(reference, found.alone) <= found.limit.value:
                return found
        except BudgetError:
            if not movable:
                raise
        found = priced(with_streamed(outlook, outlook.base.count))
        kept = found._kept()
        if not kept:
            return found
        back = found.outlook.step.model.frozen_bytes
        other = with_streamed(outlook, outlook.base.count - kept)
        taken = other.step.model.frozen_bytes - back
        return replace(found, outlook=other, limit=replace(found.limit, value=found.limit.value - taken))

    @classmethod
    def _priced(
        cls, outlook: Outlook, asked: OptionsInFile, budget: Budget, passed: IntArray, *, sums: bool
    ) -> _Priced:
        options, step, card = asked.options, outlook.given, outlook.card
        assert step.measure is not None, "the step was recorded"
        checkpoints = True in (outlook.settings.gradient_checkpointing, options.gradient_checkpointing)
        chooses = bool(step.memory.segments) and not checkpoints and options.chooses_layers

        @cache
        def measure(names: tuple[str, ...]) -> MemoryModel:
            assert step.measure is not None, "the step was recorded"
            memory = outlook.shards.of(replace(step, memory=step.measure(names))).memory
            return memory if chooses or checkpoints else memory.with_checkpointed(())

        names = free_savers(step.targets) if options.exact_savers else ()
        if outlook.shards.sharding in ("fsdp2", "zero3"):
            names = tuple(name for name in names if name != TILES)
        plain = measure(())
        if budget.kind == "parameters":
            limit = budget.resolve(ParameterCost.of(step.targets), passed)
            return cls(outlook, asked, passed, limit, measure(names), names, None, False)
        priced = price_savers(measure, names, passed, each=False) if names else Priced(plain, plain, (), ())
        if budget.kind == "total":
            frozen = outlook.step.model.frozen_bytes
            budget = budget.beside(frozen + (card.context_bytes + MOST_WORKSPACE_BYTES if card else 0), cuda=bool(card))
        elif budget.kind == "auto":
            if outlook.room is None:
                raise BudgetError('A budget of "auto" is a share of the free memory of a card: name one with --device.')
            budget = Budget("bytes", budget.value * outlook.room.bytes)
        limit = budget.resolve((plain.with_checkpointed(()) if chooses else plain).cost(), passed)
        parts = options.parts == "auto" and sums
        alone = BatchShape(1, plain.shape.length) if parts else None
        if alone and not (plain.predicts(alone) and priced.memory.predicts(alone)):
            alone = None
        if chooses and names:
            low, high = rank_bounds(step.targets, options.bounds or {})
            least = partial(least_cost, step.targets, low, high)
            priced = price_within(limit.value, priced, measure, passed, least, alone)
        memory = replace(priced.memory, accumulates=True) if alone else priced.memory
        return cls(outlook, asked, passed, limit, memory, priced.names, alone, chooses)

    def plan(self, empty: RunPlan) -> RunPlan:
        """Return the plan that keeps the LoRA if it fits, and else as much of it as does."""
        limit, passed, targets = self.limit.value, self.passed, self.outlook.step.targets
        low, high = rank_bounds(targets, {})
        cost: UntimedCost = self.memory.cost(self.alone)
        if self.limit.unit == "parameters":
            cost = ParameterCost.of(targets)
        elif self.chooses:
            least = partial(least_cost, targets, low, high)
            cost = checkpointed_cost(self.memory, passed, limit, self.alone, passed, least=least)
        possible = AllocationProblem.of(targets, cost, limit, low=low, high=high)
        check_budget(possible, list(empty.names), empty.budget.share)
        ranks = passed
        if plan_cost(cost, passed) > STAY_ROOM * limit:
            low = floor_of_experts(targets, cost, limit, low, high)
            problem = AllocationProblem.of(targets, cost, limit, low=low, high=high, ranks=passed, configured=passed)
            ranks = project(problem, passed, np.zeros(len(passed)), fill=False).ranks
        layers = fewest_checkpointed(self.memory, ranks, limit, self.alone) if self.chooses else None
        memory = self.memory if layers is None else self.memory.with_checkpointed(layers)
        every, again = (
            len({segment.name for segment in each.segments}) for each in (self.outlook.given.memory, memory)
        )
        return replace(
            empty,
            limit=self.limit,
            ranks=ranks,
            savers=self.savers,
            checkpointed=again,
            layers=every,
            in_parts=self.alone is not None,
            streamed=self.outlook.streamed,
            step_bytes=plan_cost(memory.cost(self.alone), ranks),
            use=self.outlook.room.use(memory, ranks, self.alone) if self.outlook.room else None,
        )

    def _kept(self) -> int:
        """Return the number of layers that need not stream, where all do."""
        memory, passed, limit, card = self.memory, self.passed, self.limit.value, self.outlook.card
        assert card is not None, "a base streams to a card"
        none = memory.with_checkpointed(()) if self.chooses else memory
        spare = limit - none.peak(passed, self.alone), limit - memory.peak(passed, self.alone)
        again = len(fewest_checkpointed(memory, passed, limit, self.alone)) if self.chooses else 0
        return kept_layers(
            self.outlook.base, spare, again, self.outlook.plain_seconds, BUS_SHARE * card.bus_bytes_per_s
        )
