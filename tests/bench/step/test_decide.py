"""The benchmark of decision times: what is timed is what decides, on a model that was really priced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.learned.network import Action, RankNetwork
from rankpilot.agents.learned.plan_value import PlanValueEnsemble
from rankpilot.agents.learned.policy import LearnedPolicy
from rankpilot.agents.learned.policy_file import save_policy
from rankpilot.agents.rules import find_rule
from rankpilot.allocation.actions import PLACEMENT
from rankpilot.allocation.plan import project, uniform_ranks
from rankpilot.allocation.policy import Decision
from rankpilot.allocation.schedule import DecisionSchedule
from rankpilot.bench.step import decide
from rankpilot.bench.step.decide import RULE, deciders, observation_of
from rankpilot.cli import main as cli


@pytest.fixture(scope="module")
def observation() -> Any:
    return observation_of(2)


def learned(critics: bool) -> LearnedPolicy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judges = PlanValueEnsemble().eval()
    return LearnedPolicy("mine", RankNetwork().eval(), judges if critics else None)


def test_a_first_decision_with_something_to_decide(observation: Any) -> None:
    problem = observation.problem
    assert len(observation.modules) == 14
    assert problem.max_step is None
    uniform = uniform_ranks(problem)
    assert uniform.any()
    assert not problem.fits(np.minimum(8, problem.max_ranks))


def test_what_is_timed_decides(observation: Any) -> None:
    policy = learned(critics=True)
    results = {name: call(0) for name, call in deciders(policy, observation).items()}
    assert list(results) == [RULE, "network", "actor", "policy"]
    expected = {
        RULE: find_rule(RULE).decide(observation),
        "actor": learned(critics=False).decide(observation),
        "policy": policy.decide(observation),
    }
    for name, decision in expected.items():
        decided = results[name]
        assert isinstance(decided, Decision)
        np.testing.assert_array_equal(decided.ranks, decision.ranks)
        assert observation.problem.fits(project(observation.problem, decided.ranks, decided.scores).ranks)
    assert isinstance(results["network"], Action)
    assert results["network"].mean.shape == (1, 14 + len(PLACEMENT))
    assert "policy" not in deciders(learned(critics=False), observation)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide, "QUICK", (1, 2))
    path, threads, trained = tmp_path / "figures.json", torch.get_num_threads(), learned(critics=True)
    save_policy(tmp_path / "policy", trained.network, DecisionSchedule(), {"name": "mine"}, trained.value_ensemble)
    assert cli.run(["bench", "decide", "--quick", "--policy", str(tmp_path / "policy"), "--json", str(path)]) == 0
    assert torch.get_num_threads() == threads
    figures = json.loads(path.read_text())
    for count in (7, 14):
        for name in (RULE, "network", "actor", "policy"):
            assert figures[f"modules_{count}.{name}_ms"] > 0
        ratios = [figures[f"modules_{count}.{name}_ratio"] for name in ("network", "actor", "policy")]
        assert all(ratio > 0 for ratio in ratios)
        assert ratios[2] > 1, "53 plans take longer than one"
    assert "One first decision" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "signal-mean"], "is a rule"),
        (["--policy", "nowhere/at/all"], "no policy folder"),
        (["--json", "."], "names the folder"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "decide", "--quick", *arguments]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
