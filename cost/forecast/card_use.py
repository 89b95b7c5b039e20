"""Add up the memory needs of a plan on a card, and decide if it fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ...common.arrays import IntArray
from ..cards import DeviceSpec
from ..model import MemoryModel
from ..moments import Evaluation, Peaks
from ..recording import BatchShape
from ..step_config import Quantization
from .allocator import replay
from .configured_step import ConfiguredStep, Shards

Verdict = Literal["fits", "may not fit", "does not fit"]
"""Verdict on a plan.

fits: the allocator's reserved bytes and the context fit, with the `slack_of` the card to spare.
may not fit: they fit with less to spare, or only tensors and the context fit; training then needs
    `expandable_segments:True`, or luck with fragmentation.
does not fit: not even tensors and the context fit.
"""

UNDER = {
    "none": 0.08,
    "nf4": 0.16,
    "int8": 0.16,
    "ddp": 0.43,
    "zero2": 0.26,
    "zero3": 0.36,
    "fsdp2": 0.28,
    "pictures": 0.18,
    "generation": 0.22,
    "states": 0.57,
}
"""Share of its published memory by which a run took more than predicted at most, by kind: quantization on one GPU,
sharding, rows with pictures, generation of answers, and layers that keep a state. Three of these runs took more still;
`tests/benchmarks/test_published.py` names them, and holds all others to these shares.
"""

LOGIT_BYTES = 12
"""Bytes per token and vocabulary entry of full logits: in 16 bits and in fp32, each with its gradient."""

SURELY = 0.98
"""Lower bound on the actual peak as a share of the predicted one, with ample room for margin and rounding."""


def slack_of(step: ConfiguredStep, shards: Shards, quantization: Quantization, card: DeviceSpec) -> float:
    """Return the share of a card to leave free for a plan to fit safely.

    Args:
        step: the step on one GPU.
        shards: the GPUs.
        quantization: of the frozen model.
        card: the card.
    """
    model, loaded, shape, many = step.model, step.loaded, step.memory.shape, shards.gpus > 1
    kinds = {
        quantization: True,
        shards.sharding: many,
        "pictures": bool(loaded.image),
        "generation": loaded.rollouts is not None and loaded.engine is None,
        "states": model.keeps_state,
    }
    share = max(UNDER[kind] for kind, applies in kinds.items() if applies)
    if many and shards.sharding == "fsdp2" and quantization != "none":
        # bitsandbytes stores quantised weights as bytes by default, which accelerate leaves whole on each GPU.
        share += (model.frozen_bytes - model.outside) * (1 - 1 / shards.gpus) / card.memory_bytes
    if loaded.loss in ("cut", "liger"):  # a kernel that does not know the model leaves its logits in memory
        share = max(share, LOGIT_BYTES * shape.rows * shape.length * model.words / card.memory_bytes)
    return min(share, 0.95)


@dataclass(frozen=True)
class CardUse:
    """Memory use of a plan on a card, in bytes.

    Attributes:
        device: the card.
        base_bytes: the frozen model.
        step_bytes: tensors at the peak of a training step, excluding the frozen model, including library workspaces.
        first_step_bytes: the same at the peak of the first step.
        evaluation_bytes: the same at the peak of evaluation; 0 without one.
        between_bytes: the same between steps.
        reserve_bytes: bytes reserved by the allocator beyond tensors, at most.
        context_bytes: the CUDA context.
        margin_bytes: safety margin of the byte model against predictions that are too low.
        slack: share of the card left free by a plan that fits; see `slack_of`.
        generation_bytes: bytes of generation beside the frozen model; 0 without it.
    """

    device: DeviceSpec
    base_bytes: int
    step_bytes: int
    first_step_bytes: int
    evaluation_bytes: int
    between_bytes: int
    reserve_bytes: int
    context_bytes: int
    margin_bytes: int
    slack: float = UNDER["none"]
    generation_bytes: int = 0

    @property
    def peaks(self) -> Peaks:
        """Peaks of tensors without library workspaces."""
        found = (self.first_step_bytes, self.step_bytes, self.evaluation_bytes, self.between_bytes)
        return Peaks(*(max(each - self.device.workspace_bytes, 0) for each in found))

    @property
    def allocated_bytes(self) -> int:
        """Peak bytes of tensors."""
        return self.base_bytes + max(self.step_bytes, self.evaluation_bytes, self.generation_bytes)

    @property
    def reserved_bytes(self) -> int:
        """Peak bytes held by the allocator."""
        return self.allocated_bytes + self.reserve_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes the card needs for the plan to fit."""
        return self.reserved_bytes + self.context_bytes + self.margin_bytes

    @property
    def reserve_share(self) -> float:
        """The allocator's bytes beyond tensors, as a share of everything else."""
        return self.reserve_bytes / (self.total_bytes - self.reserve_bytes)

    @property
    def spare_bytes(self) -> int:
        """Bytes of the card beyond `total_bytes`; negative if the plan lacks memory."""
        return self.device.memory_bytes - self.total_bytes

    @property
    def verdict(self) -> Verdict:
        """The verdict on the plan."""
        if self.spare_bytes >= self.slack * self.device.memory_bytes:
            return "fits"
        return "may not fit" if self.spare_bytes + self.reserve_bytes >= 0 else "does not fit"


