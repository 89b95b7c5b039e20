"""Fine-tunes on which methods are compared, and the suites of them.

A *task* is a model, its data and the size of a run; a *cell* is a task within a budget. Test cells and validation cells
share no data: a policy may be tuned on the latter, and nothing ever on the former.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal

from rankpilot.cost.budget import Budget
from rankpilot.errors import ConfigError, UnknownNameError

Kind = Literal["classification", "regression", "causal-lm"]


@dataclass(frozen=True)
class MethodTask:
    """One fine-tune, whatever its budget.

    Attributes:
        model: MiniLM or SmolLM2, whole or cut (`bases.py`), or a causal proxy base, which reads bytes.
        data: a name of `texts.TEXTS`.
        kind: what is learned.
        steps: optimiser steps.
        rows: of a batch.
        length: tokens of a row at most.
        rate: the learning rate around which every method's is searched: the peak of warm-up and linear decay.
        held_out: rows that the loss of a run is told on, and as many others for tuning.
        train_rows: distinct training rows at most.
        curve: evaluations on a part of the held-out rows, on the way.
    """

    model: str
    data: str
    kind: Kind
    steps: int
    rows: int
    length: int
    rate: float
    held_out: int = 512
    train_rows: int = 4000
    curve: int = 4

    def __post_init__(self) -> None:
        whole = (self.steps, self.rows, self.length, self.held_out, self.train_rows, self.curve)
        if min(whole) < 1 or not self.rate > 0:
            raise ConfigError(f"All sizes of a task are at least 1 and its rate is above 0; got {asdict(self)}.")

    @property
    def name(self) -> str:
        """Model and data."""
        return f"{self.model} / {self.data}"

    @property
    def key(self) -> str:
        """Names the task in stored rows: any other setting gives another key."""
        return f"{self.model}/{self.data}/{self.steps}@{_digest(tuple(vars(self)), *vars(self).values())}"


@lru_cache(maxsize=1024, typed=True)
def _digest(names: tuple[str, ...], *values: object) -> str:
    """Tells settings apart; reading stored rows asks for those of a task some thousand times."""
    settings = dict(zip(names, values, strict=True))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Cell:
    """A task within a budget.

    Attributes:
        task: which.
        budget: a share of the bytes that all-linear rank 8 takes at the peak of a step, or "400%" where there is
            practically no limit.
    """

    task: MethodTask
    budget: str

    def __post_init__(self) -> None:
        if Budget.parse(self.budget).kind != "share":
            raise ConfigError(f"The budget of a cell is a share, such as '60%'; got {self.budget!r}.")

    @property
    def name(self) -> str:
        """Model, data, steps and budget."""
        return f"{self.task.name}, {self.task.steps} steps, {self.budget}"


@dataclass(frozen=True)
class Suite:
    """Cells, and how often each is repeated.

    Attributes:
        cells: on which methods are compared.
        seeds: of results: initial weights, order of batches and dropout; the same for all methods.
        tuning_seeds: on which rates and plans are chosen, on other held-out rows; none of them is in `seeds`.
        trials: of the search (TPE).
        quick: whether only the methods that are quick to run take part.
        methods: names of those that take part; by default all that do not belong to one suite alone.
    """

    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    trials: int
    quick: bool = False
    methods: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.seeds or not self.tuning_seeds or set(self.seeds) & set(self.tuning_seeds):
            raise ConfigError(
                f"A suite has seeds and tuning seeds, and none in common; got {self.seeds} and {self.tuning_seeds}."
            )


def _minilm(
    data: str, kind: Kind = "classification", steps: int = 100, model: str = "minilm-l3", rows: int = 16
) -> MethodTask:
    return MethodTask(model, data, kind, steps, rows, length=24, rate=2e-3, held_out=256, curve=3)


def _proxy(model: str, data: str, steps: int) -> MethodTask:
    return MethodTask(model, data, "causal-lm", steps, rows=8, length=48, rate=4e-3, held_out=192, curve=3)


def _smollm2(data: str, steps: int) -> MethodTask:
    return MethodTask("smollm2-135m", data, "causal-lm", steps, 4, 32, rate=3e-3, held_out=48, curve=2)


def _cells(*pairs: tuple[MethodTask, tuple[str, ...]]) -> tuple[Cell, ...]:
    return tuple(Cell(task, budget) for task, budgets in pairs for budget in budgets)


_STANDARD = _cells(
    (_proxy("gpt2-8x64", "french", 100), ("50%", "400%")),
    (_proxy("gpt2-8x64", "templates", 150), ("30%", "50%", "70%")),
    (_proxy("llama-8x64", "french", 150), ("40%", "60%")),
    (_minilm("news-length", "regression", steps=80, rows=8), ("50%", "90%")),
    (_minilm("reuters-r8", steps=120, rows=8), ("35%", "60%", "100%")),
    (_smollm2("docstrings", 16), ("60%",)),
    (_minilm("rotten-tomatoes", steps=60, model="minilm-l6"), ("50%",)),
)
"""Chosen by the noise between seeds of plain LoRA, and by what a run takes, before any method was run on them."""

NEW_FAMILY = (_proxy("neox-8x64", "french", 100), _proxy("neox-8x64", "templates", 150))
"""Tasks of GPT-NeoX: no policy has learned from a model of its family."""

SEEN_LAST = (
    _proxy("gpt2-8x64", "russian", 150),
    _proxy("llama-8x64", "russian", 100),
    _proxy("gpt2-8x64", "news", 100),
    _proxy("llama-8x64", "news", 200),
    _minilm("newsgroups", steps=100, model="minilm-l6"),
)
"""Tasks that were written down when the shipped policy was done; the floor of broad plans was added after them."""

SAVING = (
    "all-linear-8",
    "attention-8",
    "mlp-8",
    "top-three-quarters-8",
    "top-half-8",
    "top-quarter-8",
    "every-other-layer-8",
    "attention-top-half-8",
    "mlp-top-half-8",
    "attention-2",
    "mlp-2",
    "top-half-2",
    "everything-2",
    "adalora-final",
    "eva",
    "ours-saves-time",
    "ours-saves-bytes",
)
"""The methods of the suite "saving", plain LoRA first: fixed plans, PEFT's adaptive ranks with the mean rank of plain
LoRA, and the shipped policy under goals of cost."""

SUITES: dict[str, Suite] = {
    "quick": Suite(_cells((_proxy("gpt2-8x64", "french", 100), ("50%",))), (1, 2, 3), (101,), 4, quick=True),
    "standard": Suite(_STANDARD, (1, 2, 3, 4, 5), (101,), 12),
    "saving": Suite(
        tuple(
            Cell(task, "150%") for task in dict.fromkeys([*(cell.task for cell in _STANDARD), *NEW_FAMILY, *SEEN_LAST])
        ),
        (1, 2, 3, 4, 5),
        (101,),
        1,
        methods=SAVING,
    ),
    "full": Suite(
        (
            *_STANDARD,
            *_cells(
                (_minilm("reuters-r8", steps=400, model="minilm-l6"), ("25%", "50%", "100%")),
                (_minilm("newsgroups", steps=1000), ("50%", "100%")),
                (_minilm("news-length", "regression", steps=300), ("40%", "70%")),
                (_proxy("gpt2-8x64", "russian", 1000), ("25%", "60%", "100%")),
                (_smollm2("docstrings", 100), ("40%", "80%", "100%")),
                (_smollm2("documentation", 60), ("40%", "70%")),
            ),
        ),
        tuple(range(1, 11)),
        (101, 102),
        24,
    ),
    "validation": Suite(
        _cells(
            (_minilm("imdb", steps=60, model="minilm-l6"), ("40%", "80%")),
            (_minilm("review-length", "regression"), ("60%",)),
            (_minilm("computers"), ("50%", "100%")),
            (_proxy("llama-8x64", "italian", 120), ("50%", "150%")),
            (_proxy("gpt2-8x64", "dutch", 100), ("50%", "150%")),
            (_proxy("gpt2-8x64", "italian", 200), ("150%",)),
            (_proxy("llama-8x64", "dutch", 80), ("150%",)),
            (_smollm2("reviews", 30), ("50%",)),
        ),
        (1, 2, 3),
        (101,),
        12,
    ),
}
"""Suites by name; "validation" is for tuning a policy, and shares no data with the others."""


def find_suite(name: str) -> Suite:
    """The suite of that name; UnknownNameError if there is none."""
    if name not in SUITES:
        raise UnknownNameError.of("suite", name, SUITES)
    return SUITES[name]
