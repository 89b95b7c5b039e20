"""Every byte of the predicted peak has a layer and a kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.cost.breakdown import KINDS, LOSS, break_down
from rankpilot.cost.cost import plan_cost
from rankpilot.cost.model import MemoryModel
from rankpilot.cost.record.calibration import calibrate
from rankpilot.cost.record.model_states import frozen_bytes, state_bytes
from rankpilot.cost.recording import BatchShape
from rankpilot.lora.targets import TargetModule, find_target_modules

from .measured import KeepsOnContext

REENTRANT = {None: None, "checkpointed": False, "reentrant": True}


def calibrated(model: Any, batch: dict[str, torch.Tensor], segments: str | None = None, **options: Any) -> Any:
    model.train()
    if segments:
        base = model.get_base_model()
        base.gradient_checkpointing_enable({"use_reentrant": REENTRANT[segments]})
        base.config.use_cache = False
    targets = find_target_modules(model)
    return calibrate(model, targets, batch, **{"signal_bytes": False} | options), targets


def plans(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    mixed = [generator.choice([0, 0, 1, 4, 8, 64], size=count) for _ in range(4)]
    top = np.where(np.arange(count) > count // 2, 8, 0)
    return [np.full(count, 8), np.zeros(count, dtype=int), np.full(count, 5000), top, *mixed]


def check_sums(memory: MemoryModel, targets: list[TargetModule], shape: BatchShape | None = None) -> None:
    cost = memory.cost(shape)
    for ranks in plans(len(targets)):
        breakdown = break_down(memory, targets, ranks, shape)
        if ranks.max() <= 64:  # the cost leaves out what is the peak under higher ranks alone
            assert breakdown.total == plan_cost(cost, ranks)
            assert breakdown.label in cost.moments
        assert breakdown.bytes.shape == (len(breakdown.layers), len(KINDS))
        assert (breakdown.bytes >= 0).all()
        assert breakdown.bytes.any(axis=1).all()
        rounded = ranks.sum() + len(cost.needs) + 1  # the cost of each rank and group is rounded up
        assert 0 <= breakdown.margin - memory.margin * breakdown.bytes.sum() <= rounded
        assert 0 <= breakdown.total - memory.peak(ranks, shape) <= rounded


@pytest.mark.parametrize("segments", REENTRANT)
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_parts_sum_to_the_price(
    make_llama: Any, make_bert: Any, llama_batch: Any, bert_batch: Any, kind: str, segments: str | None
) -> None:
    model, batch = (make_llama(), llama_batch) if kind == "llama" else (make_bert(), bert_batch)
    memory, targets = calibrated(model, batch, segments)
    check_sums(memory, targets)
    check_sums(memory, targets, BatchShape(9, 5))


def test_copies_of_a_second_run_are_counted(make_llama: Any, llama_batch: Any) -> None:
    model = make_llama()
    for layer in model.get_base_model().model.layers:
        layer.mlp.act_fn.forward = KeepsOnContext.apply
    check_sums(*calibrated(model, llama_batch, "checkpointed"))


def test_signals_accumulation_and_copies_are_counted(make_bert: Any, bert_batch: Any) -> None:
    model = make_bert(lora_bias=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
    memory, targets = calibrated(model, bert_batch, optimizer=optimizer, signal_bytes=True, accumulates=True)
    check_sums(memory, targets)
    breakdown = break_down(memory, targets, np.full(len(targets), 4))
    assert breakdown.of_kind("signals") == sum(4 * 4 * target.d_out for target in targets)
    assert breakdown.of_kind("gradients") == breakdown.of_kind("weights"), "all of them are always there"


def test_the_optimizer_s_step_can_be_the_peak(make_bert: Any, bert_batch: Any) -> None:
    model, batch = make_bert(), {name: tensor[:1] for name, tensor in bert_batch.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
    memory, targets = calibrated(model, batch, optimizer=optimizer)
    thick = break_down(memory, targets, np.full(len(targets), 5000))
    assert thick.total == plan_cost(memory.cost(), np.full(len(targets), 5000))
    assert thick.label == "optimizer step"
    assert thick.of_kind("transient") == thick.of_kind("weights")
    assert thick.of_kind("saved") == 0


def test_what_is_held_is_what_the_model_holds(make_bert: Any, bert_batch: Any) -> None:
    model = make_bert()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    memory, targets = calibrated(model, bert_batch, optimizer=optimizer, accumulates=True)
    breakdown = break_down(memory, targets, np.array([target.rank for target in targets]))
    held = ("weights", "gradients", "optimizer", "others")
    assert sum(breakdown.of_kind(kind) for kind in held) == state_bytes(model, optimizer)


def test_rows_follow_the_model_from_its_input_to_the_loss(make_bert: Any, bert_batch: Any) -> None:
    memory, targets = calibrated(make_bert(), bert_batch)
    breakdown = break_down(memory, targets, np.full(len(targets), 4))
    numbered = [f"bert.encoder.layer.{number}" for number in range(3)]
    assert [layer for layer in breakdown.layers if layer[-1].isdigit()] == numbered
    assert breakdown.layers[-1] == LOSS
    assert breakdown.layers[0] == "bert.embeddings"
    assert breakdown.layer_of == tuple(name for name in numbered for _ in range(6))
    assert sum(breakdown.bytes[:, 0]) == breakdown.of_kind("saved")


def test_nothing_is_saved_below_the_lowest_adapter(make_llama: Any, llama_batch: Any) -> None:
    memory, targets = calibrated(make_llama(), llama_batch)
    top = np.array([8 * target.name.startswith("model.layers.1.") for target in targets])
    breakdown = break_down(memory, targets, top)
    saved = dict(zip(breakdown.layers, breakdown.by_layer("saved", "weights", "optimizer"), strict=True))
    assert saved.get("model.layers.0", 0) == 0
    assert saved["model.layers.1"] > 0


def test_kept_inputs_and_one_segment_that_runs_again(make_bert: Any, bert_batch: Any) -> None:
    memory, targets = calibrated(make_bert(), bert_batch, "checkpointed")
    breakdown = break_down(memory, targets, np.full(len(targets), 2))
    again = breakdown.by_layer("recomputed")
    assert np.count_nonzero(again) == 1
    assert breakdown.of_kind("inputs") > 0
    hidden = 4 * 8 * 32 * 4  # rows, tokens, width, bytes
    assert breakdown.of_kind("inputs") >= hidden


def test_frozen_bytes_counts_shared_weights_once(make_llama: Any) -> None:
    model = make_llama()
    base = model.get_base_model()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    expected = sum(4 * p.numel() for p in frozen) + sum(b.numel() * b.element_size() for b in model.buffers())
    before = frozen_bytes(model)
    assert before == pytest.approx(expected, rel=0.01)
    base.lm_head.weight = base.model.embed_tokens.weight
    assert frozen_bytes(model) == before - 4 * 64 * 32
