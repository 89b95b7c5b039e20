"""What a training step takes, what other choices would take, and what fits: a card, or a budget.

Every choice follows from one recording in which every layer is checkpointed: the peak of any ranks, depth, set of
checkpointed layers and batch. Where plain LoRA does not fit a card, it is one with selective checkpointing too, as
in a run (`cost/savers.py`). The recording is made on the meta device for a model that is known from its
configuration (`cost/memory_of.py`), or on the device for one that is here (`study/memory_here.py`). Whether a plan fits
a card is told by `cost/card_use.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Literal

import numpy as np

from ..common.arrays import IntArray
from ..lora.spec import REFERENCE_RANK, highest_ranks
from .breakdown import Breakdown, break_down
from .budget import Limit, reference_seconds
from .card_use import CardUse, Verdict, card_use, slack_of
from .cards import USUAL_CARD, DeviceRates, DeviceSpec, device_table
from .configured_step import ConfiguredStep, Shards
from .cost import ParameterCost, plan_cost
from .model import MemoryModel, fewest_checkpointed, holding_layers
from .recording import BatchShape
from .step_config import StepConfig
from .step_time import LAUNCH_SECONDS, Rates, StepTime

ROWS, LENGTHS = (1, 2, 4, 8, 16), (512, 1024, 2048, 4096, 8192)
"""Batches of the grid, beside the one that was asked for."""

SHARES = (0.75, 0.5, 0.25)
"""Shares of the layers, from the top, that are shown beside all of them."""

SURELY = 0.98
"""The share of a predicted peak that tensors take at the least, far below what margin and rounding make of it."""

RESERVE = 0.025
"""The allocator's reserve as a share of all tensors, as a first guess."""

RANKS = (1, 8, 16, 64)
"""Ranks on all modules that are shown beside the one that was asked for."""

ChoiceKind = Literal["asked", "depth", "rank", "batch", "rule"]


