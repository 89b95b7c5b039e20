"""The matrix of losses: each is trained plainly and with rankpilot, which runs it in parts or says that it does not."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import rankpilot
import torch
from rankpilot.decide.rules import AsConfigured
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    LlamaForSequenceClassification,
    PrinterCallback,
)

from . import losses as of
from . import trainer_kinds as kinds

EQUAL = 1e-4
"""The distance of two runs that is rounding: of weights over how far they moved, and of losses."""

LOOSE = 0.2
"""The same for the mean loss of a run whose dropout draws other numbers in parts."""


# The matrix -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A loss.

    Attributes:
        name: of it.
        build: makes its Trainer, and may leave something to be undone.
        both: whether there is a rare variant beside the common one.
        sums: whether it is known to be a sum over rows or tokens, so that it must run in parts by default.
        draws: whether dropout draws other numbers in parts.
    """

    name: str
    build: Callable[[of.Ask, ExitStack], Any]
    both: bool = True
    sums: bool = False
    draws: bool = False


def case(name: str, build: Callable[..., Any], *arguments: Any, **options: Any) -> Case:
    """A case whose Trainer is built of arguments that stand before the `Ask`, and options that are not the case's."""
    own = {each: options.pop(each) for each in ("both", "sums", "draws") if each in options}
    return Case(name, lambda ask, undo: build(*arguments, ask, **options), **own)


def of_model(make: Callable[[], Any], collate: Any, ask: of.Ask, **options: Any) -> Any:
    return of.trainer(ask, make(), collate, **options)


KNOWN: tuple[Case, ...] = tuple(
    case(name, of_model, make, collate, sums=True, both=both, **options)
    for name, make, collate, both, options in (
        ("causal", of.llama, of.of_tokens, False, {}),
        ("causal-some-labels", of.llama, of.labelled, True, {}),
        ("causal-accumulated", of.llama, of.labelled, True, {"gradient_accumulation_steps": 2, "max_steps": 4}),
        ("causal-subclass", of.llama, of.of_tokens, False, {"kind": of.Harmless}),
        ("masked", partial(of.bert, BertForMaskedLM), of.labelled, True, {}),
        ("classes", of.bert, of.by_class, True, {}),
        ("classes-accumulated", of.bert, of.by_class, True, {"gradient_accumulation_steps": 2, "max_steps": 4}),
        (
            "classes-causal",
            partial(of.llama, LlamaForSequenceClassification, num_labels=of.CLASSES),
            of.by_class,
            False,
            {},
        ),
        ("classes-subclass", of.bert, of.by_class, True, {"kind": of.Harmless}),
        ("tags", partial(of.bert, BertForTokenClassification), of.tags, False, {}),
        ("t5", of.t5, of.answered, False, {}),
        ("bart", of.bart, of.answered, False, {}),
    )
)

HELD = {"eval_strategy": "steps", "eval_steps": 4}

SOMETIMES: tuple[Case, ...] = (
    *(
        case(name, of_model, make, collate, **options)
        for name, make, collate, options in (
            ("regression", partial(of.bert, num_labels=1), of.numbers, {}),
            ("multi-label", partial(of.bert, problem_type="multi_label_classification"), of.several, {"both": False}),
            ("answers", partial(of.bert, BertForQuestionAnswering, num_labels=2), of.answers, {}),
            ("classes-some-labels", of.bert, partial(of.collated, labels=of.some_class), {}),
            ("classes-evaluated", of.bert, of.by_class, HELD),
            ("smoothed-classes", of.bert, of.by_class, {"label_smoothing_factor": 0.2}),
            ("smoothed-causal", of.llama, of.labelled, {"label_smoothing_factor": 0.2}),
            ("experts", of.mixtral, of.of_tokens, {"both": False, "targets": ["q_proj", "v_proj"]}),
            ("dynamic-rope", of.dynamic, of.of_tokens, {"by_length": True}),
            ("longrope", of.phi3, of.of_tokens, {"by_length": True}),
            ("left-padded-gpt2", of.gpt2, partial(of.of_tokens, left=True), {"by_length": True}),
            ("no-mask", of.bert, of.unmasked, {"by_length": True}),
            ("batch-norm", lambda: of.bert(head=of.normed()), of.by_class, {"both": False}),
            ("running-buffer", lambda: of.bert(head=of.Centered()), of.by_class, {"both": False}),
            *(
                (f"step-{name}", of.bert, of.by_class, {"both": False, "kind": of.after_backward(change)})
                for name, change in of.CHANGES.items()
            ),
            ("prediction-step", of.bert, of.by_class, {"kind": of.Predicts, **HELD}),
            ("weights-in-function", of.bert, of.by_class, {"compute_loss_func": of.weighted}),
            ("neftune", of.llama, of.of_tokens, {"both": False, "neftune_noise_alpha": 5.0}),
        )
    ),
    case("gradient-hooks", of.clamped, both=False),
    case("hook-forward", of.hooked, backward=False, both=False),
    case("hook-backward", of.hooked, backward=True, both=False),
    case("features-read-by-model", of.framed_in, of.featured),
    case("sft", of.trl_of, kinds.sft, both=False, sums=True),
    case("sft-completions", of.trl_of, lambda *a, **b: kinds.sft(*a, kinds.completions(), **b), both=False, sums=True),
    case("sft-assistant", of.trl_of, partial(kinds.sft, assistant_only_loss=True), both=False, sums=True),
    case("dpo", of.trl_of, kinds.dpo, both=False, sums=True),
    case("reward", of.trl_of, kinds.reward, both=False),
)
"""Losses of libraries, and what is added to them. They may run in parts by default, as far as that is exact."""

