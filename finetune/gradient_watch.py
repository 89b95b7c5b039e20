"""Notices a run whose adapters no longer receive gradients, which would end without an error and without an effect."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import NoGradientError
from ..lora.factors import norms_of
from ..lora.targets import TargetModule

PATIENCE = 3
"""Looks in a row at which all gradients are zero, after which the run is stopped. One batch may have none: all of its
labels may be masked."""


class GradientWatch:
    """Looks at the gradients of the adapters before optimiser steps."""

    def __init__(self) -> None:
        self._zero_looks = 0

    def look(self, targets: Sequence[TargetModule], step: int, *, closely: bool) -> None:
        """Stop the run if its adapters do not train.

        Args:
            targets: the target modules.
            step: the number of the step, for the error.
            closely: compare the values with zero, for which the device is waited for.

        Raises:
            NoGradientError: no adapter has a gradient, or all gradients have been zero for `PATIENCE` close looks.
        """
        gradients = [target.weight_b.grad for target in targets if target.rank > 0]
        gradients += [target.weight_a.grad for target in targets if target.rank > 0]
        present = [gradient for gradient in gradients if gradient is not None]
        if not present:
            raise NoGradientError(
                f"No adapter received a gradient in step {step}: the loss does not depend on them, so the run would "
                "train nothing. Check that the loss is computed with the adapted model (not with a copy of it, and not "
                "under `torch.no_grad`), and that the adapter is active."
            )
        if not closely:
            return
        self._zero_looks = 0 if bool((norms_of(present) != 0).any()) else self._zero_looks + 1
        if self._zero_looks >= PATIENCE:
            raise NoGradientError(
                f"The gradients of all adapters are zero, in step {step} as in the steps that were looked at before "
                "it: the run trains nothing. Check that the batches hold labels that count (not all of them -100)."
            )