@dataclass(frozen=True, eq=False)
class Choice:
    """One way to train.

    Attributes:
        kind: what is changed: nothing ("asked"), which layers have adapters or are checkpointed ("depth"), the rank of
            all modules, the batch, or the whole plan, by a rule.
        rank: of every adapted module, or the most that it can have; under a rule the highest.
        layers: how many layers have adapters, from the top.
        checkpointed: names of the checkpointed layers.
        ranks: the plan, int64 (modules,).
        step_bytes: predicted peak of a step, beside the frozen model.
        time: of a step, as a share of plain LoRA's: rank 8 on all modules, no checkpointing; None where work was not
            counted.
        shape: of the batch.
        label: what people call it, where its numbers do not tell.
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
    _memory: MemoryModel = field(repr=False, kw_only=True)
    _use: Callable[[], CardUse | None] = field(repr=False, kw_only=True)
    _within: bool | None = field(repr=False, kw_only=True)
    _has_slack: bool = field(repr=False, kw_only=True)

    @property
    def use(self) -> CardUse | None:
        """What the card sees, which is found when it is asked for; None without a card."""
        return self._use()

    @property
    def verdict(self) -> Verdict | None:
        """Whether it fits; None where nothing limits it."""
        if self._within is not None:
            return "fits" if self._within else "does not fit"
        return use.verdict if (use := self.use) else None

    @property
    def fits(self) -> bool:
        """Whether it fits, on a card with slack; the allocator is replayed only where tensors leave as much."""
        return self._has_slack and self.verdict == "fits"


@dataclass(frozen=True)
class GridCell:
    """A batch, and what it takes for all layers at the rank that was asked for.

    Attributes:
        shape: rows and tokens.
        checkpointed: how many layers must be checkpointed so that it fits with slack; None if all are too few.
        activations: whether activations are checkpointed first, since plain LoRA does not fit without.
        bytes: on the card, with these layers, or with all; the allocator's reserve is taken to be the share that it is
            for the batch that was asked for.
    """

    shape: BatchShape
    checkpointed: int | None
    activations: bool
    bytes: float


@dataclass(frozen=True)
class MeasuredStep:
    """A measured step. The frozen model does not count unless it is named. None: the system does not report it.

    Attributes:
        peak_bytes: bytes of live tensors on the CPU, bytes that the allocator had handed out on CUDA.
        resident_bytes: how far the process's resident memory rose above what it was without training state (CPU).
        process_bytes: the process's peak resident memory, the model and all libraries included (CPU).
        reserved_bytes: what the allocator had reserved, the model included (CUDA).
    """

    peak_bytes: int
    resident_bytes: int | None = None
    process_bytes: int | None = None
    reserved_bytes: int | None = None


class Outlook:
    """What a training step takes, and what fits.

    Args:
        step: the step without selective checkpointing, with all layers checkpointed, or with none where the model's
            class has no gradient checkpointing.
        rank: on all modules, or the most that one can have.
        settings: rows, tokens and further settings of the step.
        card: the card that is asked about; None for a model that is looked at where it is.
        dtype: of the frozen model on a card, such as "bf16".
        asked: the byte model of the step just as it was asked for; None on a card, where the choices decide what runs
            again.
        limit: what a step, or an adapter, may take at most; None without a budget.
        measured: a real step, if one was taken.
        facts: what else is known of a model that is here, by name: task and device.
        shards: how many cards train together.

    Attributes:
        blocks: number of layers with target modules.
        slack: the share of a card that is to spare where a choice fits.
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
        self.rank, self.settings, self.card, self.dtype = rank, settings, card, dtype
        self.shards: Shards = shards or Shards()
        self._free = self.shards.of(step)
        self.measured, self.facts, self.notes = measured, dict(facts or {}), list[str]()
        self._asked, self._limit, self._others = asked, limit, list[Choice]()
        self._by_depth: dict[int, tuple[Choice, ...]] = {}
        self._found: dict[tuple[int, int, tuple[str, ...]], Choice] = {}
        self._uses: dict[tuple[int, BatchShape, tuple[int, ...]], tuple[MemoryModel, CardUse]] = {}
        self._blocks = np.array([target.block for target in step.targets])
        self._highest = highest_ranks(step.targets)
        self._plain = np.minimum(REFERENCE_RANK, self._highest)
        self._loaded = self.shards.loaded(step.model) if card else ()
        self.blocks: int = len({*self._blocks.tolist()})
        self.slack: float = slack_of(settings.quantization)

    @cached_property
    def step(self) -> ConfiguredStep:
        """The step of a run: on a card, activations are checkpointed where plain LoRA does not fit without."""
        plain = self._free.memory.with_checkpointed(())
        if self.card is None or _fits(self, plain) or self._lean is None:
            return self._free
        memory, top = self._lean.memory, self.plan(1, 1)
        fits = min(memory.peak(top), memory.with_checkpointed(()).peak(top)) <= self.room  # see `ExactSavers.within`
        return self._lean if fits else self._free

    @cached_property
    def _lean(self) -> ConfiguredStep | None:
        """The step with selective checkpointing, which takes a recording more; None where that is of no use."""
        lean = self._free.leaner() if self._set is None else None
        return lean and self.shards.of(lean)

    @cached_property
    def _time(self) -> StepTime | None:
        return _time_of(self.step, self.card, self.dtype)

    @property
    def memory(self) -> MemoryModel:
        """The byte model of a step in which all layers are checkpointed that can be."""
        return self.step.memory

    @property
    def limit_bytes(self) -> float | None:
        """Bytes of the card, or those that a step may take; None without a card and a budget of bytes."""
        if self.card:
            return self.card.memory_bytes
        return self._limit.value if self._limit and self._limit.unit == "bytes" else None

    @cached_property
    def reference_bytes(self) -> float:
        """The peak with rank 8 on all modules as asked for, without exact savers; on a card, no checkpointing."""
        if self.step.saved:
            first = self.step.saved[0]
            again = first.again_bytes if self._asked and self._asked.segments else None
            return first.step_bytes if again is None else again
        return (
            plan_cost(self._asked.cost(), self._plain)
            if self._asked
            else self.memory.with_checkpointed(()).peak(self._plain)
        )

    @property
    def checkpointed_bytes(self) -> float | None:
        """The same with all layers checkpointed; with exact savers where it was only recorded with them."""
        again = self.step.saved[0].again_bytes if self.step.saved else None
        return again or (self.memory.peak(self._plain) if self.memory.segments else None)

    @property
    def room(self) -> float:
        """Bytes that a step may allocate beside the frozen model on the card."""
        assert self.card is not None, "there is no card"
        taken = self._free.model.frozen_bytes + self.card.context_bytes + self.card.workspace_bytes
        return float(self.card.memory_bytes - taken)

    @cached_property
    def checkpointable(self) -> tuple[str, ...]:
        """Names of the layers that can be checkpointed; none where the model's class has no gradient checkpointing."""
        return tuple(dict.fromkeys(segment.name for segment in self.memory.segments))

    @property
    def _set(self) -> tuple[str, ...] | None:
        """The layers that every choice checkpoints on a card where that was set; None where a choice decides."""
        wanted = self.settings.gradient_checkpointing if self.card else "auto"
        segments = self._free.memory.segments if wanted else ()
        return None if wanted == "auto" else tuple(dict.fromkeys(segment.name for segment in segments))

    def plan(self, layers: int, rank: int) -> IntArray:
        """The ranks of so many layers from the top, int64 (modules,)."""
        lowest = sorted({*self._blocks.tolist()})[-layers]
        return np.where(self._blocks >= lowest, np.minimum(rank, self._highest), 0)

    def choice(self, layers: int, rank: int, checkpointed: tuple[str, ...], kind: ChoiceKind = "depth") -> Choice:
        """What one choice takes; the batch is the one that was asked for."""
        if (key := (layers, rank, checkpointed)) not in self._found:
            self._found[key] = self._priced(
                kind, layers, rank, checkpointed, self.memory.with_checkpointed(checkpointed)
            )
        return replace(self._found[key], kind=kind)

    def add(self, kind: ChoiceKind, label: str, memory: MemoryModel, shape: BatchShape, ranks: IntArray) -> None:
        """Show one choice more, which its numbers do not tell: another batch, or the plan of a rule.

        Args:
            kind: what is changed.
            label: what people call it.
            memory: the byte model of its step.
            shape: of its batch, of which `memory` can tell.
            ranks: its plan, int64 (modules,).
        """
        layers, rank = len(np.unique(self._blocks[ranks > 0])), int(ranks.max())
        checkpointed = tuple(dict.fromkeys(segment.name for segment in memory.segments))
        self._others.append(self._priced(kind, layers, rank, checkpointed, memory, ranks, shape, label))

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
        time = self._time.seconds(ranks, checkpointed) / self.plain_seconds if self._time else None
        within = None
        if self._limit:
            cost = step_bytes if self._limit.unit == "bytes" else plan_cost(ParameterCost.of(self.step.targets), ranks)
            within = cost <= self._limit.value
        elif self.card and _is_hopeless(self, step_bytes):
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
            _memory=memory,
            _use=cache(lambda: self._use(memory, ranks, shape) if self.card else None),
            _within=within,
            _has_slack=not self.card or not _is_hopeless(self, step_bytes, self.slack),
        )

    def _use(self, memory: MemoryModel, ranks: IntArray, shape: BatchShape | None = None) -> CardUse:
        assert self.card is not None, "there is no card"
        shape = shape or memory.shape
        key = id(memory), shape, tuple(ranks.tolist())
        if key not in self._uses:
            expandable = self._free.loaded.expandable_segments
            use = card_use(
                memory,
                ranks,
                self._loaded,
                self.card,
                shape=shape,
                evaluation=shape,
                expandable=expandable,
                slack=self.slack,
            )
            self._uses[key] = memory, use  # the byte model is kept, so that no other one gets its id
        return self._uses[key][1]

    @cached_property
    def plain_seconds(self) -> float:
        """Of a batch under plain LoRA, rank 8 on all modules, without gradient checkpointing."""
        time = self._time if self.step is self._free else _time_of(self._free, self.card, self.dtype)
        assert time is not None, "the step was made without its work"
        return reference_seconds(time, self._highest)

    def breakdown(self, choice: Choice) -> Breakdown:
        """The peak of a choice's step by layer and kind of bytes."""
        return break_down(choice._memory, self.step.targets, choice.ranks, choice.shape)

    def fitting(self, layers: int, rank: int, kind: ChoiceKind = "depth") -> Choice:
        """The same with as few checkpointed layers as fit the card, the allocator's reserve included if possible."""
        if self._set is not None:
            return self.choice(layers, rank, self._set, kind)
        ranks = self.plan(layers, rank)
        holding = holding_layers(self.memory, ranks)

        def checkpointing(count: int) -> Choice:
            return self.choice(layers, rank, holding[:count], kind)

        def guess(reserve: float) -> int:
            return len(fewest_checkpointed(self.memory, ranks, _room_beside(self, reserve)))

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
        """What was asked for; fewer layers, none, as few as fit or all of them checkpointed; ranks; what was added."""
        own = (choice for layers in _depths(self) for choice in _of_depth(self, layers))
        return (*own, *_rank_choices(self), *self._others)

    @property
    def best(self) -> Choice | None:
        """The choice that adapts most layers, and checkpoints least among those, and fits; None if none does.

        Where none fits with slack, it is the one that leaves most to spare of those that are tight.
        """
        if fitting := next((choice for choice in self.by_depth() if choice.fits), None):
            return fitting
        near = (choice for choice in self.by_depth() if choice.verdict != "does not fit")
        tight = [choice for choice in near if choice.use and choice.use.spare_bytes >= 0]
        return min(tight, key=lambda choice: (choice.step_bytes, -choice.layers), default=None)

    def by_depth(self) -> Iterator[Choice]:
        """The choices at the rank that was asked for: most layers first, and of these the one that checkpoints least.

        They are made as they are asked for: whether one fits takes a while to find out.
        """
        for layers in _depths(self):
            yield from sorted(_of_depth(self, layers), key=lambda choice: len(choice.checkpointed))

    @property
    def main(self) -> Choice:
        """The choice that words and pictures are about: what was asked for, or on a card the best that fits."""
        return (self.best if self.card else None) or self.choices[0]

    @cached_property
    def grid(self) -> tuple[GridCell, ...]:
        """Batches that can be predicted, for all layers at the rank that was asked for; empty without a card."""
        if self.card is None:
            return ()
        limit = self.step.model.positions or max(LENGTHS)
        lengths = sorted({length for length in LENGTHS if length <= limit} | {self.settings.max_length})
        rows = sorted({*ROWS, self.settings.batch_size})
        shapes = (BatchShape(count, length) for length in lengths for count in rows)
        return tuple(_cell(self, shape) for shape in shapes if self.memory.predicts(shape))

    @property
    def room_for_tensors(self) -> float:
        """Bytes of tensors that fit any batch, the reserve being the share of the batch that was asked for."""
        return _room_beside(self, _reserve_share(self))


