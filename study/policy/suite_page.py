"""The page of a policy over a suite: its data, and the HTML file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...allocation.log import DecisionRecord
from ...common.files import as_plain, write_text
from ...common.module_names import kinds_in_layers
from ...common.statistics import Estimate
from ..decision.explain import explain
from ..decision.shapley import BASELINE
from ..decision.why import UNITS_OF_VOTES
from ..page.explanation import shown_explanation
from ..page.html import page_html
from . import suite_words
from .suite_figures import decides_nothing
from .suite_study import StudiedRun, SuiteStudy
from .traits import changed

SCRIPTS = ("unpack.js", "frame.js", "elements.js", "evidence.js", "decisions.js", "suite.js")
"""In the order in which they run."""


def suite_data(study: SuiteStudy, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """All that the page shows, as JSON values; docs/study.md tells what each figure means.

    Args:
        study: of the policy.
        on_progress: called with (worst runs explained, worst runs in all).
    """
    promise, later, worst = study.promise(), study.moves_later(), []
    for run in study.worst():
        worst.append(_worst_run(study, run))
        if on_progress:
            on_progress(len(worst), len(study.worst()))
    return {
        "policy": study.policy,
        "rows": len(study.rows),
        "runs": len(study.runs),
        "tasks": len({row.task for row in study.rows}),
        "improvement": _figure(study.improvement()),
        "gained": asdict(study.gained()),
        "leaves_uniform": asdict(study.leaves_uniform()),
        "moves_later": later and asdict(later),
        "parts": [
            asdict(part) | {"improvement": part.improvement and _figure(part.improvement)} for part in study.parts()
        ],
        "beside": {name: _figure(value) for name, value in study.beside().items()},
        "worth": {how: _figure(value) for how, value in study.worth().items()},
        "drivers": [asdict(each) | {"name": suite_words.driver_name(each.name)} for each in study.drivers()],
        "promise": promise and as_plain(asdict(promise)),
        "traits": [asdict(trait) | {"distance": _figure(trait.distance)} for trait in study.traits()],
        "worst": worst,
        "sentences": {
            "verdict": suite_words.verdict(study),
            "obstacle": suite_words.obstacle(study),
            "promise": suite_words.promise(promise),
            "traits": suite_words.traits(study),
            "unit_of_votes": _unit_of_votes(study),
            "baseline": BASELINE,
        },
    }


def suite_html(data: dict[str, Any]) -> str:
    """The page; `data` is that of `suite_data`."""
    return page_html(data, SCRIPTS)


def write_suite_page(data: dict[str, Any], path: Path) -> None:
    """Write the page; equal data give equal bytes.

    Args:
        data: see `suite_data`.
        path: of the page; a file that is there is replaced.
    """
    write_text(path, suite_html(data))


def _unit_of_votes(study: SuiteStudy) -> str:
    """The unit of the policy's votes; where it has none, nothing of the page is in it."""
    found = (run.decisions[0].deliberation for run in study.runs)
    return UNITS_OF_VOTES[next((votes.unit for votes in found if votes), "log loss")]


def _figure(found: Estimate) -> dict[str, Any]:
    """A figure that is 0 where there is no difference."""
    return asdict(found) | {"decides_nothing": decides_nothing(found)}


def _worst_run(study: SuiteStudy, run: StudiedRun) -> dict[str, Any]:
    """What a reader asks of a run that went wrong: its result, its first plan and why, and what followed."""
    row, first = run.row, run.decisions[0]
    return {
        "task": row.task,
        "seed": row.seed,
        "improvement": row.improvement,
        "loss": row.loss,
        "uniform_loss": row.uniform_loss,
        "best_loss": row.best_loss,
        "log": str(run.log.relative_to(study.folder)),
        "plan": _plan(first),
        "explanation": shown_explanation(explain(first, study.networks, what_ifs=False).to_json()),
        "later": [_later(logged) for logged in run.decisions[1:]],
    }


def _plan(logged: DecisionRecord) -> dict[str, Any]:
    """The ranks of a plan by layer, the output's first, and kind; a cell of several modules has their mean."""
    ranks, blocks = logged.rank_after, logged.observation.problem.blocks
    kinds = kinds_in_layers(logged.observation.names, blocks.tolist())
    layers, columns = sorted(set(blocks.tolist()), reverse=True), list(dict.fromkeys(kinds))
    of_kind = np.array([columns.index(kind) for kind in kinds])
    cells = [
        [
            float(ranks[here].mean()) if (here := (blocks == layer) & (of_kind == column)).any() else None
            for column in range(len(columns))
        ]
        for layer in layers
    ]
    return {"kinds": columns, "layers": layers, "ranks": cells}


def _later(logged: DecisionRecord) -> dict[str, Any]:
    return {"step": logged.step, "changed": changed(logged)}
