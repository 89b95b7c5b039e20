"""What the pages claim of saved time and memory is what stored rows say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.methods import report as report
from benchmarks.methods.numbers import Results, compare, costs_of
from benchmarks.methods.saving import (
    LABELS,
    NEW_TEXTS,
    PEERS,
    PLAIN,
    TEXTS,
    kept_by_kind,
    loss_of,
    saving_blocks,
    saving_of,
)
from benchmarks.methods.tasks import NEW_FAMILY
from tools import make_suites

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def stored() -> Results:
    """What the rows in the repository say of the suite."""
    return report.read_results(report.Options(suite="saving"))


@pytest.fixture(scope="module")
def stored_standard() -> Results:
    return report.read_results(report.Options(suite="standard"))


def test_no_proxy_is_of_the_new_family() -> None:
    models = {task.model.partition("-")[0] for task in NEW_FAMILY}
    proxies = {base.partition("-")[0] for base in set().union(*make_suites.BASES.values())}
    assert models == {"neox"}
    assert {"llama", "bert"} <= proxies
    assert not models & proxies


def test_docs_saving_is_what_the_stored_rows_say(stored: Results) -> None:
    """Every number in docs/saving.md comes from the rows in the repository."""
    page = Path(__file__).parents[3] / "docs" / "saving.md"
    assert page.read_text() == "\n\n".join(saving_blocks(stored, "images/saving.png")) + "\n"


def test_the_readme_claims_what_the_stored_rows_say(stored: Results) -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    for name in ("ours-saves-time", "top-three-quarters-8"):
        found = saving_of(stored, name)
        assert found is not None
        low, mean, high, worst = (
            short(100 * value, 1) for value in (found.loss.low, found.loss.value, found.loss.high, found.worst)
        )
        step, size = short(found.step.value, 2), short(found.bytes.value, 2)
        assert f"loss {mean} % ({low} to {high}), {worst} % in the worst, at {step} of the time" in readme
        assert f"and {size} of the bytes" in readme
    for name, called in PEERS.items():
        found = saving_of(stored, name)
        assert found is not None
        low, mean, high = (short(100 * value, 1) for value in (found.loss.low, found.loss.value, found.loss.high))
        step = short(found.step.value, 2)
        assert re.search(
            rf"{called} (has a loss )?{re.escape(f'{mean} % ({low} to {high}) at {step}')}( of the time)?[, ]", readme
        )
    cells = stored.shared("ours-saves-time", PLAIN)
    assert f"over {len(cells)} fine-tunes" in readme
    assert stored.shared("top-three-quarters-8", PLAIN) == cells, "both are told on the same"


def test_what_pages_claim_of_rank_and_depth(stored: Results) -> None:
    plans, memory = (" ".join((ROOT / "docs" / name).read_text().split()) for name in ("plan-cost.md", "memory.md"))
    for name, words in (
        ("everything-2", "rank 2 on all modules"),
        ("top-three-quarters-8", "rank 8 on the top three quarters of the layers"),
        ("top-half-8", "rank 8 on the top half"),
        ("top-quarter-8", "rank 8 on the top quarter"),
    ):
        found = saving_of(stored, name)
        assert found is not None
        size, step = short(found.bytes.value, 2), short(found.step.value, 2)
        assert f"| {words} | {size} | {step} | {100 * found.loss.value:+.1f} % | {found.cells} |" in plans
        if name == "everything-2":
            assert f"rank 2 on all modules takes {found.bytes.value:.0%} of the bytes".replace("%", " %") in memory
        if name == "top-half-8":
            assert f"rank 8 on the top half of the layers {found.bytes.value:.0%}".replace("%", " %") in memory


def test_what_the_readme_claims_of_single_runs(stored: Results) -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    kept = kept_by_kind(stored, "ours-saves-time")
    for kind, words in (
        (TEXTS, "{} of {} runs on texts"),
        (NEW_TEXTS, "{} of {} on GPT-NeoX"),
        (LABELS, "{} of {} on labels"),
    ):
        assert words.format(kept[kind].kept, kept[kind].runs) in readme


def test_what_the_readme_claims_of_language_models(stored: Results) -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    texts, usual = stored.of_kind("texts"), "top-three-quarters-8"
    mine, other = (
        short(float(np.mean([100 * loss_of(texts, cell, name).mean() for cell in texts.shared(name, PLAIN)])), 1)
        for name in ("ours-saves-time", usual)
    )
    apart = compare(texts, "ours-saves-time", usual)
    assert apart is not None
    mean, low, high = (short(100 * each, 1) for each in (apart.mean.value, apart.mean.low, apart.mean.high))
    assert apart.cells == 10
    assert (
        f"on the ten language models the policy loses {mine} %, the top three quarters {other} % "
        f"({mean} % apart, {low} to {high})"
    ) in readme
    kept, others = (kept_by_kind(stored, name)[TEXTS] for name in ("ours-saves-time", usual))
    assert f"{kept.plain} of them plain LoRA itself (the top three quarters in {others.kept})" in readme


def test_what_the_readme_claims_of_adalora(stored_standard: Results) -> None:
    """On MiniLM-L3 its loss stays on the plateau of the commonest class."""
    others = {key: each for key, each in stored_standard.found.items() if not key[1].startswith("minilm-l3")}
    found = compare(replace(stored_standard, found=others), "ours", "adalora-final")
    assert found is not None
    told = f"AdaLoRA ({short(100 * found.mean.value, 1)} % worse without MiniLM-L3, which it does not learn in time)"
    assert told in " ".join((ROOT / "README.md").read_text().split())


ALL = "all"

BESIDE = (
    ("ours", "adalora-final", ALL, "AdaLoRA"),
    ("ours", "gora-style", ALL, "a method in GoRA's style"),
    ("ours", "eva", ALL, "EVA"),
    ("ours", "gradient-norm", ALL, "one-shot gradient norms"),
    ("ours", "simple", ALL, "the best simple window of top layers"),
    ("ours", "top-down", ALL, "the rule `top-down`"),
    ("ours", "rslora-32", TEXTS, "texts: rank 32 by rsLoRA on the layers that fit"),
    ("ours", "rslora-32", LABELS, "labels: the same"),
    ("ours", "all-linear-8-ckpt", TEXTS, "texts: rank 8 on all modules, checkpointed to fit"),
    ("ours", "all-linear-8-ckpt", LABELS, "labels: the same"),
    ("ours", "simple-ckpt", TEXTS, "texts: the best simple plan, checkpointed to fit"),
    ("ours-recompute", "simple-ckpt", TEXTS, "texts, layers run again: the same"),
    ("ours-recompute", "simple", LABELS, "labels, layers run again: the best simple window"),
)
"""The README's table of a budget spent well: a method, another one, on which cells, and the words for that."""


