"""One recorded step: which storages are created, when they are freed, and which modules need them."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from rankpilot.common.errors import UnsupportedError
from rankpilot.cost.cost import plan_cost
from rankpilot.cost.record.live_storages import LiveStorages
from rankpilot.cost.record.recorder import GradientHolders, Recorder, flow_from
from rankpilot.cost.record.work import count_work
from rankpilot.cost.recording import NEVER
from rankpilot.cost.training_step import release_inputs
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..cases import first_cases
from .measured import adamw_run, family_batch, family_model


@pytest.fixture
def recorded(named_family):
    """A recorder of a two-layer Llama, its run and one recording."""

    def record(name="llama", checkpointing=None):
        family = named_family(name)
        model = family_model(family, checkpointing=checkpointing)
        run = adamw_run(model, family_batch(family, model, 3, 8))
        recorder = Recorder(model, run.targets)
        return recorder, run, recorder.step(run.batch)

    return record


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_that_a_step_switches_off_and_on_again_is_recorded_all_the_same(recorded, reentrant):
    """As TRL does around texts that it generates."""
    recorder, run, whole = recorded(checkpointing=reentrant)
    layers = run.model.base_model.model.model.layers
    before, plain = [layer._gradient_checkpointing_func for layer in layers], recorder.loss

    def loss(batch):
        run.model.gradient_checkpointing_disable()
        run.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return plain(batch)

    recorder.loss = loss
    recording = recorder.step(run.batch)
    assert [segment.saved for segment in recording.segments] == [segment.saved for segment in whole.segments]
    assert recording.needed == whole.needed
    for column in ("sizes", "created", "freed", "segment_index"):
        assert np.array_equal(getattr(recording, column), getattr(whole, column)), column
    assert [layer._gradient_checkpointing_func for layer in layers] == before
    assert not hasattr(type(layers[0]), "_gradient_checkpointing_func")


def called_before_its_hooks(layer, *arguments, **options):
    """A layer's `__call__` in transformers 5.16."""
    call = partial(nn.Module.__call__, layer, **options)
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(call, *arguments)
    return call(*arguments)


def test_layers_have_their_names_under_every_version_of_transformers(recorded, monkeypatch):
    """Before, all layers had the name of the model that holds them, so a plan could choose none."""
    recorder, run, whole = recorded(checkpointing=False)
    names = [name for name, module in run.model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    work = count_work(run.model, run.targets, recorder.loss, run.batch)
    assert [segment.name for segment in whole.segments] == list(work.running_again) == names
    kind = type(run.model.get_submodule(names[0]))
    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", called_before_its_hooks)
    if kind.forward.__code__.co_name == "forward_with_checkpointing":
        monkeypatch.setattr(kind, "forward", kind.forward.__wrapped__)
    older = recorder.step(run.batch)
    assert [(segment.name, segment.saved) for segment in older.segments] == [
        (segment.name, segment.saved) for segment in whole.segments
    ]
    assert count_work(run.model, run.targets, recorder.loss, run.batch).running_again == work.running_again


def under_checkpoint(loss, batch):
    factor = torch.ones(4, 4, requires_grad=True)
    return loss(batch) + checkpoint(lambda given: given.exp().sum(), factor, use_reentrant=False)


def under_save_on_cpu(loss, batch):
    with save_on_cpu():
        return loss(batch)


def under_hooks_that_pack_tensors(loss, batch):
    with saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        return loss(batch)


@pytest.mark.parametrize("wrapped", [under_checkpoint, under_save_on_cpu, under_hooks_that_pack_tensors])
def test_a_step_with_hooks_of_its_own_is_refused(recorded, wrapped):
    recorder, run, _ = recorded()
    plain = recorder.loss
    recorder.loss = lambda batch: wrapped(plain, batch)
    with pytest.raises(UnsupportedError, match=r"custom hooks.*pass a budget in parameters \('300k params'\)"):
        recorder.step(run.batch)


@pytest.fixture
def checkpointed_run(named_family):
    """A run whose inputs require no gradients, so that plans of upper modules leave little of the graph."""

    def make(name, precision="fp32"):
        family = named_family(name)
        model = family_model(family, precision, checkpointing=False)
        release_inputs(model)
        return adamw_run(model, family_batch(family, model, 8, 12), precision)

    return make


@pytest.mark.parametrize("name", first_cases(2, ["llama", "gpt2", "vit"]))
def test_a_lone_module_costs_what_it_takes_and_the_margin(checkpointed_run, name):
    run = checkpointed_run(name, "autocast")
    memory = run.calibrated()
    cost = memory.cost()
    for ranks in 2 * np.eye(len(run.targets), dtype=np.int64):
        assert plan_cost(cost, ranks) == pytest.approx(run.peak(ranks) * (1 + memory.margin), rel=3e-4)
        assert memory.peak(ranks) == pytest.approx(plan_cost(cost, ranks), rel=3e-4)
        assert memory.at_peak(ranks).total == plan_cost(cost, ranks)


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