def _room_beside(outlook: Outlook, reserve: float) -> float:
    """Bytes of tensors that fit: the room with slack, where the allocator's reserve is this share of all tensors."""
    assert outlook.card is not None, "there is no card"
    return outlook.room - outlook.card.memory_bytes * (1 - (1 - outlook.slack) / (1 + reserve))


def smallest_use(outlook: Outlook) -> tuple[Choice, int]:
    """The choice that takes least of the card, and its bytes; only where tensors may leave as few is it replayed."""
    assert outlook.card is not None, "there is no card"
    beside, found = outlook.card.memory_bytes - outlook.room, list[tuple[int, int]]()
    for index, choice in sorted(enumerate(outlook.choices), key=lambda pair: pair[1].step_bytes):
        if found and beside + SURELY * choice.step_bytes > min(found)[0]:
            break
        if use := choice.use:
            found.append((use.total_bytes, index))
    total, index = min(found)
    return outlook.choices[index], total


def brought_by_offloading(outlook: Outlook) -> tuple[float, float] | None:
    """Bytes to spare if inputs of checkpointed layers lay in main memory, and seconds a step that copies then take.

    None where all layers have adapters without that, or have none with it. Copies overlap with the passes, so the
    seconds are what they take at most, at the rate of the card's bus.
    """
    if not outlook.card or outlook.step.loaded.offload or not outlook.checkpointable:
        return None
    ranks, best, lighter = outlook.plan(outlook.blocks, outlook.rank), outlook.best, outlook.memory.offloaded()
    if (best and best.layers == outlook.blocks) or _is_hopeless(outlook, least := lighter.peak(ranks), outlook.slack):
        return None
    use, moved = outlook._use(lighter, ranks), outlook.memory.peak(ranks) - least
    if use.verdict != "fits":
        return None
    return use.spare_bytes, 2 * moved / outlook.card.bus_bytes_per_s


