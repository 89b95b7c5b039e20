"""Tasks of the environment: short fine-tunes of small pretrained transformers, each fully determined by its fields.

* *planted*: the teacher is the base plus known low-rank changes on some modules; the student learns its outputs. The
  loss is the divergence KL(teacher || student) in nats per token. The modules in need of rank are known.
* *text*: the base, pretrained on documentation, is fine-tuned on another kind of text; the loss is the cross-entropy of
  the next byte, or of masked bytes, in nats. The text may change during the run.
* *labels*: the base learns to name the class of a text, or in half of the tasks which of four texts it is from, which a
  small base can learn; the loss is the cross-entropy of the class in nats.

The factors that make decisions matter are drawn with a task: a learning rate off by up to a factor of 8, a mean rank
from an eighth to 8, a budget that moves, a text that changes.

| split | bases | texts | labels |
|---|---|---|---|
| train | Llama and BERT of 4 layers | code, reviews, newsgroups, tables, four languages | sentiment, newsgroups |
| test | GPT-2, Llama and BERT of 8 layers | news, tales, templates, two languages | topics |

The splits share no base, no seed, and no text except the documentation used by planted teachers. A task description
holds no model and no data, and this module imports neither torch nor PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from ..common.checks import is_count, is_positive, is_real
from ..common.errors import ConfigError, UnknownNameError, shown
from ..cost.step_config import check_seed

Kind = Literal["planted", "text", "labels"]
Placement = Literal["low", "high", "spread"]
Regime = Literal["scarce", "rate", "moving", "plain"]

KINDS: tuple[Kind, ...] = get_args(Kind)
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
REGIMES: tuple[Regime, ...] = get_args(Regime)
"""Problems of a run: few ranks; a wrong learning rate; a budget that moves and a text that changes; none."""

POSITIONS = 128
"""Maximum sequence length of a base."""

RATE = 6e-3
"""Approximate best learning rate of the bases on most texts."""

ORIGINS = 0.5
"""Share of the tasks with labels whose classes are texts of the split. At rates four times off they lose 6 to 44 %,
others about 2 %, and a real encoder 30 to 105 %.
"""

LENGTHS = (80, 100, 130, 160)
"""Optimizer steps of drawn tasks; shorter runs have too few steps between two decisions."""


@dataclass(frozen=True)
class Split:
    """Distribution of tasks.

    Attributes:
        bases: names of proxy bases.
        texts: names of corpora.
        labels: names of labeled texts.
        first_seed: first seed of the tasks; a split has 2 ** 30 seeds.
    """

    bases: tuple[str, ...]
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    first_seed: int


SPLITS = {
    "train": Split(
        ("llama-4x64", "bert-4x64", "llama-4x32", "bert-4x32"),
        ("code", "reviews", "newsgroups", "tables", "german", "spanish", "italian", "dutch"),
        ("sentiment", "newsgroups"),
        10_000_000,
    ),
    "test": Split(
        ("gpt2-4x32", "llama-8x32", "bert-8x32"),
        ("news", "tales", "templates", "french", "russian"),
        ("topics",),
        2**31,
    ),
}
"""Splits by name."""


@dataclass(frozen=True)
class FineTuneTask:
    """One short fine-tune.

    Attributes:
        kind: "planted", "text" or "labels".
        seed: seed of data, teacher and adapters.
        base: name of a proxy base.
        corpus: the text or labeled texts to learn; for a planted task, the text to query the teacher on. Texts joined
            by "+" are the classes of a task with labels.
        then: text after `turn`, and of the held-out rows; None for no change. Only plain texts change.
        turn: share of the steps before the text changes.
        placement: layers changed by a planted teacher.
        mean_rank: the budget, as the parameter count of this rank on all modules; above 0.
        moves: (share of the steps, factor on the budget) of each budget move, in increasing order.
        offset: log2 of the peak learning rate over `learning_rate`.
        warm_up: share of the steps with linear warm-up; linear decay to 0 follows.
        learning_rate: approximate best peak for plain LoRA.
        steps: optimizer steps.
        batch_size: rows per step.
        length: tokens per row.
        eval_rows: held-out rows.

    Raises:
        ConfigError, UnknownNameError: a value out of range.
    """

    kind: Kind
    seed: int
    base: str = "llama-4x64"
    corpus: str = "code"
    then: str | None = None
    turn: float = 0.5
    placement: Placement = "spread"
    mean_rank: float = 1.0
    moves: tuple[tuple[float, float], ...] = ()
    offset: float = 0.0
    warm_up: float = 0.0
    learning_rate: float = RATE
    steps: int = 100
    batch_size: int = 4
    length: int = 32
    eval_rows: int = 192

    def __post_init__(self) -> None:
        for name, value, allowed in (("kind", self.kind, KINDS), ("placement", self.placement, PLACEMENTS)):
            if value not in allowed:
                raise UnknownNameError.of(f"{name} of a task", str(value), allowed)
        check_seed(self.seed)
        counts = (self.steps, self.batch_size, self.eval_rows, self.length)
        if not all(map(is_count, counts)) or not 2 <= self.length <= POSITIONS:
            raise ConfigError(
                "steps, batch_size and eval_rows of a task must be whole numbers of at least 1, and length from "
                f"2 to {POSITIONS}; got {', '.join(map(shown, counts))}."
            )
        positive = is_positive(self.mean_rank) and is_positive(self.learning_rate)
        if not positive or not is_real(self.offset) or not np.isfinite(self.offset):
            raise ConfigError(
                "mean_rank and learning_rate of a task must be above 0, and its offset a finite number; got "
                f"{shown(self.mean_rank)}, {shown(self.learning_rate)} and {shown(self.offset)}."
            )
        if not all(0 <= share < 1 for share in (self.turn, self.warm_up, *(at for at, _ in self.moves))):
            raise ConfigError(f"Shares of a task's steps must be at least 0 and below 1; got {self}.")
        if not all(is_positive(factor) for _, factor in self.moves):
            raise ConfigError(f"Budget factors must be above 0; got {shown(self.moves)}.")
        if self.then is not None and self.kind != "text":
            raise ConfigError(f"Only a text can change during the run; got {self.kind!r} with then={self.then!r}.")

    @property
    def id(self) -> str:
        """Readable name with the task's content and budget."""
        what = self.placement if self.kind == "planted" else self.corpus + (f" then {self.then}" if self.then else "")
        return f"{self.base}/{self.kind}-{what}/rank {self.mean_rank:.3g}/rate {2**self.offset:.3g}/{self.seed}"

    @property
    def changes_at(self) -> int:
        """First step with the second text; the number of steps if there is none."""
        return self.steps if self.then is None else round(self.turn * self.steps)

    def schedule(self, step: int) -> float:
        """Learning rate of a step, counted from 0, as a share of its peak."""
        warm = max(1, round(self.warm_up * self.steps))
        return min((step + 1) / warm, (self.steps - step) / max(self.steps - warm, 1), 1.0)

    def budget_factor(self, step: int) -> float:
        """Factor on the budget before this step."""
        return next((factor for at, factor in reversed(self.moves) if step >= at * self.steps), 1.0)


