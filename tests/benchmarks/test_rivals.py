"""Rivals of runs without a sweep: each trains what it says, at the ranks that it says."""

from __future__ import annotations

from collections import Counter

import pytest
from rankpilot.lora.targets import find_target_modules

from benchmarks.no_sweep_rivals import RIVALS, each_step
from benchmarks.text_runs import new_loader
from benchmarks.texts import TextTask, load_data

TASK = TextTask("gpt2-4x32", "french", 12, 2, held_out=8, train_rows=40)

pytestmark = [pytest.mark.assets, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("name", ["half frozen", "MLPs", "LoRA+", "AdaLoRA", "EVA"])
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to False", "ignore:lora with eva initialization")
def test_a_rival_trains_what_it_says(name: str) -> None:
    rival, data = RIVALS[name], load_data(TASK)
    model, optimizer = rival.ready(TASK, 1, 4e-3)
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    with each_step(optimizer, lambda step: rival.stepped(model, TASK, step)):
        for batch in new_loader(TASK, data, 1):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    moved = {name for name, value in model.named_parameters() if name in before and not value.equal(before[name])}
    assert moved == set(before)
    if name == "AdaLoRA":
        pattern = model.peft_config["default"].rank_pattern
        assert sum(sum(mask) for mask in pattern.values()) == 8 * len(pattern)
        return
    ranks = Counter(target.block for target in find_target_modules(model) for _ in range(target.rank))
    modules = 2 if name == "MLPs" else 4
    assert sum(ranks.values()) == 4 * 8 * modules
    frozen = {target.block for target in find_target_modules(model) if not target.weight_a.requires_grad}
    assert frozen == ({0, 1} if name == "half frozen" else set())
