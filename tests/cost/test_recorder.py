"""One recorded step: which storages are created, when they are freed, and which modules need them."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from rankpilot.cost.cost import plan_cost
from rankpilot.cost.live_storages import LiveStorages
from rankpilot.cost.recorder import GradientHolders, Recorder
from rankpilot.cost.recording import NEVER, flow_from
from rankpilot.cost.training_step import release_inputs
from rankpilot.errors import UnsupportedError
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ..cases import first_cases
from .measured import adamw_run, family_batch, family_model

FEW = 20
"""Allowance for the operators of a checkpoint itself."""


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


def test_each_storage_has_a_place_in_time_and_in_the_model(recorded):
    _, run, recording = recorded()
    count = len(recording.sizes)
    for column in (
        recording.created,
        recording.freed,
        recording.name_index,
        recording.target_index,
        recording.segment_index,
    ):
        assert len(column) == count
    assert (np.diff(recording.created) >= 0).all()
    assert (recording.freed >= recording.created).all()
    assert (recording.sizes >= 0).all()
    owned = recording.target_index >= 0
    for owner, place in zip(recording.target_index[owned].tolist(), recording.name_index[owned].tolist(), strict=True):
        assert run.targets[owner].name in recording.names[place]
    assert set(recording.target_index[owned].tolist()) == set(range(len(run.targets)))
    assert (recording.segment_index == -1).all()


def test_only_gradients_outlive_the_step_and_each_belongs_to_its_module(recorded):
    _, run, recording = recorded()
    left = np.flatnonzero((recording.freed == NEVER) & (recording.created > recording.forward_end))
    assert set(left.tolist()) == set(recording.gradients)
    for index, target in enumerate(run.targets):
        sizes = [int(recording.sizes[s]) for s, module in recording.gradients.items() if module == index]
        assert sorted(sizes) == sorted(4 * p.numel() for p in target.parameters.values())


def test_gradients_of_a_classifier_belong_to_no_module(recorded):
    _, run, recording = recorded("bert")
    sizes = [int(recording.sizes[s]) for s, module in recording.gradients.items() if module == -1]
    assert sum(sizes) == 4 * sum(
        p.numel() for p in run.model.base_model.model.classifier.parameters() if p.requires_grad
    )


def test_recording_twice_gives_the_same(recorded):
    recorder, run, first = recorded()
    second = recorder.step(run.batch)
    assert first.needed == second.needed
    assert first.gradients == second.gradients
    for name in ("sizes", "created", "freed", "target_index", "name_index", "uses_saved"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize(
    ("name", "checkpointing"), [("llama", None), ("llama", True), ("bert", None), ("gpt2-dora", None)]
)
def test_sizes_alone_are_those_of_a_whole_recording(recorded, name, checkpointing):
    recorder, run, whole = recorded(name, checkpointing)
    alone = recorder.step(run.batch, sizes_alone=True)
    assert alone.forward_end == whole.forward_end
    for column in ("sizes", "created", "freed"):
        assert np.array_equal(getattr(alone, column), getattr(whole, column)), column
    assert len(whole.needed) > 0 == len(alone.needed)
    assert (alone.target_index == -1).all()


def test_gradients_are_cleared_and_hooks_removed(recorded):
    before = len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)
    _, run, _ = recorded()
    assert all(parameter.grad is None for parameter in run.model.parameters())
    after = len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)
    assert before == after


def test_upstream_modules_need_more_than_downstream_ones(recorded):
    """On a residual stream, tensors above an adapted module are saved for it."""
    _, run, recording = recorded()
    held = np.zeros(len(run.targets))
    for serial, modules in recording.needed.items():
        if recording.created[serial] <= recording.forward_end and recording.target_index[serial] < 0:
            held += [int(recording.sizes[serial]) * (modules >> index & 1) for index in range(len(run.targets))]
    by_layer = held.reshape(2, 7)
    assert by_layer[0].min() > by_layer[1].max()


def test_lifetimes_without_holding_are_shorter_for_what_is_saved_and_the_same_for_the_rest(recorded):
    recorder, run, recording = recorded()
    assert np.array_equal(recording.freed_if_unsaved, recording.freed)
    alive = recorder.lifetimes(recording, run.batch)
    assert (alive.freed_if_unsaved <= alive.freed).all()
    shorter = np.flatnonzero(alive.freed_if_unsaved < alive.freed)
    assert len(shorter) > 20
    assert set(shorter.tolist()) <= alive.needed.keys()
    assert (alive.created[shorter] <= alive.forward_end).all()


def test_a_pass_with_other_operations_has_no_lifetimes(recorded):
    recorder, run, recording = recorded()
    head = run.model.base_model.model.lm_head
    with (
        head.register_forward_hook(lambda module, given, output: output + 1),
        pytest.raises(UnsupportedError, match="PeftModel runs other operations each time"),
    ):
        recorder.lifetimes(recording, run.batch)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_segments_that_run_once(recorded, reentrant):
    _, _, plain = recorded()
    _, run, recording = recorded(checkpointing=reentrant)
    assert [segment.reentrant for segment in recording.segments] == [reentrant] * 2
    first, second = recording.segments
    assert first.start < first.end <= second.start < second.end <= recording.forward_end
    assert set(first.outputs) & set(second.inputs)
    assert recording.forward_end == pytest.approx(plain.forward_end, abs=FEW)  # nothing runs a second time
    assert set(recording.segment_index.tolist()) == {-1, 0, 1}
    assert {int(recording.segment_index[serial]) for serial in recording.saved_in_segment} == {0, 1}
    layers = run.model.base_model.model.model.layers
    assert all("_run_segment" not in str(layer._gradient_checkpointing_func) for layer in layers)


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
    with pytest.raises(UnsupportedError, match=r"hooks of its own.*give a budget of parameters \('300k params'\)"):
        recorder.step(run.batch)


def test_what_a_step_saved_is_freed_with_it(recorded):
    """It is freed on graphs that no backward pass reaches too, such as those of DoRA's norms."""
    recorder, run, _ = recorded("gpt2-dora")
    references = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            result = hidden.exp()
            ctx.mark = mark = set()
            references.append(weakref.ref(mark))
            ctx.save_for_backward(result)
            return result

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.saved_tensors[0]

    def beside(module, given, output):
        Watched.apply(output[0] if isinstance(output, tuple) else output).exp()  # and thrown away

    with run.model.base_model.model.transformer.ln_f.register_forward_hook(beside):
        recorder.step(run.batch)
    gc.collect()
    assert len(references) == 1
    assert references[0]() is None


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
