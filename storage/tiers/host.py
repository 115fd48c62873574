"""Rows in host memory: a slab, float32[capacity, width], with one row per slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from storage.arena import Arena, Budget, Memory
from storage.eviction.contract import View
from storage.initializers import Initializer
from storage.kernels import (
    Keys,
    Rows,
    Slots,
    fill_state,
    from_bits,
    gather,
    largest_in,
    measure,
    scatter,
)
from storage.optimizer import Optimizer
from storage.slots import FREQUENCY, LOOK, Homes, Meta, SlotEntries, find_changed, unpack
from storage.tiers.base import DirtyScan, Scan


class SlotScan(ABC):
    """Scans the slots of a tier in ascending order. See Scan for the contract.

    A subclass adds ``read`` and ``measure``.

    entries  memory of the entries of all slots
    used     number of slots to look at
    """

    def __init__(self, entries: Memory, used: int) -> None:
        self._entries, self._used = entries, used

    def find(
        self, start: int, after: int, upto: int, limit: int, look: int = LOOK
    ) -> tuple[Slots, int | None]:
        slots = np.empty(limit, np.int64)
        stop = min(start + look, self._used)
        found, end = find_changed(self._entries, start, stop, after, upto, slots)
        return slots[:found], None if end >= self._used else int(end)

    def dirty(self, start: int, upto: int, limit: int) -> tuple[Slots, int | None]:
        """Find dirty rows, which have no copy in a block, with versions in 1..upto.

        For ``start``, ``limit`` and the result see ``find``. Looks at all slots.
        """
        slots = np.empty(limit, np.int64)
        found, end = find_changed(self._entries, start, self._used, 0, upto, slots, dirty=True)
        return slots[:found], None if end >= self._used else int(end)

    def copy(self, places: Slots, frequencies: NDArray[Any], rows: Rows) -> Meta:
        self.read(places, rows)
        meta = unpack(self._entries.array(), places)
        frequencies[:] = meta[:, FREQUENCY]
        return meta

    @abstractmethod
    def read(self, places: Slots, out: Rows) -> None:
        """Copy the first k numbers of rows to ``out``, float32[n, k]."""


class HostScan(SlotScan):
    """Scans the slots of a HostTier in ascending order. See Scan for the contract."""

    def __init__(self, slab: Memory, entries: Memory, used: int, dim: int) -> None:
        super().__init__(entries, used)
        self._slab, self._dim = slab, dim

    def measure(self, places: Slots, norms: NDArray[Any]) -> Meta:
        measure(self._slab.array(), places, self._dim, norms)
        return unpack(self._entries.array(), places)

    def read(self, places: Slots, out: Rows) -> None:
        gather(self._slab.array(), places, out.shape[1], out)


class HostTier:
    """Rows in host memory. See Writable for the contract.

    dim    numbers in an embedding
    state  float32[width - dim], initial optimizer state of every row
    """

    name: ClassVar[str] = "host"
    code: ClassVar[int] = 2

    def __init__(self, dim: int, state: Rows, budget: Budget) -> None:
        width = dim + len(state)
        self._dim, self._state = dim, state
        self._slab = Arena(width, np.float32, budget)
        self.slots = SlotEntries(budget)
        self._most = np.empty(width, np.uint32)  # scratch of ``largest``

    @property
    def rows(self) -> int:
        return self.slots.rows

    @property
    def in_host(self) -> int:
        return self.slots.rows

    @property
    def bytes(self) -> int:
        return self._slab.bytes + self.slots.bytes

    def allocate(self, count: int, *, exact: bool = False) -> Slots:
        before = self._slab.bytes
        self._slab.grow(self.slots.needed(count), exact=exact)
        try:
            return self.slots.allocate(count, exact=exact)
        except BaseException:
            self._slab.shrink(before)
            raise

    def release(self, slots: Slots) -> Homes:
        return self.slots.release(slots)

    @property
    def row_bytes(self) -> int:
        return self._slab.memory.row_bytes + self.slots.row_bytes

    @property
    def capacity(self) -> int:
        return min(self._slab.rows, self.slots.capacity)

    def room(self, spare: int) -> int:
        return self.capacity - self.slots.rows + max(0, spare) // self.row_bytes

    def cost(self, count: int) -> int:
        return max(0, count - self.room(0)) * self.row_bytes

    def cut(self, used: int) -> None:
        self.slots.cut(used)
        self._slab.release(used)

    def compact(self, size: int) -> None:
        """See Writable.compact. ``cut`` gives back everything that no row needs."""

    def create(self, keys: Keys, slots: Slots, initializer: Initializer, seed: int) -> None:
        initializer.fill(seed, keys, slots, self._dim, self._slab.array)
        fill_state(self._slab.array, slots, self._dim, self._state)

    def gather(self, places: Slots, out: Rows) -> None:
        gather(self._slab.array, places, out.shape[1], out)

    def scatter(self, slots: Slots, rows: Rows) -> None:
        scatter(self._slab.array, slots, rows)

    def step(
        self, slots: Slots, gradients: Rows, optimizer: Optimizer, lr: float, step: int
    ) -> None:
        optimizer.step(self._slab.array, slots, gradients, lr, step)

    def largest(self, slots: Slots) -> float:
        return from_bits(largest_in(self._slab.array.view(np.uint32), slots, self._most))

    def meta(self, places: Slots) -> Meta:
        return self.slots.meta(places)

    def scan(self) -> DirtyScan:
        return HostScan(self._slab.memory, self.slots.memory, self.slots.used, self._dim)

    def look(self) -> Scan:
        return self.scan()

    def view(self) -> View:
        return View(self.slots.array, self.slots.used, self._norms, self._dim)

    def _norms(self, slots: Slots) -> NDArray[np.float64]:
        norms = np.empty(len(slots))
        measure(self._slab.array, slots, self._dim, norms)
        return norms

    def close(self) -> None:
        self._slab.close()
        self.slots.close()