WHOLE: tuple[Case, ...] = (
    case("class-weights", of.own_loss, of.class_weights),
    *(
        Case(f"weights-in-{where}", partial(of.replaced, where=where))
        for where in (
            "loss_function",
            "mapping",
            "cross_entropy",
            "compute_loss",
            "forward",
            "mode",
            "hook_on_all",
            "backward",
        )
    ),
)
"""Losses of users, which run as a whole: those of plain steps."""

CASES = (*KNOWN, *SOMETIMES, *WHOLE)


@dataclass(frozen=True)
class Cell:
    """One place of the matrix: a case and its variant."""

    case: Case
    rare: bool

    def __str__(self) -> str:
        return f"{self.case.name}-{'rare' if self.rare else 'common'}"


CELLS = [Cell(case, rare) for case in CASES for rare in ((True, False) if case.both else (False,))]


# How a cell is run ----------------------------------------------------------------------------------------------------


@dataclass
class Ran:
    """What a run has left: trained values before and after it, losses, those of evaluations, parts, and lines."""

    start: torch.Tensor
    end: torch.Tensor
    losses: list[float]
    evaluations: list[float]
    parts: float
    told: list[str]


class _Heard(logging.Handler):
    """Keeps lines of rankpilot."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def heard() -> Iterator[list[str]]:
    """The lines that rankpilot logs inside."""
    logger, handler = logging.getLogger("rankpilot"), _Heard()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def train(cell: Cell, *, plain: bool) -> Ran:
    """Train a cell's model, plainly or with rankpilot."""
    with TemporaryDirectory() as folder, ExitStack() as undo, heard() as lines:
        torch.manual_seed(0)
        made = cell.case.build(of.Ask(Path(folder), 0, cell.rare), undo)
        if not plain:
            rankpilot.attach(made, AsConfigured(), budget="8 GiB", keep_rate=True, control=False)
        undo.enter_context(patch("rankpilot.cost.streaming.PROCESSOR_LAUNCH", 2e-7))  # some more parts
        made.remove_callback(PrinterCallback)
        start = trained(made.model)
        made.train()
        history = made.state.log_history
        losses = [[row[name] for row in history if name in row] for name in ("loss", "eval_loss")]
        parts = max((row["parts"] for row in history if "parts" in row), default=1.0)
        return Ran(start, trained(made.model), *losses, parts, lines)


def trained(model: nn.Module) -> torch.Tensor:
    """All that trains, as one vector."""
    return torch.cat([p.detach().flatten().double() for _, p in sorted(model.named_parameters()) if p.requires_grad])


_WHOLE = re.compile(r"\b(runs?|ran|goes?|went|going)\b[^.]*\bwhole\b|loss has changed", re.I)


@dataclass(frozen=True)
class Outcome:
    """What a cell has come to.

    Attributes:
        kind: "equal", "told", "silent", or "error".
        off: the largest difference, as a share.
        parts: of a batch, in the mean.
        lines: that told of whole steps, or the error.
    """

    kind: str
    off: float
    parts: float = 1.0
    lines: tuple[str, ...] = field(default=())


def apart(ones: Sequence[float], others: Sequence[float]) -> float:
    """The largest difference of losses, as shares where they are above 1; both may be no number."""
    one, other = np.array(ones), np.array(others)
    if one.shape != other.shape:
        return float("inf")
    differ = np.where(np.isnan(one) & np.isnan(other), 0.0, abs(one - other) / np.maximum(1, abs(other)))
    return float(np.nan_to_num(differ, nan=np.inf).max(initial=0.0))


def outcome(cell: Cell) -> Outcome:
    """Train a cell both ways, and compare."""
    one = train(cell, plain=True)
    try:
        run = train(cell, plain=False)
    except Exception as error:  # any is an outcome of the cell
        return Outcome("error", float("nan"), lines=(f"{type(error).__name__}: {error}",))
    told = [line for line in run.told if _WHOLE.search(line)]
    moved = (one.end - one.start).norm()
    off = max(float((run.end - one.end).norm() / moved), apart(run.losses, one.losses))
    if cell.case.draws and run.parts > 1:
        off = abs(np.mean(run.losses) / np.mean(one.losses) - 1)
        off = 0.0 if off < LOOSE else off
    evaluated = apart(run.evaluations, one.evaluations) if off < EQUAL else 0.0
    lines = [line for line in told if ("valuation" in line) == (evaluated >= EQUAL)]
    off = max(off, evaluated) if off == off else float("inf")
    kind = "equal" if off < EQUAL else "told" if lines else "silent"
    return Outcome(kind, off, run.parts, tuple(told))
