"""Stacks in the order of their lowest adapters: the bits of a batch that holds every run from the first block on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rankpilot.decide.policy import Decision
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env.stack import adapters as adapters_module
from rankpilot.env.stack import episodes as episodes_module
from rankpilot.env.stack import trainer as trainer_module
from rankpilot.env.stack.adapters import Segment
from rankpilot.env.stack.episodes import StackedEpisodes
from rankpilot.env.stack.runs import reset_runs
from rankpilot.env.stack.trainer import Blocks, Member, StackTrainer
from rankpilot.env.task_data import known_of, load_task
from rankpilot.env.tasks import FineTuneTask

from ...cases import first_cases

SCHEDULE = DecisionSchedule(probe_steps=3, fractions=(0.0, 0.3, 0.6), max_step=10)
RUNS = 4
BASES = ("llama-4x32", "bert-4x32", "gpt2-4x32")


class WholeBatch(StackTrainer):
    """All runs in one batch from the embedding on, as one writes it down."""

    def train(self, members: Sequence[Member]) -> None:
        self._train(members, self._whole_losses)

    def _whole_losses(self, active: Sequence[Member]) -> dict[Member, float]:
        inputs = torch.cat([member.data.inputs[member.batch, : member.rows] for member in active])
        with self.adapters.running([member.row for member in active]) as model:
            answers = model(input_ids=inputs).logits.chunk(len(active))
            pairs = zip(active, answers, strict=True)
            losses = torch.cat([member.data.train_losses_of(each, member.batch, member.rows) for member, each in pairs])
            self.adapters.backward(losses)
        return dict(zip(active, losses.tolist(), strict=True))

    @torch.no_grad()
    def held_out(self, tasks: Mapping[int, FineTuneTask]) -> list[float]:
        data = [load_task(task) for task in tasks.values()]
        with self.adapters.running(list(tasks)) as model:
            answers = model(input_ids=torch.cat([each.held_out_inputs for each in data])).logits
        parts = zip(data, answers.split([len(each.held_out_inputs) for each in data]), strict=True)
        return [own.mean_of(own.held_out_terms(each, 0)[0]) for own, each in parts]


def one_segment(rows, ranks, tokens, scalings, weights, gradients) -> list[Segment]:
    """The whole width for every run, whatever its rank."""
    whole = Segment(slice(0, len(rows)), scalings, weights, gradients, torch.tensor(rows))
    return [whole] if weights[0].shape[1] else []


@dataclass
class Story:
    """What a stack went through, decision by decision."""

    arrays: list[NDArray[Any]] = field(default_factory=list)
    losses: list[dict[int, float | None]] = field(default_factory=list)
    held_out: list[dict[int, float]] = field(default_factory=list)
    entries: list[list[int]] = field(default_factory=list)


def run(tasks: Sequence[FineTuneTask]) -> Story:
    """`RUNS` runs of each task, adapted from another block on at each decision."""
    base, slots = tasks[0].base, range(len(tasks) * RUNS)
    known_of.cache_clear()
    episodes, story = StackedEpisodes(base, len(slots), SCHEDULE), Story()
    episodes.begin({slot: tasks[slot // RUNS] for slot in slots})
    blocks = np.array([target.block for target in episodes._targets])
    for turn in range(len(SCHEDULE.fractions)):
        decisions = {}
        for slot in slots:
            seen = episodes.under_way[slot].observation
            story.arrays += [seen.modules, seen.run, seen.problem.ranks]
            generator = np.random.default_rng([slot, turn])
            ranks = np.where(blocks >= generator.integers(4), generator.integers(0, 25, len(blocks)), 0)
            scores = blocks + generator.normal(size=len(blocks))
            decisions[slot] = Decision(seen.problem.ladder.step(ranks, 0), scores)
        episodes.step(decisions)
        story.losses.append({slot: episodes.under_way[slot].loss for slot in slots})
        story.held_out.append(episodes.held_out())
        adapters = episodes._trainer.adapters
        story.entries.append(Blocks(adapters.model, adapters.targets).entries(adapters.ranks))
    return story


@pytest.mark.parametrize("base", first_cases(1, BASES))
def test_losses_are_those_of_the_whole_batch_bit_for_bit(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"base": base, "steps": 10, "length": 16, "eval_rows": 24}
    tasks = [
        FineTuneTask("planted", 1, corpus="documentation", mean_rank=6.0, **sizes),
        FineTuneTask("text", 2, corpus="code", then="german", mean_rank=3.0, **sizes),
        FineTuneTask("labels", 3, corpus="sentiment", mean_rank=1.5, offset=2.0, **sizes),
    ]
    monkeypatch.setattr(trainer_module, "FORWARD_TOKENS", 192)  # frozen states of three steps at a time
    monkeypatch.setattr(trainer_module, "CACHED_TOKENS", 448)  # seven runs a pass: one task and a part of another
    story = run(tasks)
    assert all(len(set(entries)) > 2 for entries in story.entries), "runs of one stack join at several blocks"
    assert story.entries[0] != story.entries[1] != story.entries[2], "and elsewhere after a decision"
    monkeypatch.setattr(episodes_module, "StackTrainer", WholeBatch)
    monkeypatch.setattr(adapters_module, "make_segments", one_segment)
    whole = run(tasks)
    for mine, theirs in zip(story.arrays, whole.arrays, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert story.losses == whole.losses
    assert story.held_out == whole.held_out
    assert all(loss is not None for losses in story.losses for loss in losses.values())


def member_of(task: FineTuneTask, row: int, step: int = 0) -> Member:
    return Member(task, row, step, task.steps, lambda step: 1e-2, None)


def test_runs_at_different_steps_of_a_task_get_their_own_batches(make_task: Any) -> None:
    task = make_task(steps=8)
    together, alone = (StackTrainer(task.base, 2, device=torch.device("cpu")) for _ in range(2))
    members = [member_of(task, 0), member_of(task, 1, step=3)]
    reset_runs(together.adapters, {0: 5, 1: 6})
    together.train(members)
    for member in members:
        reset_runs(alone.adapters, {member.row: 5 + member.row})
        own = member_of(task, member.row, step=task.steps - len(member.losses))
        alone.train([own])
        assert own.losses == member.losses
    assert [len(member.losses) for member in members] == [8, 5]
