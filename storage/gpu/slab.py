"""Rows in device memory, in pieces that never move."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.arena import Budget
from storage.errors import OutOfMemory
from storage.gpu.device import Device, Mark, Memory, Number, OutOfDeviceMemory, address
from storage.gpu.source import kernel_name, kernel_numbers
from storage.gpu.staging import ALIGNED, Staging
from storage.kernels import Rows, Slots
from storage.optimizer import Optimizer

PIECE = 16 << 20  # bytes of a piece of a slab, about
PART = 8 << 20  # bytes of slots and rows that one launch takes from or to page-locked memory
SCAN_PART = 1 << 20  # the same for a scan, of which there may be many
GRANULE = 2 << 20  # bytes; larger pieces of GPU memory take a multiple of it
WIDE = 32  # numbers of a row that is worth 16 bytes more
ONE_PIECE = 62  # log2 of the rows of a piece that has all rows
LEAST_TABLE = 64  # pointers in the first table of pieces


class Piece:
    """Rows in one piece of device memory, which is given back to the budget when it is garbage."""

    def __init__(self, size: int, device: Device, budget: Budget) -> None:
        try:
            budget.take(size)
        except OutOfMemory as error:
            what = "no GPU memory: "
            raise OutOfMemory(budget.limit, budget.held, size, what, budget.advice) from error
        try:
            self._memory: Memory = device.memory(size)
        except BaseException as error:
            budget.give(size)
            if isinstance(error, OutOfDeviceMemory):
                raise _full(error, budget) from error
            raise
        self.address = self._memory.address
        weakref.finalize(self, budget.give, size).atexit = False


def _full(error: OutOfDeviceMemory, budget: Budget) -> OutOfMemory:
    """Return the error of storage for memory that the device has not, though the budget has."""
    what = f"{error} (the budget is not the limit): "
    return OutOfMemory(budget.limit, budget.held, error.wanted, what, budget.advice)


class Table:
    """The addresses of pieces, in device memory, where kernels read them.

    address  address of the table
    """

    def __init__(self, device: Device, room: int) -> None:
        self._room = room
        self._memory: Memory | NDArray[Any]
        try:
            self._memory = device.memory(8 * room)
            self.address = self._memory.address
        except OutOfDeviceMemory:  # the host's memory is slower, but always there
            self._memory = device.pinned(8 * room)
            self.address = int(address(self._memory))

    def fits(self, count: int) -> bool:
        return count <= self._room

    def write(self, staging: Staging, first: int, pieces: list[Piece]) -> None:
        """Write the addresses of pieces number ``first`` and on, in the order of the queue."""
        (block,) = staging.lend(8 * len(pieces))
        block.view(np.uint64)[:] = [piece.address for piece in pieces]
        numbers = np.uint64(self.address), np.int64(len(pieces)), np.int64(first)
        staging.queue.run("add_pieces", len(pieces), *numbers, address(block))
        staging.launched()


class Pieces:
    """Runs kernels over rows of some pieces.

    width    numbers per row
    staging  the queue that runs the kernels; each call of a method is one batch of its own
    """

    def __init__(self, width: int, shift: int, staging: Staging, pieces: list[Piece]) -> None:
        self.width, self._shift, self.staging, self._pieces = width, shift, staging, pieces
        self.stride = row_stride(width)
        self._table: Table | None = None  # of the pieces, for kernels
        self._part = PART

    def gather(self, slots: Slots, out: Rows) -> None:
        """Copy the first columns of rows to ``out``; leave out[i] unchanged if slots[i] is ABSENT.

        slots  int64[n]
        out    float32[n, k]  written; k is at most the width
        """
        there = np.flatnonzero(slots >= 0)
        if len(there) < len(slots):
            rows = np.empty((len(there), out.shape[1]), np.float32)
            self._gather(slots[there], rows)
            out[there] = rows
        else:
            self._gather(slots, out)

    def _gather(self, slots: Slots, out: Rows) -> None:
        """Do what ``gather`` describes, if no slot is ABSENT."""
        count = out.shape[1]
        unread: list[tuple[Mark, slice, Rows]] = []
        for some in self._parts(len(slots), count):
            rows = self._launch("gather", slots[some], count, (some.stop - some.start, count))
            unread.append((self.staging.launched(), some, rows))
            if len(unread) > 1:  # the next part is being gathered while this one is copied
                _finish(unread, out)
        while unread:
            _finish(unread, out)

    def gather_into(self, slots: Slots, count: int, target: int) -> None:
        """Copy the first ``count`` numbers of rows within device memory; return before it is done.

        slots   int64[n]; ABSENT leaves a row of the result unchanged
        target  address of the result, float32[n, count]
        """
        table = self._written_table()
        head = np.uint64(table.address), np.int32(self._shift), np.int64(self.stride)
        for some in self._parts(len(slots), 0):
            n, out = some.stop - some.start, np.uint64(target + 4 * count * some.start)
            (there,) = self.staging.lend(8 * n)
            there.view(np.int64)[:] = slots[some]
            batch = address(there), np.int64(n), np.int32(count), out
            self.staging.queue.run("gather", n, *head, *batch)
            self.staging.launched()

    def scatter(self, slots: Slots, rows: Rows) -> None:
        """Copy row i of ``rows``, float32[n, width], into slots[i]; skip it if that is ABSENT."""
        for some in self._parts(len(slots), self.width):
            shape = some.stop - some.start, self.width
            self._launch("scatter", slots[some], self.width, shape, rows[some])
            self.staging.launched()

    def step(
        self, slots: Slots, gradients: Rows, optimizer: Optimizer, lr: float, step: int
    ) -> None:
        """Run one step of an optimizer over rows; see Writable.step. Returns before it is done."""
        dim = gradients.shape[1]
        kernel, numbers = kernel_name(optimizer.kernel), kernel_numbers(optimizer, lr, step, dim)
        for some in self._parts(len(slots), dim):
            shape = some.stop - some.start, dim
            self._launch(kernel, slots[some], dim, shape, gradients[some], *numbers)
            self.staging.launched()

    def measure(self, slots: Slots, dim: int) -> NDArray[np.float64]:
        """Return the L2 norms of the first ``dim`` numbers of rows, rounded to float32."""
        return self._per_row("measure", slots, dim, np.float64)

    def largest(self, slots: Slots) -> NDArray[np.uint32]:
        """Return the bits of the largest magnitude in each row, uint32[n]."""
        return self._per_row("largest", slots, self.width, np.uint32)

    def _per_row(self, kernel: str, slots: Slots, count: int, dtype: Any) -> NDArray[Any]:
        """Run a kernel that writes one number for each row, and return these numbers."""
        out = np.empty(len(slots), dtype)
        for some in self._parts(len(slots), 2):
            rows = self._launch(kernel, slots[some], count, (some.stop - some.start, 2))
            self.staging.launched().wait()
            out[some] = rows.reshape(-1).view(dtype)[: some.stop - some.start]
        return out

    def _launch(
        self,
        kernel: str,
        slots: Slots,
        count: int,
        shape: tuple[int, int],
        given: Rows | None = None,
        *numbers: Number,
    ) -> Rows:
        """Give the queue a kernel over some rows; the caller then calls ``staging.launched``.

        count    how many numbers of each row are meant
        shape    shape of the float32 array that the kernel reads or writes
        given    what the kernel reads from this array; None: it writes it
        numbers  further arguments of the kernel

        Returns that array, in page-locked memory.
        """
        table, staging, n = self._written_table(), self.staging, len(slots)
        of_slots, of_rows = staging.lend(8 * n, 4 * shape[0] * shape[1])
        there, rows = of_slots.view(np.int64), of_rows.view(np.float32).reshape(shape)
        there[:] = slots
        if given is not None:
            rows[:] = given
        head = np.uint64(table.address), np.int32(self._shift), np.int64(self.stride)
        batch = address(there), np.int64(n), np.int32(count), address(rows)
        staging.queue.run(kernel, n, *head, *batch, *numbers)
        return rows

    def _written_table(self) -> Table:
        """Return the table of the pieces. All later kernels of the queue find the pieces in it."""
        assert self._table is not None, "the slab has no rows"
        return self._table

    def at_once(self, columns: int) -> int:
        """Return the number of rows of so many numbers that one launch takes."""
        return max(1, self._part // (8 + 4 * columns))

    def _parts(self, count: int, columns: int) -> Iterator[slice]:
        """Yield slices of ``count`` rows that one launch takes."""
        most = self.at_once(columns)
        for at in range(0, count, most):
            yield slice(at, min(at + most, count))


def _finish(unread: list[tuple[Mark, slice, Rows]], out: Rows) -> None:
    """Copy the oldest part of a gather from page-locked memory, once it is there."""
    mark, some, rows = unread.pop(0)
    mark.wait()
    out[some] = rows


def write_rows(staging: Staging, target: int, places: Slots, rows: Rows) -> None:
    """Copy rows to device memory that is no slab; return before it is done.

    target  address of float32[m, dim], a multiple of 16
    places  int64[n], where in it each row goes
    rows    float32[n, dim]
    """
    dim = rows.shape[1]
    most = (PART - ALIGNED) // (8 + 4 * dim)
    for at in range(0, len(rows), most):
        some = rows[at : at + most]
        n = len(some)
        pieces, slots, there = staging.lend(8, 8 * n, some.nbytes)
        pieces.view(np.uint64)[0] = target
        slots.view(np.int64)[:] = places[at : at + n]
        there.view(np.float32).reshape(n, dim)[:] = some
        head = address(pieces), np.int32(ONE_PIECE), np.int64(dim)
        batch = address(slots), np.int64(n), np.int32(dim), address(there)
        staging.queue.run("scatter", n, *head, *batch)
        staging.launched()


def row_stride(width: int) -> int:
    """Return the numbers from one row to the next, a multiple of 16 bytes, or 32 for wide rows.

    A GPU reads and writes memory in sectors of 32 bytes.
    """
    unit = 4 if width < WIDE else 8
    return -(-width // unit) * unit


def _size(width: int, shift: int) -> int:
    """Return the bytes of GPU memory that a piece of ``1 << shift`` rows takes."""
    size = (4 * row_stride(width)) << shift
    return size if size < GRANULE else -(-size // GRANULE) * GRANULE


class Slab(Pieces):
    """The rows of one table. Only the engine thread uses it; others use a ``snapshot``.

    budget  budget of device memory
    piece   bytes of a piece, about
    """

    def __init__(self, width: int, staging: Staging, budget: Budget, piece: int = PIECE) -> None:
        shift = max(0, (piece // (4 * row_stride(width))).bit_length() - 1)
        if _size(width, shift + 1) < 2 * _size(width, shift):
            shift += 1  # larger pieces waste less
        super().__init__(width, shift, staging, [])
        self._budget = budget

    @property
    def piece_bytes(self) -> int:
        """Bytes of one piece."""
        return _size(self.width, self._shift)

    @property
    def piece_rows(self) -> int:
        """Number of rows of one piece."""
        return 1 << self._shift

    @property
    def rows(self) -> int:
        """Number of rows for which there is memory."""
        return len(self._pieces) << self._shift

    @property
    def bytes(self) -> int:
        """Bytes of device memory taken from the budget."""
        return len(self._pieces) * self.piece_bytes

    def grow(self, rows: int) -> None:
        """Take memory for at least ``rows`` rows, or raise OutOfMemory and change nothing."""
        device, size, known = self.staging.device, self.piece_bytes, len(self._pieces)
        count = -(-rows >> self._shift) - known
        pieces = [*self._pieces, *(Piece(size, device, self._budget) for _ in range(count))]
        if len(pieces) == known:
            return
        table = self._table
        try:
            if table is None or not table.fits(len(pieces)):
                table, known = Table(device, max(LEAST_TABLE, 2 * len(pieces))), 0
            table.write(self.staging, known, pieces[known:])
        except OutOfDeviceMemory as error:
            raise _full(error, self._budget) from error
        if table is not self._table:
            self.staging.finish()  # kernels may still read the table so far
        self._pieces, self._table = pieces, table

    def shrink(self, rows: int) -> None:
        """Give back the pieces that have only rows from number ``rows`` on."""
        keep = -(-rows >> self._shift)
        if keep < len(self._pieces):
            self.staging.finish()
            del self._pieces[keep:]

    def close(self) -> None:
        """Give all memory back. Snapshots keep theirs."""
        self.shrink(0)
        self._table = None

    def snapshot(self) -> Snapshot:
        """Return the rows as they are now, for reading by another thread with its own queue."""
        return Snapshot(self.width, self._shift, self.staging, list(self._pieces))


class Snapshot(Pieces):
    """The pieces that a slab had at one moment. They are not freed while this object exists.

    Reads wait for all kernels that the slab had been given at that moment. Later kernels may change
    rows while they are read.

    Each read borrows a queue, and returns it when its kernels have run. So no kernel uses the
    memory of this object when it is freed.
    """

    def __init__(self, width: int, shift: int, engine: Staging, pieces: list[Piece]) -> None:
        super().__init__(width, shift, engine, pieces)
        self._part = SCAN_PART
        self._mark, self._scans = engine.queue.mark(), engine.scans

    def renew(self, slab: Slab) -> None:
        """Know all pieces that ``slab`` has now. Nobody may change it meanwhile."""
        if self._pieces != slab._pieces:
            self._pieces, self._table = list(slab._pieces), None

    def _gather(self, slots: Slots, out: Rows) -> None:
        with self._borrowed():
            super()._gather(slots, out)

    def _per_row(self, kernel: str, slots: Slots, count: int, dtype: Any) -> NDArray[Any]:
        with self._borrowed():
            return super()._per_row(kernel, slots, count, dtype)

    @contextmanager
    def _borrowed(self) -> Iterator[None]:
        """Use a queue of the scans for one batch."""
        with self._scans.borrow(self._mark) as self.staging:
            yield

    def _written_table(self) -> Table:
        if self._table is None:  # not earlier: nobody may wait for the kernel that writes it
            table = Table(self.staging.device, len(self._pieces))
            table.write(self.staging, 0, self._pieces)
            self._table = table
        return self._table
