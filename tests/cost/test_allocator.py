"""The model of torch's caching allocator: its rules one by one, and what holds under any sequence."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from rankpilot.cost.forecast.allocator import CachingAllocator, StepEvents, evaluation_events, step_events
from rankpilot.cost.training_step import release_inputs

from ..cases import first_cases
from .measured import adamw_run, family_batch, family_model, random_plans

MIB = 2**20


def test_sizes_are_rounded_and_small_blocks_share_a_segment():
    allocator = CachingAllocator()
    allocator.allocate(1)
    allocator.allocate(513)
    assert (allocator.allocated, allocator.reserved) == (512 + 1024, 2 * MIB)
    allocator.allocate(MIB)
    assert allocator.reserved == 2 * MIB, "up to 1 MiB is small"
    allocator.allocate(MIB)
    assert allocator.reserved == 4 * MIB, "the rest of the first segment is too short"


@pytest.mark.parametrize(
    ("size", "segment"), [(MIB + 512, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB), (21 * MIB, 22 * MIB)]
)
def test_segments_of_large_blocks(size, segment):
    allocator = CachingAllocator()
    allocator.allocate(size)
    assert allocator.reserved == segment


def test_less_than_one_mib_is_not_split_off_a_large_block():
    allocator = CachingAllocator()
    address = allocator.allocate(11 * MIB)
    assert (allocator.allocated, allocator.reserved) == (12 * MIB, 12 * MIB)
    allocator.free(address)
    allocator.allocate(11 * MIB - 512)
    assert allocator.allocated == 11 * MIB - 512, "more than 1 MiB is"


def test_the_smallest_block_that_is_large_enough_is_taken_and_neighbours_become_one():
    allocator = CachingAllocator()
    first, second, third = (allocator.allocate(size * MIB) for size in (30, 20, 40))
    for address in (first, second, third):
        allocator.free(address)
    assert allocator.allocate(18 * MIB) == second
    parts = [allocator.allocate(10 * MIB) for _ in range(3)]
    assert allocator.reserved == 90 * MIB
    for address in parts:  # in the order of their addresses: each becomes one with the block before it
        allocator.free(address)
    assert allocator.allocate(30 * MIB) == first
    assert allocator.reserved == 90 * MIB


def test_only_whole_segments_are_given_back():
    allocator = CachingAllocator()
    addresses = [allocator.allocate(5 * MIB) for _ in range(4)]
    whole = allocator.allocate(50 * MIB)
    for address in (*addresses[1:], whole):
        allocator.free(address)
    allocator.empty_cache()
    assert (allocator.reserved, allocator.peak_reserved) == (20 * MIB, 70 * MIB)
    allocator.free(addresses[0])
    allocator.empty_cache()
    assert allocator.reserved == 0


def test_the_peak_begins_anew():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(4 * MIB))
    kept = allocator.allocate(2 * MIB)
    assert allocator.restart_peak() == 4 * MIB
    assert allocator.peak_allocated == allocator.allocated == 2 * MIB
    allocator.free(kept)


def test_blocks_never_overlap_and_all_is_given_back():
    generator = np.random.default_rng(0)
    allocator = CachingAllocator()
    live: dict[int, int] = {}
    most = 0
    for _ in range(3000):
        if live and generator.random() < 0.48:
            address = list(live)[generator.integers(len(live))]
            del live[address]
            allocator.free(address)
        else:
            size = int(2 ** generator.uniform(0, 26))
            address = allocator.allocate(size)
            assert address not in live
            live[address] = size
        most = max(most, allocator.allocated)
        assert sum(live.values()) <= allocator.allocated <= allocator.reserved
    ends = sorted((address, address + size) for address, size in live.items())
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert allocator.peak_allocated == most
    for address in live:
        allocator.free(address)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (0, 0)


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


def test_an_evaluation_takes_less_than_a_step_and_grows_with_its_batch(named_family):
    family = named_family("llama")
    model = family_model(family)
    memory = adamw_run(model, family_batch(family, model, 6, 12)).calibrated()
    ranks = np.full(len(memory.states.weights), 4)
    sizes = memory.sizes_under(ranks)
    evaluation = evaluation_events(memory.recording, sizes)
    assert 0 < highest(evaluation) < 0.7 * highest(step_events(memory.recording, sizes, ranks))
    assert len(evaluation.gradients) == 0
