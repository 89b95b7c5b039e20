"""The cost of a training step and its alternatives, and the choices within a card or a budget.

All choices derive from one recording with every layer checkpointed. It yields the peak for any ranks, depth, set of
checkpointed layers and batch. If plain LoRA does not fit the card, the recording uses selective checkpointing too, as a
run does (`cost/savers/exact.py`). A model known from its configuration is recorded on the meta device
(`cost/forecast/memory_of.py`), a loaded one on its own device (`report/here.py`). `cost/forecast/card_use.py` decides
if a plan fits a card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Literal

import numpy as np

from ...common.arrays import IntArray
from ...lora.spec import REFERENCE_RANK, highest_ranks
from ..breakdown import Breakdown, break_down
from ..budget import Limit
from ..cards import USUAL_CARD, DeviceSpec, card_rates, device_table
from ..cost import ParameterCost, plan_cost
from ..model import MemoryModel, fewest_checkpointed, holding_layers
from ..moments import Evaluation, between_steps
from ..recording import BatchShape
from ..rollouts import EngineNeeds, cache_bytes_of
from ..step_config import StepConfig
from ..streaming import BaseLayers, StreamedTime
from .card_use import CardRoom, CardUse, Verdict, slack_of
from .configured_step import ConfiguredStep, Shards, base_of, streamed_layers, without_streamed

ROWS, LENGTHS = (1, 2, 4, 8, 16), (512, 1024, 2048, 4096, 8192)
"""Batch sizes and lengths of the grid, in addition to the requested ones."""

SHARES = (0.75, 0.5, 0.25)
"""Shares of the layers, counted from the top, to show in addition to all layers."""

RESERVE = 0.025
"""Initial guess of the allocator's reserve, as a share of all tensors."""

RANKS = (1, 8, 16, 64)
"""Uniform ranks to show in addition to the requested one."""

ChoiceKind = Literal["asked", "depth", "rank", "batch", "rule"]


@dataclass(frozen=True, eq=False)
class Choice:
    """One way to train.

    Attributes:
        kind: what differs from the request: nothing ("asked"), the layers with adapters or checkpointing ("depth"), the
            rank of all modules, the batch, or the whole plan, set by a rule.
        rank: rank of every adapted module, capped at its maximum; under a rule, the highest rank.
        layers: number of layers with adapters, counted from the top.
        checkpointed: names of the checkpointed layers.
        ranks: the plan, int64 (modules,).
        step_bytes: predicted peak of a step, excluding the frozen model.
        time: step time relative to plain LoRA (rank 8 on all modules, no checkpointing); None if work was not counted.
        shape: shape of the batch.
        label: display name, for choices that numbers do not describe.
        memory: the byte model of its step.
    """

    kind: ChoiceKind
    rank: int
    layers: int
    checkpointed: tuple[str, ...] = field(repr=False)
    ranks: IntArray = field(repr=False)
    step_bytes: float
    time: float | None
    shape: BatchShape
    label: str = ""
    memory: MemoryModel = field(repr=False, kw_only=True)
    _use: Callable[[], CardUse | None] = field(repr=False, kw_only=True)
    _within: bool | None = field(repr=False, kw_only=True)
    _has_slack: bool = field(repr=False, kw_only=True)

    @property
    def use(self) -> CardUse | None:
        """The card's memory use, computed on first access; None without a card."""
        return self._use()

    @property
    def verdict(self) -> Verdict | None:
        """The verdict on the choice; None without a limit."""
        if self._within is not None:
            return "fits" if self._within else "does not fit"
        return use.verdict if (use := self.use) else None

    @property
    def fits(self) -> bool:
        """True if the choice fits with slack. The allocator is replayed only if tensors leave enough room."""
        return self._has_slack and self.verdict == "fits"


@dataclass(frozen=True)
class GridCell:
    """A batch shape and its memory use, with adapters on all layers at the requested rank.

    Attributes:
        shape: rows and tokens.
        checkpointed: fewest checkpointed layers for the batch to fit with slack; None if it never fits.
        activations: whether activations are checkpointed first because plain LoRA does not fit otherwise.
        bytes: bytes on the card with these layers checkpointed, or with all of them; assumes the allocator's reserve
            share of the requested batch.
    """

    shape: BatchShape
    checkpointed: int | None
    activations: bool
    bytes: float


