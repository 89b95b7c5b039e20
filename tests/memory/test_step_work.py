"""The work of a step, counted on small models and held against arithmetic, and the seconds of a device's rates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.errors import ConfigError
from rankpilot.finetune.recomputation import Recomputation
from rankpilot.lora.targets import find_target_modules
from rankpilot.memory.measured_time import count_work
from rankpilot.memory.step_time import PARAMETER_BYTES, Rates, StepWork
from rankpilot.memory.training_step import model_loss, release_inputs

ROWS, LENGTH = 3, 10
TOKENS = ROWS * LENGTH


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(TOKENS).reshape(ROWS, LENGTH) % 7
    return {"input_ids": ids, "labels": ids}


def counted(model: Any) -> tuple[StepWork, Any]:
    release_inputs(model)
    targets = find_target_modules(model)
    return count_work(model.train(), targets, model_loss(model), batch()), targets


def weights(targets: Any) -> np.ndarray:
    return np.array([target.d_in * target.d_out for target in targets])


def test_products_of_the_frozen_model(make_llama: Any) -> None:
    model = make_llama()
    work, targets = counted(model)
    config = model.get_base_model().config
    head = config.vocab_size * config.hidden_size
    attention = 2 * config.hidden_size * LENGTH  # scores and their sums, for each token and layer
    forward = (work.module < 0) & ~work.backward
    expected = weights(targets).sum() + head + config.num_hidden_layers * attention
    assert work.flops[forward].sum() == 2 * TOKENS * expected
    in_layer = forward & (work.layer == 1)
    assert work.flops[in_layer].sum() == TOKENS * (weights(targets).sum() + 2 * attention)


def test_gradients_reach_down_to_the_lowest_adapter(make_llama: Any) -> None:
    work, targets = counted(make_llama())
    time = work.time(Rates(1.0, 1e30))  # seconds are operations
    size, hidden = weights(targets), targets[0].d_in
    config_head = time.constant - 2 * TOKENS * (size.sum() + 2 * 2 * hidden * LENGTH)
    only_last = np.array([2 * (index == len(targets) - 1) for index in range(len(targets))])
    assert time.parts(only_last)[1] == config_head, "the head alone has a gradient to pass on"
    lowest = [index for index, target in enumerate(targets) if target.name.endswith("layers.0.mlp.down_proj")]
    ranks = np.where(np.arange(len(targets)) == lowest[0], 2, 0)
    upper = size[[".layers.1." in target.name for target in targets]].sum()
    assert time.parts(ranks)[1] == config_head + 2 * TOKENS * (upper + 5 * hidden * LENGTH)


def test_an_adapter_grows_with_its_rank(make_llama: Any) -> None:
    work, targets = counted(make_llama())
    time = work.time(Rates(1.0, 1e30))
    for index, target in enumerate(targets):
        both = 2 * TOKENS * (target.d_in + target.d_out)
        lowest = target.name.endswith(("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "0.self_attn.v_proj"))
        # Forward once, backward for weights and inputs; the model's own inputs need no gradient.
        assert time.per_rank[index] == pytest.approx(3 * both - lowest * 2 * TOKENS * target.d_in), target.name
        assert time.again_per_rank[index] == pytest.approx(both)


def test_bytes_count_where_they_take_longer(make_llama: Any) -> None:
    work, targets = counted(make_llama())
    time = work.time(Rates(1e30, 1.0))  # seconds are bytes
    forward = (work.module < 0) & ~work.backward
    assert time.constant == pytest.approx(work.moved[forward].sum())
    assert time.adapters.sum() == pytest.approx(work.moved[work.module >= 0].sum())
    widths = np.array([target.d_in + target.d_out for target in targets])
    assert time.per_rank == pytest.approx(PARAMETER_BYTES * widths), "the optimiser"
    least = 4 * TOKENS * widths  # each adapter reads its input and adds to the output, in fp32
    assert (time.adapters > least).all()


def test_operators_take_time_by_their_number(make_llama: Any) -> None:
    work, targets = counted(make_llama())
    some, none = work.time(Rates(1e12, 1e10, 1e-3)), work.time(Rates(1e12, 1e10))
    ranks = np.full(len(targets), 8)
    assert some.seconds(ranks) - none.seconds(ranks) == pytest.approx(1e-3 * len(work.flops))


def test_layers_that_run_again_are_counted_once(make_llama: Any) -> None:
    plain, _ = counted(make_llama())
    model = make_llama()
    layers = Recomputation(model).layers
    work, targets = counted(model)
    assert work.running_again == layers == plain.layers
    assert plain.running_again == ()
    assert work.flops.sum() == plain.flops.sum()
    time = work.time(Rates(1.0, 1e30))
    whole = np.full(len(targets), 2)
    first = plain.flops[(plain.layer >= 0) & ~plain.backward].sum()
    assert time.seconds(whole) - time.seconds(whole, ()) == pytest.approx(first)
    upper = np.where([".layers.1." in target.name for target in targets], 2, 0)
    assert time.seconds(upper) - time.seconds(upper, ()) == pytest.approx(first / 2), "the lower layer holds nothing"


def test_the_model_stays_as_it_was(make_llama: Any) -> None:
    model = make_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trains = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    counted(model)
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("rates", [(0, 1, 0), (1, -1, 0), (1, 1, -1), (float("nan"), 1, 0)])
def test_rates_are_above_zero(rates: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="Rates are above 0"):
        Rates(*rates)
