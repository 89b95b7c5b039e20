"""Proxy tasks: descriptions of short fine-tunes of a small pretrained transformer that stand for the real ones.

* *planted*: a teacher is the base plus known low-rank changes on some modules; the student learns its outputs. The
  loss is the divergence KL(teacher || student) in nats a token: where the rank is needed is known.
* *shift*: the base, pretrained on documentation, is fine-tuned on text of another kind; the loss is the cross-entropy
  of the next byte, or of masked bytes, in nats.
* *classify*: the base learns to name the class of a text; the loss is the cross-entropy of the class in nats.

A description holds no model and no data, and this module imports neither torch nor PEFT: `ProxyFineTune` trains.

What an episode needs of a fine-tune, and what fixed allocations of it achieve.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from ..common.checks import is_count, is_positive
from ..cost.step_config import check_seed
from ..errors import ConfigError
from .bases import POSITIONS, Unit, find_base

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from ..cost.budget import Budget
    from ..cost.cost import UntimedCost
    from ..lora.targets import TargetModule


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


Kind = Literal["planted", "shift", "classify"]
Placement = Literal["low", "high", "spread"]
CostKind = Literal["bytes", "checkpointed", "large batch", "parameters"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


@dataclass(frozen=True)
class ProxyTask:
    """One proxy fine-tune, fully determined by its fields.

    Attributes:
        kind: "planted", "shift" or "classify".
        seed: of data, teacher and adapters.
        base: name of a proxy base.
        budget: share of what rank 8 on all modules takes, > 0.
        unit: what is counted: "bytes" at the peak of a step, or "parameters" of the adapter.
        checkpointing: whether bytes are those of a step with gradient checkpointing. Losses do not depend on it.
        priced_rows: rows of the step whose bytes are counted, more than batch_size; batch_size if None. A proxy can
            afford few tokens a step, which makes ranks dear beside activations; with more rows ranks are as cheap as in
            large fine-tunes. Losses do not depend on it.
        placement: which layers a planted teacher changes; unused otherwise.
        corpus: the text (one of `CORPORA`) that a planted teacher is queried on or a shift leads to, or the labelled
            texts (one of `LABELS`) of a classification.
        steps: optimiser steps.
        batch_size: rows a step.
        length: tokens a row.
        eval_rows: rows of the held-out set.
        learning_rate: peak of a linear decay; on instances of suites tuned for uniform rank.
        reference: what uniform and the best known allocation achieve; measured when it is needed if it is None.

    Raises:
        ConfigError: a value out of range.
    """

    kind: Kind
    seed: int
    base: str = "llama-4x64"
    budget: float = 0.7
    unit: Unit = "bytes"
    checkpointing: bool = False
    priced_rows: int | None = None
    placement: Placement = "spread"
    corpus: str = "code"
    steps: int = 100
    batch_size: int = 4
    length: int = 32
    eval_rows: int = 192
    learning_rate: float = 5e-3
    reference: Reference | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("kind", self.kind, KINDS),
            ("placement", self.placement, PLACEMENTS),
            ("unit", self.unit, get_args(Unit)),
        ):
            if value not in allowed:
                raise ConfigError(f"The {name} of a task is one of {allowed}; got {value!r}.")
        find_base(self.base)
        check_seed(self.seed)
        counts = (self.steps, self.batch_size, self.eval_rows, self.length)
        if not all(map(is_count, counts)) or not 2 <= self.length <= POSITIONS:
            raise ConfigError(
                f"Steps, batch_size and eval_rows of a task are whole numbers of at least 1, and length is one from 2 "
                f"to {POSITIONS}; got {', '.join(map(repr, counts[:-1]))} and {self.length!r}."
            )
        if self.priced_rows is not None and not (is_count(self.priced_rows) and self.priced_rows > self.batch_size):
            raise ConfigError(
                f"The priced_rows of a task are None or a whole number above its batch_size of {self.batch_size}; got "
                f"{self.priced_rows!r}."
            )
        if not is_positive(self.budget) or not is_positive(self.learning_rate):
            raise ConfigError(
                "Budget and learning rate of a task are above 0, and finite numbers; got "
                f"{self.budget!r} and {self.learning_rate!r}."
            )

    @property
    def id(self) -> str:
        """A readable name, unique among tasks that differ in kind, place, budget or seed."""
        where = self.placement if self.kind == "planted" else self.corpus
        counted = self.cost_kind if self.priced_rows is None else f"{self.cost_kind} of {self.priced_rows}"
        return f"{self.base}/{self.kind}-{where}/{self.budget:.3g} {counted}/{self.seed}"

    @property
    def stack(self) -> tuple[str, int, int]:
        """What tasks have in common whose episodes can share a stack: base, rows of a step, and tokens of a row."""
        return self.base, self.batch_size, self.length

    @property
    def cost_kind(self) -> CostKind:
        """What is counted: "bytes", "checkpointed" bytes, those of a "large batch", or "parameters"."""
        if self.unit == "parameters" or not (self.checkpointing or self.priced_rows):
            return self.unit
        return "checkpointed" if self.checkpointing else "large batch"
