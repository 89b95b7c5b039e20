"""The plans that are timed, and what is made of given timings; no time is measured here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.cost.record import measured_time
from rankpilot.cost.record.measured_time import count_work, measure_step_time, timed_plans, usual_seconds
from rankpilot.cost.savers.checkpointed_layers import LayerCheckpointing
from rankpilot.cost.step_time import Rates
from rankpilot.cost.training_step import TrainingStep, model_loss
from rankpilot.lora.targets import find_target_modules
from transformers.modeling_layers import GradientCheckpointingLayer

RATES = Rates(1e11, 1e10, 1e-6)
FACTORS = np.array([1.3, 0.9, 2.0, 1.5, 1.1])


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(24).reshape(2, 12) % 7
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_leaves_out_what_a_causal_mask_hides(device: str) -> None:
    def flops(causal: bool) -> float:
        counted: list[float] = []
        query, key, value = (torch.ones(1, 2, 16, 8, device=device, requires_grad=True) for _ in range(3))
        with measured_time._Operators(lambda flops, moved: counted.append(flops)):
            attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            attend(query, key, value, 0.0, causal)[0].sum().backward()
        return sum(counted)

    assert flops(False) > 0
    assert flops(True) == flops(False) / 2


def test_the_plans_tell_the_parts_apart(make_llama: Any) -> None:
    targets = find_target_modules(make_llama())
    plans = timed_plans(targets, ("a", "b"))
    names = [[target.name for target, rank in zip(targets, ranks, strict=True) if rank] for ranks, _ in plans]
    assert len(names[0]) == len(names[1]) == len(names[-1]) == len(targets)
    assert names[2] == [targets[-1].name]
    assert all(".layers.0." in name for name in names[3])
    assert all(".layers.1." in name for name in names[4])
    assert names[5] == names[4]
    assert (plans[5][0] >= plans[4][0]).all()
    assert plans[5][0].sum() > plans[4][0].sum()
    assert [layers for _, layers in plans] == [(), (), (), (), (), (), ("a", "b")]
    assert [layers for _, layers in timed_plans(targets, (), ("a",))] == [("a",)] * 6
    one = [target for target in targets if target.block == 0]
    assert all(ranks.any() for ranks, _ in timed_plans(one, ())), "something trains under each plan for one layer"
    assert all((ranks <= [target.max_rank for target in targets]).all() for ranks, _ in plans)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_given_timings_are_reproduced(make_llama: Any, monkeypatch: pytest.MonkeyPatch, checkpoint: bool) -> None:
    model = make_llama().train()
    checkpointing = LayerCheckpointing(model) if checkpoint else None
    targets = find_target_modules(model)
    step = TrainingStep(model, model_loss(model), None)
    truth = count_work(model, targets, step.loss, batch()).time(RATES).scaled(FACTORS)
    seen = []

    def timed(step: Any, targets: Any, ranks: Any, batch: Any, *, warm: bool) -> float:
        layers = [name for name, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)]
        again = tuple(name for name in layers if isinstance(model.get_submodule(name), GradientCheckpointingLayer))
        seen.append((tuple(ranks), again, warm))
        return truth.seconds(ranks, again) * (1 + 10 * (len(seen) % 17 == 0))  # a spike now and then

    monkeypatch.setattr(measured_time, "_timed_step", timed)
    monkeypatch.setattr(measured_time, "measured_rates", lambda device: RATES)
    found = measure_step_time(step, targets, batch(), checkpointing.take if checkpointing else None)
    plans = 7 if checkpoint else 6
    assert len(seen) == (1 + 5) * plans, "so short steps are timed more often"
    assert not any(warm for _, _, warm in seen[:plans])
    assert all(warm for _, _, warm in seen[plans:]), "steps as short as these run once before"
    generator = np.random.default_rng(0)
    for _ in range(10):
        ranks = generator.choice([0, 1, 8, 64], size=len(targets))
        layers = tuple(name for name in found.layers if checkpoint and generator.random() < 0.5)
        assert found.seconds(ranks, layers) == pytest.approx(truth.seconds(ranks, layers), rel=1e-6)
    if checkpointing:
        assert all(layer.gradient_checkpointing for layer in checkpointing._layers.values()), "as before"


def test_real_steps_leave_the_run_as_it_was(make_llama: Any) -> None:
    model = make_llama().train()
    targets = find_target_modules(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trains = [parameter.requires_grad for parameter in model.parameters()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    state = torch.get_rng_state()
    time = measure_step_time(TrainingStep(model, model_loss(model), optimizer), targets, batch(), rounds=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not optimizer.state
    assert time.seconds(np.full(len(targets), 8)) > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == trains


def test_a_slow_round_and_a_spike_change_nothing() -> None:
    usual = np.array([1.0, 3.0, 2.0, 0.5])
    seconds = np.outer([1.0, 1.4, 1.1], usual)
    seconds[2, 3] *= 9
    found = usual_seconds(seconds)
    assert found / found[0] == pytest.approx(usual)


def test_a_step_on_another_device_than_the_current_one_is_timed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are recorded on the current device; these are stand-ins that note which one it is."""
    current, noted = [0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            noted.append(current[-1])

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 250.0

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", on)
    assert measured_time._seconds(torch.device("cuda", 1), lambda: noted.append(current[-1])) == 0.25
    assert noted == [1, 1, 1]