@dataclass(frozen=True)
class MeasuredStep:
    """A measured step, excluding the frozen model unless noted. None marks figures that the system does not report.

    Attributes:
        peak_bytes: bytes of live tensors (CPU), or bytes handed out by the allocator (CUDA).
        resident_bytes: increase of the process's resident memory over that without training state (CPU).
        process_bytes: the process's peak resident memory, including the model and all libraries (CPU).
        reserved_bytes: bytes reserved by the allocator, including the model (CUDA).
    """

    peak_bytes: int
    resident_bytes: int | None = None
    process_bytes: int | None = None
    reserved_bytes: int | None = None


class Outlook:
    """The cost of a training step and the choices that fit.

    Args:
        step: the step without selective checkpointing, with all layers checkpointed, or none if the model class does
            not support gradient checkpointing.
        rank: rank of all modules, capped at each module's maximum.
        settings: rows, tokens and other settings of the step.
        card: the card in question; None for a model examined on its own device.
        dtype: precision of the frozen model on a card, such as "bf16".
        asked: the byte model of the step exactly as requested; None on a card, where choices set the checkpointed
            layers.
        limit: upper bound of a step or an adapter; None without a budget.
        measured: a real step, if one was run.
        facts: further facts about a loaded model, by name: task and device.
        shards: number of cards that train together and their sharding.

    Attributes:
        given: the step as passed.
        base: the frozen weights of the model's layers.
        streamed: number of layers whose frozen weights stream from main memory.
        blocks: number of layers with target modules.
        room: the room on the card; None without a card.
        slack: share of the card left free by a choice that fits.
        limit_bytes: bytes of the card, or of the step's budget; None without either.
        notes: what could not be shown, and why.
    """

    def __init__(
        self,
        step: ConfiguredStep,
        rank: int,
        settings: StepConfig,
        *,
        card: DeviceSpec | None = None,
        dtype: str = "fp32",
        asked: MemoryModel | None = None,
        limit: Limit | None = None,
        measured: MeasuredStep | None = None,
        facts: Mapping[str, str] | None = None,
        shards: Shards | None = None,
    ) -> None:
        self.limit_bytes: float | None = limit.value if limit and limit.unit == "bytes" else None
        if card:
            self.limit_bytes = card.memory_bytes
        self.rank, self.settings, self.card, self.dtype, self.given = rank, settings, card, dtype, step
        self.shards: Shards = shards or Shards()
        self.base: BaseLayers = base_of(step)
        self.streamed: int = streamed_layers(self.base, step.loaded.stream, self.shards)
        self._free = self.shards.of(without_streamed(step, self.base, self.streamed))
        self.measured, self.facts, self.notes = measured, dict(facts or {}), list[str]()
        self._asked, self._limit, self._others = asked, limit, list[Choice]()
        self._by_depth: dict[int, tuple[Choice, ...]] = {}
        self._found: dict[tuple[int, int, tuple[str, ...]], Choice] = {}
        self._blocks = np.array([target.block for target in step.targets])
        self._highest = highest_ranks(step.targets)
        self._plain = np.minimum(REFERENCE_RANK, self._highest)
        self.blocks: int = len({*self._blocks.tolist()})
        self.slack: float = slack_of(step, self.shards, settings.quantization, card) if card else 0.0
        frozen, expandable = self._free.model.frozen, step.loaded.expandable_segments
        rollouts = step.loaded.rollouts
        if pictures := settings.batch_size * step.model.picture_bytes:
            frozen = *frozen, pictures
        self.room: CardRoom | None = None
        if card:
            awake = int(rollouts.awake_bytes(card.memory_bytes, self._free.model.frozen_bytes)) if rollouts else 0
            beside = replace(card, context_bytes=card.context_bytes + awake)
            self.room = CardRoom(beside, frozen, expandable, self.slack, self.evaluation, self.generation_bytes)
        # The layers checkpointed by every choice on a card, by request; None if each choice decides.
        asked_for = settings.gradient_checkpointing if card else "auto"
        layers = self._free.memory.recording.layers if asked_for else ()
        self._set = None if asked_for == "auto" else layers

    def generation_bytes(self, shape: BatchShape) -> float:
        """Return the bytes of generation beside the model and any awake engine."""
        rollouts = self.given.loaded.rollouts
        if rollouts is None or self.card is None:
            return 0.0
        cache, frozen = cache_bytes_of(self.given.model.config), self._free.model.frozen_bytes
        return rollouts.generation_bytes(self.card.memory_bytes, frozen, shape.length, cache)

    @cached_property
    def engine_needs(self) -> EngineNeeds | None:
        """The least bytes of a vLLM engine on the card; None without one."""
        model, settings, rollouts = self.given.model, self.settings, self.given.loaded.rollouts
        if rollouts is None or rollouts.engine is None:
            return None
        whole = model.frozen_bytes if settings.quantization != "none" else 2.0 * model.parameters
        return EngineNeeds.of(model.config, whole, rollouts, self.memory.shape.length)

    @property
    def engine_lacks(self) -> float:
        """Bytes by which a vLLM engine's share of the card is too small to start; 0 or less if it starts."""
        engine, needs = self.given.loaded.engine, self.engine_needs
        return needs.total - engine.share * self.card.memory_bytes if engine and needs and self.card else 0.0

    def evaluation(self, shape: BatchShape) -> Evaluation | None:
        """Return the evaluation of a run with training batches of a shape; None for none."""
        found = self.given.loaded.evaluation(shape, self.given.model, bf16=self.settings.bf16)
        return found if found is None or self._free.memory.predicts(found.shape) else Evaluation(shape)

    @cached_property
    def step(self) -> ConfiguredStep:
        """The step of a run: on a card, with activation checkpointing if plain LoRA does not fit without it."""
        plain, room = self._free.memory.with_checkpointed(()), self.room
        if room is None or room.fits(plain, self._plain) or self._lean is None:
            return self._free
        memory, top = self._lean.memory, self.plan(1, 1)
        fits = min(memory.peak(top), memory.with_checkpointed(()).peak(top)) <= room.bytes  # see `ExactSavers.within`
        return self._lean if fits else self._free

    @cached_property
    def _lean(self) -> ConfiguredStep | None:
        """The step with selective checkpointing, at the price of another recording; None if it does not help."""
        lean = self._free.leaner() if self._set is None else None
        return lean and self.shards.of(without_streamed(lean, self.base, self.streamed))

    @cached_property
    def _times(self) -> tuple[StreamedTime, StreamedTime] | None:
        """The time of any plan in `step`, and without selective checkpointing; None if work was not counted.

        By the published rates of the card, or of a usual one.
        """
        if self.card is None or self.step.work is None or self._free.work is None:
            return None
        published = self.card.rates or device_table()[USUAL_CARD].rates
        assert published is not None, "cards of the table have rates"
        rates = card_rates(published, self.dtype)
        works = [self.step.work] if self.step is self._free else [self.step.work, self._free.work]
        streams = self.checkpointable, self.base, self.streamed, self.card.bus_bytes_per_s
        times = [StreamedTime(work.time(rates), *streams) for work in works]
        return times[0], times[-1]

    @property
    def memory(self) -> MemoryModel:
        """The byte model of the step with all supported layers checkpointed."""
        return self.step.memory

    @cached_property
    def reference_bytes(self) -> float:
        """Peak bytes of the request at rank 8 on all modules, without exact savers; on a card, no checkpointing."""
        if self.step.saved:
            first = self.step.saved[0]
            again = first.again_bytes if self._asked and self._asked.segments else None
            return first.step_bytes if again is None else again
        return (
            plan_cost(self._asked.cost(), self._plain)
            if self._asked
            else self.memory.with_checkpointed(()).peak(self._plain)
        )

    @cached_property
    def checkpointable(self) -> tuple[str, ...]:
        """Names of the checkpointable layers; empty if the model class does not support checkpointing."""
        return self.memory.recording.layers

    def plan(self, layers: int, rank: int) -> IntArray:
        """Return the plan with adapters on the top `layers` layers, int64 (modules,)."""
        lowest = sorted({*self._blocks.tolist()})[-layers]
        return np.where(self._blocks >= lowest, np.minimum(rank, self._highest), 0)

    def choice(self, layers: int, rank: int, checkpointed: tuple[str, ...], kind: ChoiceKind = "depth") -> Choice:
        """Price one choice on the requested batch."""
        if (key := (layers, rank, checkpointed)) not in self._found:
            self._found[key] = self._priced(
                kind, layers, rank, checkpointed, self.memory.with_checkpointed(checkpointed)
            )
        return replace(self._found[key], kind=kind)

    def add(self, kind: ChoiceKind, label: str, memory: MemoryModel, shape: BatchShape, ranks: IntArray) -> None:
        """Add a choice with another batch, or with a rule's plan.

        Args:
            kind: what differs from the request.
            label: display name.
            memory: the byte model of its step.
            shape: shape of its batch, which `memory` must support.
            ranks: its plan, int64 (modules,).
        """
        layers, rank = len(np.unique(self._blocks[ranks > 0])), int(ranks.max())
        self._others.append(self._priced(kind, layers, rank, memory.recording.layers, memory, ranks, shape, label))

    def _priced(
        self,
        kind: ChoiceKind,
        layers: int,
        rank: int,
        checkpointed: tuple[str, ...],
        memory: MemoryModel,
        ranks: IntArray | None = None,
        shape: BatchShape | None = None,
        label: str = "",
    ) -> Choice:
        ranks, shape = self.plan(layers, rank) if ranks is None else ranks, shape or memory.shape
        step_bytes = memory.peak(ranks, shape) if self.card else plan_cost(memory.cost(shape), ranks)
        time = self._times[0].seconds(ranks, checkpointed) / self.plain_seconds if self._times else None
        within, room = None, self.room
        if self._limit:
            cost = step_bytes if self._limit.unit == "bytes" else plan_cost(ParameterCost.of(self.step.targets), ranks)
            within = cost <= self._limit.value
        needed = max(step_bytes, self._beside_steps(memory, ranks, shape)) if room else step_bytes
        if room and room.is_hopeless(needed):
            within = False
        return Choice(
            kind,
            rank,
            layers,
            checkpointed,
            ranks,
            step_bytes,
            time,
            shape,
            label,
            memory=memory,
            _use=cache(lambda: room.use(memory, ranks, shape) if room else None),
            _within=within,
            _has_slack=not room or not room.is_hopeless(needed, self.slack),
        )

    def _beside_steps(self, memory: MemoryModel, ranks: IntArray, shape: BatchShape) -> float:
        """Return the peak of evaluation and generation without the frozen model."""
        found, generates = self.evaluation(shape), self.generation_bytes(shape)
        generates += between_steps(memory, ranks) if generates else 0.0
        return max(found.bytes(memory, ranks) if found else 0.0, generates)

    @cached_property
    def plain_seconds(self) -> float:
        """Seconds of a batch with plain LoRA (rank 8 on all modules), without gradient checkpointing."""
        assert self._times is not None, "the step was made without its work"
        return self._times[1].resident.seconds(self._plain, ())

    def breakdown(self, choice: Choice) -> Breakdown:
        """Break down the peak of a choice's step by layer and kind of bytes."""
        return break_down(choice.memory, self.step.targets, choice.ranks, choice.shape)

    def fitting(self, layers: int, rank: int, kind: ChoiceKind = "depth") -> Choice:
        """Return the choice with the fewest checkpointed layers that fit, with the allocator's reserve if possible."""
        if self._set is not None:
            return self.choice(layers, rank, self._set, kind)
        assert self.room is not None, "there is no card"
        ranks, room = self.plan(layers, rank), self.room
        holding = holding_layers(self.memory, ranks)

        def checkpointing(count: int) -> Choice:
            return self.choice(layers, rank, holding[:count], kind)

        def guess(reserve: float) -> int:
            return len(fewest_checkpointed(self.memory, ranks, room.beside(reserve)))

        count = guess(RESERVE)
        if checkpointing(count)._has_slack and (use := checkpointing(count).use):
            count = guess(use.reserve_share)
        while not checkpointing(count).fits and count < len(holding):
            count += 1
        while count and checkpointing(count - 1).fits:
            count -= 1
        return checkpointing(count)

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """All choices: the request, fewer layers, different checkpointing, other ranks, and added ones."""
        own = (choice for layers in _depths(self) for choice in _of_depth(self, layers))
        return (*own, *_rank_choices(self), *self._others)

    @cached_property
    def as_asked(self) -> Choice | None:
        """The least checkpointing that fits with adapters on all layers at the requested rank and batch.

        If none fits with slack, this is the one with the most spare memory that may not fit; None if the card is too
        small, or without a card.
        """
        if self.card is None or self.engine_lacks > 0:
            return None
        asked = sorted(_of_depth(self, self.blocks), key=lambda choice: len(choice.checkpointed))
        if fitting := next((choice for choice in asked if choice.fits), None):
            return fitting
        near = [choice for choice in asked if choice.verdict != "does not fit"]
        near = [choice for choice in near if choice.use and choice.use.spare_bytes >= 0]
        return min(near, key=lambda choice: choice.step_bytes, default=None)

    @cached_property
    def instead(self) -> Choice | None:
        """The choice that fits with the most adapted layers, where the request does not fit; None without one."""
        if self.card is None or self.as_asked or self.engine_lacks > 0:
            return None
        return next((choice for choice in self.by_depth() if choice.fits), None)

    def by_depth(self) -> Iterator[Choice]:
        """Yield choices at the requested rank: most layers first, then least checkpointing.

        They are generated lazily, because checking each fit is slow.
        """
        for layers in _depths(self):
            yield from sorted(_of_depth(self, layers), key=lambda choice: len(choice.checkpointed))

    @property
    def main(self) -> Choice:
        """The choice to report: the request, on a card with the least checkpointing that fits, or with the most."""
        if self.card is None:
            return self.choices[0]
        return self.as_asked or max(_of_depth(self, self.blocks), key=lambda choice: len(choice.checkpointed))

    @cached_property
    def grid(self) -> tuple[GridCell, ...]:
        """Cells for all predictable batches, with adapters on all layers at the requested rank; empty off a card."""
        if self.card is None:
            return ()
        limit = self.step.model.positions or max(LENGTHS)
        lengths = sorted({length for length in LENGTHS if length <= limit} | {self.settings.max_length})
        rows = sorted({*ROWS, self.settings.batch_size})
        shapes = (BatchShape(count, length) for length in lengths for count in rows)
        least = self.step.model.picture_tokens
        return tuple(_cell(self, shape) for shape in shapes if shape.length >= least and self.memory.predicts(shape))


