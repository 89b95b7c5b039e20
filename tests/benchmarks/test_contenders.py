"""The contenders train as they say: rankpilot changes real ranks, AdaLoRA masks them."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig
from rankpilot.agents.log import DecisionLog

from benchmarks.models import LORA, Family, Learner, Size, random_loader, random_model
from benchmarks.overhead import AdaLora, RankPilot

TINY = Size(layers=2, width=32, vocabulary=64, rows=4, length=8)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_rankpilot_changes_real_ranks_in_the_budget_of_rank_eight(family: Family, tmp_path: Path) -> None:
    loader = random_loader(family, TINY, seed=0)
    method = RankPilot(random_model(family, TINY, 0), family, loader, 40, 10, tmp_path, 0)
    plain = Learner(random_model(family, TINY, 0), LoraConfig(**LORA[family]))
    batches = list(random_loader(family, TINY, 0))
    history = [method.ranks()]
    for turn in range(35):
        method.step(batches[turn % len(batches)])
        history.append(method.ranks())
        rows = tuple(weight.shape[0] for name, weight in method.model.named_parameters() if ".lora_A." in name)
        assert rows == method.ranks()
        trained = sum(p.numel() for p in method.model.parameters() if p.requires_grad)
        assert trained <= sum(p.numel() for p in plain.parameters)
    changed = [step for step in range(1, 36) if history[step] != history[step - 1]]
    assert {*history} != {(8,) * len(history[0])}, "no decision has moved a rank"
    assert set(changed) <= {10, 20, 30}
    assert method.controller.decision == 4
    assert method.setup_seconds > 0
    assert len(DecisionLog(tmp_path / "decisions")) == 4


def test_adalora_masks_components_at_each_period_and_keeps_their_storage() -> None:
    method = AdaLora(random_model("llama", TINY, 0), "llama", 40, 10)
    batches = list(random_loader("llama", TINY, 0))
    history = [method.ranks()]
    before = [p.shape for p in method.parameters]
    for turn in range(35):
        method.step(batches[turn % len(batches)])
        history.append(method.ranks())
    assert history[9] == ()
    assert [step for step in range(1, 36) if history[step] != history[step - 1]] == [10, 20, 30]
    totals = [sum(history[step]) for step in (10, 20, 30)]
    assert 14 * 12 > totals[0] > totals[1] > totals[2] > 14 * 8 - 14
    assert [p.shape for p in method.parameters] == before
