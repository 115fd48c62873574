"""Rows in host memory: a slab of rows, an array of metadata, and a list of free slots.

A place is a slot: the index of a row in the slab. Metadata is packed into 24 bytes per row:

    key uint64 | version << 16 | frequency >> 16 | step << 16 | frequency & 0xffff
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from storage.arena import Arena, Budget, Memory
from storage.eviction.contract import View
from storage.initializers import Initializer
from storage.kernels import (
    ABSENT,
    Images,
    Keys,
    Rows,
    Slots,
    changed,
    fill_state,
    fresh,
    from_bits,
    gather,
    images,
    largest_in,
    measure,
    put,
    release,
    reuse,
    touch,
    unpack,
)
from storage.optimizer import Optimizer
from storage.tiers.base import LOOK, Meta, Scan


class HostScan:
    """Scans the slots of a HostTier in ascending order. See Scan for the contract.

    slab  memory of the rows
    meta  memory of the packed metadata
    used  number of slots to scan: those that were ever allocated
    dim   length of an embedding
    """

    def __init__(self, slab: Memory, meta: Memory, used: int, dim: int) -> None:
        self._slab, self._meta, self._used, self._dim = slab, meta, used, dim

    def find(
        self, start: int, after: int, upto: int, limit: int, look: int = LOOK
    ) -> tuple[Slots, int | None]:
        slots = np.empty(limit, np.int64)
        stop = min(start + look, self._used)
        found, end = 0, start
        while end < stop:  # in short calls, so that the metadata can move between them
            part = min(end + LOOK, stop)
            more, end = changed(self._meta.array(), end, part, after, upto, slots[found:])
            found += more
            if end < part:  # the limit is reached
                break
        return slots[:found], None if end >= self._used else int(end)

    def copy(self, places: Slots, frequencies: NDArray[Any], rows: Rows) -> Meta:
        meta = self._meta.array()
        images(self._slab.array(), meta, places, frequencies, rows)
        return _unpacked(meta, places)

    def measure(self, places: Slots, norms: NDArray[Any]) -> Meta:
        measure(self._slab.array(), places, self._dim, norms)
        return _unpacked(self._meta.array(), places)

    def read(self, places: Slots, out: Rows) -> None:
        gather(self._slab.array(), places, self._dim, out)


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
        self._used = 0  # slots ever allocated
        self._first_free = ABSENT  # head of the list of free slots; see kernels.release
        self._free_count = 0
        self._most = np.empty(width, np.uint32)  # scratch of ``largest``

    @property
    def rows(self) -> int:
        return self._used - self._free_count

    @property
    def bytes(self) -> int:
        return self._slab.bytes + self._meta.bytes

    def allocate(self, count: int) -> Slots:
        recycled = min(count, self._free_count)
        used = self._used + count - recycled
        before = self._slab.bytes
        self._slab.grow(used)
        try:
            self._meta.grow(used)
        except BaseException:
            self._slab.shrink(before)
            raise
        slots = np.empty(count, np.int64)
        self._first_free = reuse(self._meta.array, self._first_free, slots[:recycled])
        slots[recycled:] = np.arange(self._used, used)
        self._free_count -= recycled
        self._used = used
        return slots

    def release(self, places: Slots) -> None:
        self._first_free = release(self._meta.array, places, self._first_free)
        self._free_count += len(places)

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

    def largest(self, places: Slots) -> float:
        return from_bits(largest_in(self._slab.array.view(np.uint32), places, self._most))

    def put(self, places: Slots, images: Images) -> None:
        put(self._slab.array, self._meta.array, places, *images)

    def meta(self, places: Slots) -> Meta:
        return _unpacked(self._meta.array, places)

    def scan(self) -> Scan:
        return HostScan(self._slab.memory, self._meta.memory, self._used, self._dim)

    def view(self) -> View:
        rows = self._used - self._free_count
        return View(self._slab.array, self._meta.array, self._used, rows, self._dim)

    def dump(self, places: Slots) -> tuple[Rows, Meta]:
        return self._slab.array[places], self.meta(places)

    def close(self) -> None:
        self._slab.close()
        self._meta.close()
        self._used = self._free_count = 0
        self._first_free = ABSENT
