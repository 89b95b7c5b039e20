"""Peaks at the loss of deep models with checkpointing, where what waits for second runs takes the most."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import transformers as t
from rankpilot.cost.cost import moment_costs, plan_cost
from rankpilot.cost.recording import BatchShape

from ..cases import first_cases
from ..families import FAMILIES
from .measured import adamw_run, family_batch, family_model, random_plans

ROWS = {family.name: family for family in FAMILIES}
CLASSES = {
    "llama": (t.LlamaConfig, t.LlamaForCausalLM),
    "qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM),
    "mistral": (t.MistralConfig, t.MistralForCausalLM),
    "gemma": (t.GemmaConfig, t.GemmaForCausalLM),
}


def deep(name: str) -> t.PreTrainedModel:
    """Eight narrow layers below many logits, so that the peak is at the loss."""
    config, model = CLASSES[name]
    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    built: t.PreTrainedModel = model(
        config(vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=8, use_cache=False, **sizes)
    )
    return built


@pytest.mark.parametrize("reentrant", first_cases(1, [False, True]), ids=["checkpointed", "reentrant"])
@pytest.mark.parametrize(
    ("name", "precision"), first_cases(2, [("llama", "bf16-all"), *((name, "bf16") for name in CLASSES)])
)
def test_inputs_of_segments_that_are_yet_to_run_again_are_there_at_the_loss(name, precision, reentrant):
    """In half precision each layer's first norm saves its input as a copy in fp32, and nothing saves the input."""
    family = replace(ROWS["llama"], build=lambda: deep(name))
    model = family_model(family, precision, reentrant)
    run = adamw_run(model, family_batch(family, model, 8, 16), precision)
    memory = run.calibrated()
    cost = memory.cost()
    for ranks in random_plans(run.targets, np.random.default_rng(0), 2):
        error = plan_cost(cost, ranks) / run.peak(ranks) - 1
        assert 0 <= error <= memory.margin + 0.002


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_peak_of_a_plan_is_the_highest_of_all_candidates(share: float) -> None:
    """Parts of a step that cannot hold the peak are left out by bounds."""
    family = replace(ROWS["llama"], build=lambda: deep("llama"))
    model = family_model(family, "bf16", False)
    run = adamw_run(model, family_batch(family, model, 8, 16), "bf16")
    memory = run.calibrated()
    layers = [segment.name for segment in memory.segments]
    memory = memory.recomputing(layers[: round(share * len(layers))])
    for shape in (memory.shape, BatchShape(3, 64)):
        every, _, _ = memory._full_cost(*memory.sizes(shape))
        for ranks in random_plans(run.targets, np.random.default_rng(1), 8):
            buffers = memory.states.signals @ ranks
            highest = (moment_costs(every, ranks).max() - buffers) * (1 + memory.margin) + buffers
            assert memory.peak(ranks, shape) == pytest.approx(highest, abs=2)
