"""Counted work of a step, and rates of a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.cost.record import work
from rankpilot.cost.record.work import count_work, measured_rates
from rankpilot.cost.training_step import model_loss
from rankpilot.lora.targets import find_target_modules


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(24).reshape(2, 12) % 7
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_leaves_out_what_a_causal_mask_hides(device: str) -> None:
    def flops(causal: bool) -> float:
        counted: list[float] = []
        query, key, value = (torch.ones(1, 2, 16, 8, device=device, requires_grad=True) for _ in range(3))
        with work._Operators(lambda flops, moved: counted.append(flops)):
            attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            attend(query, key, value, 0.0, causal)[0].sum().backward()
        return sum(counted)

    assert flops(False) > 0
    assert flops(True) == flops(False) / 2


def test_a_counted_step_leaves_the_run_as_it_was(make_llama: Any) -> None:
    model = make_llama().train()
    targets = find_target_modules(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trains = [parameter.requires_grad for parameter in model.parameters()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    state = torch.get_rng_state()
    time = count_work(model, targets, model_loss(model), batch()).time(
        measured_rates(torch.device("cpu"), torch.float32)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not optimizer.state
    assert time.seconds(np.full(len(targets), 8)) > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == trains


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
    assert work._seconds(torch.device("cuda", 1), lambda: noted.append(current[-1])) == 0.25
    assert noted == [1, 1, 1]
