"""What plans take of a card, and whether they fit it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rankpilot.cost.cards import DeviceSpec, find_device_spec
from rankpilot.cost.forecast.allocator import replay
from rankpilot.cost.forecast.card_use import UNDER, CardUse, card_use
from rankpilot.cost.forecast.configured_step import ConfiguredStep, LoadedAs
from rankpilot.cost.forecast.from_config import from_config
from rankpilot.cost.moments import Evaluation
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.step_config import StepConfig
from transformers import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8
)
CARD = find_device_spec("rtx 4090")


@pytest.fixture(scope="module")
def step() -> ConfiguredStep:
    return from_config(CONFIG, StepConfig(batch_size=4, max_length=256, gradient_checkpointing=True), LoadedAs())


def use_of(step: ConfiguredStep, **options: object) -> CardUse:
    ranks = np.full(len(step.targets), 8)
    return card_use(step.memory, ranks, step.model.frozen, CARD, **options)  # type: ignore[arg-type]


def test_the_parts_add_up_and_are_those_of_the_byte_model(step):
    use = use_of(step)
    assert use.base_bytes == step.model.frozen_bytes == sum(step.model.frozen)
    priced = step.memory.peak(np.full(len(step.targets), 8))
    # The allocator rounds each tensor, and has the workspaces.
    assert use.step_bytes + use.margin_bytes == pytest.approx(priced + CARD.workspace_bytes, rel=0.02)
    assert use.total_bytes == (
        use.base_bytes + use.step_bytes + use.reserve_bytes + use.context_bytes + use.margin_bytes
    )
    assert use.spare_bytes == CARD.memory_bytes - use.total_bytes
    assert use.reserve_bytes > 0
    assert use.evaluation_bytes == 0


def test_verdicts_change_where_the_card_is_full(step):
    use = use_of(step)
    needed = use.total_bytes - use.reserve_bytes

    def on(memory_bytes: int) -> str:
        return replace(use, device=DeviceSpec("card", memory_bytes, use.context_bytes)).verdict

    slack = int(use.total_bytes / (1 - UNDER["none"])) + 2
    assert on(slack) == "fits"
    assert on(slack - 4) == on(use.total_bytes) == on(use.total_bytes - 1) == on(needed) == "may not fit"
    assert on(needed - 1) == "does not fit"


def test_evaluation_counts_where_it_is_the_peak(step):
    training, few = use_of(step), use_of(step, evaluation=Evaluation(BatchShape(1, 64)))
    assert 0 < few.evaluation_bytes < few.step_bytes
    assert few.total_bytes == training.total_bytes
    many = use_of(step, evaluation=Evaluation(BatchShape(64, 512)))
    assert many.evaluation_bytes > 64 * 512 * CONFIG.vocab_size * 4 > many.step_bytes
    assert many.allocated_bytes == many.base_bytes + many.evaluation_bytes
    kept = use_of(step, evaluation=Evaluation(BatchShape(64, 512), 3, 4 * CONFIG.vocab_size))
    assert kept.evaluation_bytes > 6 * 64 * 512 * CONFIG.vocab_size * 4


def test_accumulated_gradients_and_rank_count(step):
    loaded = step.model.frozen
    sums = replace(step.memory, accumulates=True)
    few, many = (np.full(len(step.targets), rank) for rank in (4, 64))
    assert replay(sums, many, loaded).allocated >= replay(step.memory, many, loaded).allocated
    assert replay(step.memory, many, loaded).allocated > replay(step.memory, few, loaded).allocated
