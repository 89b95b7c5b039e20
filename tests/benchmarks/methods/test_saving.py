"""The suite "saving": fixed plans by kind and depth, and what its report makes of rows with known losses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rankpilot.cost.cost import cost_from_state
from rankpilot.lora.spec import ModuleSpec
from rankpilot.training.plan_runs import read_real_plan_runs

from benchmarks.methods import report as report
from benchmarks.methods import run
from benchmarks.methods.numbers import Results, compare, costs_of
from benchmarks.methods.plans import PLANS
from benchmarks.methods.registry import METHODS
from benchmarks.methods.rows import Work, plan_ranks, plan_text
from benchmarks.methods.saving import (
    FIXED,
    LABELS,
    NEW_TEXTS,
    OURS,
    PEERS,
    PLAIN,
    TEXTS,
    better_kind,
    kept_by_kind,
    loss_of,
    saving_blocks,
    saving_of,
    share_of_best,
)
from benchmarks.methods.study import Modules, Study
from benchmarks.methods.tasks import NEW_FAMILY, SAVING, SEEN_LAST, SUITES, Cell, Suite
from tools import make_suites

from . import made_up

ROOT = Path(__file__).parents[3]
PLAN_RUNS = ROOT / "tools" / "trials" / "more-plan-runs-0.safetensors"
KINDS = (("attn", 32, 32), ("fc", 32, 64), ("proj", 64, 32))
SPECS = [[f"h.{layer}.{name}", layer, d_in, d_out] for layer in range(4) for name, d_in, d_out in KINDS]
STATE = {
    "unit": "bytes",
    "moments": ["backward"],
    "constant": [50.0],
    "per_rank": [[1.0] * 12],
    "group_bytes": [[100.0] * 4],
    "needs": [[module // 3 <= layer for module in range(12)] for layer in range(4)],
}
MODULES = Modules(tuple(ModuleSpec(*fields) for fields in SPECS), cost_from_state(STATE), 546.0)
TASKS = (made_up.TASK, *(replace(made_up.TASK, data=data) for data in ("german", "spanish", "tales")))
SUITE = Suite(tuple(Cell(task, "150%") for task in TASKS), (1, 2), (101,), 1, methods=SAVING)
TOP_HALF = "0x6 8x6"
PARTS = [plan for plan in PLANS if plan.group == "saving"]


def plan_of(name: str) -> str:
    method = next(method for method in PARTS if method.name == name)
    return plan_text(method.plan(MODULES, "150%"))


def row_of(work: Work, gains: dict[str, float]) -> dict[str, Any]:
    """A step takes .4 of plain LoRA's, and .05 more for each adapted module; the policy takes the top half."""
    if work.kind == "costs":
        return {"modules": SPECS, "cost": STATE, "reference": 546.0, "cpu_s": 1.0}
    if work.kind == "plan":
        assert work.get("budget") == "150%"
        assert float(work.get("doubt").split()[0]) > 0, "goals of cost follow it"
        return {"plan": TOP_HALF, "predicted": 298.0, "limit": 819.0, "cpu_s": 2.0}
    row = made_up.row_of(work, gains)
    if work.kind == "step":
        row["step_ratio"] = 0.4 + 0.05 * int((plan_ranks(work.get("plan")) > 0).sum())
    return row


def results_of(gains: dict[str, float], make: Callable[[Work, dict[str, float]], dict[str, Any]] = row_of) -> Results:
    study, methods = made_up.new_study(SUITE), run.chosen_methods(SUITE, (), ())
    for cell in SUITE.cells:
        while missing := run.missing_work(study, cell, methods):
            for work in missing:
                study.rows.add(work, make(work, gains))
    return Results.of(study, methods)


@pytest.fixture(scope="module")
def stored() -> Results:
    """What the rows in the repository say of the suite."""
    return report.read_results(report.Options(suite="saving"))


@pytest.fixture(scope="module")
def stored_standard() -> Results:
    return report.read_results(report.Options(suite="standard"))


def test_plans_by_kind_and_depth() -> None:
    plans = {method.name: method.plan(MODULES, "150%").reshape(4, 3) for method in PARTS}
    assert len({plan.tobytes() for plan in plans.values()}) == len(plans) == 12
    np.testing.assert_array_equal(plans["attention-8"], [[8, 0, 0]] * 4)
    np.testing.assert_array_equal(plans["mlp-2"], [[0, 2, 2]] * 4)
    for name, layers in (
        ("top-quarter-8", [3]), ("top-half-8", [2, 3]), ("top-three-quarters-8", [1, 2, 3]),
        ("every-other-layer-8", [1, 3]), ("mlp-top-half-8", [2, 3]),
    ):  # fmt: skip
        np.testing.assert_array_equal(np.flatnonzero(plans[name].any(axis=1)), layers)
    np.testing.assert_array_equal(plans["everything-2"], 2)


def test_the_suite_has_each_task_of_the_standard_one_once() -> None:
    suite = SUITES["saving"]
    tasks = [cell.task for cell in suite.cells]
    assert len(set(tasks)) == len(tasks)
    assert set(tasks) == {*(cell.task for cell in SUITES["standard"].cells), *NEW_FAMILY, *SEEN_LAST}
    assert {cell.budget for cell in suite.cells} == {"150%"}, "plain LoRA fits"
    assert [method.name for method in run.chosen_methods(suite, (), ())] == list(SAVING)


