"""Memory that grows by chunks and never moves, and the budget it is taken from.

An arena reserves address space for all the rows it may ever hold and takes memory chunk by chunk
as rows appear. Growing therefore copies nothing and pauses nothing, and pointers into it stay
valid. Fresh memory reads as zero.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from storage.errors import OutOfMemory

HUGE = 2 << 20  # bytes of a huge page
SMALLEST_CHUNK = 64 << 10  # bytes, of a table that has not filled a huge page yet
LARGEST_CHUNK = 64 << 20  # bytes
MAP_NORESERVE = 0x4000  # Linux; the mmap module names it from Python 3.13 on


class Budget:
    """Bytes that a shard's tables may hold together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    @property
    def free(self) -> int:
        """Bytes that may still be taken."""
        return self.limit - self.held

    def take(self, size: int) -> None:
        """Count ``size`` more bytes as held, or raise OutOfMemory and count nothing."""
        if self.held + size > self.limit:
            raise OutOfMemory(self.limit, self.held, size)
        self.held += size

    def give(self, size: int) -> None:
        """Count ``size`` bytes as free again."""
        self.held -= size


class Arena:
    """A two-dimensional array [rows, width] of one dtype whose rows appear by chunks.

    ``array`` spans the whole reservation; only its first ``rows`` rows may be touched.
    """

    def __init__(self, width: int, dtype: DTypeLike, budget: Budget) -> None:
        self._row_bytes = width * np.dtype(dtype).itemsize
        self._budget = budget
        self._taken = 0  # bytes of the reservation that may be touched
        capacity = budget.limit // self._row_bytes + 1
        size = -(-capacity * self._row_bytes // HUGE) * HUGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        try:
            self._map = mmap.mmap(-1, size, flags=flags)
        except OSError as error:  # strict overcommit, or an address space limit
            raise OutOfMemory(budget.limit, budget.held, size) from error
        self.array: NDArray[Any] = np.frombuffer(
            self._map, dtype, size // self._row_bytes * width
        ).reshape(-1, width)

    @property
    def rows(self) -> int:
        """Rows that may be touched now."""
        return self._taken // self._row_bytes

    @property
    def bytes(self) -> int:
        """Bytes taken from the budget."""
        return self._taken

    def grow(self, rows: int) -> None:
        """Make at least ``rows`` rows usable, or raise OutOfMemory and change nothing.

        Chunks are 1/64 of what is held: large enough to be rare, small enough to waste
        little. Huge pages start behind the first 2 MiB, so that a small table stays small.
        """
        wanted = rows * self._row_bytes
        if wanted <= self._taken:
            return
        unit = SMALLEST_CHUNK if wanted <= HUGE else HUGE
        chunk = min(max(self._taken // 64, unit), LARGEST_CHUNK)
        end = -(-max(wanted, self._taken + chunk) // unit) * unit
        if end - self._taken > self._budget.free:  # the last rows before the limit
            end = -(-wanted // mmap.PAGESIZE) * mmap.PAGESIZE
        self._budget.take(end - self._taken)
        start = max(self._taken, HUGE)
        if end > start:
            self._map.madvise(mmap.MADV_HUGEPAGE, start, min(end, len(self._map)) - start)
        self._taken = end

    def shrink(self, size: int) -> None:
        """Go back to ``size`` bytes after growing; the rows behind were never touched."""
        self._budget.give(self._taken - size)
        self._taken = size

    def close(self) -> None:
        """Return the memory; the array must not be used again."""
        self._budget.give(self._taken)
        self._taken = 0
        self.array = self.array[:0].copy()
