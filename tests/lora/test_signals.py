"""Signals: what they measure, and that they find what was planted."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from rankpilot.lora.adapters import SIGNALS, SignalMeter, signal_buffer_bytes
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.targets import find_target_modules

from ..cases import first_cases


def columns(values):
    return dict(zip(SIGNALS, values.T, strict=True))


def step(model, tokens, *meters):
    """Gradients of a batch, and of no other, as meters see them."""
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    for meter in meters:
        meter.accumulate()


@pytest.mark.parametrize("planted", first_cases(6, range(14)))
def test_sensitivity_picks_the_module_that_has_to_change(make_llama, make_tokens, planted):
    """A teacher differs from the student in one weight; the student learns its outputs."""
    model = make_llama(filled=False, r=2, lora_alpha=4)
    targets = find_target_modules(model)
    with torch.no_grad():  # a random model's layers hardly change anything unless they are enlarged
        for weight in [t.layer.base_layer.weight for t in targets]:
            weight *= 5
        model.base_model.model.model.embed_tokens.weight *= 5
    teacher = copy.deepcopy(model)
    weight = find_target_modules(teacher)[planted].layer.base_layer.weight
    with torch.no_grad():
        change = torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1])
        weight += weight.norm() / 2 * change / change.norm()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    meter = SignalMeter(targets)
    for step in range(40):
        tokens = make_tokens(rows=8, seed=step)
        with torch.no_grad():
            goal = teacher(input_ids=tokens).logits
        optimizer.zero_grad()
        (model(input_ids=tokens).logits - goal).square().mean().backward()
        meter.accumulate()
        optimizer.step()
    assert int(columns(meter.read())["sensitivity"].argmax()) == planted


def test_signals_against_their_definitions(make_llama, make_tokens):
    model = make_llama(dtype=torch.float64)
    targets = find_target_modules(model)
    meter = SignalMeter(targets)
    gradients = []
    for seed in range(3):
        step(model, make_tokens(seed=seed), meter)
        gradients.append([t.weight_b.grad.clone() for t in targets])
    values = columns(meter.read())
    for index, target in enumerate(targets):
        mine = torch.stack([step[index] for step in gradients])
        mean = mine.mean(dim=0)
        snr = mean.norm() ** 2 / mine.flatten(1).norm(dim=1).square().mean()
        assert values["snr"][index] == pytest.approx(float(snr))
        sensitivity = (target.weight_b * mean).sum(dim=0).abs().sum()
        at_rank_8 = target.scaling_at(8) / target.scaling
        assert at_rank_8 == 0.5
        assert values["sensitivity"][index] == pytest.approx(at_rank_8 * float(sensitivity.detach()) / target.rank)
        root_mean_square = mine.square().sum(dim=(1, 2)).mean().sqrt()
        assert values["gradient_norm"][index] == pytest.approx(at_rank_8 * float(root_mean_square))
        importance = (target.weight_b.detach() * mean).abs().sum()
        assert values["importance"][index] == pytest.approx(at_rank_8 * float(importance) / target.rank)
        delta = target.scaling * (target.weight_b @ target.weight_a).norm()
        relative = float(delta.detach() / target.layer.base_layer.weight.norm())
        assert values["relative_change"][index] == pytest.approx(relative, rel=1e-6)
    assert ((values["snr"] > 0) & (values["snr"] <= 1 + 1e-9)).all()


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-6)])
def test_long_intervals_of_half_precision_count_in_full(make_llama, dtype, size):
    """In bfloat16 a sum stalls after some 256 equal terms, and in float16 the square of 1e-6 is 0."""
    model = make_llama(dtype=dtype)
    targets = find_target_modules(model)
    meter = SignalMeter(targets)
    for target in targets:
        target.weight_b.grad = torch.full_like(target.weight_b, size)
    for _ in range(1000):
        meter.accumulate()
    restored = SignalMeter(targets)
    restored.load_state_dict(meter.state_dict())
    ranks = np.array([target.rank for target in targets])
    assert meter.buffer_bytes == restored.buffer_bytes == signal_buffer_bytes(targets) @ ranks
    values = columns(meter.read())
    assert meter.buffer_bytes == 0
    np.testing.assert_array_equal(values["snr"], columns(restored.read())["snr"])
    np.testing.assert_allclose(values["snr"], 1, rtol=1e-3)
    for index, target in enumerate(targets):
        given = float(target.weight_b.grad[0, 0]) * target.weight_b.numel() ** 0.5
        assert values["gradient_norm"][index] == pytest.approx(given * target.scaling_at(8) / target.scaling, rel=1e-3)


def test_before_the_first_read_nothing_is_known(make_llama):
    meter = SignalMeter(find_target_modules(make_llama()))
    assert np.isnan(meter.values).all()
    assert meter.values.shape == (14, len(SIGNALS))
    meter.accumulate()  # no gradients yet
    assert np.isnan(meter.read()).all()
    assert (meter.age == 1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradients_are_left_out(make_llama, llama_batch, value):
    model = make_llama()
    targets = find_target_modules(model)
    meter, clean = SignalMeter(targets), SignalMeter(targets)
    model(**llama_batch).loss.backward()
    meter.accumulate()
    clean.accumulate()
    kept = targets[3].weight_b.grad.clone()
    targets[3].weight_b.grad[0, 0] = value
    meter.accumulate()
    targets[3].weight_b.grad.copy_(kept)
    np.testing.assert_array_equal(meter.read(), clean.read())


def test_a_module_at_rank_zero_keeps_its_values_and_ages(make_llama, make_tokens):
    model = make_llama()
    targets = find_target_modules(model)
    meter = SignalMeter(targets)

    def interval():
        step(model, make_tokens(), meter)
        return meter.read().copy()

    first = interval()
    assert (meter.age == 0).all()
    set_ranks(targets, {targets[5].name: 0, targets[6].name: 2})
    meter.restart()
    second, third = interval(), interval()
    np.testing.assert_array_equal(second[5], first[5])
    np.testing.assert_array_equal(third[5], first[5])
    assert meter.age[5] == 2
    assert (np.delete(meter.age, 5) == 0).all()
    assert not np.array_equal(second[6], first[6])


def test_going_on_from_a_state_dict_is_as_if_never_stopped(make_llama, make_tokens):
    """A checkpoint in memory does not change with the steps that follow."""
    model = make_llama()
    targets = find_target_modules(model)
    set_ranks(targets, {targets[2].name: 0})
    meter, again = SignalMeter(targets), SignalMeter(targets)
    step(model, make_tokens(seed=0), meter)
    meter.read()
    step(model, make_tokens(seed=1), meter)
    state = meter.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    again.load_state_dict(state)
    np.testing.assert_array_equal(again.values, meter.values)
    np.testing.assert_array_equal(again.age, meter.age)
    step(model, make_tokens(seed=2), meter, again)
    for key, value in state.items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
    np.testing.assert_array_equal(again.read(), meter.read())
    np.testing.assert_array_equal(again.age, meter.age)
