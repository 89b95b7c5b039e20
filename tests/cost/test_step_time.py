"""Seconds of plans, computed by hand and fitted to given timings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.common.errors import ConfigError
from rankpilot.cost.cost import TIME, ByteCost, ParameterCost, cost_from_state, cost_state, plan_cost, unit_cost
from rankpilot.cost.record.measured_time import count_work
from rankpilot.cost.savers.checkpointed_layers import LayerCheckpointing
from rankpilot.cost.step_time import PARAMETER_BYTES, PARTS, Rates, StepTime, StepWork, fitted
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
    assert time.parts(plan, layers).sum() == pytest.approx(seconds)
    assert time.seconds(plan) == time.seconds(plan, ()), "no layer runs again by default"


@pytest.mark.parametrize("layers", [(), ("upper",), ("lower", "upper")])
def test_the_seconds_are_those_of_the_row(time, layers):
    row, generator = time.row(layers), np.random.default_rng(0)
    for ranks in generator.choice([0, 1, 8], size=(20, 5)):
        assert time.seconds(ranks, layers) == row.seconds(ranks)


def test_factors_scale_the_parts(time):
    factors, ranks, layers = np.array([2.0, 3.0, 0.0, 5.0, 7.0]), np.array([1, 0, 2, 0, 0]), ("lower",)
    assert len(factors) == len(PARTS)
    assert time.scaled(factors).parts(ranks, layers) == pytest.approx(factors * time.parts(ranks, layers))


def test_layers_that_run_again_by_themselves_count(time):
    again = StepTime(**{**vars(time), "running_again": ("upper",)})
    ranks = np.array([0, 0, 1, 0, 0])
    assert again.seconds(ranks) == time.seconds(ranks, ("upper",)) > time.seconds(ranks)
    assert again.seconds(ranks, ()) == time.seconds(ranks, ())


def test_the_parts_are_fitted_to_what_was_measured(time):
    factors = np.array([1.5, 0.5, 2.0, 3.0, 0.8])
    plans = [
        (np.array(ranks), layers)
        for ranks, layers in [
            ((8, 8, 8, 8, 8), ()),
            ((32, 32, 32, 32, 32), ()),
            ((8, 0, 0, 0, 0), ()),
            ((0, 0, 0, 0, 8), ()),
            ((0, 0, 8, 8, 8), ()),
            ((8, 8, 8, 8, 8), ("lower", "upper")),
        ]
    ]
    truth = time.scaled(factors)
    found = fitted(time, plans, np.array([truth.seconds(*plan) for plan in plans]))
    for ranks, layers in [*plans, (np.array([1, 0, 64, 2, 0]), ("upper",))]:
        assert found.seconds(ranks, layers) == pytest.approx(truth.seconds(ranks, layers))


def test_a_part_that_noise_makes_negative_is_left_out(time):
    plans = [(np.full(5, 8), ()), (np.full(5, 32), ())]
    found = fitted(time, plans, np.array([50.0, 49.0]))  # a higher rank cannot take less
    assert all(value >= 0 for value in found.parts(np.full(5, 8)))
    assert found.seconds(np.full(5, 8)) == pytest.approx(49.5, rel=0.02)


def test_what_grows_with_ranks_has_a_least_factor(time):
    plans = [(np.full(5, rank), ()) for rank in (8, 32)] + [
        (np.array([0, 0, 0, 0, 8]), ()),
        (np.array([8, 0, 0, 0, 0]), ()),
    ]
    truth = time.scaled(np.array([1.0, 1.0, 1.0, 0.0, 1.0]))
    seconds = np.array([truth.seconds(*plan) for plan in plans])
    ranks = np.full(5, 64)
    free = fitted(time, plans, seconds).seconds(ranks)
    assert free == pytest.approx(truth.seconds(ranks)), "rank 64 takes no more than rank 8"
    found = fitted(time, plans, seconds, least_growth=0.1)
    assert found.per_rank == pytest.approx(0.1 * time.per_rank)
    assert found.seconds(np.full(5, 8)) == pytest.approx(truth.seconds(np.full(5, 8)), rel=0.1)
    assert found.seconds(ranks) > 1.05 * free


def test_second_runs_that_every_plan_has_count_as_the_first_ones(time):
    plans = [(np.array(ranks), time.layers) for ranks in ((8, 8, 8, 8, 8), (0, 0, 8, 8, 8), (8, 0, 0, 0, 0))]
    truth = time.scaled(np.array([2.0, 1.0, 1.0, 1.0, 2.0]))
    found = fitted(time, plans, np.array([truth.seconds(*plan) for plan in plans]))
    parts = found.parts(*plans[0]) / time.parts(*plans[0])
    assert parts[0] == pytest.approx(parts[-1])
    for ranks, layers in plans:
        assert found.seconds(ranks, layers) == pytest.approx(truth.seconds(ranks, layers))


def test_times_of_nothing_are_refused(time):
    with pytest.raises(ConfigError, match=r"above 0 seconds; got \[0.0\]"):
        fitted(time, [(np.ones(5, dtype=int), ())], np.zeros(1))


def test_it_is_saved_and_read(time):
    again = StepTime.from_state(time.state())
    ranks = np.array([1, 0, 2, 0, 4])
    assert again.seconds(ranks, ("lower",)) == time.seconds(ranks, ("lower",))
    assert (again.layers, again.running_again) == (time.layers, time.running_again)


def test_time_is_one_more_moment_of_bytes(time):
    cost = ByteCost(("loss",), np.array([1000.0]), np.full((1, 5), 10.0), np.array([[500.0]]), np.eye(5)[:1] > 0)
    timed = time.row(()).added_to(cost, limit=4000.0, seconds=40.0)
    ranks = np.array([2, 0, 0, 1, 0])
    assert timed.moments == ("loss", TIME)
    assert timed.unit == "bytes"
    assert unit_cost(timed, ranks) == plan_cost(cost, ranks) == 1530
    assert plan_cost(timed, ranks) == pytest.approx(100 * time.seconds(ranks, ()), rel=1e-6)
    assert plan_cost(timed, ranks) >= 100 * time.seconds(ranks, ()), "never under"
    assert timed.unit_per_second == 100
    assert plan_cost(cost_from_state(cost_state(timed)), ranks) == plan_cost(timed, ranks)


def test_sums_of_time_are_exact(time):
    cost = ParameterCost(np.full((1, 5), 7.0))
    timed = time.row(time.layers).added_to(cost, limit=300_000.0, seconds=17.3)
    total = timed.constant[-1] + timed.group_bytes[-1].sum() + timed.per_rank[-1] @ np.full(5, 64)
    parts = [timed.constant[-1], *timed.group_bytes[-1], *(64 * timed.per_rank[-1])]
    forwards = backwards = 0.0
    for part in parts:
        forwards += part
    for part in reversed(parts):
        backwards += part
    assert forwards == backwards == total
    assert timed.unit == "parameters"
    assert isinstance(cost_from_state(cost_state(cost)), ParameterCost)


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
    assert time.parts(only_last)[1] == config_head, "the head alone has a gradient to pass on"
    lowest = [index for index, target in enumerate(targets) if target.name.endswith("layers.0.mlp.down_proj")]
    ranks = np.where(np.arange(len(targets)) == lowest[0], 2, 0)
    upper = size[[".layers.1." in target.name for target in targets]].sum()
    assert time.parts(ranks)[1] == config_head + 2 * TOKENS * (upper + 2.5 * hidden * LENGTH)


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
