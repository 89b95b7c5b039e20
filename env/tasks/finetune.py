"""What an episode needs of a fine-tune, and what fixed allocations of it achieve."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from ...lora.targets import TargetModule
    from ...memory.budget import Budget
    from ...memory.cost import UntimedCost


@dataclass(frozen=True)
class Reference:
    """What fixed allocations of a task achieve, held-out losses in nats.

    Attributes:
        initial: before training.
        uniform: after the run of `uniform_ranks` within the task's budget.
        best: after the run of the oracle (planted tasks) or of rank 32 everywhere, whatever it costs; None if unknown.
    """

    initial: float
    uniform: float
    best: float | None = None

    @property
    def gain(self) -> float:
        """What the uniform run gained; at least 1 % of the initial loss, so that it can be divided by."""
        return max(self.initial - self.uniform, 0.01 * self.initial, 1e-6)

    @property
    def headroom(self) -> float:
        """What a better allocation could gain over uniform, nearly; at least 5 % of what uniform gained.

        Where `best` is unknown, a tenth of what uniform gained.
        """
        if self.best is None:
            return 0.1 * self.gain
        return max(self.uniform - self.best, 0.05 * self.gain)


class FineTune(Hashable, Protocol):
    """What an episode needs of a fine-tune; `ProxyFineTune` and `OwnTask` are the two there are."""

    @property
    def seed(self) -> int:
        """Decides data and adapters."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""

    @property
    def batch_size(self) -> int:
        """Rows a step."""

    @property
    def learning_rate(self) -> float:
        """Peak of a linear decay."""

    @property
    def id(self) -> str:
        """A readable name."""

    @property
    def limit(self) -> Budget:
        """The budget."""

    @property
    def predicted(self) -> float:
        """Share of the tokens whose prediction the loss counts, above 0."""

    @property
    def reference(self) -> Reference | None:
        """What fixed allocations achieve, if it is known already."""

    @property
    def known(self) -> dict[Hashable, Any]:
        """What episodes have found out about it, such as its probe; the same object each time."""

    def adapted(self) -> tuple[PeftModel, list[TargetModule]]:
        """The model with a LoRA pair on every target module; the same object each time."""

    def cost(self) -> UntimedCost:
        """What a plan costs."""

    def train_loss(self, model: torch.nn.Module, step: int, rows: int | None = None) -> torch.Tensor:
        """Loss of the batch of one step, or of its first rows, in nats."""

    def held_out_loss(self, model: torch.nn.Module) -> float:
        """Loss on the held-out set, in nats."""