def test_no_policy_has_learned_from_a_model_of_the_new_family() -> None:
    models = {task.model.partition("-")[0] for task in NEW_FAMILY}
    proxies = {base.partition("-")[0] for base in set().union(*make_suites.BASES.values())}
    real = {each.family.partition("-")[0] for each in read_real_plan_runs(PLAN_RUNS)}
    assert models == {"neox"}
    assert {"llama", "bert"} <= proxies
    assert {"llama", "gpt2"} <= real
    assert not models & (proxies | real)


def test_they_take_part_in_no_other_suite() -> None:
    for name, suite in SUITES.items():
        if name != "saving":
            assert not {*FIXED, *OURS} & {method.name for method in run.chosen_methods(suite, (), ())}
    assert {method.name for method in METHODS.values() if method.group == "saving"} == {*FIXED, *OURS}


def test_losses_and_costs_beside_plain_lora() -> None:
    found = saving_of(results_of({TOP_HALF: -0.02}), "ours-saves-time")
    assert found is not None
    assert (found.cells, found.kept, found.far) == (4, 0, 0)
    assert found.loss.value == pytest.approx(0.02)
    assert found.worst == pytest.approx(0.02)
    assert found.step.value == pytest.approx(0.7)
    assert found.bytes.value == pytest.approx(298 / 546)
    assert saving_of(results_of({TOP_HALF: -0.05}), "ours-saves-bytes").far == 4  # type: ignore[union-attr]


def test_each_plan_that_a_goal_chooses_is_timed() -> None:
    """One seed takes the top half, the other one plain LoRA."""

    def make(work: Work, gains: dict[str, float]) -> dict[str, Any]:
        row = row_of(work, gains)
        return {**row, "plan": "8x12"} if work.kind == "plan" and work.get("seed") == 2 else row

    found = saving_of(results_of({}, make), "ours-saves-time")
    assert found is not None
    assert found.step.value == pytest.approx((0.7 + 1.0) / 2)


def test_the_share_of_what_could_be_saved() -> None:
    """The top quarter saves .45 and keeps the loss, as the policy's top half does; all other plans lose 5 %."""
    lost = {plan_of(name): -0.05 for name in FIXED if name not in ("top-quarter-8", "top-half-8")}
    share = share_of_best(results_of(lost), "ours-saves-time")
    assert share is not None
    assert share.value == pytest.approx(0.3 / 0.45)
    nothing = share_of_best(results_of(lost | {TOP_HALF: -0.05}), "ours-saves-time")
    assert nothing is not None
    assert nothing.value == 0, "what is saved at a loss counts for nothing"
    everything = {plan_of(method.name): -0.05 for method in PARTS}
    assert share_of_best(results_of(everything), "ours-saves-time") is None, "there was nothing to save"
    whole = results_of(lost)
    few = replace(whole, found={key: each for key, each in whole.found.items() if "tales" not in key[1]})
    assert share_of_best(few, "ours-saves-time") is None, "three tasks tell no interval"


def test_the_better_kind() -> None:
    worse = results_of({plan_of("attention-8"): -0.1})
    found = better_kind(worse, "ours-saves-time")
    assert found is not None
    assert found.value == 1
    found = better_kind(results_of({TOP_HALF: -0.1}), "ours-saves-time")
    assert found is not None
    assert found.value == 0


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_suite", lambda name: SUITE)
    packed = tmp_path / "rows.parquet"
    results_of({plan_of("attention-8"): -0.04, TOP_HALF: 0.005}).study.rows.pack(packed)
    options = report.Options(suite="saving", packed=packed, output=tmp_path)
    figures = report.benchmark(options, report.Console(quiet=True))
    assert figures["ours-saves-time.loss"] == pytest.approx(-0.005)
    assert figures["attention-8.far"] == 4
    text = (tmp_path / "saving.md").read_text()
    assert "| attention-8 | 4 | +4.0 (+4.0 to +4.0) | +4.0 | 0 / 4 |" in text
    # Two modules of twelve are the fewest of all plans.
    assert "| gpt2-4x32 / tales | -0.5 (-0.5 to -0.5) | 0.70 | 0.55 | attention-top-half-8, 0.50 |" in text
    assert "new family)" not in text
    assert "`ours-saves-time` is better than the worse of `attention-8` and `mlp-8` in 100% (" in text
    assert text.count("](./saving.png)") == 1
    assert (tmp_path / "saving.png").stat().st_size > 10_000


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
    ("ours-recompute", "simple-ckpt", TEXTS, "texts, `recompute=True`: the same"),
    ("ours-recompute", "simple", LABELS, "labels, `recompute=True`: the best simple window"),
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


def test_missing_rows_are_no_results() -> None:
    study: Study = made_up.new_study(SUITE)
    found = Results.of(study, run.chosen_methods(SUITE, (), ()))
    assert saving_of(found, "mlp-8") is None
    assert share_of_best(found, "mlp-8") is None
    assert better_kind(found, "mlp-8") is None
