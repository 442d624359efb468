"""The births and deaths of a step put through the rules of torch's CUDA caching allocator: what it reserves, whether a card will do.

Rules of `c10/cuda/CUDACachingAllocator.cpp` at its defaults: two pools, segments of 2 MiB for up to 1 MiB and of 20 MiB for less than
10 MiB, else as large as asked for; the smallest free block that is large enough is taken and split; neighbours that are free become one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

MIB = 2**20
_SMALL = MIB
_LARGE = 10 * MIB


@dataclass(eq=False)
class Block:
    """A piece of a segment, and the pieces beside it."""

    size: int
    address: int
    small: bool
    before: Block | None = None
    after: Block | None = None
    free: bool = False


class Full(Exception):
    """Not even with every unused segment given back is there room."""


@dataclass
class Allocator:
    """An empty card of `capacity` bytes."""

    capacity: float = float("inf")
    reserved: int = 0
    most: int = 0
    """The most that was ever reserved."""
    _taken: dict[int, Block] = field(default_factory=dict)
    _pools: dict[bool, list[tuple[int, int, Block]]] = field(default_factory=lambda: {True: [], False: []})
    _next: int = 0

    def run(self, events: Iterable[tuple[int, int]]) -> None:
        """(storage, bytes) is a birth and (storage, 0) a death. Raises Full."""
        for number, size in events:
            if size:
                self._taken[number] = self._allocate(size)
            elif number in self._taken:
                self._release(self._taken.pop(number))

    def _allocate(self, size: int) -> Block:
        small = size <= _SMALL
        pool = self._pools[small]
        at = bisect_left(pool, (size, -1))
        block = pool.pop(at)[2] if at < len(pool) else self._segment(size, small)
        block.free = False
        left = block.size - size
        if left >= (512 if small else _SMALL + 1):
            rest = Block(left, block.address + size, small, before=block, after=block.after)
            if block.after:
                block.after.before = rest
            block.size, block.after = size, rest
            self._shelve(rest)
        return block

    def _segment(self, size: int, small: bool) -> Block:
        size = 2 * MIB if small else 20 * MIB if size < _LARGE else -(-size // (2 * MIB)) * 2 * MIB
        if self.reserved + size > self.capacity:
            self._give_back()
        if self.reserved + size > self.capacity:
            raise Full
        self.reserved += size
        self.most = max(self.most, self.reserved)
        self._next += size + 1  # a gap: blocks of two segments are no neighbours
        return Block(size, self._next - size, small)

    def _give_back(self) -> None:
        """Every segment of which nothing is used."""
        for pool in self._pools.values():
            whole = [entry for entry in pool if not entry[2].before and not entry[2].after]
            self.reserved -= sum(size for size, _, _ in whole)
            pool[:] = [entry for entry in pool if entry[2].before or entry[2].after]

    def _release(self, block: Block) -> None:
        for side in (block.before, block.after):
            if side and side.free:
                pool = self._pools[side.small]
                del pool[bisect_left(pool, (side.size, side.address))]
                first, second = (side, block) if side is block.before else (block, side)
                first.size += second.size
                first.after = second.after
                if second.after:
                    second.after.before = first
                block = first
        self._shelve(block)

    def _shelve(self, block: Block) -> None:
        block.free = True
        insort(self._pools[block.small], (block.size, block.address, block))
