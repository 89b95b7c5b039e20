"""Goals of cost in a real run: plans are timed, the cheapest good one is taken, and the frontier is shown."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rankpilot
import torch
from rankpilot.agents.learned.networks import PlanValueConfig, PlanValueEnsemble, RankNetwork
from rankpilot.agents.learned.policy import LearnedPolicy
from rankpilot.agents.learned.policy_file import save_policy
from rankpilot.agents.log import DecisionLog
from rankpilot.agents.policy import lacks_room, promise
from rankpilot.agents.settings import DecisionSchedule, NetworkConfig
from rankpilot.cost.cost import TimedCost
from rankpilot.errors import ConfigError
from rankpilot.finetune.allocate import static_plan
from rankpilot.plan.goal import Goal, vote_of
from rankpilot.study.replay import redecide
from rankpilot.study.run_data import read_run
from rankpilot.study.verdict import verdict
from transformers import LlamaConfig, Trainer

from .test_time import begun, counted_times
from .tiny_runs import PLAIN, adapted, arguments, counting, ranks_of
from .tiny_runs import llama_config as llama_config

pytestmark = pytest.mark.usefixtures("narrow_plans_too")

SCHEDULE = DecisionSchedule(probe_steps=3, fractions=(0.0, 0.5))
ONCE = DecisionSchedule(probe_steps=3, fractions=(0.0,))


class Indifferent(PlanValueEnsemble):
    """Networks that expect the same loss of all plans."""

    def forward(self, plans: Any) -> torch.Tensor:
        return torch.zeros(2, 1, plans.ranks.shape[1])


@pytest.fixture
def policy() -> LearnedPolicy:
    torch.manual_seed(0)
    ensemble = Indifferent(PlanValueConfig(count=1, width=1, unit="log loss")).eval()
    return LearnedPolicy("indifferent", RankNetwork(NetworkConfig(width=8)).eval(), ensemble)


@pytest.fixture
def trainer(llama_config: LlamaConfig, tmp_path: Path) -> Trainer:
    return Trainer(adapted(llama_config), arguments(tmp_path / "run", max_steps=2), train_dataset=counting(40, 20))


@pytest.mark.parametrize("goal", ["time", "bytes"])
def test_the_cheapest_plan_is_trained(policy: LearnedPolicy, trainer: Trainer, tmp_path: Path, goal: str) -> None:
    callback = rankpilot.attach(trainer, policy, budget="90%", schedule=SCHEDULE, goal=goal, tolerance=0.02)
    trainer.train()
    log = DecisionLog(tmp_path / "run" / "decisions")
    assert len(log) == 2
    first, later = log.logged(0), log.logged(1)
    assert (first.saved[0].name, later.saved) == ("plain LoRA", ()), "what exact savers bring is known of the run"
    found = first.deliberation
    assert found is not None
    assert found.goal == Goal(goal, 0.02)  # type: ignore[arg-type]
    assert (found.seconds is None) is (goal == "bytes")
    assert isinstance(first.problem.cost, TimedCost) is (goal == "time")
    costs = found.costs if found.seconds is None else found.seconds
    assert costs is not None
    assert costs[found.plan] <= 1.01 * costs[found.may_take].min()
    ranks = first.rank_after
    np.testing.assert_array_equal(later.rank_after, ranks)
    assert 0 < ranks.sum() < 8 * len(ranks)
    figures = callback.pilot.figures()
    assert ("plan_seconds" in figures) is (goal == "time")
    assert "budget_seconds" not in figures, "nobody has set one"
    assert list(ranks_of(trainer.model).values()) == ranks.tolist()
    assert redecide(first, policy).differences == redecide(later, policy).differences == ()
    assert max(peak for _, peak in callback.peaks) <= callback.limit


def test_later_epochs_make_upper_layers_cheaper(
    policy: LearnedPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted_times(monkeypatch)
    pilot, _ = begun(tmp_path, policy=policy, goal="time")
    time, found = pilot.controller.time.time, pilot.decision.deliberation
    blocks = np.array([target.block for target in pilot.controller.targets])
    spared = np.array([time.forward[: blocks[ranks > 0].min()].sum() for ranks in found.plans])
    of_one_epoch = np.array([time.seconds(ranks) for ranks in found.plans])
    np.testing.assert_allclose(found.seconds, of_one_epoch - 2 / 3 * spared, rtol=1e-4)
    assert spared.max() > 0.1 * of_one_epoch.max()
    assert found.seconds[found.plan] <= 1.01 * found.seconds[found.may_take].min()


def test_what_is_expected_is_told_before_the_first_step(
    policy: LearnedPolicy, trainer: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rankpilot.attach(
        trainer, policy, budget="90%", schedule=ONCE, goal="bytes", tolerance=0.02, gradient_checkpointing=False
    )
    with caplog.at_level(logging.INFO, logger="rankpilot"):
        trainer.train()
    expected = "Expected beside rank 8 on all modules: log loss +0.000, surely at most +0.000."
    assert expected in caplog.text
    assert expected in verdict(read_run(tmp_path / "run")).results
    found = DecisionLog(tmp_path / "run" / "decisions").logged(0).deliberation
    assert found is not None
    bad = np.where(np.arange(len(found.plans)) == found.reference, 0, np.float32(-5))
    worse = replace(found, votes=np.repeat(bad[None], len(found.votes), axis=0))
    assert promise(worse).startswith("The goal cannot be kept: rank 8 on all modules does not fit the budget")
    plain = replace(worse, allowed=None, taken=int(np.flatnonzero(found.plan_of == found.reference)[0]))
    assert promise(plain).endswith(
        "within 0.02 (log) of the loss of rank 8 on all modules, so it is rank 8 on all modules."
    )
    assert promise(replace(plain, goal=Goal())) == "", "nothing is expected of plain LoRA beside itself"


def test_what_a_tight_budget_is_expected_to_cost_is_told(
    policy: LearnedPolicy, trainer: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rankpilot.attach(trainer, policy, budget="60%", schedule=ONCE)
    with caplog.at_level(logging.INFO, logger="rankpilot"):
        trainer.train()
    assert "Expected beside rank 8 on all modules, which does not fit: log loss +0.000." in caplog.text
    assert "makes room" not in caplog.text, "nothing is lost"
    found = DecisionLog(tmp_path / "run" / "decisions").logged(0).deliberation
    assert found is not None
    votes = np.where(np.arange(len(found.plans)) == found.plain, np.float32(vote_of(0.05)), np.float32(0))
    short = replace(found, votes=np.repeat(votes[None], len(found.votes), axis=0))
    assert promise(short) == "Expected beside rank 8 on all modules, which does not fit: log loss +0.050."
    assert lacks_room(short)
    assert promise(replace(short, allowed=None)) == "Expected beside rank 8 on all modules: log loss +0.050."
    assert promise(replace(short, plain=None)) == ""
    others = {"allowed": None}, {"plain": None}, {"goal": Goal("bytes")}, {"trained": True}
    assert not any(lacks_room(replace(short, **other)) for other in (*others, {"outside": {"depth": (0.5, 1.0, 1.0)}}))


class Spendthrift(PlanValueEnsemble):
    """Networks that expect less loss of more rank, by 5 % (log) for each rank that modules have in the mean."""

    def forward(self, plans: Any) -> torch.Tensor:
        return vote_of(0.05) * plans.ranks.double().mean(dim=-1).expand(2, 1, -1)


ROOM = "A larger budget makes room"
"""How the advice begins."""

AGAIN = ", and so do layers that run again in the backward pass, which takes time (gradient_checkpointing)"
"""How it goes on where none may do so yet, and the budget counts bytes."""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (PLAIN, f"{ROOM}{AGAIN}."),
        ({"budget": "60%"}, f"{ROOM}."),
        ({"budget": "3k params"}, f"{ROOM}."),
        ({"time": "99%"} | PLAIN, "A larger budget or time makes room."),
    ],
)
def test_what_makes_room_is_told_where_it_helps(
    policy: LearnedPolicy,
    trainer: Trainer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    words: str,
) -> None:
    counted_times(monkeypatch)
    assert policy.value_ensemble is not None
    spends = replace(policy, value_ensemble=Spendthrift(policy.value_ensemble.config).eval())
    rankpilot.attach(trainer, spends, schedule=ONCE, **{"budget": "40%"} | options)
    with caplog.at_level(logging.INFO, logger="rankpilot"):
        trainer.train()
        lines = [line for line in caplog.messages if "which does not fit" in line]
        assert len(lines) == 1
        assert lines[0].endswith(words)
        trainer.train()
    assert [line for line in caplog.messages if "which does not fit" in line] == lines, "nothing is known of the second"
    unlike = "has learned from no run like this one, so trust it less: adapters that are trained already."
    assert sum(line.endswith(unlike) for line in caplog.messages) == 1


def test_the_frontier_before_training(policy: LearnedPolicy, trainer: Trainer) -> None:
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    rows = rankpilot.frontier(trainer, budget="90%", policy=policy, schedule=SCHEDULE)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    assert [row.cost for row in rows] == sorted(row.cost for row in rows)
    assert all(row.seconds is not None and row.seconds > 0 for row in rows)
    assert [(row.name, row.fits, row.verdict) for row in rows][-1] == ("all-linear", False, "tie")
    assert sum(row.taken for row in rows) == 1
    # No layer runs again for a plan of a frontier, whose time would depend on it.
    plan = static_plan(trainer, budget="90%", policy=policy, schedule=SCHEDULE, gradient_checkpointing=False)
    assert plan.frontier is None
    assert [row.ranks.tolist() for row in rows if row.taken] == [[*plan.ranks.values()]]


def test_policies_that_show_no_frontier(trainer: Trainer) -> None:
    of_one_cost = LearnedPolicy("earlier", RankNetwork(NetworkConfig(width=8)), PlanValueEnsemble())
    for policy in ("signal-mean", of_one_cost):
        with pytest.raises(ConfigError, match=r"so a frontier needs .*leave the frontier out"):
            rankpilot.frontier(trainer, policy=policy, schedule=SCHEDULE)


def test_a_policy_folder_has_a_schedule_and_tells_plans_of_any_cost_apart(trainer: Trainer, tmp_path: Path) -> None:
    """Who decides once needs no room for signals: plain LoRA fits in what it takes itself."""
    ensemble = PlanValueEnsemble(PlanValueConfig(count=2, width=4, unit="log loss")).eval()
    folder = save_policy(tmp_path / "mine", RankNetwork(NetworkConfig(width=8)), ONCE, {}, ensemble)
    pilot = rankpilot.RankPilot(folder, goal="time", tolerance=0.03)
    assert isinstance(pilot.policy, LearnedPolicy)
    assert pilot.policy.goal == Goal("time", 0.03)
    rows = rankpilot.frontier(trainer, policy=folder, budget="100%")
    assert rows
    assert all(row.fits for row in rows), "plain LoRA would be shown as too large"