def _reserve_share(outlook: Outlook) -> float:
    """The allocator's reserve as a share of all tensors, all layers checkpointed on the batch asked for."""
    use = outlook.choice(outlook.blocks, outlook.rank, outlook.checkpointable).use
    assert use is not None, "there is no card"
    return use.reserve_share


def _fits(outlook: Outlook, plain: MemoryModel) -> bool:
    """Whether plain LoRA fits the card."""
    if _is_hopeless(outlook, plain.peak(outlook._plain), outlook.slack):
        return False
    return outlook._use(plain, outlook._plain).verdict == "fits"


def _is_hopeless(outlook: Outlook, step_bytes: float, slack: float = 0.0) -> bool:
    """Whether tensors alone leave no such share of the card, so that what the allocator adds need not be known."""
    assert outlook.card is not None, "there is no card"
    return SURELY * step_bytes > outlook.room - slack * outlook.card.memory_bytes


def _depths(outlook: Outlook) -> list[int]:
    """How many layers from the top have adapters in the choices that are shown, the most first."""
    return list(dict.fromkeys(max(1, round(share * outlook.blocks)) for share in (1.0, *SHARES)))


def _of_depth(outlook: Outlook, layers: int) -> tuple[Choice, ...]:
    """Choices of so many layers at the rank that was asked for."""
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
    assert outlook.card is not None, "there is no card"
    ranks, room = outlook.plan(outlook.blocks, outlook.rank), outlook.room_for_tensors
    taken = outlook.card.memory_bytes - outlook.room
    plain = outlook._free.memory.with_checkpointed(()).peak(outlook._plain, shape)
    step = outlook._free if plain <= room else outlook._lean or outlook._free
    asked = shape == outlook.memory.shape  # as it is priced above, with the allocator's reserve for this very choice
    chosen = (
        outlook.fitting(outlook.blocks, outlook.rank).checkpointed
        if asked or outlook._set is not None
        else fewest_checkpointed(step.memory, ranks, room, shape)
    )
    peak = step.memory.with_checkpointed(chosen).peak(ranks, shape)
    total = (peak + taken) * (1 + _reserve_share(outlook))
    return GridCell(shape, len(chosen) if peak <= room else None, step is not outlook._free, total)


def _time_of(step: ConfiguredStep, card: DeviceSpec | None, dtype: str) -> StepTime | None:
    """The time of any plan, by counted work and the published rates of the card, or of a usual one."""
    if step.work is None or card is None:
        return None
    rates = card.rates or device_table()[USUAL_CARD].rates
    assert rates is not None, "cards of the table have rates"
    return step.work.time(card_rates(rates, dtype))


REACHED_BYTES, REACHED_SHARE = 0.83e12, 0.41
"""Bytes in a second that the operators of a step reach on any card whose published rate allows it, and the share of
that rate that they reach at least, where products reach theirs (docs/experiments.md)."""


def card_rates(rates: DeviceRates, dtype: str) -> Rates:
    """What a card does in a second with a frozen model of this dtype; products at fp32's rate if it lacks theirs."""
    products = rates.flops_per_s.get(dtype, rates.flops_per_s["fp32"])  # torch leaves TF32 off
    moved = max(REACHED_SHARE * rates.bytes_per_s, min(rates.bytes_per_s, REACHED_BYTES))
    return Rates(products, moved, launch_seconds=LAUNCH_SECONDS)
