"""Why a measured peak differs from its prediction, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..common.units import format_bytes
from ..memory.batch_shape import has_no_padding
from ..memory.recording import Batch

MARGIN = 0.03
"""The share of the prediction by which a measured peak may differ without a word."""


@dataclass(frozen=True)
class StepBatches:
    """The batches that `before_step` got for one optimiser step.

    Attributes:
        count: how many; 0 if none were passed.
        unpadded: whether all have a mask, and none masks anything.
    """

    count: int
    unpadded: bool = False

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> StepBatches:
        """Of these batches."""
        return cls(len(batches), bool(batches) and all(map(has_no_padding, batches)))


def likely_cause(peak: int, predicted: float, batches: StepBatches, accumulation: int) -> str:
    """The prediction of a measured peak and the likely cause if they differ by more than the margin, else nothing.

    Args:
        peak: measured, in bytes.
        predicted: in bytes.
        batches: of the measured step.
        accumulation: the batches of a step, as the run was told.
    """
    if abs(peak - predicted) <= MARGIN * predicted:
        return ""
    if batches.count and batches.count != accumulation:
        took = f"{batches.count} batch" if batches.count == 1 else f"{batches.count} batches"
        cause = (
            f"the step took {took}, and the run was told accumulation={accumulation}. The last step of an epoch may "
            "have fewer; else tell the run how many make a step, and pass all of them to `before_step`."
        )
    elif peak < predicted and batches.unpadded:
        cause = (
            "no row of the step is padded, and the prediction leaves room for rows that are. A peak below the "
            "prediction is no danger."
        )
    else:
        cause = (
            f"the step computes {'more' if peak > predicted else 'less'} than the one that was measured "
            "before training, because the model, the loss or the kind of batch has changed since, or another library "
            "keeps tensors."
        )
    return f"where {format_bytes(predicted)} were predicted. Likely cause: {cause}"
