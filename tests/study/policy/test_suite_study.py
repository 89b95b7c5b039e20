"""A policy over a suite, held against its rows and logs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rankpilot.agents.evaluation.evaluate import LOGS, ROWS
from rankpilot.agents.evaluation.results import Row, read_rows, write_rows
from rankpilot.agents.evaluation.runs import log_folder
from rankpilot.agents.learned.policy import LearnedPolicy
from rankpilot.agents.learned.policy_file import load_policy
from rankpilot.allocation.log import DecisionLog
from rankpilot.errors import RunFolderError
from rankpilot.study.decision.shapley import GROUPS, attribute
from rankpilot.study.policy.suite_study import SuiteStudy, study_suite
from rankpilot.study.policy.traits import concentration, traits_of


@pytest.fixture(scope="module")
def study(folder: Path) -> SuiteStudy:
    return study_suite(folder, "default", load_policy("default"))


def rows_of(folder: Path, name: str) -> list[Row]:
    return [row for row in read_rows(folder / ROWS) if row.policy == name]


def test_runs_are_those_of_the_policy(folder: Path, study: SuiteStudy) -> None:
    mine = rows_of(folder, "default")
    assert list(study.rows) == mine == [run.row for run in study.runs]
    assert len(mine) == 8
    assert {len(run.decisions) for run in study.runs} == {2}
    assert study.improvement().value == pytest.approx(np.mean([row.improvement for row in mine]))
    assert study.gained().value == np.mean([row.improvement > 0 for row in mine])
    assert study.obstacle == ""


def test_leaving_uniform_rank_is_told_by_ranks(folder: Path, study: SuiteStudy) -> None:
    uniform = study_suite(folder, "uniform")
    assert uniform.leaves_uniform().value == 0
    assert uniform.moves_later() is not None
    assert uniform.moves_later().value == 0  # type: ignore[union-attr]
    by_key = {run.row.key[1:]: run.decisions[0].rank_after for run in uniform.runs}
    left = [bool((run.decisions[0].rank_after != by_key[run.row.key[1:]]).any()) for run in study.runs]
    assert [run.leaves_uniform for run in study.runs] == left
    assert study.leaves_uniform().value == np.mean(left)
    later = [run.decisions[1] for run in study.runs]
    moved = [bool((each.rank_before != each.rank_after).any()) for each in later]
    assert study.moves_later().value == np.mean(moved)  # type: ignore[union-attr]


def test_drivers_are_shapley_values_of_first_decisions(folder: Path, study: SuiteStudy) -> None:
    policy = load_policy("default")
    assert isinstance(policy, LearnedPolicy)
    found = []
    for row in rows_of(folder, "default"):
        known = attribute(DecisionLog(log_folder(folder / LOGS, row.key)).logged(0), policy)
        assert known
        found.append(known.bound)
    sizes, means = np.abs(found).mean(axis=0), np.mean(found, axis=0)
    drivers = study.drivers()
    assert [driver.name for driver in drivers] == [[*GROUPS][place] for place in np.argsort(-sizes, kind="stable")]
    for driver in drivers:
        place = [*GROUPS].index(driver.name)
        assert driver.size.value == pytest.approx(sizes[place])
        assert driver.size.low <= driver.size.value <= driver.size.high
        assert driver.mean == pytest.approx(means[place])


def test_worth_is_against_the_same_task_and_seed(folder: Path, study: SuiteStudy) -> None:
    assert set(study.worth()) == {"static", "shuffled"}
    assert set(study.beside()) == {"uniform", "top-half"}
    mine = {row.key[1:]: row.improvement for row in study.rows}
    for name, found in {"default static": study.worth()["static"], "top-half": study.beside()["top-half"]}.items():
        gaps = [mine[row.key[1:]] - row.improvement for row in rows_of(folder, name)]
        assert len(gaps) == 8
        assert found.value == pytest.approx(np.mean(gaps))
    assert study.against("nobody") is None


def test_parts_are_by_kind_of_task(study: SuiteStudy) -> None:
    parts = {part.name: part for part in study.parts()}
    assert set(parts) == {"budget in bytes", "budget in parameters"}, "all tasks are planted, on one base"
    counted = [row.improvement for row in study.rows if row.cost_kind == "parameters"]
    found = parts["budget in parameters"]
    assert (found.runs, found.tasks) == (6, 3)
    assert found.improvement
    assert found.improvement.value == pytest.approx(np.mean(counted))
    assert parts["budget in bytes"].improvement is None, "one task tells no interval"


def test_worst_runs_and_their_traits(study: SuiteStudy) -> None:
    (worst,) = study.worst()
    assert worst.row.improvement == min(row.improvement for row in study.rows)
    values = [traits_of(run.row, run.decisions)["expected gain"] for run in study.runs]
    place = [*study.runs].index(worst)
    trait = next(trait for trait in study.traits() if trait.name == "expected gain")
    rest = np.delete(values, place)
    assert trait.worst == pytest.approx(values[place])
    assert trait.rest == pytest.approx(rest.mean())
    assert trait.distance.value == pytest.approx((values[place] - rest.mean()) / np.std(values))
    names = {trait.name for trait in study.traits()}
    assert "budget counts bytes" in names
    assert "planted task" not in names, "it is the same in all runs"


def test_traits_of_one_run(study: SuiteStudy) -> None:
    run = study.runs[0]
    first = run.decisions[0]
    ranks = {name: int(rank) for name, rank in zip(first.observation.names, first.rank_after, strict=True)}
    found = traits_of(run.row, run.decisions)
    adapted = [name for name, rank in ranks.items() if rank]
    assert found["highest rank"] == max(ranks.values())
    assert found["share of modules adapted"] == len(adapted) / len(ranks)
    layers = {name.split("layers.")[1].split(".")[0] for name in adapted}
    assert found["share of layers adapted"] == len(layers) / 4
    assert found["budget, share of plain LoRA"] == 0.4
    votes = first.deliberation
    assert votes is not None
    assert found["expected gain"] == pytest.approx(np.mean(votes.votes[:, votes.plan]))
    assert found["spread of the votes"] == pytest.approx(np.std(votes.votes[:, votes.plan]))
    assert concentration(np.array([4, 0, 0, 0, 0, 0, 0, 0, 0, 12] * 2)) == 24 / 32
    assert concentration(np.zeros(3, dtype=np.int64)) == 0


def test_promise_counts_runs_that_left_uniform_rank(study: SuiteStudy) -> None:
    found, left = study.promise(), [run for run in study.runs if run.leaves_uniform]
    assert len(left) >= 6
    assert found
    assert sum(third.runs for third in found.thirds) == len(left)
    assert found.gained.value == np.mean([run.row.improvement > 0 for run in left])


def test_rules_are_studied_without_votes(folder: Path) -> None:
    uniform = study_suite(folder, "uniform", load_policy("default"))
    assert uniform.drivers() == []
    assert uniform.promise() is None
    assert "weighs no plans" in uniform.obstacle
    assert "expected gain" not in {trait.name for trait in uniform.traits()}


def test_networks_that_did_not_decide(folder: Path) -> None:
    policy = load_policy("default")
    assert isinstance(policy, LearnedPolicy)
    for given, obstacle in (
        (None, "the networks of default are not at hand"),
        (replace(policy, sha256="another"), "others than those that decided"),
        (load_policy("signal-mean"), "signal-mean, which was given, has no value networks"),
    ):
        study = study_suite(folder, "default", given)
        assert obstacle in study.obstacle
        assert study.drivers() == []
        assert study.promise()


def test_a_run_without_a_log_counts_in_the_gain_alone(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    row = rows_of(folder, "default")[0]
    shutil.rmtree(log_folder(tmp_path / "copy" / LOGS, row.key))
    study = study_suite(tmp_path / "copy", "default")
    assert (len(study.rows), len(study.runs)) == (8, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody", "holds no runs of 'nobody'; it holds those of: default, uniform, default static"),
        ("top-half", "holds decision logs of 'top-half' on 0 tasks; intervals need at least 2"),
    ],
)
def test_policies_that_cannot_be_studied(folder: Path, name: str, message: str) -> None:
    with pytest.raises(RunFolderError, match=message):
        study_suite(folder, name)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="pass the output folder of `rankpilot evaluate --logs`"):
        study_suite(tmp_path, "default")


def test_names_that_are_folders(folder: Path, tmp_path: Path) -> None:
    """Runs at final ranks have the name of the log's folder, in which blanks are hyphens."""
    rows: list[Any] = read_rows(folder / ROWS)
    named = {"default": "default exploring at 2", "default static": "default-exploring-at-2 static"}
    write_rows(tmp_path / ROWS, [replace(row, policy=named.get(row.policy, row.policy)) for row in rows])
    shutil.copytree(folder / LOGS / "default", tmp_path / LOGS / "default-exploring-at-2")
    assert set(study_suite(tmp_path, "default exploring at 2").worth()) == {"static"}
