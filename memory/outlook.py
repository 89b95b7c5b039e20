"""What fits a card, and what it costs: the choices that a user has before a model is downloaded.

Everything follows from one recording on the meta device (`memory/from_config.py`) in which every layer runs again: the
peak of any ranks, any depth, any set of recomputed layers and any batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..common.arrays import IntArray
from ..errors import ConfigError, UnknownNameError
from ..lora.ladder import REFERENCE_RANK
from .batch_shape import BatchShape
from .breakdown import frozen_sizes
from .budget import reference_seconds
from .calibration import check_rank, highest_ranks
from .device_table import DeviceRates, DeviceSpec, Precision, device_table, find_device_spec
from .find_configuration import find_configuration
from .from_config import ConfiguredStep, LoadedAs, from_config
from .hollow_device import Attention
from .model import MemoryModel, fewest_recomputed, holding_layers
from .step_config import StepConfig
from .step_time import OPERATOR_SECONDS, Rates, StepTime
from .verdict import CardUse, card_use

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Precisions in which a frozen model can be loaded."""

ROWS, LENGTHS = (1, 2, 4, 8, 16), (512, 1024, 2048, 4096, 8192)
"""Batches of the grid, beside the one that was asked for."""

PLACES = 9
"""Places between all layers running again and none, in the picture."""

USUAL_CARD = "RTX 4090"
"""Times on a card of which only the memory is known are by the rates of this one. They are told as shares."""

SHARES = (0.75, 0.5, 0.25)
"""Shares of the layers, from the top, that are shown beside all of them."""

RANKS = (8, 16, 64)
"""Ranks on all modules that are shown beside the one that was asked for."""


@dataclass(frozen=True, eq=False)
class Choice:
    """One way to train.

    Attributes:
        rank: of every adapted module, or the most that it can have.
        layers: how many layers have adapters, from the top.
        recomputed: names of the layers that run again in the backward pass.
        ranks: the plan, int64 (modules,).
        step_bytes: predicted peak of a step, beside the frozen model.
        use: what the card sees.
        time: of a step, as a share of plain LoRA's: rank 8 on all modules, no layer runs again.
    """

    rank: int
    layers: int
    recomputed: tuple[str, ...] = field(repr=False)
    ranks: IntArray = field(repr=False)
    step_bytes: float
    use: CardUse
    time: float


@dataclass(frozen=True)
class GridCell:
    """A batch, and what it takes for all layers at the rank that was asked for.

    Attributes:
        shape: rows and tokens.
        recomputed: how many layers must run again so that it fits; None if it does not fit even then.
        bytes: on the card, with these layers, or with all; the allocator's reserve is taken to be the share that it is
            for the batch that was asked for.
    """

    shape: BatchShape
    recomputed: int | None
    bytes: float


