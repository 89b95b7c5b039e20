"""Stacked episodes: those of one PEFT model each, whatever runs beside them; budgets that move; runs that break."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.common.errors import ConfigError
from rankpilot.decide.groups import GROUP_RULES
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.plan.rate import RULE
from rankpilot.decide.policy import Decision
from rankpilot.decide.rate_control import CHANGES, UNDO
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env.bases import adapted_base
from rankpilot.env.stack.episodes import StackedEpisodes
from rankpilot.env.task_data import load_task
from rankpilot.env.tasks import FineTuneTask
from rankpilot.finetune.controlled_rate import alignment
from rankpilot.lora.adapters import PeftAdapters
from rankpilot.lora.resize import reset_adapters
from rankpilot.lora.spec import REFERENCE_RANK

from ...cases import first_cases

MakeTask = Callable[..., FineTuneTask]
SCHEDULE = DecisionSchedule(probe_steps=3, fractions=(0.0, 0.25, 0.5, 0.75), max_step=10)


def scripted(turn: int, count: int) -> Decision:
    """Ranks that rise and fall, and a rate that does."""
    ranks = np.random.default_rng(turn).choice([0, 1, 2, 4], size=count)
    return Decision(ranks.astype(np.int64), np.zeros(count), exact=True, change=(0, 5, 2, 0)[turn])


def by_peft(task: FineTuneTask) -> tuple[list[float], list[float], float]:
    """Losses of the steps, alignments, and the held-out loss of a run that PEFT's model and torch's AdamW make."""
    model, targets = adapted_base(task.base)
    adapters, data, moved = PeftAdapters(model, targets), load_task(task), 0.0
    reset_adapters(targets, 1, task.seed)
    factors = [weight for target in targets for weight in (target.weight_a, target.weight_b)]
    optimizer = torch.optim.AdamW(factors, weight_decay=0.0)
    plain = np.array([target.scaling_at(REFERENCE_RANK) for target in targets])
    losses, aligned, at = list[float](), list[float](), SCHEDULE.steps(task.steps)
    for step in range(task.steps):
        if step in at:
            decision = scripted(at.index(step), len(targets))
            adapters.set_ranks(decision.ranks, optimizer, seed=task.seed, step=step)
            moved += CHANGES[decision.change] if step else 0.0
            scales = np.array([target.scaling for target in targets])
            factor = RULE.factor(decision.ranks, scales, plain)
        (loss,) = data.train_losses_of(model(input_ids=data.inputs[step]).logits, step)
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([each for each in factors if each.grad is not None], 1.0)
        aligned.append(float(alignment(optimizer, targets)))
        for group in optimizer.param_groups:
            group["lr"] = task.learning_rate * 2 ** (task.offset + moved) * factor * task.schedule(step)
        optimizer.step()
        optimizer.zero_grad()
    return losses, aligned, data.held_out_loss(model)


@pytest.mark.parametrize("base", first_cases(1, ["llama-4x32", "bert-4x32", "gpt2-4x32"]))
def test_an_episode_is_the_run_of_a_peft_model(make_task: MakeTask, base: str) -> None:
    task = make_task("text", 5, base=base, mean_rank=8.0, offset=-1.0, warm_up=0.1)
    losses, aligned, held_out = by_peft(task)
    episodes = StackedEpisodes(base, 2, SCHEDULE)
    episodes.begin({0: task, 1: make_task("text", 6, base=base, mean_rank=2.0)})
    at = (*SCHEDULE.steps(task.steps), task.steps)
    for turn, (start, end) in enumerate(pairwise(at)):
        episode = episodes.under_way[0]
        decision = scripted(turn, len(episode.applier.targets))
        episodes.step({0: decision, 1: GROUP_RULES["left-alone"].decide(episodes.under_way[1].observation)})
        assert episode.record.losses == pytest.approx(losses[start:end], rel=2e-3)
        assert episode.record.alignments == pytest.approx(aligned[max(start, 1) : end], abs=0.05)
    assert episodes.over
    assert episodes.held_out()[0] == pytest.approx(held_out, rel=2e-3)


def test_an_episode_does_not_notice_its_neighbours(make_task: MakeTask) -> None:
    task, other = make_task("text", 5, mean_rank=0.5), make_task("planted", 6, mean_rank=4.0, moves=((0.3, 0.5),))
    rule = GROUP_RULES["union"]

    def losses(*tasks: FineTuneTask) -> tuple[float, Any]:
        episodes = StackedEpisodes(task.base, len(tasks), rule.schedule)
        episodes.begin(dict(enumerate(tasks)))
        found = episodes.play(dict.fromkeys(range(len(tasks)), rule))
        return found[tasks.index(task)], episodes.under_way[tasks.index(task)].applier.ranks.tolist()

    alone = losses(task)
    assert losses(task, other) == alone
    assert losses(other, task) == alone


def test_a_budget_that_falls_shrinks_the_plan_and_one_that_rises_leaves_room(make_task: MakeTask) -> None:
    task = make_task("text", 5, mean_rank=2.0, moves=((0.3, 0.5), (0.7, 1.0)))
    episodes = StackedEpisodes(task.base, 1, SCHEDULE)
    episodes.begin({0: task})
    costs = []
    while not episodes.over:
        episode = episodes.under_way[0]
        problem = episode.observation.problem
        costs.append(float(problem.cost.per_rank[0] @ episode.applier.ranks) / problem.limit)
        assert episode.applier.fits() or not episode.applier.clock.taken
        episodes.step({0: GROUP_RULES["left-alone"].decide(episode.observation)})
    assert max(costs[1:]) <= 1.0
    assert costs[-1] <= 0.55, "the plan of half the budget, in all of it"


def test_an_undo_puts_adapters_and_moments_back(make_task: MakeTask) -> None:
    task = make_task("text", 5, mean_rank=1.0)
    episodes = StackedEpisodes(task.base, 1, SCHEDULE)
    episodes.begin({0: task})
    episodes.step({0: GROUP_RULES["left-alone"].decide(episodes.under_way[0].observation)})
    start = episodes.under_way[0].copy
    assert start is not None
    kept = GROUP_RULES["left-alone"].decide(episodes.under_way[0].observation)
    before = episodes._adapters.weights.clone()
    count, decision = episodes.under_way[0].record.step, Decision(kept.ranks, kept.scores, exact=True, change=UNDO)
    trained: list[Any] = []
    episodes._train = lambda running: trained.append(episodes._adapters.copy_run(0))  # type: ignore[method-assign]
    episodes.step({0: decision})
    assert episodes.under_way[0].record.moved == CHANGES[UNDO]
    assert episodes.under_way[0].record.step == count
    assert not torch.equal(before, episodes._adapters.weights)
    assert all(torch.equal(a, b) for a, b in zip(trained[0].parts, start.parts, strict=True))


def test_a_run_that_breaks_goes_back_at_half_the_rate_and_one_that_breaks_for_good_is_over(make_task: MakeTask) -> None:
    broken, sound = make_task("text", 5, learning_rate=1e30), make_task("text", 6)
    episodes = StackedEpisodes(broken.base, 2, SCHEDULE)
    episodes.begin({0: broken, 1: sound})
    losses = episodes.play(dict.fromkeys((0, 1), GROUP_RULES["left-alone"]))
    assert losses[0] == float("inf")
    assert np.isfinite(losses[1])
    assert episodes.under_way[0].record.moved < 0


def test_decisions_are_logged_as_those_of_a_run(make_task: MakeTask, tmp_path: Path) -> None:
    task, rule = make_task("text", 5), GROUP_RULES["union"]
    episodes = StackedEpisodes(task.base, 1, rule.schedule)
    log = DecisionLog(tmp_path / "log")
    episodes.begin({0: task}, {0: (log, rule)})
    episodes.play({0: rule})
    records = log.read()
    assert [record.step for record in records] == list(rule.schedule.steps(task.steps))
    assert (records[-1].rank_after == episodes.under_way[0].applier.ranks).all()
    for record in records:
        again = rule.decide(record.observation)
        assert (again.ranks == record.rank_wanted).all()
        assert again.change == record.decision.change


def test_tasks_that_cannot_be_stacked(make_task: MakeTask) -> None:
    episodes = StackedEpisodes("llama-4x32", 2, SCHEDULE)
    with pytest.raises(ConfigError, match="Stacked tasks must share the base llama-4x32"):
        episodes.begin({0: make_task("text", 1, base="bert-4x32")})
    with pytest.raises(ConfigError, match="shape of their batches"):
        episodes.begin({0: make_task("text", 1), 1: make_task("text", 1, length=8)})
