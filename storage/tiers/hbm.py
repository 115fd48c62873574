"""Rows in GPU memory. Their keys and metadata are in host memory.

The engine thread gives all its kernels to one queue, so that reads see the pushes before them. It
does not wait for the kernel of a push. It waits only for the launch before the last, whose
page-locked memory it uses again. A read waits for its rows.

No server uses this tier yet.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from storage.arena import Budget, Memory
from storage.eviction.contract import View
from storage.gpu.slab import PIECE, Slab, Snapshot
from storage.gpu.staging import Staging
from storage.initializers import Initializer
from storage.kernels import Keys, Rows, Slots, fill_state, from_bits
from storage.optimizer import Optimizer
from storage.slots import Meta, SlotEntries, unpack
from storage.tiers.base import DirtyScan
from storage.tiers.host import SlotScan


class HbmScan(SlotScan):
    """Scans the slots of an HbmTier in ascending order. See Scan for the contract.

    It has a queue of its own, which waits for the pushes before the scan. Otherwise it could read a
    row from before a push whose version the row's metadata already have.
    """

    def __init__(self, rows: Snapshot, entries: Memory, used: int, dim: int) -> None:
        super().__init__(entries, used)
        self._rows, self._dim = rows, dim

    def measure(self, places: Slots, norms: NDArray[Any]) -> Meta:
        norms[:] = self._rows.measure(places, self._dim)
        return unpack(self._entries.array(), places)

    def read(self, places: Slots, out: Rows) -> None:
        self._rows.gather(places, out)


class HbmTier:
    """Rows in GPU memory. See Writable for the contract.

    dim      numbers in an embedding
    state    float32[width - dim], initial optimizer state of every row
    budget   memory budget of the host, for keys and metadata
    device   budget of GPU memory, for rows
    staging  the queue of the engine thread; tables share it
    piece    bytes of GPU memory that are taken at once, about
    """

    name: ClassVar[str] = "hbm"
    code: ClassVar[int] = 1

    def __init__(
        self,
        dim: int,
        state: Rows,
        budget: Budget,
        device: Budget,
        staging: Staging,
        piece: int = PIECE,
    ) -> None:
        self._dim, self._state, self._width = dim, state, dim + len(state)
        self._slab = Slab(self._width, staging, device, piece)
        self.slots = SlotEntries(budget)

    @property
    def rows(self) -> int:
        return self.slots.rows

    @property
    def bytes(self) -> int:
        return self._slab.bytes + self.slots.bytes

    def allocate(self, count: int, *, exact: bool = False) -> Slots:
        """See Writable.allocate. GPU memory comes in whole pieces, even if ``exact``."""
        before = self._slab.rows
        self._slab.grow(self.slots.needed(count))
        try:
            return self.slots.allocate(count, exact=exact)
        except BaseException:
            self._slab.shrink(before)
            raise

    @property
    def row_bytes(self) -> int:
        return 4 * self._slab.stride + self.slots.row_bytes

    @property
    def capacity(self) -> int:
        return min(self._slab.rows, self.slots.capacity)

    def cut(self, used: int) -> None:
        self.slots.cut(used)
        self._slab.shrink(used)

    def create(self, keys: Keys, slots: Slots, initializer: Initializer, seed: int) -> None:
        most = self._slab.at_once(self._width)
        for at in range(0, len(keys), most):
            some = keys[at : at + most]
            rows, here = np.empty((len(some), self._width), np.float32), np.arange(len(some))
            initializer.fill(seed, some, here, self._dim, rows)
            fill_state(rows, here, self._dim, self._state)
            self._slab.scatter(slots[at : at + most], rows)

    def gather(self, places: Slots, out: Rows) -> None:
        self._slab.gather(places, out)

    def scatter(self, slots: Slots, rows: Rows) -> None:
        self._slab.scatter(slots, rows)

    def step(
        self, slots: Slots, gradients: Rows, optimizer: Optimizer, lr: float, step: int
    ) -> None:
        self._slab.step(slots, gradients, optimizer, lr, step)

    def largest(self, slots: Slots) -> float:
        return from_bits(int(self._slab.largest(slots).max(initial=0)))

    def meta(self, places: Slots) -> Meta:
        return self.slots.meta(places)

    def scan(self) -> DirtyScan:
        rows = self._slab.snapshot()
        return HbmScan(rows, self.slots.memory, self.slots.used, self._dim)

    def view(self) -> View:
        return View(self.slots.array, self.slots.used, self._norms, self._dim)

    def _norms(self, slots: Slots) -> NDArray[np.float64]:
        return self._slab.measure(slots, self._dim)

    def close(self) -> None:
        self._slab.close()
        self.slots.close()
