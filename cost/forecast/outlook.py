"""The cost of a training step and its alternatives, and the choices that fit a card.

All choices derive from one recording with every layer checkpointed. It yields the peak for any ranks, depth, set of
checkpointed layers and batch. If plain LoRA does not fit the card, the recording uses selective checkpointing too, as a
run does (`cost/savers/exact.py`). The model is recorded from its configuration, on the meta device
(`cost/forecast/memory_of.py`). `cost/forecast/card_use.py` decides if a plan fits a card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Literal

import numpy as np

from ...common.arrays import IntArray
from ...lora.spec import REFERENCE_RANK, highest_ranks
from ..breakdown import Breakdown, break_down
from ..cards import USUAL_CARD, DeviceSpec, card_rates, device_table
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

ChoiceKind = Literal["depth", "rank"]


@dataclass(frozen=True, eq=False)
class Choice:
    """One way to train.

    Attributes:
        kind: what differs from the request: the layers with adapters or checkpointing ("depth"), or the rank.
        rank: rank of every adapted module, capped at its maximum.
        layers: number of layers with adapters, counted from the top.
        checkpointed: names of the checkpointed layers.
        ranks: the plan, int64 (modules,).
        step_bytes: predicted peak of a step, excluding the frozen model.
        time: step time relative to plain LoRA (rank 8 on all modules, no checkpointing); None if work was not counted.
        shape: shape of the batch.
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
    memory: MemoryModel = field(repr=False)
    _use: Callable[[], CardUse] = field(repr=False)
    _is_hopeless: bool = field(repr=False)
    _has_slack: bool = field(repr=False)

    @property
    def use(self) -> CardUse:
        """The card's memory use, computed on first access."""
        return self._use()

    @property
    def verdict(self) -> Verdict:
        """The verdict on the choice."""
        return "does not fit" if self._is_hopeless else self.use.verdict

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


