"""Arenas: arrays whose memory grows in chunks, and the budget that the memory is taken from.

An arena reserves address space, and takes memory from it chunk by chunk as rows are added. New
memory is zero. Growing within the reservation copies and moves nothing. While a process has few
arenas, each reserves room for the whole budget, so that none ever moves.

With thousands of arenas the address space does not suffice for that, so later arenas reserve less.
An arena that outgrows its reservation moves to a larger one: the kernel maps its pages to different
addresses, without copying them. Therefore a reader on a different thread must get the array from
the arena's ``Memory`` for each short use, and must then drop it. A move waits until no reader has
the array.
"""

from __future__ import annotations

import mmap
import resource
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from storage.errors import OutOfMemory

HUGE = 2 << 20  # bytes of a huge page
SMALLEST_CHUNK = 64 << 10  # bytes; for arenas smaller than a huge page
LARGEST_CHUNK = 64 << 20  # bytes
ADDRESSES = 32 << 40  # bytes of address space for the arenas of a budget: 1/4 of a process's
SHARE = 64  # an arena reserves about 1/SHARE of the address space that is left
SMALLEST_RESERVATION = 64 << 20  # bytes
OUTGROWN = 4  # a move reserves this many times the bytes that are needed
FEW = 64  # more tables than this are ranked by size only in every FEW-th call of ``reclaim``
LARGER = 1.25  # a table gives memory to tables that take less than 1/LARGER of its own
MOVE_SECONDS = 1.0  # a move waits this long for readers
ADDRESS_SPACE = "no address space (see ulimit -v and vm.overcommit_memory): "
MAP_NORESERVE = 0x4000  # Linux; the mmap module names it from Python 3.13 on


class Holder(Protocol):
    """A table that can move rows to disk to give memory back.

    held   bytes of memory that its rows take
    dirty  number of rows that cannot leave memory before a flush
    """

    @property
    def held(self) -> int: ...

    @property
    def dirty(self) -> int: ...

    def shrink(self, size: int) -> int:
        """Give about ``size`` bytes back to the budget; return how many were given."""
        ...


