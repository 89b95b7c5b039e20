"""A step with adapters on some modules takes what its own recording tells, though another one has them on all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.cost.cards import card_rates, device_table
from rankpilot.cost.cost import plan_cost
from rankpilot.cost.forecast.allocator import replay
from rankpilot.cost.forecast.configured_step import LoadedAs
from rankpilot.cost.forecast.memory_of import AskedStep
from rankpilot.cost.forecast.of_targets import OfTargets, places_of
from rankpilot.cost.forecast.stored_step import StepFile, StoredStep
from rankpilot.cost.moments import Evaluation
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.step_config import StepConfig
from rankpilot.lora.spec import ModuleSpec, highest_ranks

from ..cases import first_cases
from .test_stored_step import config

ATTENTION = "q_proj,k_proj,v_proj,o_proj"


def step_of(name: str, target_modules: str, **loaded: Any) -> StoredStep:
    settings = StepConfig(target_modules=target_modules, bf16=True, batch_size=3, max_length=96)
    asked = AskedStep(config(name), settings, LoadedAs(dtype=torch.bfloat16, **loaded))
    return StoredStep(StepFile(asked.key), asked.recorder, None, asked.loaded)


@pytest.mark.parametrize(
    ("name", "target_modules", "loaded"),
    first_cases(
        2,
        [
            ("llama", "q_proj,v_proj", {}),
            ("qwen3_moe", "q_proj,v_proj", {"reentrant": True}),
            ("llama", ATTENTION, {"adapter": {"lora_dropout": 0.1}}),
            ("llama", "down_proj", {"loss": "chunked"}),
            ("llama", "layers.3.mlp.up_proj, k_proj", {}),
            ("gemma2", "q_proj,v_proj", {"padded": True}),
            ("gemma2", "gate_proj", {}),
            ("gpt2", "c_attn", {}),
            ("llama", "o_proj", {"attention": "math"}),
        ],
    ),
)
def test_it_is_what_a_recording_of_its_own_tells(name: str, target_modules: str, loaded: dict[str, Any]) -> None:
    whole, own = step_of(name, "all-linear", **loaded), step_of(name, target_modules, **loaded)
    targets = whole.model.targets
    places = places_of(target_modules, targets)
    assert places is not None
    assert 0 < len(places) < len(targets)
    settings = StepConfig(bf16=True, batch_size=3, max_length=96, accumulation=2)
    shape = BatchShape(3, 96)
    mine = whole.of(OfTargets(places, len(targets))).configured(settings)
    its = own.configured(replace(settings, target_modules=target_modules))
    assert [each.name for each in mine.saved] == [each.name for each in its.saved]
    assert (mine.targets, mine.model.frozen) == (its.targets, its.model.frozen)
    highest, generator = highest_ranks(its.targets), np.random.default_rng(0)
    rates = card_rates(device_table()["RTX 4090"].rates, "bf16")
    for ranks in (np.minimum(8, highest), np.minimum(generator.choice([0, 1, 4], len(highest)), highest)):
        for layers in ((), [segment.name for segment in its.memory.segments][::2]):
            pair = [step.memory.with_checkpointed(layers) for step in (mine, its)]
            assert_same([memory.peak(ranks, shape) for memory in pair])
            assert_same([plan_cost(memory.cost(shape), ranks) for memory in pair])
            assert_same(
                [replay(memory, ranks, its.model.frozen, evaluation=Evaluation(shape)).allocated for memory in pair]
            )
            assert mine.work is not None
            assert its.work is not None
            seconds = [step.work.time(rates).seconds(ranks, layers) for step in (mine, its) if step.work]
            assert 0.99 < seconds[0] / seconds[1] < 1.08, "launches of sums of gradients are counted, if few are alone"


def assert_same(pair: Sequence[float]) -> None:
    """The first is the second; a layer without an adapter may count a block of the allocator in its forward pass."""
    assert 0 <= pair[0] - pair[1] <= 1024


def test_names_that_are_of_no_module_are_left_to_peft() -> None:
    targets = [ModuleSpec(f"layers.{i}.{name}", i, 8, 8) for i in range(2) for name in ("q_proj", "v_proj")]
    found = places_of("layers.1.q_proj, v_proj", targets)
    assert found is not None
    assert found.tolist() == [1, 2, 3]
    for names in ("q_proj,lm_head", "embed_tokens", r".*q_proj", "roj"):
        assert places_of(names, targets) is None, names
