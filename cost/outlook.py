"""What a training step takes, what other choices would take, and what fits: a card, or a budget.

Every choice follows from one recording in which every layer is checkpointed: the peak of any ranks, depth, set of
checkpointed layers and batch. Where plain LoRA does not fit a card, it is one with selective checkpointing too, as
in a run (`cost/savers.py`). The recording is made on the meta device for a model that is known from its
configuration (`memory_of`), or on the device for one that is here (`study/memory_here.py`). Whether a plan fits a card
is told by `cost/card_use.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..common.arrays import IntArray
from ..common.checks import is_count
from ..errors import ConfigError, UnknownNameError, shown
from ..lora.spec import REFERENCE_RANK
from .breakdown import Breakdown, break_down
from .budget import Limit, reference_seconds
from .calibration import check_rank, highest_ranks
from .card_use import SLACK, CardUse, Verdict, card_use
from .cost import ParameterCost, plan_cost
from .from_config import ConfiguredStep, Implementation, LoadedAs, Sharding, Shards, from_config, usual_class
from .model import MemoryModel, fewest_checkpointed, holding_layers
from .published import (
    USUAL_CARD,
    DeviceRates,
    DeviceSpec,
    device_table,
    find_configuration,
    find_device_spec,
    positions_of,
)
from .recording import BatchShape
from .step_config import StepConfig
from .step_time import LAUNCH_SECONDS, Rates, StepTime

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Precisions in which a frozen model can be loaded."""

ROWS, LENGTHS = (1, 2, 4, 8, 16), (512, 1024, 2048, 4096, 8192)
"""Batches of the grid, beside the one that was asked for."""

