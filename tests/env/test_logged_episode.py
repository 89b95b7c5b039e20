"""Decisions of an episode can be logged and taken again, as those of a fine-tune can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rankpilot.agents.log import DecisionLog, DecisionRecord
from rankpilot.agents.rules import SignalRule
from rankpilot.agents.settings import DecisionSchedule
from rankpilot.env.episode import Episode
from rankpilot.env.proxy_finetune import fine_tune_of
from rankpilot.env.proxy_task import ProxyTask
from rankpilot.plan.plan import project


@pytest.mark.parametrize("unit", ["bytes", "parameters"])
def test_logged_decisions_of_an_episode_can_be_taken_again(
    make_task: Callable[..., ProxyTask], schedule: DecisionSchedule, tmp_path: Path, unit: Any
) -> None:
    episode, policy = Episode(fine_tune_of(make_task(unit=unit)), schedule), SignalRule()
    log, loss, ranks = DecisionLog(tmp_path), None, []
    while episode.step < episode.task.steps:
        observation, step = episode.observe(loss), episode.step
        decision = policy.decide(observation)
        plan = episode.apply(decision)
        log.append(
            DecisionRecord.of(
                episode.controller, observation, decision, plan, policy=policy, number=len(log), step=step, loss=loss
            )
        )
        ranks.append(plan.ranks.tolist())
        loss = episode.advance()
    table = log.to_pandas()
    for number, expected in enumerate(ranks):
        here = table[table["decision"] == number]
        plan = project(log.logged(number).problem, here["rank_wanted"].to_numpy(), here["score"].to_numpy())
        assert plan.ranks.tolist() == here["rank_after"].tolist() == expected
        assert plan.clipped.tolist() == here["rank_clipped"].tolist()
    assert set(table["unit"].tolist()) == {unit}
    assert set(table["policy"].tolist()) == {policy.name}
    assert table["policy_sha256"].isna().sum() == len(table)
    assert table["loss"].isna().sum() == len(table) // len(ranks), "none before the first decision"