def draw_task(
    generator: np.random.Generator,
    split: str = "train",
    base: str | None = None,
    regime: Regime | None = None,
    steps: int | None = None,
) -> FineTuneTask:
    """Draw a task of a split.

    Args:
        generator: source of randomness.
        split: a key of `SPLITS`.
        base: proxy base of the task; drawn if None.
        regime: the problem with the run; drawn if None.
        steps: steps of the run; drawn from `LENGTHS` if None.

    Raises:
        UnknownNameError: no such split or regime.
    """
    if split not in SPLITS:
        raise UnknownNameError.of("split", split, SPLITS)
    if regime not in (None, *REGIMES):
        raise UnknownNameError.of("regime", str(regime), REGIMES)
    of = SPLITS[split]
    regime = regime or _one(REGIMES, generator)
    kind: Kind = "text" if regime == "moving" else _one(("planted", "text", "text", "labels"), generator)
    corpus = {"planted": "documentation", "text": _one(of.texts, generator), "labels": _one(of.labels, generator)}[kind]
    drawn: dict[str, Any] = {
        "base": base or _one(of.bases, generator),
        "corpus": corpus,
        "placement": _one(PLACEMENTS, generator),
        "mean_rank": float(2.0 ** generator.uniform(-3, 1 if regime == "scarce" else 3)),
        "offset": float(generator.uniform(-3, 3)) if regime == "rate" else float(generator.uniform(-0.5, 0.5)),
        "warm_up": _one((0.0, 0.1), generator),
        "steps": steps or _one(LENGTHS, generator),
    }
    if regime == "moving":
        others = [text for text in of.texts if text != corpus]
        low, back = sorted(generator.uniform(0.1, 0.7, 2).tolist())
        drawn |= {"moves": ((low, float(2.0 ** generator.uniform(-2, 0))), (back, 1.0))}
        drawn |= {"then": _one(others, generator), "turn": float(generator.uniform(0.2, 0.6))}
    if kind == "labels" and generator.random() < ORIGINS:
        drawn["corpus"] = "+".join(generator.choice(of.texts, min(len(of.texts), 4), replace=False).tolist())
    return FineTuneTask(kind, of.first_seed + int(generator.integers(2**30)), **drawn)


def _one(items: Sequence[Any], generator: np.random.Generator) -> Any:
    return items[int(generator.integers(len(items)))]
