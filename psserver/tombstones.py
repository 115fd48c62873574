"""Keep records of deleted keys, called tombstones, for later readers: subscribers and flushes.

The row itself is gone, so its tombstone is the only record of the delete in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.kernels import Keys


@dataclass(frozen=True, slots=True, eq=False)
class Tombstones:
    """Records of n deleted keys, in order of the versions of their deletes."""

    tables: NDArray[np.uint32]  # [n]  numbers of the tables
    keys: Keys  # uint64[n]
    versions: NDArray[np.uint64]  # [n]  versions of the deletes, ascending
    causes: NDArray[np.uint32]  # [n]  records.Cause: by request, or by which eviction rule

    def __len__(self) -> int:
        """Return the number of tombstones."""
        return len(self.keys)

    def take(self, chosen: NDArray[np.bool_] | NDArray[np.int64] | slice) -> Tombstones:
        """Return the tombstones that ``chosen`` selects; copies unless it is a slice."""
        return Tombstones(*(column[chosen] for column in self.columns()))

    def columns(self) -> tuple[NDArray[Any], ...]:
        """Return the arrays (tables, keys, versions, causes)."""
        return self.tables, self.keys, self.versions, self.causes

    def after(self, version: int) -> Tombstones:
        """Return the tombstones newer than ``version``; nothing is copied."""
        return self.take(slice(int(np.searchsorted(self.versions, version, "right")), None))

    def by_table(self) -> list[tuple[int, Tombstones]]:
        """Return a pair (number of the table, its tombstones) for each table that has any."""
        of_tables = self.take(np.argsort(self.tables, kind="stable"))
        numbers, starts = np.unique(of_tables.tables, return_index=True)
        ends = [*starts[1:].tolist(), len(self)]
        return [
            (number, of_tables.take(slice(start, end)))
            for number, start, end in zip(numbers.tolist(), starts.tolist(), ends, strict=False)
        ]


def no_tombstones(capacity: int = 0) -> Tombstones:
    """Return new arrays with room for ``capacity`` tombstones, and undefined contents."""
    return Tombstones(
        np.empty(capacity, np.uint32),
        np.empty(capacity, np.uint64),
        np.empty(capacity, np.uint64),
        np.empty(capacity, np.uint32),
    )


def joined(parts: list[Tombstones]) -> Tombstones:
    """Return copies of several Tombstones as one, in the order of the list."""
    columns = zip(*(part.columns() for part in (no_tombstones(), *parts)), strict=True)
    return Tombstones(*map(np.concatenate, columns))
