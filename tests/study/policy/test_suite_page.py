"""The data of the page on a policy over a suite, and its words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rankpilot.agents.learned.policy_file import load_policy
from rankpilot.common.statistics import Estimate
from rankpilot.study.policy import suite_words
from rankpilot.study.policy.suite_figures import Promise
from rankpilot.study.policy.suite_page import suite_data, suite_html, write_suite_page
from rankpilot.study.policy.suite_study import SuiteStudy, study_suite


@pytest.fixture(scope="module")
def study(folder: Path) -> SuiteStudy:
    return study_suite(folder, "default", load_policy("default"))


@pytest.fixture(scope="module")
def data(study: SuiteStudy) -> dict[str, Any]:
    return suite_data(study)


def test_the_data_are_json(data: dict[str, Any]) -> None:
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert (data["rows"], data["runs"], data["tasks"]) == (8, 8, 4)
    assert data["drivers"][0].keys() == {"name", "size", "mean"}
    assert "the actor's scores" in {driver["name"] for driver in data["drivers"]}


def test_the_worst_run_tells_its_plan_and_why(study: SuiteStudy, data: dict[str, Any]) -> None:
    (shown,), (run,) = data["worst"], study.worst()
    first = run.decisions[0]
    assert (shown["task"], shown["seed"], shown["improvement"]) == (run.row.task, run.row.seed, run.row.improvement)
    plan = shown["plan"]
    assert plan["layers"] == [3, 2, 1, 0]
    ranks = dict(zip(first.observation.names, first.rank_after.tolist(), strict=True))
    name = next(name for name in ranks if "layers.3." in name and name.endswith("q_proj"))
    assert plan["ranks"][0][plan["kinds"].index("q_proj")] == ranks[name]
    assert sum(rank for layer in plan["ranks"] for rank in layer) == sum(ranks.values())
    votes = first.deliberation
    assert votes is not None
    taken = next(plan for plan in shown["explanation"]["plans"] if plan["plan"] == votes.plan)
    assert taken["mean"] == pytest.approx(np.mean(votes.votes[:, votes.plan]))
    assert data["sentences"]["unit_of_votes"] == shown["explanation"]["unit_of_votes"]
    groups = shown["explanation"]["shapley"]["groups"]
    np.testing.assert_allclose([group["value"] for group in groups], run.parts, atol=1e-5)
    assert [each["step"] for each in shown["later"]] == [logged.step for logged in run.decisions[1:]]
    assert (study.folder / shown["log"]).is_dir()


def test_words_follow_the_figures(study: SuiteStudy, data: dict[str, Any]) -> None:
    lead, counts, leaves, drivers, static, shuffled = data["sentences"]["verdict"]
    gain = study.improvement()
    assert f"is {gain.value:+.2f} of the headroom".replace("-", "\N{MINUS SIGN}") in lead
    assert lead.endswith("decides nothing.") == (gain.low <= 0 <= gain.high)
    assert "of 8 runs on 4 tasks end better" in counts
    assert leaves.startswith(f"It leaves uniform rank at the start of {100 * study.leaves_uniform().value:.0f} %")
    largest = study.drivers()[0].name
    assert f"in the unit of votes: {suite_words.driver_name(largest)} (" in drivers
    for how, sentence in (("static", static), ("shuffled", shuffled)):
        worth = study.worth()[how]
        assert f"{worth.value:+.2f} of the headroom".replace("-", "\N{MINUS SIGN}") in sentence
        assert sentence.endswith("decides nothing.") == (worth.low <= 0 <= worth.high)


def test_words_tell_what_was_not_run(study: SuiteStudy) -> None:
    words = suite_words.worth(replace(study, others={}))
    assert f"`rankpilot evaluate static:{study.folder / 'logs' / 'default'} --output {study.folder}" in words["static"]
    assert "its worth is not known" in words["shuffled"]
    assert "are not at hand." in suite_words.verdict(study_suite(study.folder, "default"))[3]


def test_words_tell_failed_and_unlogged_runs(study: SuiteStudy) -> None:
    rows = [replace(study.rows[0], failed=True, loss=None, improvement=-3.0), *study.rows[1:]]
    counts = suite_words.verdict(replace(study, rows=tuple(rows), runs=study.runs[1:]))[1]
    assert "1 run failed. 1 run without a decision log counted in these two figures alone." in counts


@pytest.mark.parametrize(
    ("claimed", "correlation", "claim", "follows"),
    [
        (0.98, Estimate(0.3, 0.1, 0.5), "the votes claim too much.", "runs gain more where more is expected."),
        (0.70, Estimate(-0.3, -0.5, -0.1), "that fits.", "runs gain less where more is expected."),
        (0.20, Estimate(0.1, -0.1, 0.3), "the votes claim too little.", "this decides nothing."),
    ],
)
def test_promise_in_words(claimed: float, correlation: Estimate, claim: str, follows: str) -> None:
    first, second = suite_words.promise(Promise(correlation, claimed, Estimate(0.7, 0.6, 0.8), ()))
    assert "70 % of them did (95 % interval 60 to 80 %)" in first
    assert first.endswith(claim)
    assert second.endswith(follows)


def test_equal_data_give_equal_bytes(data: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_suite_page(data, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes() == suite_html(data).encode()
