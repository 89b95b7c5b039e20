"""Measured peaks of real steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rankpilot.cost.cost import plan_cost
from rankpilot.cost.record.live_storages import LivePeak
from rankpilot.cost.record.model_states import state_bytes
from rankpilot.cost.record.peak_meter import PeakMeter

from .measured import Run, adamw_run, family_batch, family_model, random_plans


@pytest.fixture
def run(named_family) -> Run:
    family = named_family("llama")
    model = family_model(family)
    return adamw_run(model, family_batch(family, model, 4, 12))


def train(run: Run) -> None:
    run.loss().backward()
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def measured(run: Run, meter: PeakMeter, step: int = 0, extra: int = 0) -> int | None:
    meter.begin(run.model, run.optimizer, extra)
    train(run)
    return meter.end(step)


def test_the_first_step_is_due_then_every_so_many_and_each_one_asked_for(run):
    meter = PeakMeter(every_steps=10)
    assert meter.due(7)
    measured(run, meter, 7)
    assert [step for step in range(8, 32) if meter.due(step)] == [10, 20, 30]
    meter.request()
    assert meter.due(11)
    assert meter.due(12), "a request stands until a step has been measured"
    measured(run, meter, 12)
    assert not meter.due(13)
    assert [step for step, _ in meter.history] == [7, 12]


def test_a_peak_is_what_was_held_before_and_the_rise_of_live_bytes(run):
    train(run)
    with LivePeak() as live:
        train(run)
    before = state_bytes(run.model, run.optimizer, gradients=False)
    meter = PeakMeter()
    assert measured(run, meter) == before + live.peak
    assert measured(run, meter, 1, extra=1000) == before + live.peak + 1000
    assert meter.history == [(0, before + live.peak), (1, before + live.peak + 1000)]


def test_state_that_the_first_step_makes_counts_as_if_it_had_been_there(run):
    first, second = (measured(run, PeakMeter()) for _ in range(2))
    assert first == second


def test_what_runs_after_the_optimisers_step_does_not_count(run):
    """Such as a callback that generates a sample with the model, or with a larger batch."""
    expected, meter = measured(run, PeakMeter()), PeakMeter()
    meter.begin(run.model, run.optimizer)
    train(run)
    kept = torch.zeros(10_000_000)
    assert meter.end(0) == expected
    meter.begin(run.model, run.optimizer)
    also = torch.zeros(10_000_000)
    train(run)
    assert meter.end(1) > expected + also.nbytes / 2
    assert kept.nbytes == also.nbytes
    assert not run.optimizer._optimizer_step_post_hooks


def test_what_runs_aside_does_not_count_and_what_it_leaves_behind_does(run):
    """Such as answers to prompts that the model writes between the batches of a step."""
    expected, meter = measured(run, PeakMeter()), PeakMeter()
    meter.begin(run.model, run.optimizer)
    run.loss().backward()
    run.optimizer.zero_grad(set_to_none=True)
    with meter.aside():
        kept = torch.zeros(10_000_000)[:0].new_zeros(250)
    train(run)
    assert meter.end(0) == expected + kept.nbytes


def test_gradients_may_be_cleared_at_the_head_of_a_step(run):
    """As in PyTorch's tutorials: those of the step before are still there when it begins, and after it."""
    train(run)
    expected = measured(run, PeakMeter())
    run.loss().backward()
    meter = PeakMeter()
    meter.begin(run.model, run.optimizer)
    run.optimizer.zero_grad()
    run.loss().backward()
    run.optimizer.step()
    assert meter.end(0) == expected
    closure = PeakMeter()
    run.optimizer.zero_grad()
    closure.begin(run.model, run.optimizer)
    run.optimizer.step(lambda: run.loss().backward())
    assert closure.end(1) == pytest.approx(expected, rel=0.01)


def test_buffers_that_a_step_makes_count_once(run):
    """As from the start if they stay: so a first step is like all others, also where its passes take little."""
    train(run)
    run.optimizer.zero_grad()
    kept = []

    def peak() -> int | None:
        meter = PeakMeter()
        meter.begin(run.model, run.optimizer, buffers=lambda: sum(tensor.nbytes for tensor in kept))
        run.loss().backward()
        meter.passed()
        if not kept:
            kept.append(torch.zeros(1_000_000))
        run.optimizer.step()
        run.optimizer.zero_grad()
        return meter.end(0)

    alone = measured(run, PeakMeter())
    assert peak() == peak() == alone + 4_000_000


def test_a_measurement_that_an_error_left_open_ends_with_the_next(run):
    lost, meter = PeakMeter(), PeakMeter()
    lost.begin(run.model, run.optimizer)
    expected = measured(run, meter)
    assert not lost.measuring
    assert lost.end(0) is None
    assert torch._C._len_torch_dispatch_stack() == 0
    lost.begin(run.model, run.optimizer)
    train(run)
    assert measured(run, lost) == expected, "it begins anew"


def test_closing_stops_without_a_result_and_stays_due(run):
    meter = PeakMeter()
    meter.begin(run.model, run.optimizer)
    assert torch._C._len_torch_dispatch_stack() == 1
    meter.close()
    meter.close()
    assert torch._C._len_torch_dispatch_stack() == 0
    assert meter.end(0) is None
    assert meter.due(3)


def test_measuring_does_not_change_what_a_step_computes(named_family):
    weights = []
    for metered in (False, True):
        family = named_family("bert")
        model = family_model(family)
        run = adamw_run(model, family_batch(family, model, 4, 8))
        torch.manual_seed(3)
        for step in range(2):
            measured(run, PeakMeter(), step) if metered else train(run)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="reads the allocator of CUDA")
def test_on_a_gpu_the_allocator_itself_is_read_and_predictions_hold(named_family):
    """The model is small compared with the allocator's blocks and with workspaces, so the bounds are wide."""
    family = named_family("llama")
    model = family_model(family).cuda()
    batch = {name: tensor.cuda() for name, tensor in family_batch(family, model, 64, 16).items()}
    run = adamw_run(model, batch)
    train(run)
    cost = run.calibrated().cost()
    for ranks in random_plans(run.targets, np.random.default_rng(0), 8):
        run.apply(ranks)
        train(run)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = state_bytes(model, run.optimizer, gradients=False)
        before = torch.cuda.memory_allocated()
        train(run)
        real = torch.cuda.max_memory_allocated() - before + held
        assert measured(run, PeakMeter()) == pytest.approx(real, rel=1e-3)
        assert plan_cost(cost, ranks) == pytest.approx(real, rel=0.05)
