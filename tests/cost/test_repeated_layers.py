"""What a few layers tell of all is what all tell, storage by storage."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
from rankpilot.cost.forecast import from_config as from_config_module
from rankpilot.cost.forecast.configured_step import ConfiguredStep, LoadedAs
from rankpilot.cost.forecast.from_config import StepRecorder, from_config
from rankpilot.cost.record import repeated_layers as module
from rankpilot.cost.record.recorder import Recorder
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.savers.prices import free_savers
from rankpilot.cost.step_config import StepConfig
from torch import nn
from transformers import AutoConfig

from ..cases import first_cases

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 120,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _SIZES | {"num_hidden_layers": 7},
    "gemma2": _SIZES | {"num_hidden_layers": 12, "sliding_window": 16},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 8, "vocab_size": 120, "state_size": 8, "num_heads": 8}
    | {"head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "qwen3_moe": _SIZES | _EXPERTS | {"num_hidden_layers": 9, "mlp_only_layers": [0]},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 6, "vocab_size": 120},
    "qwen3_next": _SIZES
    | _EXPERTS
    | {"num_hidden_layers": 16, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2}
    | {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
RECORDED = {"gemma2": (6, 12), "mamba2": (5, 8), "qwen3_moe": (5, 9), "gpt2": (4, 6)}
"""How many layers are recorded at last, of how many."""


def recorded(name: str, monkeypatch: pytest.MonkeyPatch, **loaded: Any) -> tuple[ConfiguredStep, list[tuple[int, int]]]:
    """The step of a model, and how many layers were recorded of how many; no such pair where all were."""
    seen: list[tuple[int, int]] = []
    few = module._of_few_layers

    def of_few(training: Any, targets: Any, batch: Any, layers: Any) -> Any:
        memory = few(training, targets, batch, layers)
        if memory:
            seen.append((layers.kept, layers.count))
        return memory

    monkeypatch.setattr(module, "_of_few_layers", of_few)
    config = AutoConfig.for_model(name, **MODELS[name])
    step = StepConfig(batch_size=2, max_length=32, gradient_checkpointing=True, exact_savers=False)
    return from_config(config, step, LoadedAs(**loaded), counted=True), seen


def assert_same(one: Any, other: Any) -> None:
    """Two recordings or byte models have equal values; autograd's numbers of segments serve their recording alone."""
    for field in fields(one):
        mine, its = getattr(one, field.name), getattr(other, field.name)
        if field.name == "segments":
            assert len(mine) == len(its)
            for here, there in zip(mine, its, strict=True):
                assert_same(here, there)
        elif is_dataclass(mine):
            assert_same(mine, its)
        elif isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, its, err_msg=field.name)
        elif field.name != "sequences":
            assert mine == its, field.name
            if field.name == "gradients":  # the allocator holds their states in this order
                assert list(mine) == list(its)


@pytest.mark.parametrize(
    ("name", "reentrant"), first_cases(2, [("gemma2", False), ("mamba2", False), ("gpt2", True), ("qwen3_moe", False)])
)
def test_repeated_layers_are_those_of_the_whole_model(
    name: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, counted = module.count_work, list[int]()

    def noted(model: Any, targets: Any, *rest: Any) -> Any:
        counted.append(len(targets))
        return count(model, targets, *rest)

    monkeypatch.setattr(module, "count_work", noted)
    few, seen = recorded(name, monkeypatch, reentrant=reentrant)
    assert seen == [RECORDED[name]]
    monkeypatch.setattr(module.RepeatedLayers, "of", lambda *arguments: [])
    whole, none = recorded(name, monkeypatch, reentrant=reentrant)
    assert not none
    assert_same(few.memory, whole.memory)
    assert_same(few.work, whole.work)
    assert len(counted) == 2
    assert counted[0] < counted[1] == len(whole.targets)


def test_later_steps_of_a_hybrid_are_recorded_with_fewer_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("qwen3_next", **MODELS["qwen3_next"])
    shape, step = BatchShape(2, 40), StepConfig(gradient_checkpointing=True)
    few = StepRecorder(config, step)
    savers = free_savers(few.model.targets)
    _, later = few.memory((), shape), few.memory(savers, shape)
    assert [way.kept for way in few._ways] == [8, 12, 12]  # the first step took 12
    monkeypatch.setattr(module.RepeatedLayers, "of", lambda *arguments: [])
    whole = StepRecorder(config, step)
    assert_same(later, whole.memory(savers, shape))
    assert_same(few.work(savers, shape), whole.work(savers, shape))


def test_a_step_whose_operators_follow_the_rows_is_recorded_in_full_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("qwen3_next", **MODELS["qwen3_next"] | {"num_hidden_layers": 2})
    step, finished = Recorder.step, list[bool]()

    def noted(self: Recorder, batch: Any, *, like: Any = None) -> Any:
        recording = step(self, batch, like=like)
        finished.append(like is None)
        return recording

    monkeypatch.setattr(Recorder, "step", noted)
    memory = StepRecorder(config, StepConfig(gradient_checkpointing=True)).memory((), BatchShape(1, 40))
    assert finished == [True, False]  # at twice the rank; that of two rows stopped after its forward pass
    assert memory.predicts(BatchShape(1, 40))
    assert not memory.predicts(BatchShape(2, 40))


@pytest.mark.parametrize("change", ["odd settings", "an odd layer", "too few", "counted layers"])
def test_layers_that_differ_are_all_recorded(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = from_config_module.base_on_meta

    def changed(*arguments: Any) -> Any:
        base = build(*arguments)
        layers = base.model.layers
        if change == "odd settings":
            for number, layer in enumerate(layers):
                layer.self_attn.scaling = 1 / (number + 1)
        elif change == "an odd layer":
            layers[6].post_attention_layernorm = nn.Identity()
        elif change == "counted layers":

            def counts(model: Any, *_: Any) -> None:
                _ = model.layers[6]

            base.model.register_forward_pre_hook(counts)
        else:
            base.model.layers = layers[:2]
        return base

    monkeypatch.setattr(from_config_module, "base_on_meta", changed)
    step, seen = recorded("llama", monkeypatch)
    assert not seen
    assert len(step.memory.segments) == (2 if change == "too few" else 7)
