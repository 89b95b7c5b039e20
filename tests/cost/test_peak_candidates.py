"""Peaks at the loss of deep models with checkpointing, where what waits for second runs takes the most."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import transformers as t
from rankpilot.cost.cost import moment_costs, plan_cost
from rankpilot.cost.peak_candidates import PeakFinder
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


def deep(name: str, tokens: int = 384) -> t.PreTrainedModel:
    """Eight narrow layers below many logits, so that the peak is at the loss; with few, it is in a layer."""
    config, model = CLASSES[name]
    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    built: t.PreTrainedModel = model(
        config(vocab_size=tokens, hidden_size=32, intermediate_size=48, num_hidden_layers=8, use_cache=False, **sizes)
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


@pytest.mark.parametrize(
    ("share", "tokens", "accumulates"),
    [(0.0, 384, False), (0.5, 384, True), (1.0, 384, False), (1.0, 48, False), (1.0, 48, True)],
)
def test_the_peak_of_a_plan_is_the_highest_of_all_candidates(share: float, tokens: int, accumulates: bool) -> None:
    """Parts of a step that cannot hold the peak are left out by bounds."""
    family = replace(ROWS["llama"], build=lambda: deep("llama", tokens))
    model = family_model(family, "bf16", False)
    run = adamw_run(model, family_batch(family, model, 8, 16), "bf16")
    memory = run.calibrated()
    layers = [segment.name for segment in memory.segments]
    memory = replace(memory.with_checkpointed(layers[: round(share * len(layers))]), accumulates=accumulates)
    for shape in (memory.shape, BatchShape(3, 64)):
        base, slope = memory.sizes(shape)
        every = memory._full_cost(memory._finder.candidates(base + 2 * slope), base, slope)
        for ranks in random_plans(run.targets, np.random.default_rng(1), 8):
            buffers = memory.states.signals @ ranks
            highest = (moment_costs(every, ranks).max() - buffers) * (1 + memory.margin) + buffers
            assert memory.peak(ranks, shape) == pytest.approx(highest, abs=2)
            assert memory.at_peak(ranks, shape).label == every.moments[moment_costs(every, ranks).argmax()]


@pytest.mark.parametrize("accumulates", [False, True])
def test_no_part_of_a_step_holds_more_than_its_bound(accumulates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    family = replace(ROWS["llama"], build=lambda: deep("llama", 48))
    run = adamw_run(model := family_model(family, "bf16", False), family_batch(family, model, 8, 16), "bf16")
    memory = replace(run.calibrated(), accumulates=accumulates)
    bounds, found = PeakFinder.bounds, list[Any]()

    def peak_of(ranks: Any, part: int) -> float:
        """The peak of one part alone; that of the optimizer's step, for none."""

        def of_part(self: PeakFinder, *sizes: Any) -> Any:
            found[:] = [bounds(self, *sizes)]
            return np.where(np.arange(len(self.parts)) == part, np.inf, -np.inf)

        monkeypatch.setattr(PeakFinder, "bounds", of_part)
        return replace(memory).peak(ranks)

    for ranks in random_plans(run.targets, np.random.default_rng(2), 6):
        states, least = memory.states, peak_of(ranks, -1)
        gradients = (states.weights @ ranks if accumulates else 0) + states.other_gradients
        step = states.other_gradients + (states.weights + states.scratch) @ ranks
        for part in range(1, len(found[0])):
            more = (peak_of(ranks, part) - least) / (1 + memory.margin)
            assert more <= max(found[0][part] + accumulates * gradients - step, 0) + 2
