"""The benchmark of rank changes times real ones."""

from __future__ import annotations

import torch
from rankpilot.bench.step import resize
from rankpilot.common.devices import find_device


def test_plans_really_change_ranks_and_each_starts_over(monkeypatch):
    monkeypatch.setattr(resize, "SHAPES", {"up": (8, 24), "down": (24, 8)})
    monkeypatch.setattr(resize, "RANK", 4)
    monkeypatch.setattr(resize, "PLANS", {"half": lambda index: 2 if index % 2 else 6, "shrink": lambda index: 1})
    seen = []
    real = resize.set_ranks

    def watched(targets, plan, optimizer, **options):
        seen.append(real(targets, plan, optimizer, **options))
        assert optimizer.state[targets[0].weight_a]["exp_avg"].shape == targets[0].weight_a.shape

    monkeypatch.setattr(resize, "set_ranks", watched)
    medians = resize.time_plans(layers=2, rounds=2, device=find_device("cpu"))
    assert list(medians) == ["half", "shrink"]
    assert all(seconds > 0 for seconds in medians.values())
    moves = [sorted((change.before, change.after) for change in changes) for changes in seen]
    assert moves == [[(4, 2), (4, 2), (4, 6), (4, 6)]] * 2 + [[(4, 1)] * 4] * 2


def test_frozen_weights_take_no_memory():
    targets, optimizer = resize.adapters(1, torch.device("cpu"))
    assert len(targets) == 7
    assert all(target.layer.get_base_layer().weight.device.type == "meta" for target in targets)
    assert len(optimizer.state) == 14