class Outlook:
    """What fits a card.

    Args:
        step: from the configuration, with all layers checkpointed, or with none where the model's class has no
            gradient checkpointing.
        card: the card.
        rank: on all modules, or the most that one can have.
        settings: rows, tokens and further settings of the step.
        dtype: of the frozen model, by its name in `DTYPES`.

    Attributes:
        blocks: number of layers with target modules.
    """

    card: DeviceSpec
    dtype: str
    rank: int
    settings: StepConfig
    step: ConfiguredStep

    def __init__(self, step: ConfiguredStep, card: DeviceSpec, rank: int, settings: StepConfig, dtype: str) -> None:
        self.step, self.card, self.rank, self.settings, self.dtype = step, card, rank, settings, dtype
        self._blocks = np.array([target.block for target in step.targets])
        self._highest = highest_ranks(step.targets)
        self._loaded = frozen_sizes(step.model)
        self.blocks: int = len(np.unique(self._blocks))

    @cached_property
    def _time(self) -> StepTime:
        """The time of any plan, by counted work and the published rates of the card, or of a usual one."""
        assert self.step.work is not None, "the step was made without its work"
        rates = self.card.rates or device_table()[USUAL_CARD].rates
        assert rates is not None, "cards of the table have rates"
        return self.step.work.time(Rates(product_rate(rates, self.dtype), rates.bytes_per_s, OPERATOR_SECONDS))

    @cached_property
    def _plain_seconds(self) -> float:
        return reference_seconds(self._time, self._highest)

    @property
    def memory(self) -> MemoryModel:
        """The byte model of a step in which all layers that can run again do."""
        return self.step.memory

    @property
    def room(self) -> float:
        """Bytes that a step may allocate beside the frozen model."""
        taken = self.step.frozen_bytes + self.card.context_bytes + self.card.workspace_bytes
        return float(self.card.memory_bytes - taken)

    @cached_property
    def recomputable(self) -> tuple[str, ...]:
        """Names of the layers that can run again; none where the model's class has no gradient checkpointing."""
        return tuple(dict.fromkeys(segment.name for segment in self.memory.segments))

    def plan(self, layers: int, rank: int) -> IntArray:
        """The ranks of so many layers from the top, int64 (modules,)."""
        lowest = np.unique(self._blocks)[-layers]
        return np.where(self._blocks >= lowest, np.minimum(rank, self._highest), 0)

    def choice(self, layers: int, rank: int, recomputed: tuple[str, ...]) -> Choice:
        """What the card sees under one choice; the batch is the one that was asked for."""
        ranks, memory = self.plan(layers, rank), self.memory.recomputing(recomputed)
        use = card_use(memory, ranks, self._loaded, self.card, evaluation=memory.shape)
        time = self._time.seconds(ranks, recomputed) / self._plain_seconds
        return Choice(rank, layers, recomputed, ranks, memory.peak(ranks), use, time)

    def fitting(self, layers: int, rank: int) -> Choice:
        """The same with as few recomputed layers as fit, the allocator's reserve included where that is possible."""
        ranks = self.plan(layers, rank)
        chosen = fewest_recomputed(self.memory, ranks, self._room_for_tensors)
        choice, holding = self.choice(layers, rank, chosen), holding_layers(self.memory, ranks)
        while choice.use.verdict != "fits" and len(choice.recomputed) < len(holding):
            choice = self.choice(layers, rank, holding[: len(choice.recomputed) + 1])
        return choice

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """All layers and fewer layers, with no recomputation, as little as fits, and all of it; then other ranks."""
        return tuple(self._choices())

    @property
    def depths(self) -> tuple[int, ...]:
        """How many layers from the top have adapters, in the choices that are shown."""
        return tuple(dict.fromkeys(max(1, round(share * self.blocks)) for share in (1.0, *SHARES)))

    def _choices(self) -> Iterator[Choice]:
        for layers in self.depths:
            none = self.choice(layers, self.rank, ())
            yield none
            if not self.recomputable:
                continue
            every = self.choice(layers, self.rank, holding_layers(self.memory, none.ranks))
            if none.use.verdict != "fits" and every.use.verdict != "does not fit":
                fitting = self.fitting(layers, self.rank)
                if fitting.recomputed != every.recomputed:
                    yield fitting
            yield every
        for rank in RANKS:
            if rank != self.rank and rank <= self._highest.max():
                yield self.fitting(self.blocks, rank)

    @property
    def best(self) -> Choice | None:
        """The choice that adapts most layers, and recomputes least among those, and fits; None if none does."""
        fitting = [choice for choice in self.choices if choice.use.verdict == "fits" and choice.rank == self.rank]
        return max(fitting, key=lambda choice: (choice.layers, -len(choice.recomputed)), default=None)

    @cached_property
    def grid(self) -> tuple[GridCell, ...]:
        """Batches by rows and tokens, for all layers at the rank that was asked for."""
        limit = self.step.positions or max(LENGTHS)
        lengths = sorted({length for length in LENGTHS if length <= limit} | {self.settings.max_length})
        rows = sorted({*ROWS, self.settings.batch_size})
        return tuple(self._cell(BatchShape(count, length)) for length in lengths for count in rows)

    def _cell(self, shape: BatchShape) -> GridCell:
        ranks, room = self.plan(self.blocks, self.rank), self._room_for_tensors
        taken = self.card.memory_bytes - self.room
        chosen = fewest_recomputed(self.memory, ranks, room, shape)
        peak = self.memory.recomputing(chosen).peak(ranks, shape)
        return GridCell(shape, len(chosen) if peak <= room else None, (peak + taken) * (1 + self._reserve_share))

    def trade(self, layers: int) -> list[tuple[int, float, float]]:
        """What recomputation trades for so many adapted layers from the top: from all of them again to none.

        Returns:
            (layers that run again, bytes on the card, time as a share of plain LoRA's) at a few places between.
        """
        ranks = self.plan(layers, self.rank)
        holding, points = holding_layers(self.memory, ranks), []
        taken = self.card.memory_bytes - self.room
        for count in sorted({round(part * len(holding)) for part in np.linspace(0, 1, PLACES)}, reverse=True):
            peak = self.memory.recomputing(holding[:count]).peak(ranks)
            seconds = self._time.seconds(ranks, holding[:count])
            points.append((count, (peak + taken) * (1 + self._reserve_share), seconds / self._plain_seconds))
        return points

    @property
    def _room_for_tensors(self) -> float:
        """What is left of `room` where the allocator's reserve is the share that it is for the batch asked for."""
        return self.room - self.card.memory_bytes * (1 - 1 / (1 + self._reserve_share))

    @cached_property
    def _reserve_share(self) -> float:
        """The allocator's reserve as a share of all tensors, where all layers run again on the batch asked for."""
        use = self.choice(self.blocks, self.rank, self.recomputable).use
        return use.reserve_bytes / (use.total_bytes - use.reserve_bytes)


def product_rate(rates: DeviceRates, dtype: str) -> float:
    """The operations per second of products with a frozen model of this dtype; fp32's where a card lacks its own."""
    own: dict[str, Precision] = {"bf16": "bf16", "fp16": "fp16", "fp32": "tf32"}
    return rates.flops_per_s.get(own[dtype], rates.flops_per_s["fp32"])


def memory_of(
    model: str | PreTrainedConfig,
    card: str,
    *,
    rank: int = REFERENCE_RANK,
    dtype: str | None = None,
    padded: bool = False,
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
        settings: of `StepConfig`: batch_size, max_length, quantization, optimizer, target_modules, accumulation.

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
    spec = find_device_spec(card)
    dtype = dtype or ("bf16" if spec.has_bf16 else "fp16")
    if dtype not in DTYPES:
        raise UnknownNameError.of("dtype", dtype, DTYPES)
    known = {each.name for each in fields(StepConfig)}
    for name in settings:
        if name not in known:
            raise UnknownNameError.of("setting of a step", name, known)
    config = find_configuration(model) if isinstance(model, str) else model
    defaults = {"batch_size": 4, "max_length": 1024, "bf16": dtype == "bf16"}
    step = StepConfig(**defaults | settings | {"checkpointing": True})
    if rank < 1:
        raise ConfigError(f"rank is at least 1; got {rank}.")
    attention: Attention = "auto" if spec.has_flash_attention else "efficient"
    loaded = LoadedAs(dtype=DTYPES[dtype], attention=attention, padded=padded)
    configured = from_config(config, step, loaded, counted=True, checkpointing_optional=True)
    check_rank(rank, configured.targets)
    return Outlook(configured, spec, rank, step, dtype)
