"""What else would fit a card: offloaded inputs, a streamed base, a smaller evaluation, another share of an engine."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from ..moments import between_steps
from ..recording import BatchShape
from ..rollouts import GRAPHS_BYTES, Engine, EngineNeeds, cache_bytes_of
from ..streaming import ON_DEVICE
from .outlook import Outlook, room_for_tensors

MOST_ROW = 2**17
"""Largest row to try for a model without a limit, in tokens."""


def least_use(outlook: Outlook) -> int:
    """Return the bytes on the card of the run as requested, with all layers checkpointed if it may checkpoint any."""
    assert outlook.main.use is not None, "there is a card"
    return outlook.main.use.total_bytes


def brought_by_offloading(outlook: Outlook) -> tuple[float, float] | None:
    """Return spare bytes with checkpointed inputs offloaded to main memory, and the seconds per step for the copies.

    None if all layers fit with adapters already, or none fits with offloading. Copies overlap with the passes, so the
    seconds are an upper bound at the bus rate of the card.
    """
    room = outlook.room
    if outlook.step.loaded.offload or not outlook.checkpointable:
        return None
    ranks, lighter = outlook.plan(outlook.blocks, outlook.rank), outlook.memory.offloaded()
    if (outlook.as_asked and outlook.as_asked.fits) or room.is_hopeless(least := lighter.peak(ranks), room.slack):
        return None
    use, moved = room.use(lighter, ranks), outlook.memory.peak(ranks) - least
    if use.verdict != "fits":
        return None
    return use.spare_bytes, 2 * moved / room.card.bus_bytes_per_s


@lru_cache(maxsize=4)
def brought_by_streaming(outlook: Outlook) -> Outlook | None:
    """Return the outlook with the base streamed, in the least time, if only that fits adapters on all layers.

    All layers stream, with the fewest checkpointed ones that fit; or all are checkpointed, and as few stream as fit.
    None if streaming is needless or does not help.
    """
    count = outlook.base.count
    if outlook.streamed or not outlook.base.layer_bytes or outlook.shards.gpus > 1:
        return None
    if outlook.as_asked:
        return None
    every = with_streamed(outlook, count)
    found = every.fitting(outlook.blocks, outlook.rank)
    if not found.fits:
        return None
    use = every.choice(outlook.blocks, outlook.rank, outlook.checkpointable).use
    spare = (use.spare_bytes - outlook.slack * outlook.card.memory_bytes) / (1 + use.reserve_share)
    fewer = with_streamed(outlook, max(count - int(spare / outlook.base.layer_bytes), ON_DEVICE + 1))
    other = fewer.fitting(outlook.blocks, outlook.rank)
    quicker = other.fits and (other.time or 0.0) <= (found.time or 0.0)
    return fewer if quicker else every


def with_streamed(outlook: Outlook, layers: int) -> Outlook:
    """Return the outlook of the same step with this number of streamed layers."""
    return _with(outlook, stream=layers)


def _with(outlook: Outlook, **settings: Any) -> Outlook:
    """Return the outlook of the same step with other settings of `LoadedAs`, which must not change its recording."""
    step = replace(outlook.given, loaded=replace(outlook.given.loaded, **settings))
    return Outlook(step, outlook.rank, outlook.settings, card=outlook.card, dtype=outlook.dtype, shards=outlook.shards)


def with_smaller_evaluation(outlook: Outlook) -> Outlook | None:
    """Return the outlook with the largest evaluation that fits the card, if only the one asked for does not fit.

    First fewer logits are kept, then none, then batches are halved.
    """
    asked, loaded = outlook.evaluation(outlook.memory.shape), outlook.given.loaded
    if asked is None or (outlook.as_asked and outlook.as_asked.fits):
        return None
    bare = _with(outlook, eval_batch_size="none")
    step = bare.as_asked
    if step is None or not step.fits:
        return None
    rows = loaded.eval_batch_size or outlook.memory.shape.rows
    assert isinstance(rows, int), "there is an evaluation"
    smaller = [(rows, batches * rows) for batches in _halves(asked.kept)]
    for size, kept in (*smaller, *((size, 0) for size in (rows, *_halves(rows)))):
        other = _with(outlook, eval_batch_size=size, keep_logits=kept)
        if other.room.use(step.memory, step.ranks, step.shape).verdict == "fits":
            return other
    return None


def largest_share(outlook: Outlook, engine: Engine) -> float:
    """Return the largest share of the card for a vLLM engine beside the request's smallest step."""
    alone = _with(outlook, rollouts=None)
    choice = alone.choice(alone.blocks, alone.rank, alone.checkpointable)
    taken = choice.use.total_bytes
    if engine.sleeps:
        taken = int(alone.room.taken + between_steps(choice.memory, choice.ranks))
    taken += GRAPHS_BYTES - engine.lends * choice.use.base_bytes
    return 1 - outlook.slack - taken / alone.room.card.memory_bytes


def longest_rows(outlook: Outlook, engine: Engine, needs: EngineNeeds) -> int:
    """Return the most tokens of a row for which step and engine have room, in multiples of 64."""
    choice = outlook.choice(outlook.blocks, outlook.rank, outlook.checkpointable)
    room, most = room_for_tensors(outlook), outlook.step.model.positions or MOST_ROW
    if each := cache_bytes_of(outlook.given.model.config) / engine.cards:
        most = min(most, int((engine.share * outlook.card.memory_bytes - needs.weights - needs.prefill) / each))
    low, high = 0, most // 64
    while low < high:
        middle = (low + high + 1) // 2
        one = BatchShape(outlook.memory.shape.rows, 64 * middle)
        fits = choice.memory.predicts(one) and choice.memory.peak(choice.ranks, one) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return 64 * low


def _halves(count: int) -> list[int]:
    """Return halves of a count, rounded down, to 1."""
    return [count >> shift for shift in range(1, count.bit_length())]