def test_what_the_readme_claims_of_a_budget_spent_well(stored_standard: Results) -> None:
    """Each row on the cells in which both have been run; some do not fit in all of them."""
    readme = (ROOT / "README.md").read_text()
    for first, second, kind, words in BESIDE:
        assert budget_row(stored_standard, first, second, kind, words) in readme
    count = len(stored_standard.shared("ours", "simple"))
    assert f"{count} of its {len(stored_standard.cells)} cells" in " ".join(readme.split())


def budget_row(results: Results, first: str, second: str, kind: str, words: str) -> str:
    """The row of a comparison: cells, gain and runs won with intervals; time of a step and bytes beside the other's."""
    shared = results.shared(first, second)
    cells = {c.name for c in shared if kind == ALL or (c.task.kind == "causal-lm") == (kind == TEXTS)}
    there = replace(results, found={key: each for key, each in results.found.items() if key[1] in cells})
    one, mine, its = compare(there, first, second), costs_of(there, first), costs_of(there, second)
    assert one is not None
    assert mine is not None
    assert its is not None
    mean, low, high = (short(100 * each, 1) for each in (one.mean.value, one.mean.low, one.mean.high))
    won = one.pairs.better
    return (
        f"| {words} | {one.cells} | {mean} % ({low} to {high}) "
        f"| {won.value:.0%} ({won.low:.0%} to {won.high:.0%}) "
        f"| {short(mine.step / its.step, 2)} | {short(mine.bytes / its.bytes, 2)} |"
    )


def short(value: float, digits: int) -> str:
    """A number as the README writes it: without the 0 before the point."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.{digits}f}")
