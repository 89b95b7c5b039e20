"""What else would fit a card: the choice that uses least of it, offloaded inputs, a streamed base."""

from __future__ import annotations

from dataclasses import replace

from ..streaming import ON_DEVICE
from .card_use import SURELY
from .outlook import Choice, Outlook


def smallest_use(outlook: Outlook) -> tuple[Choice, int]:
    """Return the choice with the least use of the card, and its bytes. Replays the allocator only for contenders."""
    assert outlook.room is not None, "there is no card"
    beside, found = outlook.room.taken, list[tuple[int, int]]()
    for index, choice in sorted(enumerate(outlook.choices), key=lambda pair: pair[1].step_bytes):
        if found and beside + SURELY * choice.step_bytes > min(found)[0]:
            break
        if use := choice.use:
            found.append((use.total_bytes, index))
    total, index = min(found)
    return outlook.choices[index], total


def brought_by_offloading(outlook: Outlook) -> tuple[float, float] | None:
    """Return spare bytes with checkpointed inputs offloaded to main memory, and the seconds per step for the copies.

    None if all layers fit with adapters already, or none fits with offloading. Copies overlap with the passes, so the
    seconds are an upper bound at the bus rate of the card.
    """
    room = outlook.room
    if not room or outlook.step.loaded.offload or not outlook.checkpointable:
        return None
    ranks, best, lighter = outlook.plan(outlook.blocks, outlook.rank), outlook.best, outlook.memory.offloaded()
    if (best and best.layers == outlook.blocks) or room.is_hopeless(least := lighter.peak(ranks), room.slack):
        return None
    use, moved = room.use(lighter, ranks), outlook.memory.peak(ranks) - least
    if use.verdict != "fits":
        return None
    return use.spare_bytes, 2 * moved / room.card.bus_bytes_per_s


def brought_by_streaming(outlook: Outlook) -> Outlook | None:
    """Return the outlook with the base streamed, in the least time, if only that fits adapters on all layers.

    All layers stream, with the fewest checkpointed ones that fit; or all are checkpointed, and as few stream as fit.
    None if streaming is needless or does not help.
    """
    best, count = outlook.best, outlook.base.count
    if not outlook.card or outlook.streamed or not outlook.base.layer_bytes or outlook.shards.gpus > 1:
        return None
    if best and best.layers == outlook.blocks:
        return None
    every = with_streamed(outlook, count)
    found = every.fitting(outlook.blocks, outlook.rank)
    if not found.fits:
        return None
    use = every.choice(outlook.blocks, outlook.rank, outlook.checkpointable).use
    assert use is not None, "there is a card"
    spare = (use.spare_bytes - outlook.slack * outlook.card.memory_bytes) / (1 + use.reserve_share)
    fewer = with_streamed(outlook, max(count - int(spare / outlook.base.layer_bytes), ON_DEVICE + 1))
    other = fewer.fitting(outlook.blocks, outlook.rank)
    quicker = other.fits and (other.time or 0.0) <= (found.time or 0.0)
    return fewer if quicker else every


def with_streamed(outlook: Outlook, layers: int) -> Outlook:
    """Return the outlook of the same step with this number of streamed layers."""
    step = replace(outlook.given, loaded=replace(outlook.given.loaded, stream=layers))
    return Outlook(step, outlook.rank, outlook.settings, card=outlook.card, dtype=outlook.dtype, shards=outlook.shards)
