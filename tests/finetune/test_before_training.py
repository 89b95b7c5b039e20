"""How long the probe of a real run is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from rankpilot import RankPilot, TrainingRun
from rankpilot.data.batches import IGNORED
from rankpilot.decide.observation import RUN_FEATURES, Observation
from rankpilot.decide.policy import Decision, decision_from_plan
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.finetune.probing import LEAST_PROBE_STEPS, PROBE_SHARE, probe_steps
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from .tiny_runs import adapted


def run_of(model: nn.Module, *, rows: int, total_steps: int, accumulation: int = 1, answers: int = 12) -> TrainingRun:
    tokens = torch.arange(12)
    labels = tokens.masked_fill(tokens < 12 - answers, IGNORED)
    examples = [{"input_ids": tokens, "labels": labels} for _ in range(2 * rows)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loader: DataLoader[Any] = DataLoader(examples, batch_size=rows)  # type: ignore[arg-type]
    return TrainingRun.of_loader(model, optimizer, loader, total_steps=total_steps, accumulation=accumulation)


@pytest.mark.parametrize(
    ("rows", "total_steps", "accumulation", "steps"),
    [(16, 1000, 1, 40), (16, 286, 1, 40), (16, 100, 1, 14), (4, 100, 4, 14), (8, 150, 1, 10), (4, 20, 1, 8)],
)
def test_a_short_run_has_a_short_probe(
    rows: int, total_steps: int, accumulation: int, steps: int, llama_config: LlamaConfig
) -> None:
    run = run_of(adapted(llama_config), rows=rows, total_steps=total_steps, accumulation=accumulation)
    assert probe_steps(run, DecisionSchedule()) == steps
    share = 2 * steps / (rows * total_steps * accumulation)
    assert share <= PROBE_SHARE or steps == LEAST_PROBE_STEPS


def test_a_probe_is_never_longer_than_its_schedule(llama_config: LlamaConfig) -> None:
    assert probe_steps(run_of(adapted(llama_config), rows=16, total_steps=100), DecisionSchedule(probe_steps=3)) == 3


def test_the_run_takes_so_many_steps(llama_config: LlamaConfig) -> None:
    counts: list[int] = []

    def progress(items: Iterable[Any], label: str, count: int) -> Iterable[Any]:
        counts.append(count)
        for item in items:
            counts.append(len(item["input_ids"]))
            yield item

    model = adapted(llama_config)
    pilot = RankPilot("signal-mean", "3k params", schedule=DecisionSchedule(probe_batch=1), progress=progress)
    pilot.begin(run_of(model, rows=4, total_steps=150))
    assert counts == [10, *[1] * 10]


@pytest.mark.parametrize(("answers", "seen"), [(12, 0.0), (3, -0.5)])
def test_a_policy_sees_what_share_of_the_tokens_is_predicted(
    llama_config: LlamaConfig, answers: int, seen: float
) -> None:
    model = adapted(llama_config)
    observed: list[float] = []

    class Watching:
        name = "watching"

        def decide(self, observation: Observation) -> Decision:
            observed.append(float(observation.run[RUN_FEATURES.index("predicted")]))
            return decision_from_plan(observation.problem.ranks)

    pilot = RankPilot(Watching(), "3k params")
    pilot.begin(run_of(model, rows=4, total_steps=20, answers=answers))
    assert observed == [seen]
    assert pilot.applier is not None
    assert pilot.applier.state_dict()["predicted"] == pytest.approx(2 ** (4 * seen))
