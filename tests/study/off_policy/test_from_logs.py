"""From the logs of a policy that explored to estimates of others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rankpilot.agents.evaluation.evaluate import LOGS, ROWS
from rankpilot.agents.evaluation.results import Row
from rankpilot.agents.evaluation.runs import compare
from rankpilot.agents.learned.exploring import exploring
from rankpilot.agents.learned.policy_file import load_policy
from rankpilot.agents.rules import RULES, find_rule
from rankpilot.agents.rules.random import RandomScores
from rankpilot.allocation.schedule import DecisionSchedule
from rankpilot.cli import main as cli
from rankpilot.env.tasks.finetune import Reference
from rankpilot.env.tasks.proxy_task import ProxyTask
from rankpilot.errors import RunFolderError
from rankpilot.study.off_policy.from_logs import logged_suite

BEHAVIOUR = "default exploring at 2"
SIZES: dict[str, Any] = {"base": "llama-4x32", "steps": 8, "batch_size": 2, "length": 8, "eval_rows": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation: six tasks, two seeds each, of a policy that explores and one that does not."""
    folder = tmp_path_factory.mktemp("evaluation")
    one = ProxyTask("planted", 1, corpus="documentation", budget=0.4, reference=Reference(0.3, 0.2, 0.1), **SIZES)
    tasks = [replace(one, seed=seed) for seed in range(1, 7)]
    policies = [exploring(load_policy("default"), 2.0), RULES["signal-mean"]]
    schedule = DecisionSchedule(probe_steps=2, fractions=(0.0,))
    compare(policies, tasks, schedule, workers=1, seeds=2, file=folder / ROWS, logs=folder / LOGS)
    return folder


def test_choices_are_those_of_the_log(folder: Path) -> None:
    suite = logged_suite(folder, BEHAVIOUR)
    assert len(suite.decisions) == 12
    assert len(set(suite.choices.tasks)) == 6
    assert suite.choices.probabilities is not None
    assert suite.choices.predictions is not None
    for number, logged in enumerate(suite.decisions):
        deliberation, start = logged.deliberation, suite.choices.starts[number]
        assert deliberation is not None
        plans = slice(start, start + suite.choices.plans[number])
        np.testing.assert_array_equal(suite.choices.probabilities[plans], deliberation.probabilities)
        np.testing.assert_array_equal(deliberation.plans[suite.choices.chosen[number]], logged.rank_after)


def test_outcomes_are_gains_over_uniform(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankpilot.agents.evaluation.results import read_rows
    from rankpilot.study.off_policy import from_logs

    rows = [row for row in read_rows(folder / ROWS) if row.policy == BEHAVIOUR]
    gains = [np.log(row.uniform_loss / row.loss) for row in rows if row.loss]
    np.testing.assert_allclose(logged_suite(folder, BEHAVIOUR).choices.outcomes, gains)

    def failed(path: Path) -> list[Row]:
        return [replace(row, loss=None, failed=True) for row in read_rows(path)]

    monkeypatch.setattr(from_logs, "read_rows", failed)
    nothing = [np.log(row.uniform_loss / row.initial_loss) for row in rows]
    np.testing.assert_allclose(logged_suite(folder, BEHAVIOUR).choices.outcomes, nothing)


def test_targets_are_what_policies_would_take(folder: Path) -> None:
    suite = logged_suite(folder, BEHAVIOUR)
    uniform = suite.target(find_rule("uniform"))
    assert uniform is not None
    taken = np.flatnonzero(uniform.probabilities)
    np.testing.assert_array_equal(taken, suite.choices.starts, "the reference comes first")
    default = suite.target(load_policy("default"))
    assert default is not None
    best = [each.deliberation.favourite for each in suite.decisions if each.deliberation]
    np.testing.assert_array_equal(np.flatnonzero(default.probabilities) - suite.choices.starts, best)
    assert suite.target(RandomScores()) is None, "its plans could not be drawn"


def test_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.run(["study", "off-policy", str(folder), "--behaviour", BEHAVIOUR, "--policies", "uniform", "random"]) == 0
    )
    out = " ".join(capsys.readouterr().out.split())
    assert "random takes plans that default exploring at 2 could not draw: no estimate." in out
    assert "12 first decisions of default exploring at 2" in out
    assert "uniform" in out
    assert "self-normalised" in out
    assert "restricted choice" not in out, "each run saw data of its own"
    assert cli.run(["study", "off-policy", str(folder), "--behaviour", BEHAVIOUR, "--policies"]) == 1
    assert "There is no policy to estimate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [("nobody", "holds no runs of 'nobody'"), ("signal-mean", "holds no decision of 'signal-mean'")],
)
def test_runs_that_cannot_be_judged(folder: Path, name: str, message: str) -> None:
    with pytest.raises(RunFolderError, match=message):
        logged_suite(folder, name)
