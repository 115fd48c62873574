"""The rows of a slab by number: which slot owns each row, and which rows are free.

A slab is an array of rows. A row of a table keeps its slot for as long as it is in memory, but the
numbers of the row may move from one slab to another. So each row of a slab has an entry of 8 bytes:
the slot that owns it or, if it is free, a negative number that leads to the next free row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from storage.arena import Arena, Budget
from storage.kernels import ABSENT, Slots, jit


@jit
def _take(owners: Any, first: Any, slots: Any, numbers: Any) -> Any:
    """Take n rows from the list of free rows, which must have as many, for some slots.

    owners   int64[rows]  a free row has -2 - (next free row); ABSENT (-1) is the end
    first    head of the list
    slots    int64[n]  the new owners
    numbers  int64[n]  written

    Returns the new head.
    """
    for i in range(slots.shape[0]):
        numbers[i] = first
        following = -2 - owners[first]
        owners[first] = slots[i]
        first = following
    return first


@jit
def _give(owners: Any, first: Any, numbers: Any) -> Any:
    """Add rows to the list of free rows. Returns the new head."""
    for i in range(numbers.shape[0]):
        owners[numbers[i]] = -2 - first
        first = numbers[i]
    return first


@jit
def _without(owners: Any, first: Any, end: int) -> Any:
    """Remove the rows with numbers of at least ``end`` from the list of free rows.

    Returns (new head, number of rows in the new list).
    """
    head, count = np.int64(ABSENT), 0
    while first != ABSENT:
        following = -2 - owners[first]
        if first < end:
            owners[first] = -2 - head
            head = first
            count += 1
        first = following
    return head, count


class Owners:
    """Which slots own the rows of one slab.

    used  number of rows ever taken; rows from this number on have no entry
    free  rows below ``used`` that nobody owns
    """

    def __init__(self, budget: Budget) -> None:
        self._arena = Arena(1, np.int64, budget)
        self._first = ABSENT  # of the list of free rows
        self.used = self.free = 0

    @property
    def rows(self) -> int:
        """Number of rows that have an owner."""
        return self.used - self.free

    @property
    def bytes(self) -> int:
        """Bytes of memory taken from the budget."""
        return self._arena.bytes

    @property
    def capacity(self) -> int:
        """Number of rows for which there are entries."""
        return self._arena.rows

    def needed(self, count: int) -> int:
        """Return how many rows the slab must have before ``count`` more are taken."""
        return self.used + max(0, count - self.free)

    def grow(self, rows: int, *, exact: bool = False) -> None:
        """Take memory for the entries of ``rows`` rows. Raises OutOfMemory, and changes nothing."""
        self._arena.grow(rows, exact=exact)

    def shrink(self, size: int) -> None:
        """Undo the last ``grow``: keep ``size`` bytes, those before it."""
        self._arena.shrink(size)

    def take(self, slots: Slots) -> Slots:
        """Give each slot, int64[n], a row. Returns the numbers of the rows, int64[n].

        There must be memory for them, see ``needed``.
        """
        owners, count = self._arena.array[:, 0], len(slots)
        numbers = np.empty(count, np.int64)
        old = min(count, self.free)
        self._first = _take(owners, self._first, slots[:old], numbers[:old])
        numbers[old:] = np.arange(self.used, self.used + count - old)
        owners[self.used : self.used + count - old] = slots[old:]
        self.free -= old
        self.used += count - old
        return numbers

    def give(self, numbers: Slots) -> None:
        """Make rows free, int64[n]."""
        self._first = _give(self._arena.array[:, 0], self._first, numbers)
        self.free += len(numbers)

    def change(self, numbers: Slots, slots: Slots) -> None:
        """Make ``slots`` the owners of rows that other slots own."""
        self._arena.array[numbers, 0] = slots

    def empty_from(self, end: int) -> tuple[Slots, Slots, Slots]:
        """Find free rows before number ``end`` for the rows from there on, which become free.

        At most ``end`` rows may have owners. Afterwards ``used`` is ``end`` or less.

        Returns (slots, numbers so far, new numbers) of the rows that the caller must copy, int64[n]
        each.
        """
        end = min(end, self.used)
        after = self._arena.array[end : self.used, 0]
        busy = np.flatnonzero(after >= 0)
        slots = after[busy]
        self._first, self.free = _without(self._arena.array[:, 0], self._first, end)
        self.used = end
        return slots, busy + end, self.take(slots)

    def cut(self) -> None:
        """Give the memory after the last entry back."""
        self._arena.release(self.used)

    def close(self) -> None:
        """Free the memory."""
        self._arena.close()
        self._first, self.used, self.free = ABSENT, 0, 0
