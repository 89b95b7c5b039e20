"""Gradients that go two ways: a plan whose graph has only one of them frees them sooner."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from rankpilot.memory.cost import plan_cost
from rankpilot.memory.live_storages import LiveStorages
from rankpilot.memory.recorder import GradientHolders, Recorder
from rankpilot.memory.recording import NEVER, flow_from
from rankpilot.memory.training_step import release_inputs

from ..cases import first_cases
from .measured import adamw_run, family_batch, family_model


@pytest.fixture
def checkpointed_run(named_family):
    """A run whose inputs require no gradients, so that plans of upper modules leave little of the graph."""

    def make(name, precision="fp32"):
        family = named_family(name)
        model = family_model(family, precision, checkpointing=False)
        release_inputs(model)
        return adamw_run(model, family_batch(family, model, 8, 12), precision)

    return make


def lone_plans(run):
    """Each module alone, at rank 2."""
    return 2 * np.eye(len(run.targets), dtype=np.int64)


@pytest.mark.parametrize("name", first_cases(2, ["llama", "gpt2", "vit"]))
def test_a_lone_module_costs_what_it_takes_and_the_margin(checkpointed_run, name):
    run = checkpointed_run(name, "autocast")
    memory = run.calibrated()
    cost = memory.cost()
    for ranks in lone_plans(run):
        assert plan_cost(cost, ranks) == pytest.approx(run.peak(ranks) * (1 + memory.margin), rel=3e-4)
        assert memory.peak(ranks) == pytest.approx(plan_cost(cost, ranks), rel=3e-4)
        assert memory.at_peak(ranks).total == plan_cost(cost, ranks)


def test_a_gradient_past_a_layer_waits_for_modules_below_it_alone(checkpointed_run):
    run = checkpointed_run("llama")
    recording = Recorder(run.model, run.targets).step(run.batch)
    names = [target.name for target in run.targets]
    below = sum(1 << i for i, name in enumerate(names) if "layers.0." in name or "self_attn" in name)
    top = next(i for i, name in enumerate(names) if "layers.1.mlp.down_proj" in name)
    past = [serial for serial, phases in recording.needed_later.items() if phases[-1][1] == below]
    past = [serial for serial in past if recording.needed[serial] >> top & 1]
    assert len(past) == 1  # one residual stream runs past the upper layer's last block
    assert recording.sizes[past[0]] == run.batch["input_ids"].numel() * 24 * 4


def test_needs_shrink_and_never_come_to_nothing(checkpointed_run):
    run = checkpointed_run("gpt2")
    recording = Recorder(run.model, run.targets).step(run.batch)
    assert len(recording.needed_later) > 10
    for serial, phases in recording.needed_later.items():
        times = [int(recording.created[serial]), *(time for time, _ in phases), int(recording.freed[serial])]
        assert recording.forward_end < times[0] <= times[1]
        assert times[1:] == sorted(set(times[1:]))
        needs = [recording.needed[serial], *(modules for _, modules in phases)]
        for before, after in pairwise(needs):
            assert after
            assert after & before == after != before
        assert serial not in recording.gradients


@pytest.mark.parametrize("keeps", [False, True])
def test_a_gradient_that_something_else_keeps_is_needed_to_its_end(keeps):
    """The gradient of a sum goes through a branch to one leaf, and past it to another."""
    past, branch = (torch.ones(64, requires_grad=True) for _ in range(2))
    created, freed, gradients, kept = [], [], [], []

    def note(serial, size):
        created.append(mode.now)
        freed.append(NEVER)

    def hear(gradient):
        gradients.append(mode.serial(gradient))
        kept.extend([gradient] * keeps)

    mode = LiveStorages(note, lambda serial: freed.__setitem__(serial, mode.now))
    with mode:
        total = (past * 2).exp() + ((branch * 2).exp() * 2).exp()
        total.register_hook(hear)
        loss = (total * 3).sum()
        flow = flow_from(loss, lambda leaf: 1 if leaf is past else 2)
        holders = GradientHolders(flow, mode.serial, lambda: mode.now)
        del flow
        loss.backward()
        later = holders.needed_later(created, freed, dict.fromkeys(range(mode.count), 3))
    (gradient,) = gradients
    if keeps:
        assert freed[gradient] == NEVER
        assert gradient not in later
    else:
        (phase,) = later[gradient]
        assert phase[1] == 1
        assert created[gradient] < phase[0] < freed[gradient]
