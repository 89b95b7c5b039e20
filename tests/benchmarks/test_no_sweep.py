"""What pages claim of runs without a sweep is what stored rows say."""

from __future__ import annotations

import io
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import no_sweep, worth
from benchmarks.harness import Figures
from benchmarks.loss_runs import HARD
from benchmarks.no_sweep import Run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def figures() -> Figures:
    rows = {Run(*run): row for run, row in json.loads(no_sweep.PACKED.read_text(encoding="utf-8"))}
    best, console = no_sweep.best_rows(rows), Console(file=io.StringIO())
    return no_sweep._report(best, console) | no_sweep._report_control(rows, best, console)


@pytest.mark.parametrize("name", ["README.md", "docs/choose.md"])
def test_pages_claim_what_the_stored_rows_say(figures: Figures, name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert f"{figures['admitted']} texts" in page
    for side in ("quality", "bytes", "plain, rule", "usual", "rslora-64"):
        value, low, high, worst = (figures[f"admitted, {side}: {name}"] for name in ("value", "low", "high", "worst"))
        size = figures[f"admitted, {side}: bytes"]
        taken = f"{size:.2f}" if math.isfinite(size) else "1"  # of plain LoRA without savers, and of rank 64 about
        assert f"| {value:+.2f} % ({low:+.2f} to {high:+.2f}) | {worst:+.1f} % | {taken}" in page


def test_the_page_on_choices_tells_what_rivals_reach(figures: Figures) -> None:
    page = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    for side in ("MLPs", "top 3/4", "LoRA+", "Prodigy", "AdaLoRA", "EVA"):
        value, low, high, worst = (figures[f"admitted, {side}: {name}"] for name in ("value", "low", "high", "worst"))
        assert f"| {value:+.2f} % ({low:+.2f} to {high:+.2f}) | {worst:+.1f} % |" in page


def test_the_page_on_choices_tells_what_parts_of_smollm2_cost() -> None:
    page, found = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8"), defaultdict(list)
    for packed in json.loads(worth.PACKED.read_text(encoding="utf-8")):
        if packed["task"][0] == "smollm2-135m" and packed["task"][1] in HARD:
            best = min(run[4] for run in packed["runs"] if run[:3] == ["all", 8, 1.0])
            for part, rank, *_, loss in packed["runs"]:
                found[part, rank > 8 or part != "all"].append(100 * math.log(loss / best))
    for part in ("all", "mlp", "every-other", "top-3/4", "attention", "top-1/2", "top-1/4"):
        values = found[part, True]
        low, mean, high = (f"{value:+.1f}" for value in (min(values), np.mean(values), max(values)))
        assert f"| {len(values)} | {mean} % | {low} to {high} |" in page


def test_the_readme_tells_what_smollm2_gains() -> None:
    rows = {Run(*run): row for run, row in json.loads(no_sweep.PACKED.read_text(encoding="utf-8"))}
    changes = []
    for text in no_sweep.WHOLE:
        best = min(row["loss"] for run, row in rows.items() if (run.text, run.side) == (text, "plain"))
        changes.append(f"{100 * math.log(rows[Run(text, 'quality')]['loss'] / best):+.1f}")
    first, second, third = changes
    assert f"at {first}, {second} and {third} % on three texts" in (ROOT / "README.md").read_text(encoding="utf-8")


def _rounded(value: float) -> float:
    """To one digit, without a negative zero."""
    return round(value, 1) + 0.0


def test_the_readme_claims_what_control_does(figures: Figures) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    costs = [_rounded(figures[f"{side} at {at}: value"]) for at in ("0.25", "4") for side in ("plain", "controlled")]
    told = "costs {:.1f} % left alone and {:.1f} % corrected, four times the right one {:.1f} % and {:.1f} %;"
    assert told.format(*costs) in " ".join(readme.split())
    assert f"the right one itself loses {figures['controlled at 1: value']:.1f} %" in readme


def test_the_page_of_control_claims_what_the_stored_rows_say(figures: Figures) -> None:
    page = (ROOT / "docs" / "control.md").read_text(encoding="utf-8")
    for factor, words in ((0.25, "a quarter of the rule's"), (1.0, "the rule's"), (4.0, "four times the rule's")):
        sides = ("plain", "controlled", "forks", "hypergradient, .3", "reduced on a plateau")
        found = ([figures[f"{side} at {factor:g}: {name}"] for name in ("value", "worst")] for side in sides)
        cells = (f"{_rounded(value):+.1f} % (worst {worst:.1f})" for value, worst in found)
        assert f"| {words} | {' | '.join(cells)} |" in page
    told = " ".join(page.split())
    for factor, words in ((0.25, "from a quarter of the rule's rate"), (4.0, "from four times the rate")):
        value, worst = (figures[f"SmolLM2-135M, controlled at {factor:g}: {name}"] for name in ("value", "worst"))
        assert f"{_rounded(value):+.1f} % (worst {worst:.1f}) {words}" in told