def card_use(
    memory: MemoryModel,
    ranks: IntArray,
    loaded: Sequence[int],
    device: DeviceSpec,
    *,
    shape: BatchShape | None = None,
    evaluation: Evaluation | None = None,
    expandable: bool = False,
    slack: float = UNDER["none"],
) -> CardUse:
    """Compute the memory use of a plan on a card.

    Args:
        memory: the byte model of its training step, which also sets the checkpointed layers.
        ranks: the plan, (modules,).
        loaded: bytes of each storage of the frozen model, from `breakdown.frozen_sizes`.
        device: the card.
        shape: shape of the batches; defaults to that of calibration.
        evaluation: batches of an evaluation; None for no evaluation.
        expandable: whether the allocator uses `expandable_segments`.
        slack: share of the card left free by a plan that fits.

    Raises:
        UnsupportedError: see `MemoryModel.sizes`.
    """
    replayed = replay(
        memory,
        ranks,
        loaded,
        shape=shape,
        evaluation=evaluation,
        workspace_bytes=device.workspace_bytes,
        expandable=expandable,
    )
    base = sum(loaded)
    step = replayed.allocated - base
    return CardUse(
        device=device,
        base_bytes=base,
        step_bytes=step,
        first_step_bytes=replayed.first - base,
        evaluation_bytes=max(replayed.evaluation - base, 0),
        between_bytes=replayed.between - base,
        reserve_bytes=replayed.reserved - max(replayed.allocated, replayed.evaluation),
        context_bytes=device.context_bytes,
        margin_bytes=int(memory.margin * step),
        slack=slack,
    )


@dataclass(frozen=True, eq=False)
class CardRoom:
    """The room on a card beside a frozen model, the context and workspaces.

    Attributes:
        card: the card.
        loaded: bytes of each storage of the frozen model.
        expandable: whether the allocator uses `expandable_segments`.
        slack: share of the card left free by a plan that fits.
        evaluation: returns the evaluation of a run with training batches of a shape; None for none.
        generation: returns the bytes of generation beside the model for such batches; 0 for none.
    """

    card: DeviceSpec
    loaded: tuple[int, ...]
    expandable: bool
    slack: float
    evaluation: Callable[[BatchShape], Evaluation | None] = Evaluation
    generation: Callable[[BatchShape], float] = lambda shape: 0.0
    _uses: dict[tuple[int, BatchShape, tuple[int, ...]], tuple[MemoryModel, CardUse]] = field(default_factory=dict)

    @property
    def taken(self) -> int:
        """Bytes of the frozen model, the context and workspaces."""
        return sum(self.loaded) + self.card.context_bytes + self.card.workspace_bytes

    @property
    def bytes(self) -> int:
        """Bytes available to a step."""
        return self.card.memory_bytes - self.taken

    def beside(self, reserve: float) -> float:
        """Return the tensor bytes that fit with slack, if the allocator reserves this share of all tensors on top."""
        return self.bytes - self.card.memory_bytes * (1 - (1 - self.slack) / (1 + reserve))

    def is_hopeless(self, step_bytes: float, slack: float = 0.0) -> bool:
        """True if tensors alone exceed the card less `slack`, so the allocator need not be replayed."""
        return SURELY * step_bytes > self.bytes - slack * self.card.memory_bytes

    def use(self, memory: MemoryModel, ranks: IntArray, shape: BatchShape | None = None) -> CardUse:
        """Return the card's memory use by a plan, int64 (modules,), on a batch; that of calibration by default."""
        shape = shape or memory.shape
        key = id(memory), shape, tuple(ranks.tolist())
        if key not in self._uses:
            use = card_use(
                memory,
                ranks,
                self.loaded,
                self.card,
                shape=shape,
                evaluation=self.evaluation(shape),
                expandable=self.expandable,
                slack=self.slack,
            )
            if generates := self.generation(shape):
                use = replace(use, generation_bytes=int(generates) + use.between_bytes)
            self._uses[key] = memory, use  # keep the byte model alive so that its id stays unique
        return self._uses[key][1]

    def fits(self, memory: MemoryModel, ranks: IntArray) -> bool:
        """Check whether a plan fits with slack."""
        return not self.is_hopeless(memory.peak(ranks), self.slack) and self.use(memory, ranks).verdict == "fits"
