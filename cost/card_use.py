"""Whether a plan fits a card: everything that the card must hold, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..common.arrays import IntArray
from .allocator import replay
from .cards import DeviceSpec
from .model import MemoryModel
from .recording import BatchShape
from .step_config import Quantization

Verdict = Literal["fits", "tight", "does not fit"]
"""fits: what the allocator reserves and the context fit the card, and `slack_of` it is to spare. tight: they fit with
less to spare, or only tensors and the context do: then training needs `expandable_segments:True`, or the luck that
memory is not cut up. does not fit: not even these do."""

SLACK, QUANTISED_SLACK = 0.03, 0.08
"""The share of a card within which predictions err, and with a quantised model. 99.2 % of the verdicts on published
runs are right where the card is farther than the first from what they took, and 73 % where it is nearer. What the
allocator reserved in 27 runs under nf4 was up to 7.3 % above what is predicted (docs/known-models.md)."""


def slack_of(quantization: Quantization) -> float:
    """The share of a card that has to be to spare, so that a plan surely fits."""
    return SLACK if quantization == "none" else QUANTISED_SLACK


@dataclass(frozen=True)
class CardUse:
    """What a plan takes of a card, in bytes.

    Attributes:
        device: the card.
        base_bytes: the frozen model.
        step_bytes: tensors at the peak of a training step beside the frozen model, workspaces of libraries included.
        evaluation_bytes: the same at the peak of evaluation; 0 if none is asked for.
        reserve_bytes: what the allocator holds beyond tensors at the most.
        context_bytes: the CUDA context.
        margin_bytes: the byte model's margin, so that nothing is predicted too low.
        slack: the share of the card that is to spare where the plan fits; see `slack_of`.
    """

    device: DeviceSpec
    base_bytes: int
    step_bytes: int
    evaluation_bytes: int
    reserve_bytes: int
    context_bytes: int
    margin_bytes: int
    slack: float = SLACK

    @property
    def allocated_bytes(self) -> int:
        """Tensors at the peak."""
        return self.base_bytes + max(self.step_bytes, self.evaluation_bytes)

    @property
    def reserved_bytes(self) -> int:
        """What the allocator holds at the most."""
        return self.allocated_bytes + self.reserve_bytes

    @property
    def total_bytes(self) -> int:
        """What the card must hold so that the plan fits."""
        return self.reserved_bytes + self.context_bytes + self.margin_bytes

    @property
    def reserve_share(self) -> float:
        """What the allocator holds beyond tensors, as a share of all else."""
        return self.reserve_bytes / (self.total_bytes - self.reserve_bytes)

    @property
    def spare_bytes(self) -> int:
        """Bytes of the card that `total_bytes` leaves; below 0, those that are missing."""
        return self.device.memory_bytes - self.total_bytes

    @property
    def verdict(self) -> Verdict:
        """Whether the plan fits."""
        if self.spare_bytes >= self.slack * self.device.memory_bytes:
            return "fits"
        return "tight" if self.spare_bytes + self.reserve_bytes >= 0 else "does not fit"


def card_use(
    memory: MemoryModel,
    ranks: IntArray,
    loaded: Sequence[int],
    device: DeviceSpec,
    *,
    shape: BatchShape | None = None,
    evaluation: BatchShape | None = None,
    expandable: bool = False,
    slack: float = SLACK,
) -> CardUse:
    """What a plan takes of a card.

    Args:
        memory: the byte model of its training step; checkpointed layers are those that it says.
        ranks: the plan, (modules,).
        loaded: bytes of each storage of the frozen model, as `breakdown.frozen_sizes` tells.
        device: the card.
        shape: of the batches; by default that of calibration.
        evaluation: the shape of batches of evaluation; None for none. It is the recorded forward pass with nothing
            saved for a backward pass: all logits, and the widest layer.
        expandable: whether the allocator has `expandable_segments`.
        slack: the share of the card that is to spare where the plan fits.

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
        evaluation_bytes=max(replayed.evaluation - base, 0),
        reserve_bytes=replayed.reserved - max(replayed.allocated, replayed.evaluation),
        context_bytes=device.context_bytes,
        margin_bytes=int(memory.margin * step),
        slack=slack,
    )