def address_space() -> int:
    """Return the bytes of address space that the arenas of one budget may reserve together."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return ADDRESSES if limit == resource.RLIM_INFINITY else min(ADDRESSES, limit // 2)


class Budget:
    """Counts the memory of all tables of a shard, and refuses growth beyond a limit.

    limit      bytes of memory
    addresses  bytes of address space; None: the result of ``address_space``
    set_aside  bytes that slots of rows must leave to indexes and counters; 0: none
    holders    the tables that can move rows to disk to give memory back
    cold_rows  number of rows of all tables that are on disk only; any thread may read it
    advice     end of the message of OutOfMemory: what to do; "" or text that begins with ": "

    Only the engine thread takes memory. Any thread may give memory back, because the last reader of
    an arena frees it. The garbage collector may do that during any method here, so the lock is
    reentrant.
    """

    def __init__(self, limit: int, addresses: int | None = None) -> None:
        self.limit = limit
        self.addresses = address_space() if addresses is None else addresses
        self.set_aside = 0
        self.holders: list[Holder] = []
        self.cold_rows = 0
        self._ranking: list[Holder] = []  # the holders, largest first, as of some calls ago
        self._calls = 0  # of ``reclaim``
        self.advice = ""
        self.reserved = 0  # bytes of address space that are reserved
        self._taken = 0
        self._excess: int | None = 0  # bytes that may be taken beyond the limit; None: any number
        self._lock = threading.RLock()

    @property
    def held(self) -> int:
        """Bytes of memory that are taken now."""
        return self._taken

    @property
    def free(self) -> int:
        """Bytes that may still be taken up to the limit; negative if more than that is taken."""
        return self.limit - self._taken

    @property
    def spare(self) -> int:
        """Bytes that slots of rows may still take: without ``set_aside``. Negative: too many."""
        return self.limit - self.set_aside - self._taken

    def join(self, holder: Holder) -> None:
        """Add a table that can give memory back."""
        self.holders.append(holder)
        self._ranking = []

    def leave(self, holder: Holder) -> None:
        """Remove a table, if it is there, that cannot give memory back any more."""
        if holder in self.holders:
            self.holders.remove(holder)
        self._ranking = []

    @property
    def crowded(self) -> bool:
        """True if what is not rows, for example indexes, leaves no room for rows."""
        movable = sum(holder.held for holder in self.holders)
        return self._taken - movable > self.limit - self.set_aside

    def reclaim(self, size: int, asker: Holder | None = None) -> int:
        """Make the tables that take the most memory give back about ``size`` bytes.

        asker  the table that needs the memory. Only tables that are larger than it give memory;
               None: any table gives

        Returns how many bytes were given back.
        """
        given, self._calls = 0, self._calls + 1
        if not self._ranking or len(self.holders) <= FEW or self._calls % FEW == 0:
            self._ranking = sorted(self.holders, key=lambda each: -each.held)
        for holder in self._ranking:
            small = asker is not None and holder.held <= LARGER * asker.held
            if given >= size or small or holder is asker:
                break
            given += holder.shrink(size - given)
        return given

    @property
    def loading(self) -> bool:
        """True while stored rows are loaded. Arenas then take only the memory that they need."""
        return self._excess != 0

    def begin_loading(self, excess: int | None = None) -> None:
        """Allow up to ``excess`` bytes beyond the limit until ``end_loading``; None: any number.

        A shard must be able to load all rows that it has acknowledged, even if its limit is lower
        now.
        """
        self._excess = excess

    def end_loading(self) -> None:
        """Refuse growth beyond the limit from now on. Memory that is taken already stays taken."""
        self._excess = 0

    @contextmanager
    def exceeding(self, excess: int | None = None) -> Iterator[None]:
        """Allow ``excess`` bytes beyond the limit while the block runs; None: any number."""
        before, self._excess = self._excess, excess
        try:
            yield
        finally:
            self._excess = before

    def take(self, size: int) -> None:
        """Count ``size`` more bytes of memory as taken, or raise OutOfMemory and count nothing."""
        with self._lock:
            if self._excess is not None and self._taken + size > self.limit + self._excess:
                raise OutOfMemory(self.limit, self._taken, size, "", self.advice)
            self._taken += size

    def give(self, size: int) -> None:
        """Count ``size`` bytes of memory as free again."""
        with self._lock:
            self._taken -= size

    def reserve(self, size: int) -> None:
        """Add ``size`` bytes of address space to ``reserved``; a negative size frees them."""
        with self._lock:
            self.reserved += size


class Memory:
    """The memory of one arena, which threads other than the arena's own may read.

    row_bytes  bytes per row

    When the arena is closed and the last reader has dropped this object, the memory is freed and
    its bytes are given back to the budget.
    """

    def __init__(self, width: int, dtype: DTypeLike, budget: Budget) -> None:
        self._width, self._dtype, self._budget = width, dtype, budget
        self.row_bytes = width * np.dtype(dtype).itemsize
        self._map, size = _reserve(budget, self._reservation(0))
        self._charge = _Charge(budget, size)
        weakref.finalize(self._map, self._charge.release).atexit = False
        self._huge = False  # huge pages were requested
        self._array: NDArray[Any] | None = self._view()

    @property
    def taken(self) -> int:
        """Bytes taken from the budget: the part of the reservation that may be accessed."""
        return self._charge.taken

    def array(self) -> NDArray[Any]:
        """Return the rows, an array [rows, width] over the whole reservation.

        Any thread may call this. It must drop the array after one short use, because a move of the
        memory waits until nobody has the array. Waits while the memory is being moved.
        """
        while (array := self._array) is None:  # it is being moved
            time.sleep(1e-5)
        return array

    def fits(self, end: int) -> bool:
        """Return whether the reservation has at least ``end`` bytes."""
        return end <= self._charge.reserved

    def take(self, end: int) -> None:
        """Take memory from the budget, so that the first ``end`` bytes may be accessed.

        Moves to a larger reservation if they do not fit. Raises OutOfMemory, and takes nothing
        then.
        """
        if not self.fits(end):
            self._move(end)
        charge = self._charge
        self._budget.take(end - charge.taken)
        charge.taken = end
        if end > HUGE and not self._huge:
            self._huge = True
            with suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_HUGEPAGE)  # for all of it: only a whole map can move

    def shrink(self, end: int) -> None:
        """Give the bytes from ``end`` on back to the budget. They must never have been accessed."""
        self._budget.give(self._charge.taken - end)
        self._charge.taken = end

    def release(self, end: int) -> None:
        """Give the bytes from ``end`` on, which is in whole pages, back to the system.

        They are zero from then on. Readers on other threads may still look at them.
        """
        if end < self._charge.taken:
            self._map.madvise(mmap.MADV_DONTNEED, end, self._charge.taken - end)
            self.shrink(end)

    def _view(self) -> NDArray[Any]:
        """Return a new array [rows, width] over the whole reservation."""
        count = self._charge.reserved // self.row_bytes * self._width
        return np.frombuffer(self._map, self._dtype, count).reshape(-1, self._width)

    def _reservation(self, least: int) -> int:
        """Return the bytes of address space to reserve if at least ``least`` bytes are needed."""
        budget = self._budget
        smallest = max(min(SMALLEST_RESERVATION, budget.addresses // 4096), self.row_bytes)
        share = (budget.addresses - budget.reserved) // SHARE
        most = max(budget.limit + self.row_bytes, OUTGROWN * least)  # loading may exceed the limit
        return _whole(min(max(share, smallest, OUTGROWN * least), most))

    def _move(self, least: int) -> None:
        """Move to a reservation of at least ``least`` bytes.

        Raises OutOfMemory, and does not move then.
        """
        charge, size = self._charge, self._reservation(least)
        self._array = None  # Python refuses to resize memory while there is an array over it
        try:
            while not self._resize(size):
                if size == _whole(least):
                    raise _no_addresses(self._budget, size)
                size = max(_whole(size // 2), _whole(least))
            self._budget.reserve(size - charge.reserved)
            charge.reserved = size
        finally:
            self._array = self._view()

    def _resize(self, size: int) -> bool:
        """Resize the reservation to ``size`` bytes once no reader has the array.

        Returns False if there is not enough address space. Raises OutOfMemory if a reader keeps the
        array for more than MOVE_SECONDS (1 s).
        """
        deadline = time.monotonic() + MOVE_SECONDS
        while True:
            try:
                self._map.resize(size)
                return True
            except BufferError as error:
                if time.monotonic() > deadline:
                    raise OutOfMemory(
                        self._budget.limit, self._budget.held, size, ADDRESS_SPACE
                    ) from error
                time.sleep(1e-5)
            except OSError:
                return False


class _Charge:
    """The bytes of memory and of address space that one Memory has taken from a budget."""

    def __init__(self, budget: Budget, reserved: int) -> None:
        self._budget = budget
        self.reserved = reserved
        self.taken = 0
        budget.reserve(reserved)

    def release(self) -> None:
        """Give memory and address space back to the budget. Called when the memory is unmapped."""
        self._budget.give(self.taken)
        self._budget.reserve(-self.reserved)


def _no_addresses(budget: Budget, size: int) -> OutOfMemory:
    return OutOfMemory(budget.limit, budget.held, size, ADDRESS_SPACE)


def _whole(size: int) -> int:
    """Return ``size`` rounded up to huge pages."""
    return -(-size // HUGE) * HUGE


def _reserve(budget: Budget, size: int) -> tuple[mmap.mmap, int]:
    """Reserve ``size`` bytes of address space. If that fails, try with half, down to 2 MiB.

    Returns (memory map, its size). Raises OutOfMemory if not even 2 MiB can be reserved.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    while True:
        try:
            return mmap.mmap(-1, size, flags=flags), size
        except OSError as error:  # strict overcommit, or an address space limit
            if size <= HUGE:
                raise _no_addresses(budget, size) from error
            size = _whole(size // 2)


class Arena:
    """A growable array [rows, width] of one dtype. Memory is added in chunks.

    array  the rows. Only the first ``rows`` rows may be accessed. Use it only on the thread that
           calls ``grow``; each ``grow`` may replace it. Other threads read through ``memory``
    rows   number of rows that may be accessed now
    """

    def __init__(self, width: int, dtype: DTypeLike, budget: Budget) -> None:
        self._budget = budget
        self._memory: Memory | None = Memory(width, dtype, budget)
        self.array: NDArray[Any] = self._memory.array()
        self.rows = 0

    @property
    def memory(self) -> Memory:
        """The memory, for readers on other threads. They may use it after the arena is closed."""
        assert self._memory is not None, "the arena is closed"
        return self._memory

    @property
    def bytes(self) -> int:
        """Bytes of memory taken from the budget."""
        return self._memory.taken if self._memory is not None else 0

    def grow(self, rows: int, *, exact: bool = False) -> None:
        """Make at least ``rows`` rows accessible, or raise OutOfMemory and change nothing.

        exact  take no more memory than for ``rows``, in whole pages

        Takes at least 1/64 of the memory that the arena has already, so that growth is rare and
        little memory is unused. Takes only the memory for ``rows`` while stored rows are loaded, or
        if the budget does not suffice for more. Huge pages are used only after the first 2 MiB, so
        that a small table takes little memory.
        """
        if rows <= self.rows:
            return
        memory = self.memory
        taken, wanted = memory.taken, rows * memory.row_bytes
        unit = SMALLEST_CHUNK if wanted <= HUGE else HUGE
        chunk = min(max(taken // 64, unit), LARGEST_CHUNK)
        end = -(-max(wanted, taken + chunk) // unit) * unit
        if exact or self._budget.loading or end - taken > self._budget.spare:
            end = -(-wanted // mmap.PAGESIZE) * mmap.PAGESIZE
        if memory.fits(end):
            memory.take(end)
        else:
            self.array = np.empty((0, self.array.shape[1]), self.array.dtype)
            try:
                memory.take(end)
            finally:
                self.array = memory.array()
        self.rows = end // memory.row_bytes

    def shrink(self, size: int) -> None:
        """Undo a ``grow``: keep only the first ``size`` bytes.

        The bytes after them must never have been accessed.
        """
        self.memory.shrink(size)
        self.rows = size // self.memory.row_bytes

    def release(self, rows: int) -> None:
        """Give back the memory of all rows from index ``rows`` on. They are zero from then on."""
        end = -(-rows * self.memory.row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if end < self.memory.taken:
            self.memory.release(end)
            self.rows = end // self.memory.row_bytes

    def close(self) -> None:
        """Close the arena. The memory is freed as soon as no reader refers to it."""
        self.array = np.empty((0, self.array.shape[1]), self.array.dtype)
        self._memory, self.rows = None, 0
