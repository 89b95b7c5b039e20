"""Learners on the closed-form fine-tune: what each is, by hand, and that each learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.training.ppo_policy import GroupRolloutBuffer
from rankpilot.allocation.optimum import best_plan
from rankpilot.allocation.plan import uniform_ranks
from rankpilot.allocation.policy import decision_from_plan
from rankpilot.bench.training import learners, learning
from rankpilot.bench.training.closed_form import ClosedForm, Episode, share_reached
from rankpilot.bench.training.learners import Learners, main
from rankpilot.bench.training.learning import SETTINGS, LeaveOneOutBuffer, Piece, Setting, learn
from rankpilot.env.spaces import observation_space, score_space
from rankpilot.errors import ConfigError


def test_shares_of_known_plans() -> None:
    """Uniform rank is 0, the best ranks are 1, and none of their permutations is better."""
    task = ClosedForm(3)
    problem = Episode(task).controller.problem()
    best = best_plan(problem, task.worth[:, None] * np.log1p(problem.ladder.array))
    generator = np.random.default_rng(0)
    for ranks, share in ((uniform_ranks(problem), 0.0), (best, 1.0)):
        episode = Episode(task)
        reached = share_reached(task, episode, decision_from_plan(episode.observe(), ranks))
        assert share - 1e-6 <= reached < share + 0.1, "`project` spends what a plan leaves"
    for _ in range(20):
        episode = Episode(task)
        ranks = generator.permutation(best)
        assert share_reached(task, episode, decision_from_plan(episode.observe(), ranks)) <= 1.001


def filled(kind: type[GroupRolloutBuffer], rewards: list[float]) -> Any:
    """Advantages of one group of episodes of one step."""
    envs = len(rewards)
    buffer = kind(1, observation_space(2), score_space(2), "cpu", n_envs=envs, gamma=1.0, gae_lambda=1.0, group=envs)
    observed = {key: np.stack([space.sample()] * envs) for key, space in observation_space(2).items()}
    ones = torch.ones(envs)
    buffer.add(observed, np.zeros((envs, 4)), np.array(rewards), np.ones(envs), ones, ones)
    buffer.compute_returns_and_advantage(torch.zeros(envs), np.ones(envs))
    return buffer.advantages[0]


def test_advantages_of_rloo() -> None:
    """Of returns 1, 2 and 6 the first has 1 - (2 + 6) / 2."""
    np.testing.assert_allclose(filled(LeaveOneOutBuffer, [1.0, 2.0, 6.0]), [-3.0, -1.5, 4.5], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "rloo", "es"])
def test_each_learns(name: str) -> None:
    shares = learn(Piece(name, 0, 10, (1, 10)))
    assert set(shares) == {1, 10}
    assert shares[10] > 0.7 > shares[1]


def test_one_seed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(learning.SETTINGS, "tiny", Setting("es", rate=0.1))
    one, again, other = (learn(Piece("tiny", seed, 1, (1,))) for seed in (0, 0, 1))
    assert one == again
    assert one != other


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {("ppo", 0): 0.8, ("ppo", 1): 0.6, ("es", 0): 0.5, ("es", 1): 0.7}

    def known(piece: Piece) -> dict[int, float]:
        return {round_: shares[piece.name, piece.seed] + round_ / 100 for round_ in piece.told}

    monkeypatch.setattr(learners, "learn", known)
    path = tmp_path / "figures.json"
    options = ["--settings", "ppo", "es", "--rounds", "8", "--seeds", "2", "--workers", "1", "--json", str(path)]
    assert main(options) == 0
    figures = json.loads(path.read_text())
    assert figures["ppo.share_512"] == pytest.approx(0.78)
    assert figures["ppo.least_512"] == pytest.approx(0.68)
    assert figures["es.share_128"] == pytest.approx(0.62)
    assert 0.4 < figures["es.share_0"] == figures["ppo.share_0"] < 0.6, "both start as the rule"
    assert "0.780 (0.680)" in capsys.readouterr().out


def test_settings_are_what_their_names_say() -> None:
    usual = SETTINGS["ppo"]
    assert SETTINGS["ppo, one pass"] == replace(usual, epochs=1)
    assert SETTINGS["ppo, a critic as baseline"] == replace(usual, grouped=False)
    assert SETTINGS["ppo, 2 heads of attention"].network.attention_heads == 2


@pytest.mark.parametrize("options", [{"rounds": 3}, {"seeds": 0}, {"workers": 0}])
def test_values_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="--rounds is at least 4"):
        Learners(**options).chosen()  # type: ignore[arg-type]


def test_unknown_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no setting 'a2c'; there are 'ppo'"):
        Learners(settings=("a2c",)).chosen()
    assert main(["--settings", "a2c"]) == 1
    assert capsys.readouterr().err.startswith("error: There is no setting 'a2c'")
