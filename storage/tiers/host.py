"""Rows in host memory: a slab, its metadata beside it, and the list of free slots.

A place is a slot: the position of a row in the slab. The slab grows by chunks and never moves.
Metadata is packed into 24 bytes a row:

    key uint64 | version << 16 | frequency >> 16 | step << 16 | frequency & 0xffff
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from storage.arena import Arena, Budget
from storage.errors import OutOfMemory
from storage.eviction.contract import View
from storage.initializers import Initializer
from storage.kernels import (
    Keys,
    Rows,
    Slots,
    changed,
    fill_state,
    forget,
    fresh,
    gather,
    images,
    measure,
    put,
    touch,
    unpack,
)
from storage.optimizer import Optimizer
from storage.tiers.base import Meta, Scan

FIND_SLOTS = 1 << 16  # slots that a call of ``find`` looks at: 1.5 MiB of metadata


class HostScan:
    """The slots handed out so far, in their order. See Scan for the contract."""

    def __init__(self, slab: Rows, meta: NDArray[Any], used: int, dim: int) -> None:
        self._slab, self._meta, self._used, self._dim = slab, meta, used, dim

    def find(self, start: int, after: int, upto: int, limit: int) -> tuple[Slots, int | None]:
        slots = np.empty(limit, np.int64)
        stop = min(self._used, start + FIND_SLOTS)
        found, end = changed(self._meta, start, stop, after, upto, slots)
        return slots[:found], None if end == self._used else int(end)

    def copy(self, places: Slots, frequencies: NDArray[Any], rows: Rows) -> Meta:
        images(self._slab, self._meta, places, frequencies, rows)
        return _unpacked(self._meta, places)

    def measure(self, places: Slots, norms: NDArray[Any]) -> Meta:
        measure(self._slab, places, self._dim, norms)
        return _unpacked(self._meta, places)

    def read(self, places: Slots, out: Rows) -> None:
        gather(self._slab, places, self._dim, out)


def _unpacked(packed: NDArray[Any], slots: Slots) -> Meta:
    meta = np.empty((len(slots), 4), np.uint64)
    unpack(packed, slots, meta)
    return meta


class HostTier:
    """Rows in host memory. See Tier for the contract."""

    name: ClassVar[str] = "host"
    code: ClassVar[int] = 2

    def __init__(self, dim: int, width: int, budget: Budget) -> None:
        self._dim = dim
        self._slab = Arena(width, np.float32, budget)
        self._meta = Arena(3, np.uint64, budget)
        self._used = 0  # slots ever handed out
        self._free: Slots = np.empty(0, np.int64)  # a stack of the slots given back
        self._free_count = 0

    @property
    def rows(self) -> int:
        return self._used - self._free_count

    @property
    def bytes(self) -> int:
        return self._slab.bytes + self._meta.bytes

    def allocate(self, count: int) -> Slots:
        recycled = min(count, self._free_count)
        fresh = count - recycled
        before = self._slab.bytes
        self._slab.grow(self._used + fresh)
        try:
            self._meta.grow(self._used + fresh)
        except OutOfMemory:
            self._slab.shrink(before)
            raise
        self._free_count -= recycled
        slots = np.empty(count, np.int64)
        slots[:recycled] = self._free[self._free_count : self._free_count + recycled]
        slots[recycled:] = np.arange(self._used, self._used + fresh)
        self._used += fresh
        return slots

    def release(self, places: Slots) -> None:
        forget(self._meta.array, places)
        end = self._free_count + len(places)
        if end > len(self._free):
            grown = np.empty(max(end, 2 * len(self._free), 1024), np.int64)
            grown[: self._free_count] = self._free[: self._free_count]
            self._free = grown
        self._free[self._free_count : end] = places
        self._free_count = end

    def create(
        self, keys: Keys, places: Slots, initializer: Initializer, seed: int, state: Rows
    ) -> None:
        initializer.fill(seed, keys, places, self._dim, self._slab.array)
        fill_state(self._slab.array, places, self._dim, state)
        fresh(self._meta.array, places, keys)

    def read(self, places: Slots, out: Rows) -> None:
        gather(self._slab.array, places, self._dim, out)

    def push(
        self,
        places: Slots,
        gradients: Rows,
        counts: NDArray[Any],
        optimizer: Optimizer,
        lr: float,
        step: int,
        version: int,
        stamp: int | None = None,
    ) -> None:
        touch(self._meta.array, places, counts, step if stamp is None else stamp, version)
        optimizer.step(self._slab.array, places, gradients, lr, step)

    def images(self, places: Slots, frequencies: NDArray[Any], rows: Rows) -> None:
        images(self._slab.array, self._meta.array, places, frequencies, rows)

    def put(
        self,
        keys: Keys,
        places: Slots,
        versions: NDArray[Any],
        steps: NDArray[Any],
        frequencies: NDArray[Any],
        rows: Rows,
    ) -> None:
        slab, meta = self._slab.array, self._meta.array
        put(slab, meta, places, keys, versions, steps, frequencies, rows)

    def meta(self, places: Slots) -> Meta:
        return _unpacked(self._meta.array, places)

    def scan(self) -> Scan:
        return HostScan(self._slab.array, self._meta.array, self._used, self._dim)

    def view(self) -> View:
        rows = self._used - self._free_count
        return View(self._slab.array, self._meta.array, self._used, rows, self._dim)

    def dump(self, places: Slots) -> tuple[Rows, Meta]:
        return self._slab.array[places], self.meta(places)

    def close(self) -> None:
        self._slab.close()
        self._meta.close()
        self._used = self._free_count = 0
