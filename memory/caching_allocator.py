"""A model of torch's caching allocator for CUDA: what it reserves for a sequence of allocations.

A card must hold what the allocator reserves, which is more than what tensors take: blocks are cut out of segments that
the driver gave, and a segment is kept as long as the process lives, or until the cache is emptied.
Source: c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.6 to 2.9, with its default settings and one stream.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

_MIB = 2**20

BLOCK_BYTES = 512
"""Sizes are rounded up to multiples of this many bytes."""

SMALL_BYTES = _MIB
"""Blocks up to this size come from segments of their own; of a larger block, less than this is not split off."""

SMALL_SEGMENT_BYTES = 2 * _MIB
"""The size of a segment for small blocks; larger ones have a multiple of it."""

LARGE_SEGMENT_BYTES = 20 * _MIB
"""The size of a segment for blocks below `LARGE_BLOCK_BYTES`."""

LARGE_BLOCK_BYTES = 10 * _MIB
"""A block of this size or above gets a segment that it fills."""


@dataclass(slots=True)
class _Block:
    """A piece of a segment; its neighbours are linked."""

    size: int
    small: bool
    free: bool = False
    before: int | None = None
    after: int | None = None


class CachingAllocator:
    """The allocator's bookkeeping, without memory.

    Attributes:
        allocated: bytes of the blocks in use.
        reserved: bytes of all segments.
        peak_allocated: the highest value of `allocated` so far, or since `restart_peak`.
        peak_reserved: the highest value of `reserved` so far.
    """

    allocated: int
    peak_allocated: int
    reserved: int
    peak_reserved: int

    def __init__(self) -> None:
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._blocks: dict[int, _Block] = {}  # by address
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # sizes and addresses, by pool
        self._next_address = 0

    def allocate(self, size: int) -> int:
        """Allocate bytes, at least 1; returns the block's address, which `free` takes."""
        size = -(-size // BLOCK_BYTES) * BLOCK_BYTES
        small = size <= SMALL_BYTES
        free = self._free[small]
        index = bisect_left(free, (size, -1))
        address = free.pop(index)[1] if index < len(free) else self._new_block(size, small)
        block = self._blocks[address]
        block.free = False
        rest = block.size - size
        if rest >= BLOCK_BYTES and (small or rest > SMALL_BYTES):
            self._split(address, block, size)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return address

    def free(self, address: int) -> None:
        """Free a block; it becomes one with free neighbours."""
        block = self._blocks[address]
        self.allocated -= block.size
        free = self._free[block.small]
        after = block.after
        if after is not None and self._blocks[after].free:
            del free[bisect_left(free, (self._blocks[after].size, after))]
            self._join(address, block, after)
        before = block.before
        if before is not None and self._blocks[before].free:
            del free[bisect_left(free, (self._blocks[before].size, before))]
            self._join(before, self._blocks[before], address)
            address, block = before, self._blocks[before]
        block.free = True
        insort(free, (block.size, address))

    def restart_peak(self) -> int:
        """Let `peak_allocated` begin anew; returns its value."""
        peak, self.peak_allocated = self.peak_allocated, self.allocated
        return peak

    def empty_cache(self) -> None:
        """Give segments back in which nothing is allocated."""
        for free in self._free.values():
            for size, address in list(free):
                block = self._blocks[address]
                if block.before is None and block.after is None:
                    free.remove((size, address))
                    self.reserved -= size
                    del self._blocks[address]

    def _new_block(self, size: int, small: bool) -> int:
        """A block that is large enough, from the driver."""
        unit = SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES
        if not small and size >= LARGE_BLOCK_BYTES:
            unit = -(-size // SMALL_SEGMENT_BYTES) * SMALL_SEGMENT_BYTES
        address = self._next_address
        self._blocks[address] = _Block(unit, small)
        self._next_address += unit
        self.reserved += unit
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return address

    def _split(self, address: int, block: _Block, size: int) -> None:
        """Cut a block to a size; the rest becomes a free block."""
        rest = address + size
        self._blocks[rest] = _Block(block.size - size, block.small, True, address, block.after)
        if block.after is not None:
            self._blocks[block.after].before = rest
        insort(self._free[block.small], (block.size - size, rest))
        block.size, block.after = size, rest

    def _join(self, address: int, block: _Block, after: int) -> None:
        """Make a block and the next one, which is in no list of free blocks, one."""
        other = self._blocks.pop(after)
        block.size += other.size
        block.after = other.after
        if other.after is not None:
            self._blocks[other.after].before = address