def checkpointed_bytes(outlook: Outlook) -> float | None:
    """Return the `reference_bytes` with all layers checkpointed; with exact savers if no other recording exists."""
    again = outlook.step.saved[0].again_bytes if outlook.step.saved else None
    return again or (outlook.memory.peak(outlook._plain) if outlook.memory.segments else None)


def room_for_tensors(outlook: Outlook) -> float:
    """Return the tensor bytes available to any batch, assuming the reserve share of the requested one."""
    assert outlook.room is not None, "there is no card"
    return outlook.room.beside(_reserve_share(outlook))


def _reserve_share(outlook: Outlook) -> float:
    """Return the allocator's reserve as a share of all tensors, for the request with all layers checkpointed."""
    use = outlook.choice(outlook.blocks, outlook.rank, outlook.checkpointable).use
    assert use is not None, "there is no card"
    return use.reserve_share


def _depths(outlook: Outlook) -> list[int]:
    """Return the numbers of adapted top layers to show, in descending order."""
    return list(dict.fromkeys(max(1, round(share * outlook.blocks)) for share in (1.0, *SHARES)))


def _of_depth(outlook: Outlook, layers: int) -> tuple[Choice, ...]:
    """Return the choices with this many layers, at the requested rank."""
    if layers not in outlook._by_depth:
        outlook._by_depth[layers] = tuple(_depth_choices(outlook, layers))
    return outlook._by_depth[layers]


