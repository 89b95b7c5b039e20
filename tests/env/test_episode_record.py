"""The text of an episode holds its numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rankpilot.cost.cost import ParameterCost
from rankpilot.env.episode import Comparison, EpisodeRecord
from rankpilot.env.proxy_task import Reference
from rankpilot.lora.spec import RankLadder
from rankpilot.plan.problem import AllocationProblem

KINDS = ("attn.q", "attn.k", "mlp.up")
NAMES = tuple(f"h.{layer}.{kind}" for layer in range(2) for kind in KINDS)


class Episode:
    """A record whose applier has given ranks, each of which costs 10 parameters."""

    def __init__(self, names: tuple[str, ...] = NAMES, blocks: tuple[int, ...] = (0, 0, 0, 1, 1, 1)) -> None:
        self.blocks, self.ranks = np.array(blocks), np.ones(len(names), dtype=np.int64)
        applier: Any = SimpleNamespace(names=names, total_steps=100, cost=SimpleNamespace(unit="parameters"))
        applier.problem = self.problem
        observation: Any = SimpleNamespace(problem=self.problem())
        self.record = EpisodeRecord("a task", Reference(3.0, 1.375), applier, observation)

    def problem(self) -> AllocationProblem:
        count = len(self.ranks)
        cost = ParameterCost(np.full((1, count), 10.0))
        return AllocationProblem(self.ranks, np.full(count, 64), self.blocks, cost, 12_000.0, RankLadder())

    def advance(self, ranks: list[int], step: int, loss: float | None) -> None:
        self.ranks = np.array(ranks)
        observation: Any = SimpleNamespace(problem=self.problem())
        self.record.advance(step, loss, observation)


def test_text_holds_the_numbers() -> None:
    episode = Episode()
    assert episode.record.describe().splitlines() == [
        "a task",
        "step 0 of 100, no plan yet for 12,000 parameters",
        "layer 1   q 1  k 1  up 1",
        "layer 0   q 1  k 1  up 1",
    ]
    episode.advance([0, 2, 16, 4, 8, 0], 34, 2.5)
    assert episode.record.describe().splitlines() == [
        "a task",
        "step 34 of 100, loss 2.500, 2.5 % of 12,000 parameters",
        "layer 1   q  4  k  8  up  0",
        "layer 0   q  0  k  2  up 16",
    ]


@pytest.mark.parametrize(("loss", "shown"), [(1.5, "1.500"), (None, "nan")])
def test_text_says_how_the_episode_ended(loss: float | None, shown: str) -> None:
    episode = Episode()
    episode.advance([1] * 6, 100, loss)
    held_out = None if loss is None else 1.25
    episode.record.end(held_out, Comparison.with_uniform(episode.record.reference))
    end = "" if loss is None else ", held-out loss 1.250 (uniform 1.375)"
    line = f"step 100 of 100, loss {shown}, 0.5 % of 12,000 parameters{end}"
    assert episode.record.describe().splitlines()[1] == line
    assert episode.record.info()["non_finite"] == (loss is None)


def test_columns_stay_aligned_where_layers_differ() -> None:
    episode = Episode(("h.0.attn.q", "h.0.mlp.up", "h.1.mlp.up", "h.1.mlp.down"), (9, 9, 10, 10))
    episode.advance([1, 16, 2, 4], 10, 1.0)
    assert episode.record.describe().splitlines()[2:] == [
        "layer 10         up  2  down  4",
        "layer  9   q  1  up 16",
    ]
