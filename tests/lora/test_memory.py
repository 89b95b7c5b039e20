"""Predicted bytes against bytes measured on a real step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rankpilot.errors import UnsupportedError
from rankpilot.lora.memory import (
    ByteCost,
    ParameterCost,
    SavedTensors,
    calibrate,
    state_bytes,
    total_cost,
)
from rankpilot.lora.ranks import set_ranks
from rankpilot.lora.targets import find_target_modules


def trained_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def measured_bytes(model, batch, optimizer):
    """What a step really holds when its backward pass begins."""
    with SavedTensors(model) as saved:
        loss = model(**batch).loss
    peak_saved = saved.total
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return peak_saved + state_bytes(model, optimizer)


def random_plan(targets, generator, density):
    """Random ranks; at least one module is adapted."""
    ranks = generator.choice([1, 2, 4, 8], size=len(targets)) * (generator.random(len(targets)) < density)
    if not ranks.any():
        ranks[generator.integers(len(targets))] = 2
    return ranks.astype(np.int64)


def compare(model, batch, plans, optimizer_class=torch.optim.AdamW):
    """Predicted over measured bytes of each plan."""
    targets = find_target_modules(model)
    optimizer = optimizer_class(trained_parameters(model), lr=1e-3)
    cost = calibrate(model, targets, batch, optimizer, signal_bytes=False)
    ratios = []
    for ranks in plans(targets):
        set_ranks(targets, {t.name: int(r) for t, r in zip(targets, ranks, strict=True)}, optimizer)
        ratios.append(total_cost(cost, ranks) / measured_bytes(model, batch, optimizer))
    return np.array(ratios)


def random_plans(targets):
    generator = np.random.default_rng(0)
    for density in (0.1, 0.3, 0.6, 1.0):
        for _ in range(4):
            yield random_plan(targets, generator, density)


def planned_shapes(targets):
    """Plans that people would make: the top layers only, one kind of module only, one module only."""
    blocks = np.array([t.block for t in targets])
    for lowest in range(int(blocks.max()) + 1):
        yield np.where(blocks >= lowest, 4, 0)
    for kind in sorted({t.name.rpartition(".")[2] for t in targets}):
        yield np.array([4 if t.name.endswith(f".{kind}") else 0 for t in targets])
    for index in range(len(targets)):
        yield 2 * np.eye(len(targets), dtype=np.int64)[index]


@pytest.fixture
def large_llama_batch(make_tokens):
    """More rows than the four that calibration looks at."""
    tokens = make_tokens(rows=7)
    return {"input_ids": tokens, "labels": tokens}


@pytest.fixture
def large_bert_batch(make_tokens):
    tokens = make_tokens(rows=7)
    mask = (torch.arange(tokens.shape[1]) < torch.arange(2, 9)[:, None]).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": torch.arange(7) % 3}


def test_llama_is_predicted_exactly_for_whole_layers_kinds_and_single_modules(make_llama, large_llama_batch):
    ratios = compare(make_llama().train(), large_llama_batch, planned_shapes)
    assert np.abs(ratios - 1).max() <= 0.005


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_llama_is_never_underestimated(make_llama, large_llama_batch, optimizer, dropout):
    model = make_llama(lora_dropout=dropout).train()
    check_upper_bound(compare(model, large_llama_batch, random_plans, optimizer))


@pytest.mark.parametrize("plans", [random_plans, planned_shapes])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bert_with_dropout_is_never_underestimated(make_bert, large_bert_batch, plans, dropout):
    check_upper_bound(compare(make_bert(lora_dropout=dropout).train(), large_bert_batch, plans))


def check_upper_bound(ratios):
    """Never below; above only where part of the lowest layer is adapted: it weighs most in a small model."""
    assert ratios.min() >= 1 - 1e-9
    assert ratios.max() <= 1.15
    assert np.median(ratios) <= 1.005


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9])
def test_batches_of_any_size_are_extrapolated(make_llama, make_tokens, rows):
    tokens = make_tokens(rows=rows)
    batch = {"input_ids": tokens, "labels": tokens}
    ratios = compare(make_llama().train(), batch, lambda targets: [np.full(len(targets), 4)])
    assert ratios == pytest.approx(1, abs=0.005)


def test_calibration_leaves_everything_as_it_was(make_bert, bert_batch):
    model = make_bert().train()
    targets = find_target_modules(model)
    set_ranks(targets, {targets[0].name: 0, targets[1].name: 7})
    model(**bert_batch).loss.backward()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    trained = [p.requires_grad for p in model.parameters()]
    ranks = [t.rank for t in targets]
    pointers = [t.weight_a.data_ptr() for t in targets]
    random_state = torch.get_rng_state()
    with torch.no_grad():
        calibrate(model, targets, bert_batch)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [t.rank for t in targets] == ranks
    assert [t.weight_a.data_ptr() for t in targets] == pointers
    assert [p.requires_grad for p in model.parameters()] == trained
    assert model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name])
        assert (p.grad is None) == (name not in grads)
        assert p.grad is None or torch.equal(p.grad, grads[name])
    assert not any(t.layer.lora_A[t.adapter]._forward_pre_hooks for t in targets)


def test_calibration_does_not_depend_on_the_current_ranks(make_llama, llama_batch):
    model = make_llama().train()
    targets = find_target_modules(model)
    costs = []
    for rank in (4, 0, 11):
        set_ranks(targets, {t.name: rank for t in targets})
        costs.append(calibrate(model, targets, llama_batch))
    ranks = np.full(len(targets), 3)
    assert total_cost(costs[0], ranks) == total_cost(costs[1], ranks) == total_cost(costs[2], ranks)


def test_weights_come_back_after_a_failing_forward_pass(make_llama, llama_batch):
    model = make_llama()
    targets = find_target_modules(model)
    with pytest.raises((IndexError, RuntimeError)):
        calibrate(model, targets, llama_batch | {"input_ids": torch.full((4, 8), 999)})
    assert {t.rank for t in targets} == {4}
    assert all(t.weight_a.requires_grad and t.weight_b.requires_grad for t in targets)


def test_a_module_that_takes_no_part_is_named(make_bert, bert_batch):
    model = make_bert(exclude_modules=None)
    model.base_model.model.bert.pooler.forward = lambda hidden: hidden[:, 0]
    with pytest.raises(UnsupportedError, match=r"'bert\.pooler\.dense' took no part"):
        calibrate(model, find_target_modules(model), bert_batch)


def test_signal_buffers_are_one_more_b(make_llama, llama_batch):
    model = make_llama()
    targets = find_target_modules(model)
    with_buffers = calibrate(model, targets, llama_batch)
    without = calibrate(model, targets, llama_batch, signal_bytes=False)
    assert (with_buffers.per_rank - without.per_rank).tolist() == [4 * t.d_out for t in targets]


def test_the_lowest_module_costs_more_than_any_rank(make_llama, llama_batch):
    model = make_llama().train()
    targets = find_target_modules(model)
    cost = calibrate(model, targets, llama_batch)
    bottom, top = np.zeros((2, len(targets)), dtype=np.int64)
    bottom[0], top[-1] = 1, 8
    assert total_cost(cost, bottom) > total_cost(cost, top)
    assert cost.fixed(np.zeros(len(targets), dtype=bool)) == cost.constant


def test_state_bytes_counts_weights_gradients_and_state(make_bert, bert_batch):
    model = make_bert()
    parameters = trained_parameters(model)
    weights = sum(p.numel() * 4 for p in parameters)
    assert state_bytes(model, None) == 2 * weights
    optimizer = torch.optim.AdamW(parameters)
    assert state_bytes(model, optimizer) == 2 * weights
    model(**bert_batch).loss.backward()
    optimizer.step()
    assert state_bytes(model, optimizer) == 4 * weights
    optimizer.zero_grad(set_to_none=True)
    assert state_bytes(model, optimizer) == 4 * weights
    targets = find_target_modules(model)
    set_ranks(targets, {t.name: 0 for t in targets}, optimizer)
    head = sum(p.numel() * 4 for p in trained_parameters(model) if p.numel())
    assert state_bytes(model, optimizer) == 4 * head


def test_state_bytes_sees_storage_that_a_view_would_not_free(make_llama):
    model = make_llama()
    target = find_target_modules(model)[0]
    before = state_bytes(model, None)
    target.weight_a.data = target.weight_a.data[:1]
    assert state_bytes(model, None) == before


def test_saved_tensors_counts_storages_once_and_no_parameters():
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    with SavedTensors(layer) as saved:
        hidden = torch.tanh(layer(x))
        out = (hidden * hidden).sum() + layer(x).sum()
    assert saved.total == 2 * 4 * 8 * 4  # x and hidden; not the weight, and x once only
    out.backward()
    assert saved.total == 2 * 4 * 8 * 4


def test_parameter_cost(make_llama):
    targets = find_target_modules(make_llama())
    cost = ParameterCost.of(targets)
    ranks = np.arange(len(targets))
    expected = sum(int(r) * (t.d_in + t.d_out) for r, t in zip(ranks, targets, strict=True))
    assert total_cost(cost, ranks) == expected


def test_byte_cost_by_hand():
    cost = ByteCost(
        per_rank=np.array([1.0, 1.0, 2.0]),
        constant=100.0,
        order=np.array([0, 1, 2]),
        chain=np.array([50.0, 40.0, 10.0]),
        extra=np.array([[0.0, 7, 0], [0, 0, 5], [0, 0, 0]]),
        together=np.array([3.0, 0, 0]),
        shared=np.array([0, 0, 1]),
        block=np.array([0, 0, 1]),
    )
    assert total_cost(cost, np.array([0, 0, 0])) == 100
    assert total_cost(cost, np.array([0, 0, 3])) == 100 + 10 + 6
    assert total_cost(cost, np.array([0, 2, 1])) == 100 + 40 + 5 + 2 + 2
    # Module 1 shares module 0's input, so only the interaction of the two comes on top.
    assert total_cost(cost, np.array([1, 1, 0])) == 100 + 50 + 3 + 2