def _depth_choices(outlook: Outlook, layers: int) -> Iterator[Choice]:
    as_asked: tuple[str, ...] | None = None
    if outlook._asked:
        as_asked = outlook.checkpointable if outlook._asked.segments else ()
        if layers == outlook.blocks:
            yield outlook._priced("asked", layers, outlook.rank, as_asked, outlook._asked)
    if outlook._set is not None:
        yield outlook.fitting(layers, outlook.rank)
        return
    none = outlook.choice(layers, outlook.rank, ())
    holding = holding_layers(outlook.memory, none.ranks)
    if as_asked != () or layers < outlook.blocks:
        yield none
    if not holding or (as_asked and layers == outlook.blocks):
        return
    every = outlook.choice(layers, outlook.rank, holding)
    if outlook.card and not none.fits:
        fitting = outlook.fitting(layers, outlook.rank)
        if fitting.checkpointed != every.checkpointed:
            yield fitting
    yield every


def _rank_choices(outlook: Outlook) -> Iterator[Choice]:
    for rank in RANKS:
        if rank == outlook.rank or rank > outlook._highest.max():
            continue
        if outlook._asked:
            checkpointed = outlook.checkpointable if outlook._asked.segments else ()
            yield outlook._priced("rank", outlook.blocks, rank, checkpointed, outlook._asked)
        else:
            yield outlook.fitting(outlook.blocks, rank, "rank")


def _cell(outlook: Outlook, shape: BatchShape) -> GridCell:
    assert outlook.room is not None, "there is no card"
    ranks, room = outlook.plan(outlook.blocks, outlook.rank), room_for_tensors(outlook)
    plain = outlook._free.memory.with_checkpointed(()).peak(outlook._plain, shape)
    step = outlook._free if plain <= room else outlook._lean or outlook._free
    asked = shape == outlook.memory.shape  # reuse the price above, including this choice's own reserve
    chosen = (
        outlook.fitting(outlook.blocks, outlook.rank).checkpointed
        if asked or outlook._set is not None
        else fewest_checkpointed(step.memory, ranks, room, shape)
    )
    peak = step.memory.with_checkpointed(chosen).peak(ranks, shape)
    total = (peak + outlook.room.taken) * (1 + _reserve_share(outlook))
    return GridCell(shape, len(chosen) if peak <= room else None, step is not outlook._free, total)
