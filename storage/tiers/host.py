"""Rows in host memory: a slab, its metadata beside it, and the list of free slots.

A place is a slot: the position of a row in the slab. The slab grows by chunks and never moves.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from storage.arena import Arena, Budget
from storage.errors import OutOfMemory
from storage.initializers import Initializer
from storage.kernels import Keys, Rows, Slots, fill_state, gather, touch
from storage.optimizers import Optimizer
from storage.tiers.base import KEY, Meta


class HostTier:
    """Rows in host memory. See Tier for the contract."""

    name: ClassVar[str] = "host"
    code: ClassVar[int] = 2

    def __init__(self, dim: int, width: int, budget: Budget) -> None:
        self._dim = dim
        self._slab = Arena(width, np.float32, budget)
        self._meta = Arena(4, np.uint64, budget)
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
        self._meta.array[places] = 0
        self._meta.array[places, KEY] = keys

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
    ) -> None:
        touch(self._meta.array, places, counts, step, version)
        optimizer.step(self._slab.array, places, gradients, lr, step)

    def dump(self, places: Slots) -> tuple[Rows, Meta]:
        return self._slab.array[places], self._meta.array[places]

    def close(self) -> None:
        self._slab.close()
        self._meta.close()
        self._used = self._free_count = 0
