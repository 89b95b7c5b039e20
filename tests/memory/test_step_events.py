"""The order of allocations under a plan, against the peaks of real steps."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from rankpilot.memory.allocator import StepEvents, evaluation_events, step_events
from rankpilot.memory.training_step import release_inputs

from ..cases import first_cases
from .measured import adamw_run, family_batch, family_model, random_plans


def highest(events: StepEvents) -> int:
    """The most bytes that are allocated at once."""
    live = np.cumsum(np.where(events.order >= 0, events.sizes[events.order], -events.sizes[-1 - events.order]))
    return int(live.max(initial=0))


def states_under(memory: Any, ranks: np.ndarray) -> float:
    """Bytes of weights and optimiser state."""
    states = memory.states
    return float(((states.weights + states.optimizer) * ranks + states.fixed * (ranks > 0)).sum() + states.others)


KINDS = {"plain": None, "checkpointed": False, "reentrant": True}
QUICK = [("llama", "plain"), ("llama", "checkpointed"), ("gpt2", "plain"), ("bert", "reentrant"), ("t5", "plain")]


@pytest.mark.parametrize(
    ("name", "kind"),
    first_cases(len(QUICK), [*QUICK, *sorted({*product(("llama", "gpt2", "bert", "t5"), KINDS)} - {*QUICK})]),
)
def test_the_most_that_is_allocated_is_the_peak_of_a_real_step(named_family, name, kind):
    checkpointing = KINDS[kind]
    family = named_family(name)
    model = family_model(family, checkpointing=checkpointing)
    if checkpointing is not None:
        release_inputs(model)
    run = adamw_run(model, family_batch(family, model, 6, 12))
    memory = run.calibrated()
    plans = [*random_plans(run.targets, np.random.default_rng(0), 6)]
    if not checkpointing:
        plans += [*2 * np.eye(len(run.targets), dtype=np.int64)[-3:]]
    for ranks in plans:
        events = step_events(memory.recording, memory.sizes_under(ranks), ranks)
        error = (highest(events) + states_under(memory, ranks)) / run.peak(ranks) - 1
        if checkpointing:
            assert -0.002 <= error <= 0.05
        else:
            assert error == 0


def test_every_tensor_is_freed_once_or_stays(named_family):
    family = named_family("llama")
    model = family_model(family, checkpointing=False)
    run = adamw_run(model, family_batch(family, model, 6, 12))
    memory = run.calibrated()
    ranks = np.arange(len(run.targets)) % 2 * 4
    events = step_events(memory.recording, memory.sizes_under(ranks), ranks)
    count = len(events.sizes)
    order = events.order.tolist()
    position = {event: index for index, event in enumerate(order)}
    assert sorted(event for event in order if event >= 0) == list(range(count))
    stays = {*events.gradients.tolist(), *events.others.tolist()}
    assert {-1 - event for event in order if event < 0} == set(range(count)) - stays
    assert all(position[tensor] < position[-1 - tensor] for tensor in range(count) if tensor not in stays)
    assert len(events.gradients) == 2 * (ranks > 0).sum()
    assert (events.sizes > 0).all()


def test_tensors_of_layers_that_run_again_are_allocated_twice(named_family):
    family = named_family("llama")
    model = family_model(family, checkpointing=False)
    release_inputs(model)
    memory = adamw_run(model, family_batch(family, model, 6, 12)).calibrated()
    ranks = np.full(len(memory.states.weights), 4)
    names = [segment.name for segment in memory.segments]
    counts, peaks = [], []
    for again in (names, names[:1], []):
        part = memory.recomputing(again)
        events = step_events(part.recording, part.sizes_under(ranks), ranks)
        counts.append(len(events.sizes))
        peaks.append(highest(events))
    assert counts[0] > counts[1] > counts[2]
    assert peaks[0] < peaks[1] < peaks[2]


def test_an_evaluation_takes_less_than_a_step_and_grows_with_its_batch(named_family):
    family = named_family("llama")
    model = family_model(family)
    memory = adamw_run(model, family_batch(family, model, 6, 12)).calibrated()
    ranks = np.full(len(memory.states.weights), 4)
    sizes = memory.sizes_under(ranks)
    evaluation = evaluation_events(memory.recording, sizes)
    assert 0 < highest(evaluation) < 0.7 * highest(step_events(memory.recording, sizes, ranks))
    assert len(evaluation.gradients) == 0
