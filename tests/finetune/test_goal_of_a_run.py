"""Goals of cost in a real run: plans are timed, and the cheapest good one is taken."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rankpilot
from rankpilot.agents.policy_file import GroupNetwork, NetworkConfig, save_policy
from rankpilot.common.errors import ConfigError
from rankpilot.decide.chooser import PlanChooser
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.plan.goal import Goal
from rankpilot.decide.plan.worth import FEATURES, PlanWorth
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.study.replay import redecide
from rankpilot.study.run_data import read_run
from rankpilot.study.verdict import verdict
from transformers import LlamaConfig, Trainer

from .tiny_runs import PLAIN, adapted, arguments, counting, ranks_of
from .tiny_runs import llama_config as llama_config

SCHEDULE = DecisionSchedule(probe_steps=3, fractions=(0.0, 0.5))
ONCE = DecisionSchedule(probe_steps=3, fractions=(0.0,))


def expecting(**effects: float) -> PlanChooser:
    """A policy that knows these effects for sure, in log loss, and no others."""
    known = [effects.get(name.replace(" ", "_"), 0.0) for name in FEATURES]
    return PlanChooser("sure", worth=PlanWorth(np.array(known), np.zeros((len(FEATURES), len(FEATURES))), 0.0))


@pytest.fixture
def policy() -> PlanChooser:
    """It expects the same loss of all plans."""
    return expecting()


@pytest.fixture
def trainer(llama_config: LlamaConfig, tmp_path: Path) -> Trainer:
    return Trainer(adapted(llama_config), arguments(tmp_path / "run", max_steps=2), train_dataset=counting(40, 20))


@pytest.mark.parametrize("goal", ["time", "bytes"])
def test_the_cheapest_plan_is_trained(policy: PlanChooser, trainer: Trainer, tmp_path: Path, goal: str) -> None:
    callback = rankpilot.attach(trainer, policy, budget="90%", schedule=SCHEDULE, goal=goal, tolerance=0.02)
    trainer.train()
    log = DecisionLog(tmp_path / "run" / "decisions")
    assert len(log) == 2
    first, later = log.logged(0), log.logged(1)
    assert (first.saved[0].name, later.saved) == ("plain LoRA", ()), "what exact savers bring is known of the run"
    found = first.choice
    assert found is not None
    assert found.goal == Goal(goal, 0.02)  # type: ignore[arg-type]
    assert (found.seconds is None) is (goal == "bytes")
    assert (first.problem.time is None) is (goal == "bytes")
    costs = found.costs if found.seconds is None else found.seconds
    assert costs[found.taken] <= 1.01 * costs[found.fits].min()
    ranks = first.rank_after
    np.testing.assert_array_equal(later.rank_after, ranks)
    assert 0 < ranks.sum() < 8 * len(ranks)
    figures = callback.pilot.figures()
    assert ("plan_time" in figures) is (goal == "time")
    assert list(ranks_of(trainer.model).values()) == ranks.tolist()
    assert redecide(first, replace(policy, goal=found.goal)).differences == redecide(later, policy).differences == ()
    assert max(peak for _, peak in callback.peaks) <= callback.limit


def test_what_is_expected_is_told_before_the_first_step(
    policy: PlanChooser, trainer: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rankpilot.attach(
        trainer,
        policy,
        budget="90%",
        schedule=ONCE,
        goal="bytes",
        tolerance=0.02,
        gradient_checkpointing=False,
        parts="off",  # in parts, rank 8 on all modules fits
    )
    with caplog.at_level(logging.INFO, logger="rankpilot"):
        trainer.train()
    expected = "Expected versus rank 8 on all modules, which does not fit: loss +0.0 %, very likely at most +0.0 %."
    assert expected in caplog.text
    assert expected in verdict(read_run(tmp_path / "run")).results


ROOM = "A larger budget would help"
"""How the advice begins."""

AGAIN = ", as does gradient checkpointing, which takes time"
"""How it goes on where none may do so yet, and the budget counts bytes."""


def test_no_larger_budget_is_advised_where_bounds_leave_no_room(
    trainer: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    spends = expecting(few_modules=0.1, rank_of_MLP_modules=-0.1, rank_of_attention_modules=-0.1)
    rankpilot.attach(trainer, spends, schedule=ONCE, budget="400%", bounds=dict.fromkeys(names, 1))
    with caplog.at_level(logging.INFO, logger="rankpilot"):
        trainer.train()
    line = next(line for line in caplog.messages if "which does not fit" in line)
    assert ROOM not in line
    assert "bounds" in line


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (PLAIN, f"{ROOM}{AGAIN}."),
        ({"budget": "60%"}, f"{ROOM}."),
        ({"budget": "3k params"}, f"{ROOM}."),
    ],
)
def test_what_makes_room_is_told_where_it_helps(
    trainer: Trainer,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    words: str,
) -> None:
    spends = expecting(few_modules=0.1, rank_of_MLP_modules=-0.1, rank_of_attention_modules=-0.1)
    limits: dict[str, Any] = {"budget": "40%", "parts": "off"}  # in parts, rank 8 on all modules fits
    rankpilot.attach(trainer, spends, schedule=ONCE, **limits | options)
    with caplog.at_level(logging.INFO, logger="rankpilot"):
        trainer.train()
        lines = [line for line in caplog.messages if "which does not fit" in line]
        assert len(lines) == 1
        assert lines[0].endswith(words)
        trainer.train()
    unlike = "are less reliable here: its adapters are already trained"
    assert sum(unlike in line for line in caplog.messages) == 1, "the second run"


def test_policies_that_expect_nothing(trainer: Trainer, tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "mine", GroupNetwork(NetworkConfig(width=8)), ONCE, {})
    for policy in ("signal-mean", folder):
        with pytest.raises(ConfigError, match=r"so goal='time' requires policy='default'.* use goal='quality'"):
            rankpilot.RankPilot(policy, goal="time")


def test_the_policy_that_ships_decides_once(trainer: Trainer) -> None:
    """Who decides once needs no room for signals: plain LoRA fits in what it takes itself."""
    pilot = rankpilot.RankPilot(goal="time", tolerance=0.03)
    assert isinstance(pilot.policy, PlanChooser)
    assert (pilot.policy.goal, pilot.schedule.fractions) == (Goal("time", 0.03), (0.0,))
