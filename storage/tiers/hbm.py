"""Rows in GPU memory, and in host memory those for which the GPU has no room.

Keys and metadata of all rows are in host memory, by slot. The numbers of a row (embedding and
optimizer state) are in one of two slabs: one in host memory, one in GPU memory. An array says where
the numbers of each slot are. So a row keeps its slot when its numbers move, and nobody else needs
to know of a move: neither the index nor a scan, a flush or a sweep. A row may move whether it is
dirty (changed since its last copy on disk) or not.

A move copies the numbers, waits for the GPU, switches the array, and frees the old place. It
happens on the engine thread, between requests. Another thread that copies rows for a flush holds a
lock meanwhile; then the engine thread does not move rows, and does not wait.

The engine thread gives all its kernels to one queue, so that reads see the pushes before them. It
does not wait for the kernel of a push. It waits only for the launch before the last, whose
page-locked memory it uses again. A read waits for its rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from storage.arena import Arena, Budget
from storage.errors import OutOfMemory
from storage.eviction.contract import View
from storage.gpu.gpu import Gpu
from storage.gpu.slab import PIECE, Pieces, Slab
from storage.initializers import Initializer
from storage.kernels import (
    ABSENT,
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
from storage.owners import Owners
from storage.slots import Homes, Meta, SlotEntries, unpack
from storage.tiers.base import DirtyScan, Scan
from storage.tiers.host import SlotScan
from storage.tiers.places import Places


def _norms(at: Places, slab: Rows, rows: Pieces, dim: int) -> NDArray[np.float64]:
    """Return the L2 norms of embeddings, rounded to float32; 0 for slots without a row.

    slab  the slab in host memory
    rows  the slab in GPU memory
    """
    norms, there = np.zeros(len(at.far)), np.flatnonzero(at.far >= 0)
    others = np.empty(len(there))
    measure(slab, at.far[there], dim, others)
    norms[there] = others
    if at.here is not None:
        norms[at.here] = rows.measure(at.near[at.here], dim)
    return norms


class HbmTier:
    """Rows in GPU memory and in host memory. See Writable for the contract.

    New rows are in host memory; ``move`` exchanges rows between the two.

    dim     numbers in an embedding
    width   numbers in a row
    state   float32[width - dim], initial optimizer state of every row
    budget  memory budget of the host, for keys, metadata, and the rows in host memory
    gpu     the GPU, which other tables use, too
    limit   bytes of GPU memory that this tier may take; None: only the budget of the GPU limits it
    piece   bytes of GPU memory that are taken at once, about

    hbm      the rows in GPU memory
    closed   True after ``close``
    hits     rows of pushes, and those that the caller adds, that were in GPU memory
    recent   rows that the last ``gather`` found in GPU memory
    stirred  rows that were pushed or written; it only grows
    """

    name: ClassVar[str] = "host"  # of a row that is not in GPU memory
    code: ClassVar[int] = 1

    def __init__(
        self,
        dim: int,
        state: Rows,
        budget: Budget,
        gpu: Gpu,
        limit: int | None = None,
        piece: int = PIECE,
    ) -> None:
        self.dim, self._state, self.width = dim, state, dim + len(state)
        self.budget, self.gpu, self._limit = budget, gpu, limit
        self.slots = SlotEntries(budget)
        self._where = Arena(1, np.int64, budget)
        self._slab = Arena(self.width, np.float32, budget)
        self._far = Owners(budget)  # of the slab in host memory
        self._near = Owners(budget)  # of the slab in GPU memory
        self.hbm = Slab(self.width, gpu.staging, gpu.budget, piece)
        self._most = np.empty(self.width, np.uint32)  # scratch of ``largest``
        self._copying = threading.Lock()  # held while another thread copies rows, or rows move
        self.closed = False
        self.hits = self.recent = self.stirred = 0

    # ---- sizes

    @property
    def rows(self) -> int:
        return self.slots.rows

    @property
    def in_host(self) -> int:
        return self._far.rows

    @property
    def few_slots(self) -> bool:
        """True if there is memory for more rows than slots: then any row that leaves makes room."""
        slots, rows = self._free()
        return slots < rows

    @property
    def bytes(self) -> int:
        """Bytes of host memory."""
        parts = self.slots, self._where, self._slab, self._far, self._near
        return sum(each.bytes for each in parts)

    @property
    def hbm_rows(self) -> int:
        """Number of rows in GPU memory."""
        return self._near.rows

    @property
    def piece_rows(self) -> int:
        """Number of rows in one piece of GPU memory."""
        return self.hbm.piece_rows

    @property
    def hbm_unused(self) -> int:
        """Number of pieces of GPU memory that the rows there do not need."""
        return (self.hbm.rows - self._near.rows) // self.hbm.piece_rows

    @property
    def hbm_bytes(self) -> int:
        """Bytes of GPU memory that the tier has taken, including unused places."""
        return self.hbm.bytes

    @property
    def row_bytes(self) -> int:
        return self._slab.memory.row_bytes + self._slot_bytes + 8

    @property
    def _slot_bytes(self) -> int:
        return self.slots.row_bytes + 8

    @property
    def capacity(self) -> int:
        return min(self.slots.capacity, self._where.rows)

    def _free(self) -> tuple[int, int]:
        """Return for how many more slots, and for how many more rows, there is memory."""
        return self.capacity - self.slots.rows, min(
            self._slab.rows, self._far.capacity
        ) - self._far.rows

    def cost(self, count: int) -> int:
        slots, rows = self._free()
        of_row = self.row_bytes - self._slot_bytes
        return max(0, count - slots) * self._slot_bytes + max(0, count - rows) * of_row

    def room(self, spare: int) -> int:
        spare, (slots, rows) = max(0, spare), self._free()
        unit = self._slot_bytes if slots < rows else self.row_bytes - self._slot_bytes
        half = min(abs(slots - rows), spare // unit)  # rows that lack only one of the two
        return min(slots, rows) + half + (spare - half * unit) // self.row_bytes

    def hbm_room(self) -> int:
        """Return how many rows GPU memory can have, as far as the budgets and the GPU allow."""
        slab, budget = self.hbm, self.gpu.budget
        spare = budget.free if self.gpu.promotes else 0
        if self._limit is not None:
            spare = min(spare, self._limit - slab.bytes)
        return slab.rows + max(0, spare) // slab.piece_bytes * slab.piece_rows

    # ---- rows

    def allocate(self, count: int, *, exact: bool = False) -> Slots:
        arenas: tuple[Arena | Owners, ...] = self._where, self._slab, self._far
        before = [each.bytes for each in arenas]
        rows = self._far.needed(count)
        try:
            self._slab.grow(rows, exact=exact)
            self._far.grow(rows, exact=exact)
            self._where.grow(self.slots.needed(count), exact=exact)
            slots = self.slots.allocate(count, exact=exact)
        except BaseException:
            for arena, size in zip(arenas, before, strict=True):
                arena.shrink(size)
            raise
        self._where.array[slots, 0] = self._far.take(slots)
        return slots

    def release(self, slots: Slots) -> Homes:
        homes = self.slots.release(slots)
        self._give_up(Places(self._where.array[:, 0], slots))
        self._where.array[slots, 0] = ABSENT
        return homes

    def _give_up(self, at: Places) -> None:
        """Make the places free where the numbers of some slots are."""
        self._far.give(at.far if at.there is None else at.far[at.there])
        if at.here is not None:
            self._near.give(at.near[at.here])

    def cut(self, used: int) -> None:
        self.slots.cut(used)
        self._where.release(used)

    def compact(self, size: int) -> None:
        """See Writable.compact. Rows at the end of the slab move to free places before them."""
        row = self.row_bytes - self._slot_bytes
        end = max(self._far.rows, self._slab.rows - -(-size // row))
        if end >= self._slab.rows or not self._copying.acquire(blocking=False):
            return
        try:
            slots, old, new = self._far.empty_from(end)
            if len(slots):
                rows = np.empty((len(slots), self.width), np.float32)
                gather(self._slab.array, old, self.width, rows)
                scatter(self._slab.array, new, rows)
                self._where.array[slots, 0] = new
            self._slab.release(end)
            self._far.cut()
        finally:
            self._copying.release()

    def create(self, keys: Keys, slots: Slots, initializer: Initializer, seed: int) -> None:
        numbers = self._where.array[slots, 0]
        initializer.fill(seed, keys, numbers, self.dim, self._slab.array)
        fill_state(self._slab.array, numbers, self.dim, self._state)

    def gather(self, places: Slots, out: Rows) -> None:
        at = Places(self._where.array[:, 0], places)
        self.recent = 0
        if at.here is not None:
            self.recent = len(at.here)
            self.hbm.gather(at.near, out)
        gather(self._slab.array, at.far, out.shape[1], out)

    def scatter(self, slots: Slots, rows: Rows) -> None:
        at = Places(self._where.array[:, 0], slots)
        self.stirred += len(slots)
        if at.here is not None:
            self.hbm.scatter(at.near[at.here], rows[at.here])
        scatter(self._slab.array, at.far, rows)

    def step(
        self, slots: Slots, gradients: Rows, optimizer: Optimizer, lr: float, step: int
    ) -> None:
        at = Places(self._where.array[:, 0], slots)
        self.stirred += len(slots)
        if at.here is None or at.there is None:
            optimizer.step(self._slab.array, at.far, gradients, lr, step)
            return
        self.hits += len(at.here)
        if not len(at.there):
            self.hbm.step(at.near, gradients, optimizer, lr, step)
            return
        self.hbm.step(at.near[at.here], gradients[at.here], optimizer, lr, step)
        optimizer.step(self._slab.array, at.far[at.there], gradients[at.there], lr, step)

    def largest(self, slots: Slots) -> float:
        at = Places(self._where.array[:, 0], slots)
        far = at.far if at.there is None else at.far[at.there]
        most = int(largest_in(self._slab.array.view(np.uint32), far, self._most))
        if at.here is not None:
            most = max(most, int(self.hbm.largest(at.near[at.here]).max(initial=0)))
        return from_bits(most)

    def meta(self, places: Slots) -> Meta:
        return self.slots.meta(places)

    def in_hbm(self, slots: Slots) -> NDArray[np.bool_]:
        """Return which rows are in GPU memory, bool[n]."""
        where: NDArray[np.int64] = self._where.array[slots, 0]
        return where < ABSENT

    @property
    def where(self) -> NDArray[np.int64]:
        """Where the numbers of each slot are; see places.py. Any thread may use it shortly."""
        return self._where.memory.array()[:, 0]

    @property
    def slab(self) -> Rows:
        """The rows in host memory. Any thread may use it shortly."""
        rows: Rows = self._slab.memory.array()
        return rows

    @contextmanager
    def still(self) -> Iterator[bool]:
        """Keep rows from moving while the block runs, which another thread does that copies some.

        Yields whether there are rows: False if the tier was closed.
        """
        with self._copying:
            yield not self.closed

    # ---- scans and sweeps

    def scan(self) -> DirtyScan:
        return HbmScan(self, self.hbm)

    def look(self) -> Scan:
        return EngineScan(self)

    def view(self) -> View:
        return View(self.slots.array, self.slots.used, self.norms, self.dim)

    def norms(self, slots: Slots) -> NDArray[np.float64]:
        """Return the L2 norms of the embeddings of some rows, rounded to float32."""
        at = Places(self._where.array[:, 0], slots)
        return _norms(at, self._slab.array, self.hbm, self.dim)

    # ---- moves

    def move(self, up: Slots, down: Slots) -> bool:
        """Move rows between host and GPU memory.

        up    int64[n], slots of rows in host memory that move to the GPU
        down  int64[m], slots of rows in GPU memory that move to the host

        Rows that change places take no more memory. Returns False, and moves nothing, while another
        thread copies rows. Raises OutOfMemory, and moves nothing then.
        """
        if not self._copying.acquire(blocking=False):
            return False
        try:
            self._reserve(len(up), len(down))
            self._move(up, down)
        finally:
            self._copying.release()
        return True

    def _reserve(self, up: int, down: int) -> None:
        """Take memory for moves of so many rows. Raises OutOfMemory, and takes none then."""
        near, far = self._near.needed(max(0, up - down)), self._far.needed(max(0, down - up))
        arenas: tuple[Arena | Owners, ...] = self._near, self._slab, self._far
        before, rows = [each.bytes for each in arenas], self.hbm.rows
        if near > rows:
            try:
                self.hbm.grow(near)
            except OutOfMemory as error:
                self.gpu.full(error)
                raise
            self.gpu.resume()
        try:
            for arena, needed in zip(arenas, (near, far, far), strict=True):
                arena.grow(needed, exact=True)
        except BaseException:
            for arena, size in zip(arenas, before, strict=True):
                arena.shrink(size)
            self.hbm.shrink(rows)
            raise

    def _move(self, up: Slots, down: Slots) -> None:
        """Do what ``move`` describes; there is memory for all rows."""
        where = self._where.array[:, 0]
        old_far, old_near = where[up], -2 - where[down]
        rising = np.empty((len(up), self.width), np.float32)
        gather(self._slab.array, old_far, self.width, rising)
        sinking = np.empty((len(down), self.width), np.float32)
        self.hbm.gather(old_near, sinking)
        self._far.give(old_far)
        self._near.give(old_near)
        new_near, new_far = self._near.take(up), self._far.take(down)
        self.hbm.scatter(new_near, rising)
        self.hbm.staging.finish()
        scatter(self._slab.array, new_far, sinking)
        where[up], where[down] = -2 - new_near, new_far

    def shrink_hbm(self) -> None:
        """Give back one piece of GPU memory, if the rows there fit into the others."""
        slab = self.hbm
        end = slab.rows - slab.piece_rows
        if self._near.rows > end or not self._copying.acquire(blocking=False):
            return
        try:
            slots, old, new = self._near.empty_from(end)
            rows = np.empty((len(slots), self.width), np.float32)
            slab.gather(old, rows)
            slab.scatter(new, rows)
            slab.staging.finish()
            self._where.array[slots, 0] = -2 - new
            slab.shrink(end)
            self._near.cut()
        finally:
            self._copying.release()

    def close(self) -> None:
        with self._copying:  # another thread may be copying rows
            self.closed = True
            for each in (self.slots, self._where, self._slab, self._far, self._near, self.hbm):
                each.close()


class EngineScan(SlotScan):
    """Scans the slots of an HbmTier. Only the engine thread may copy, measure and read rows.

    It uses the queue of the engine thread. Rows of a closed tier count as deleted.
    """

    def __init__(self, tier: HbmTier) -> None:
        super().__init__(tier.slots.memory, tier.slots.used)
        self._tier = tier

    def copy(self, places: Slots, frequencies: NDArray[Any], rows: Rows) -> Meta:
        return self._unless_closed(super().copy(places, frequencies, rows))

    def measure(self, places: Slots, norms: NDArray[Any]) -> Meta:
        norms[:] = self._norms(places)
        return self._unless_closed(unpack(self._entries.array(), places))

    def read(self, places: Slots, out: Rows) -> None:
        if not self._tier.closed:
            self._tier.gather(places, out)

    def _norms(self, places: Slots) -> NDArray[np.float64]:
        return np.zeros(len(places)) if self._tier.closed else self._tier.norms(places)

    def _unless_closed(self, meta: Meta) -> Meta:
        if self._tier.closed:
            meta[:] = 0
        return meta


class HbmScan(EngineScan):
    """Scans the slots of an HbmTier. Any one thread may use it. See Scan for the contract.

    It reads rows in GPU memory with a queue of its own, which waits for the pushes before the scan.
    Otherwise it could read a row from before a push whose version the row's metadata already have.
    """

    def __init__(self, tier: HbmTier, slab: Slab) -> None:
        super().__init__(tier)
        self._slab, self._rows = slab, slab.snapshot()

    def read(self, places: Slots, out: Rows) -> None:
        tier = self._tier
        with tier.still() as there:
            if not there:
                return
            at = Places(tier.where, places)
            if at.here is not None:
                self._rows.renew(self._slab)
                self._rows.gather(at.near, out)
            gather(tier.slab, at.far, out.shape[1], out)

    def _norms(self, places: Slots) -> NDArray[np.float64]:
        tier = self._tier
        with tier.still() as there:
            if not there:
                return np.zeros(len(places))
            self._rows.renew(self._slab)
            return _norms(Places(tier.where, places), tier.slab, self._rows, tier.dim)