SHARES = (0.75, 0.5, 0.25)
"""Shares of the layers, from the top, that are shown beside all of them."""

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
        use: what the card sees; None without a card.
        time: of a step, as a share of plain LoRA's: rank 8 on all modules, no checkpointing; None where work was not
            counted.
        verdict: whether it fits; None where nothing limits it.
        shape: of the batch.
        label: what people call it, where its numbers do not tell.
    """

    kind: ChoiceKind
    rank: int
    layers: int
    checkpointed: tuple[str, ...] = field(repr=False)
    ranks: IntArray = field(repr=False)
    step_bytes: float
    use: CardUse | None
    time: float | None
    verdict: Verdict | None
    shape: BatchShape
    label: str = ""
    _memory: MemoryModel = field(repr=False, kw_only=True)


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
        dtype: of the frozen model on a card, by its name in `DTYPES`.
        asked: the byte model of the step just as it was asked for; None on a card, where the choices decide what runs
            again.
        limit: what a step, or an adapter, may take at most; None without a budget.
        measured: a real step, if one was taken.
        facts: what else is known of a model that is here, by name: task and device.
        shards: how many cards train together.

    Attributes:
        blocks: number of layers with target modules.
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
        self._found: dict[tuple[int, int, tuple[str, ...]], Choice] = {}
        self._blocks = np.array([target.block for target in step.targets])
        self._highest = highest_ranks(step.targets)
        self._plain = np.minimum(REFERENCE_RANK, self._highest)
        self._loaded = self.shards.loaded(step) if card else []
        self.blocks: int = len(np.unique(self._blocks))

    @cached_property
    def step(self) -> ConfiguredStep:
        """The step of a run: on a card, activations are checkpointed where plain LoRA does not fit without."""
        plain = self._free.memory.with_checkpointed(())
        if self.card is None or self._use(plain, self._plain).verdict == "fits" or self._lean is None:
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
        taken = self._free.frozen_bytes + self.card.context_bytes + self.card.workspace_bytes
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
        lowest = np.unique(self._blocks)[-layers]
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
        use = self._use(memory, ranks, shape) if self.card else None
        time = self._time.seconds(ranks, checkpointed) / self.plain_seconds if self._time else None
        verdict: Verdict | None = use.verdict if use else None
        if self._limit:
            cost = step_bytes if self._limit.unit == "bytes" else plan_cost(ParameterCost.of(self.step.targets), ranks)
            verdict = "fits" if cost <= self._limit.value else "does not fit"
        return Choice(
            kind, rank, layers, checkpointed, ranks, step_bytes, use, time, verdict, shape, label, _memory=memory
        )

    def _use(self, memory: MemoryModel, ranks: IntArray, shape: BatchShape | None = None) -> CardUse:
        assert self.card is not None, "there is no card"
        shape = shape or memory.shape
        expandable = self._free.loaded.expandable_segments
        return card_use(memory, ranks, self._loaded, self.card, shape=shape, evaluation=shape, expandable=expandable)

    @cached_property
    def plain_seconds(self) -> float:
        """Of a batch under plain LoRA, rank 8 on all modules, without gradient checkpointing."""
        time = _time_of(self._free, self.card, self.dtype)
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
        chosen = fewest_checkpointed(self.memory, ranks, self.room_for_tensors)
        choice, holding = self.choice(layers, rank, chosen, kind), holding_layers(self.memory, ranks)
        while choice.verdict != "fits" and len(choice.checkpointed) < len(holding):
            choice = self.choice(layers, rank, holding[: len(choice.checkpointed) + 1], kind)
        return choice

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """What was asked for; fewer layers, none, as few as fit or all of them checkpointed; ranks; what was added."""
        return (*_depth_choices(self), *_rank_choices(self), *self._others)

    @property
    def best(self) -> Choice | None:
        """The choice that adapts most layers, and checkpoints least among those, and fits; None if none does.

        Where none fits with slack, it is the one that leaves most to spare of those that are tight.
        """
        own = [choice for choice in self.choices if choice.kind in ("asked", "depth") and choice.rank == self.rank]
        fitting = [choice for choice in own if choice.verdict == "fits"]
        if fitting:
            return max(fitting, key=lambda choice: (choice.layers, -len(choice.checkpointed)))
        tight = [choice for choice in own if choice.use and choice.use.spare_bytes >= 0]
        return min(tight, key=lambda choice: (choice.step_bytes, -choice.layers), default=None)

    @property
    def main(self) -> Choice:
        """The choice that words and pictures are about: what was asked for, or on a card the best that fits."""
        return (self.best if self.card else None) or self.choices[0]

    @cached_property
    def grid(self) -> tuple[GridCell, ...]:
        """Batches that can be predicted, for all layers at the rank that was asked for; empty without a card."""
        if self.card is None:
            return ()
        limit = self.step.positions or max(LENGTHS)
        lengths = sorted({length for length in LENGTHS if length <= limit} | {self.settings.max_length})
        rows = sorted({*ROWS, self.settings.batch_size})
        shapes = (BatchShape(count, length) for length in lengths for count in rows)
        return tuple(_cell(self, shape) for shape in shapes if self.memory.predicts(shape))

    @property
    def room_for_tensors(self) -> float:
        """Bytes of tensors that fit: `room` with slack, the reserve being the share of the batch that was asked for."""
        assert self.card is not None, "there is no card"
        return self.room - self.card.memory_bytes * (1 - (1 - SLACK) / (1 + self._reserve_share))

    @cached_property
    def _reserve_share(self) -> float:
        """The allocator's reserve as a share of all tensors, all layers checkpointed on the batch asked for."""
        use = self.choice(self.blocks, self.rank, self.checkpointable).use
        assert use is not None, "there is no card"
        return use.reserve_bytes / (use.total_bytes - use.reserve_bytes)


def _depth_choices(outlook: Outlook) -> Iterator[Choice]:
    as_asked: tuple[str, ...] | None = None
    if outlook._asked:
        as_asked = outlook.checkpointable if outlook._asked.segments else ()
        yield outlook._priced("asked", outlook.blocks, outlook.rank, as_asked, outlook._asked)
    for layers in dict.fromkeys(max(1, round(share * outlook.blocks)) for share in (1.0, *SHARES)):
        if outlook._set is not None:
            yield outlook.fitting(layers, outlook.rank)
            continue
        none = outlook.choice(layers, outlook.rank, ())
        holding = holding_layers(outlook.memory, none.ranks)
        if as_asked != () or layers < outlook.blocks:
            yield none
        if not holding or (as_asked and layers == outlook.blocks):
            continue
        every = outlook.choice(layers, outlook.rank, holding)
        if outlook.card and none.verdict != "fits" and every.verdict != "does not fit":
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
    total = (peak + taken) * (1 + outlook._reserve_share)
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


_OF_LOAD = {each.name for each in fields(LoadedAs)} - {"device", "dtype", "attention", "padded", "implementation"}
"""Settings of `LoadedAs` that `memory_of` takes by their names."""


