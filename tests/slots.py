"""Slots of a tier for the tests of eviction: written row by row, and released as a table does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage.eviction.contract import Contents, Now, View
from storage.eviction.rules import (
    EVICTIONS,
    CapacityLfu,
    CapacityLru,
)
from storage.eviction.sweep import MOST, Sweep
from storage.kernels import measure
from storage.records import Cause

MASK = 2**64 - 1
EXTREMES = [0, 1, MASK, MASK - 1, 1 << 63, (1 << 63) - 1, (1 << 63) + 1, 1 << 62]
LAST_STEP = (1 << 47) - 1
FIRST_STEP = -(1 << 47)
NAMES = list(EVICTIONS)
DIM, WIDTH = 3, 5
CAPACITIES = (CapacityLru, CapacityLfu)
CAUSES = {int(cause): cause for cause in Cause}


@dataclass(frozen=True)
class Row:
    """A row as its push left it."""

    key: int
    version: int
    step: int = 0
    frequency: int = 1
    embedding: tuple[float, ...] = (1.0, 1.0, 1.0)


class Rows:
    """A tier's slots, some of them empty."""

    def __init__(self, rows: Sequence[Row | None], dim: int = DIM, width: int = WIDTH) -> None:
        self.slab = np.full((len(rows) + 1, width), 1e9, np.float32)  # state counts for nothing
        self.entries = np.zeros((len(rows) + 1, 4), np.uint64)
        self.used, self.dim = len(rows), dim
        for slot, row in enumerate(rows):
            if row is not None:
                self.put(slot, row)
            else:
                self.entries[slot] = 7, 0xFFFF, (FIRST_STEP << 16) & MASK, 0  # what an old row left

    def put(self, slot: int, row: Row) -> None:
        frequency = row.frequency
        self.entries[slot, 0] = row.key
        self.entries[slot, 1] = row.version << 16 | frequency >> 16
        self.entries[slot, 2] = (row.step << 16 | frequency & 0xFFFF) & MASK
        self.slab[slot, : self.dim] = row.embedding

    @property
    def rows(self) -> int:
        return int((self.entries[: self.used, 1] >> np.uint64(16) != 0).sum())

    @property
    def contents(self) -> Contents:
        return Contents(self.rows, View(self.entries, self.used, self.norms, self.dim))

    def norms(self, slots: Any) -> Any:
        norms = np.empty(len(slots))
        measure(self.slab, slots, self.dim, norms)
        return norms

    def release(self, slots: Any) -> None:
        self.entries[slots, 1] &= np.uint64(0xFFFF)


def run(
    sweep: Sweep, rows: Rows, now: Now, limit: int = 1 << 16, most: int = MOST
) -> list[tuple[int, Cause]]:
    """Sweep to the end, deleting what is found: slots and causes in the order of their leaving."""
    found = []
    for _ in range(100_000):
        if sweep.done:
            return found
        victims = sweep.slice(rows.contents, now, limit, most)
        assert len(victims) <= most
        causes = [CAUSES[cause] for cause in victims.causes.tolist()]
        found += list(zip(victims.slots.tolist(), causes, strict=True))
        rows.release(victims.slots)
    raise AssertionError("the sweep does not end")
