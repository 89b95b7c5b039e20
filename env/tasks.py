"""Proxy tasks: short fine-tunes of a small pretrained transformer that stand for the real ones.

* *planted*: a teacher is the base plus known low-rank changes on some modules; the student learns its outputs. The
  loss is the divergence KL(teacher || student) in nats a token: where the rank is needed is known.
* *shift*: the base, pretrained on documentation, is fine-tuned on text of another kind; the loss is the cross-entropy
  of the next byte, or of masked bytes, in nats.
* *classify*: the base learns to name the class of a text; the loss is the cross-entropy of the class in nats.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ..errors import ConfigError
from ..lora.budget import Budget
from ..lora.calibration import calibrate
from ..lora.cost import Cost, ParameterCost
from ..lora.targets import TargetModule, find_target_modules
from .bases import POSITIONS, find_base, load_base_model

if TYPE_CHECKING:
    from .task_data import TaskData

Kind = Literal["planted", "shift", "classify"]
Placement = Literal["low", "high", "spread"]
Unit = Literal["bytes", "parameters"]
Price = Literal["bytes", "checkpointed", "large batch", "parameters"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)

SCALING = 2.0
"""Constant LoRA scaling of proxy runs (alpha 16 at rank 8, PEFT users' most common setting)."""


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

    def improvement(self, loss: float) -> float:
        """How much lower a loss is than the uniform run's, as a share of what the uniform run gained."""
        return (self.uniform - loss) / self.gain


class FineTune(Hashable, Protocol):
    """What an episode needs of a fine-tune; `ProxyTask` and `OwnTask` are the two there are."""

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
    def reference(self) -> Reference | None:
        """What fixed allocations achieve, if it is known already."""

    def adapted(self) -> tuple[PeftModel, list[TargetModule]]:
        """The model with a LoRA pair on every target module; the same object each time."""

    def cost(self) -> Cost:
        """Price of a plan."""

    def train_loss(self, model: torch.nn.Module, step: int, rows: int | None = None) -> torch.Tensor:
        """Loss of the batch of one step, or of its first rows, in nats."""

    def held_out_loss(self, model: torch.nn.Module) -> float:
        """Loss on the held-out set, in nats."""


@dataclass(frozen=True)
class ProxyTask:
    """One proxy fine-tune, fully determined by its fields.

    Attributes:
        kind: "planted", "shift" or "classify".
        seed: of data, teacher and adapters.
        base: name of a proxy base.
        budget: share of what uniform rank 8 takes, > 0.
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
        if min(self.steps, self.batch_size, self.eval_rows) < 1 or not 2 <= self.length <= POSITIONS:
            raise ConfigError(
                f"Steps, batch_size and eval_rows of a task are at least 1, and length is 2 to {POSITIONS}; got "
                f"{self.steps}, {self.batch_size}, {self.eval_rows} and {self.length}."
            )
        if self.priced_rows is not None and self.priced_rows <= self.batch_size:
            raise ConfigError(
                f"The priced_rows of a task are None or more than its batch_size of {self.batch_size}; got "
                f"{self.priced_rows}."
            )
        if not self.budget > 0 or not self.learning_rate > 0:
            raise ConfigError(
                f"Budget and learning rate of a task are above 0; got {self.budget} and {self.learning_rate}."
            )

    @property
    def id(self) -> str:
        """A readable name, unique among tasks that differ in kind, place, budget or seed."""
        where = self.placement if self.kind == "planted" else self.corpus
        price = self.price if self.priced_rows is None else f"{self.price} of {self.priced_rows}"
        return f"{self.base}/{self.kind}-{where}/{self.budget:.3g} {price}/{self.seed}"

    @property
    def price(self) -> Price:
        """What is counted: "bytes", "checkpointed" bytes, those of a "large batch", or "parameters"."""
        if self.unit == "parameters" or not (self.checkpointing or self.priced_rows):
            return self.unit
        return "checkpointed" if self.checkpointing else "large batch"

    @property
    def limit(self) -> Budget:
        """The budget, as a share."""
        return Budget("share", self.budget)

    def adapted(self) -> tuple[PeftModel, list[TargetModule]]:
        """See `FineTune`."""
        return adapted_base(self.base)

    def cost(self) -> Cost:
        """See `FineTune`."""
        return proxy_cost(self.base, self.priced_rows or self.batch_size, self.length, self.unit, self.checkpointing)

    @property
    def data(self) -> TaskData:
        """Everything that the task's episodes share."""
        from .task_data import load_task  # it needs this module

        return load_task(self)

    def train_loss(self, model: torch.nn.Module, step: int, rows: int | None = None) -> torch.Tensor:
        """See `FineTune`."""
        return self.data.train_loss(model, step, rows)

    def held_out_loss(self, model: torch.nn.Module) -> float:
        """See `FineTune`."""
        return self.data.held_out_loss(model)


@lru_cache(maxsize=4)
def adapted_base(name: str) -> tuple[PeftModel, list[TargetModule]]:
    """The proxy base with a LoRA pair on every target module; one a process, since episodes run one after another."""
    base = find_base(name)
    config = LoraConfig(
        r=8,
        lora_alpha=int(8 * SCALING),
        target_modules=list(base.target_modules),
        lora_dropout=0.0,
        fan_in_fan_out=base.family == "gpt2",
    )
    model = get_peft_model(load_base_model(name), config)
    return model, find_target_modules(model)


@lru_cache(maxsize=64)
def proxy_cost(base: str, rows: int, length: int, unit: Unit = "bytes", checkpointing: bool = False) -> Cost:
    """Price of plans on a proxy base at one batch shape."""
    model, targets = adapted_base(base)
    if unit == "parameters":
        return ParameterCost.of(targets)
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    inner = model.get_base_model()
    if not checkpointing:
        return calibrate(model, targets, {"input_ids": tokens, "labels": tokens}).cost()
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # transformers checkpoints in training alone; the bases have no dropout
    try:
        return calibrate(model, targets, {"input_ids": tokens, "labels": tokens}).cost()
    finally:
        inner.gradient_checkpointing_disable()
        if hasattr(inner, "_require_grads_hook"):  # set by enabling; it would make all later steps save everything
            inner.disable_input_require_grads()
        model.eval()