def _dtype_on(card: DeviceSpec, dtype: str | None) -> str:
    """The precision that is asked for, if it is one, or else that of the card."""
    dtype = dtype or ("bf16" if card.has_bf16 else "fp16")
    if dtype not in DTYPES:
        raise UnknownNameError.of("dtype", dtype, DTYPES)
    return dtype


def _known(model: str | PreTrainedConfig, rank: object, settings: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of a model, if the rank is one and all settings are known as well."""
    known = {each.name for each in fields(StepConfig)} | _OF_LOAD
    for name in settings:
        if name not in known:
            raise UnknownNameError.of("setting of a step", name, known)
    config = find_configuration(model) if isinstance(model, str) else model
    if not isinstance(config, PreTrainedConfig):
        raise ConfigError(f"model is a name, a path or a transformers configuration; got {shown(model)}.")
    if not is_count(rank):
        raise ConfigError(f"rank is at least 1, a whole number; got {shown(rank)}.")
    return config


def memory_of(
    model: str | PreTrainedConfig,
    card: str,
    *,
    rank: int = REFERENCE_RANK,
    dtype: str | None = None,
    padded: bool = False,
    gpus: int = 1,
    sharding: Sharding = "ddp",
    attention: Implementation | Literal["math"] | None = None,
    lora_dropout: float = 0.0,
    **settings: Any,
) -> Outlook:
    """What a LoRA fine-tune of a model takes on a card, from its configuration alone.

    Args:
        model: a short name ("qwen3-8b"), a Hugging Face id, a folder or a config.json, or a configuration.
        card: a card of the table ("RTX 4090") or its memory ("24GiB").
        rank: on all modules; a module that is narrower has its own width.
        dtype: of the frozen model: "bf16", "fp16" or "fp32"; by default bf16 where the card has it, else fp16. Steps
            compute under bf16 autocast with bf16.
        padded: whether rows of a batch are padded, which takes other attention kernels.
        gpus: how many such cards train together, each with its own batch; figures are of one.
        sharding: what they share: "ddp", "fsdp2" or "zero3"; see `Shards`.
        attention: "eager", "sdpa", "flash" or "flex"; or "math", sdpa where no fused kernel is there.
        lora_dropout: see `peft.LoraConfig`.
        settings: of `LoadedAs`: experts, loss, reentrant, packed, offload, expandable_segments, adapter ...; and of
            `StepConfig`: batch_size, max_length, quantization, optimizer, target_modules, accumulation,
            gradient_checkpointing (of all layers, of none, or "auto": as few as fit). Sizes are as usual in commands.

    Returns:
        The outlook: `best`, `choices` and `grid`, computed when they are asked for.

    Raises:
        UnknownNameError, AssetError: there is no such model, card or setting.
        ConfigError: a setting is out of range, a row is longer than the model has positions, no module is as wide as
            the rank, or the model reads no tokens.
        UnsupportedError: the model's step cannot be predicted.

    Example:
        >>> rankpilot.memory_of("qwen3-8b", "24GiB", quantization="nf4", batch_size=4).best  # doctest: +SKIP
    """
    spec, shards = find_device_spec(card), Shards(gpus, sharding)
    dtype = _dtype_on(spec, dtype)
    of_load = {name: settings.pop(name) for name in _OF_LOAD & set(settings)}
    config = _known(model, rank, settings)
    step = StepConfig(**{"bf16": dtype == "bf16"} | settings)
    step = step.sized(continues=usual_class(config) == "AutoModelForCausalLM", positions=positions_of(config))
    loaded = LoadedAs(
        dtype=DTYPES[dtype],
        attention="math" if attention == "math" else "auto" if spec.has_flash_attention else "efficient",
        padded=padded,
        implementation=None if attention == "math" else attention,
        adapter=dict(of_load.pop("adapter", {})) | ({"lora_dropout": lora_dropout} if lora_dropout else {}),
        **of_load,
    )
    recorded, optional = replace(step, gradient_checkpointing=True), step.gradient_checkpointing is not True
    configured = from_config(config, recorded, loaded, counted=True, checkpointing_optional=optional)
    check_rank(rank, configured.targets)
    return Outlook(configured, rank, step, card=spec, dtype=dtype, shards=shards)
