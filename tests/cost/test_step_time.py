"""Seconds of plans, computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.common.errors import ConfigError
from rankpilot.cost.record.work import count_work
from rankpilot.cost.savers.checkpointed_layers import LayerCheckpointing
from rankpilot.cost.step_time import PARAMETER_BYTES, PlanSeconds, Rates, StepTime, StepWork
from rankpilot.cost.training_step import model_loss, release_inputs
from rankpilot.lora.targets import find_target_modules


@pytest.fixture
def time() -> StepTime:
    """Two layers with two modules each, and a module above them."""
    return StepTime(
        constant=10.0,
        per_rank=np.array([0.1, 0.2, 0.3, 0.4, 0.5]),
        adapters=np.array([1.0, 1.0, 2.0, 2.0, 3.0]),
        groups=np.array([5.0, 7.0]),
        needs=np.array([[True, True, False, False, False], [True, True, True, True, False]]),
        layers=("lower", "upper"),
        running_again=(),
        layer_seconds=np.array([20.0, 30.0]),
        layer_needs=np.array([[True, True, False, False, False], [True, True, True, True, False]]),
        layer_of=np.array([0, 0, 1, 1, -1]),
        again=np.array([0.5, 0.5, 0.5, 0.5, 100.0]),
        again_per_rank=np.array([0.01, 0.01, 0.01, 0.01, 100.0]),
    )


@pytest.mark.parametrize(
    ("ranks", "layers", "seconds"),
    [
        ((0, 0, 0, 0, 0), (), 10),
        ((0, 0, 0, 0, 4), (), 10 + 3 + 4 * 0.5),  # nothing flows below the uppermost module
        ((0, 0, 2, 0, 0), (), 10 + 7 + 2 + 2 * 0.3),
        ((1, 0, 0, 1, 0), (), 10 + 5 + 7 + 1 + 2 + 0.1 + 0.4),
        (
            (0, 0, 2, 0, 0),
            ("lower", "upper"),
            10 + 7 + 2 + 2 * 0.3 + 30 + 0.5 + 2 * 0.01,
        ),  # the lower holds nothing
        ((1, 0, 0, 1, 0), ("lower",), 25.5 + 20 + 0.5 + 0.01),
        ((0, 0, 0, 0, 4), ("lower", "upper"), 15),
    ],
)
def test_a_plan_takes_the_sum_of_its_parts(time, ranks, layers, seconds):
    plan = np.array(ranks)
    assert time.seconds(plan, layers) == pytest.approx(seconds)
    assert time.times(3).seconds(plan, layers) == pytest.approx(3 * seconds)
    assert time.seconds(plan) == time.seconds(plan, ()), "no layer runs again by default"


@pytest.mark.parametrize("layers", [(), ("upper",), ("lower", "upper")])
def test_the_seconds_are_those_of_the_row(time, layers):
    row, generator = time.of_plans(layers), np.random.default_rng(0)
    for ranks in generator.choice([0, 1, 8], size=(20, 5)):
        assert time.seconds(ranks, layers) == pytest.approx(row(ranks))


def test_layers_that_run_again_by_themselves_count(time):
    again = StepTime(**{**vars(time), "running_again": ("upper",)})
    ranks = np.array([0, 0, 1, 0, 0])
    assert again.seconds(ranks) == time.seconds(ranks, ("upper",)) > time.seconds(ranks)
    assert again.seconds(ranks, ()) == time.seconds(ranks, ())


def test_it_is_saved_and_read(time):
    plans = time.of_plans(("lower",))
    again = PlanSeconds.from_state(vars(plans), 5)
    ranks = np.array([[1, 0, 2, 0, 4], [0, 0, 0, 0, 8]])
    np.testing.assert_array_equal(again(ranks), plans(ranks))
    with pytest.raises(ValueError, match="per_rank of the step time has shape"):
        PlanSeconds.from_state(vars(plans), 4)


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


def _backward(time: StepTime, ranks: np.ndarray) -> float:
    """The seconds of the frozen model's backward pass."""
    return float(time.groups @ time.needs[:, ranks > 0].any(axis=1))


def test_products_of_the_frozen_model(make_llama: Any) -> None:
    model = make_llama()
    work, targets = counted(model)
    config = model.get_base_model().config
    head = config.vocab_size * config.hidden_size
    attention = config.hidden_size * LENGTH  # scores and their sums, for each token and layer, half of them hidden
    forward = (work.module < 0) & ~work.backward
    expected = weights(targets).sum() + head + config.num_hidden_layers * attention
    assert work.flops[forward].sum() == 2 * TOKENS * expected
    in_layer = forward & (work.layer == 1)
    assert work.flops[in_layer].sum() == TOKENS * (weights(targets).sum() + 2 * attention)


def test_gradients_reach_down_to_the_lowest_adapter(make_llama: Any) -> None:
    work, targets = counted(make_llama())
    time = work.time(Rates(1.0, 1e30))  # seconds are operations
    size, hidden = weights(targets), targets[0].d_in
    config_head = time.constant - 2 * TOKENS * (size.sum() + 2 * hidden * LENGTH)
    only_last = np.array([2 * (index == len(targets) - 1) for index in range(len(targets))])
    assert _backward(time, only_last) == config_head, "the head alone has a gradient to pass on"
    lowest = [index for index, target in enumerate(targets) if target.name.endswith("layers.0.mlp.down_proj")]
    ranks = np.where(np.arange(len(targets)) == lowest[0], 2, 0)
    upper = size[[".layers.1." in target.name for target in targets]].sum()
    assert _backward(time, ranks) == config_head + 2 * TOKENS * (upper + 2.5 * hidden * LENGTH)


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


def test_a_step_takes_the_longer_of_all_work_and_all_launches(make_llama: Any) -> None:
    work, targets = counted(make_llama())
    plans = np.full(len(targets), 8), np.eye(len(targets), dtype=np.int64)[-1]
    for launch, rates in ((1e-9, Rates(1e12, 1e10)), (1e-2, Rates(1e30, 1e30, 1e-2))):
        time, longer = work.time(Rates(1e12, 1e10, launch_seconds=launch)), work.time(rates)
        assert list(map(time.seconds, plans)) == pytest.approx(list(map(longer.seconds, plans)))


def test_layers_that_run_again_are_counted_once(make_llama: Any) -> None:
    plain, _ = counted(make_llama())
    model = make_llama()
    layers = LayerCheckpointing(model).layers
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


@pytest.mark.parametrize("rates", [(0, 1, 0), (1, -1, 0), (1, 1, -1), (float("nan"), 1, 0), (1, 1, 0, -1)])
def test_rates_are_above_zero(rates: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="Rates must be above 0"):
        Rates(*rates)