class Outlook:
    """The cost of a training step and the choices that fit.

    Args:
        step: the step without selective checkpointing, with all layers checkpointed, or none if the model class does
            not support gradient checkpointing.
        rank: rank of all modules, capped at each module's maximum.
        settings: rows, tokens and other settings of the step.
        card: the card in question.
        dtype: precision of the frozen model, such as "bf16".
        shards: number of cards that train together and their sharding.

    Attributes:
        given: the step as passed.
        base: the frozen weights of the model's layers.
        streamed: number of layers whose frozen weights stream from main memory.
        blocks: number of layers with target modules.
        room: the room on the card.
        slack: share of the card left free by a choice that fits.
    """

    def __init__(
        self,
        step: ConfiguredStep,
        rank: int,
        settings: StepConfig,
        *,
        card: DeviceSpec,
        dtype: str = "fp32",
        shards: Shards | None = None,
    ) -> None:
        self.rank, self.settings, self.card, self.dtype, self.given = rank, settings, card, dtype, step
        self.shards: Shards = shards or Shards()
        self.base: BaseLayers = base_of(step)
        self.streamed: int = streamed_layers(self.base, step.loaded.stream, self.shards)
        self._free = self.shards.of(without_streamed(step, self.base, self.streamed))
        self._by_depth: dict[int, tuple[Choice, ...]] = {}
        self._found: dict[tuple[int, int, tuple[str, ...]], Choice] = {}
        self._blocks = np.array([target.block for target in step.targets])
        self._highest = highest_ranks(step.targets)
        self._plain = np.minimum(REFERENCE_RANK, self._highest)
        self.blocks: int = len({*self._blocks.tolist()})
        self.slack: float = slack_of(step, self.shards, settings.quantization, card)
        frozen, expandable = self._free.model.frozen, step.loaded.expandable_segments
        rollouts = step.loaded.rollouts
        if pictures := settings.batch_size * step.model.picture_bytes:
            frozen = *frozen, pictures
        awake = int(rollouts.awake_bytes(card.memory_bytes, self._free.model.frozen_bytes)) if rollouts else 0
        beside = replace(card, context_bytes=card.context_bytes + awake)
        self.room = CardRoom(beside, frozen, expandable, self.slack, self.evaluation, self.generation_bytes)
        # The layers checkpointed by every choice, by request; None if each choice decides.
        asked_for = settings.gradient_checkpointing
        layers = self._free.memory.recording.layers if asked_for else ()
        self._set = None if asked_for == "auto" else layers

    def generation_bytes(self, shape: BatchShape) -> float:
        """Return the bytes of generation beside the model and any awake engine."""
        rollouts = self.given.loaded.rollouts
        if rollouts is None:
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
        return needs.total - engine.share * self.card.memory_bytes if engine and needs else 0.0

    def evaluation(self, shape: BatchShape) -> Evaluation | None:
        """Return the evaluation of a run with training batches of a shape; None for none."""
        found = self.given.loaded.evaluation(shape, self.given.model, bf16=self.settings.bf16)
        return found if found is None or self._free.memory.predicts(found.shape) else Evaluation(shape)

    @cached_property
    def step(self) -> ConfiguredStep:
        """The step of a run, with activation checkpointing if plain LoRA does not fit without it."""
        plain, room = self._free.memory.with_checkpointed(()), self.room
        if room.fits(plain, self._plain) or self._lean is None:
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
        if self.step.work is None or self._free.work is None:
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
        """Peak bytes of the request at rank 8 on all modules, without exact savers and checkpointing."""
        if self.step.saved:
            return self.step.saved[0].step_bytes
        return self.memory.with_checkpointed(()).peak(self._plain)

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
            memory, ranks, room = self.memory.with_checkpointed(checkpointed), self.plan(layers, rank), self.room
            step_bytes = memory.peak(ranks)
            needed = max(step_bytes, self._beside_steps(memory, ranks))
            self._found[key] = Choice(
                kind,
                rank,
                layers,
                checkpointed,
                ranks,
                step_bytes,
                self._times[0].seconds(ranks, checkpointed) / self.plain_seconds if self._times else None,
                memory.shape,
                memory,
                cache(lambda: room.use(memory, ranks, memory.shape)),
                room.is_hopeless(needed),
                not room.is_hopeless(needed, self.slack),
            )
        return replace(self._found[key], kind=kind)

    def _beside_steps(self, memory: MemoryModel, ranks: IntArray) -> float:
        """Return the peak of evaluation and generation without the frozen model."""
        found, generates = self.evaluation(memory.shape), self.generation_bytes(memory.shape)
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
        ranks, room = self.plan(layers, rank), self.room
        holding = holding_layers(self.memory, ranks)

        def checkpointing(count: int) -> Choice:
            return self.choice(layers, rank, holding[:count], kind)

        def guess(reserve: float) -> int:
            return len(fewest_checkpointed(self.memory, ranks, room.beside(reserve)))

        count = guess(RESERVE)
        if checkpointing(count)._has_slack:
            count = guess(checkpointing(count).use.reserve_share)
        while not checkpointing(count).fits and count < len(holding):
            count += 1
        while count and checkpointing(count - 1).fits:
            count -= 1
        return checkpointing(count)

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """All choices: the request, fewer layers, different checkpointing, and other ranks."""
        own = [choice for layers in _depths(self) for choice in _of_depth(self, layers)]
        ranks = [rank for rank in RANKS if rank != self.rank and rank <= self._highest.max()]
        return (*own, *(self.fitting(self.blocks, rank, "rank") for rank in ranks))

    @cached_property
    def as_asked(self) -> Choice | None:
        """The least checkpointing that fits with adapters on all layers at the requested rank and batch.

        If none fits with slack, this is the one with the most spare memory that may not fit; None if the card is too
        small.
        """
        if self.engine_lacks > 0:
            return None
        asked = sorted(_of_depth(self, self.blocks), key=lambda choice: len(choice.checkpointed))
        if fitting := next((choice for choice in asked if choice.fits), None):
            return fitting
        near = [choice for choice in asked if choice.verdict != "does not fit"]
        near = [choice for choice in near if choice.use.spare_bytes >= 0]
        return min(near, key=lambda choice: choice.step_bytes, default=None)

    @cached_property
    def instead(self) -> Choice | None:
        """The choice that fits with the most adapted layers, where the request does not fit; None without one."""
        if self.as_asked or self.engine_lacks > 0:
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
        """The choice to report: the request with the least checkpointing that fits, or with the most."""
        return self.as_asked or max(_of_depth(self, self.blocks), key=lambda choice: len(choice.checkpointed))

    @cached_property
    def grid(self) -> tuple[GridCell, ...]:
        """Cells for all predictable batches, with adapters on all layers at the requested rank."""
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
    return outlook.room.beside(_reserve_share(outlook))


def _reserve_share(outlook: Outlook) -> float:
    """Return the allocator's reserve as a share of all tensors, for the request with all layers checkpointed."""
    return outlook.choice(outlook.blocks, outlook.rank, outlook.checkpointable).use.reserve_share


def _depths(outlook: Outlook) -> list[int]:
    """Return the numbers of adapted top layers to show, in descending order."""
    return list(dict.fromkeys(max(1, round(share * outlook.blocks)) for share in (1.0, *SHARES)))


def _of_depth(outlook: Outlook, layers: int) -> tuple[Choice, ...]:
    """Return the choices with this many layers, at the requested rank."""
    if layers not in outlook._by_depth:
        outlook._by_depth[layers] = tuple(_depth_choices(outlook, layers))
    return outlook._by_depth[layers]


def _depth_choices(outlook: Outlook, layers: int) -> Iterator[Choice]:
    if outlook._set is not None:
        yield outlook.fitting(layers, outlook.rank)
        return
    yield (none := outlook.choice(layers, outlook.rank, ()))
    if not (holding := holding_layers(outlook.memory, none.ranks)):
        return
    every = outlook.choice(layers, outlook.rank, holding)
    if not none.fits:
        fitting = outlook.fitting(layers, outlook.rank)
        if fitting.checkpointed != every.checkpointed:
            yield fitting
    yield every


def _cell(outlook: Outlook, shape: BatchShape) -> GridCell:
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
