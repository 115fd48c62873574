"""Memory that grows by chunks, and the budget that it is taken from.

An arena reserves address space and takes memory from it chunk by chunk, as rows appear. Fresh
memory reads as zero. Growing within the reservation copies nothing and moves nothing. While a
process has few arenas, each reserves room for the whole budget, and that is all that ever happens.

With thousands of arenas the address space is not enough for that. Later arenas then reserve less.
An arena that outgrows its reservation is moved to a larger one: the kernel moves its pages to other
addresses, and copies none. Readers on other threads therefore take the array from the arena's
``Memory`` for each short call, and keep no reference to it between calls. A move waits until no
reader has a reference.
"""

from __future__ import annotations

import mmap
import resource
import threading
import time
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from storage.errors import OutOfMemory

HUGE = 2 << 20  # bytes of a huge page
SMALLEST_CHUNK = 64 << 10  # bytes, of a table that has not filled a huge page yet
LARGEST_CHUNK = 64 << 20  # bytes
ADDRESSES = 32 << 40  # bytes of address space for the arenas of a budget: 1/4 of Linux's
SHARE = 64  # an arena reserves at most this part of the addresses that are left
SMALLEST_RESERVATION = 64 << 20  # bytes
OUTGROWN = 4  # a reservation that was outgrown becomes this many times what is needed
MOVE_SECONDS = 1.0  # a move waits this long for readers
ADDRESS_SPACE = "no address space (see ulimit -v and vm.overcommit_memory): "
MAP_NORESERVE = 0x4000  # Linux; the mmap module names it from Python 3.13 on


def address_space() -> int:
    """Return the bytes of address space that the arenas of one budget may reserve."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return ADDRESSES if limit == resource.RLIM_INFINITY else min(ADDRESSES, limit // 2)


class Budget:
    """Bytes that a shard's tables may take together.

    Tables take memory on the engine thread. Any thread may give it back, because memory is freed
    by whoever used it last. That may be the garbage collector, in the middle of any method here,
    so the lock is reentrant.

    limit      bytes
    addresses  bytes of address space; None: as much as there is
    """

    def __init__(self, limit: int, addresses: int | None = None) -> None:
        self.limit = limit
        self.addresses = address_space() if addresses is None else addresses
        self.reserved = 0  # bytes of address space
        self._taken = 0
        self._excess: int | None = 0  # bytes beyond the limit that may be taken; None: any
        self._lock = threading.RLock()

    @property
    def held(self) -> int:
        """Bytes that are taken now."""
        return self._taken

    @property
    def free(self) -> int:
        """Bytes that may still be taken; negative while more than the limit is taken."""
        return self.limit - self._taken

    @property
    def loading(self) -> bool:
        """Whether stored rows are being loaded: arenas then take no more than they need."""
        return self._excess != 0

    def begin_loading(self, excess: int | None = None) -> None:
        """Let up to ``excess`` bytes beyond the limit be taken; None: any number.

        A shard must always load what it has acknowledged, whatever its limit is now.
        """
        self._excess = excess

    def end_loading(self) -> None:
        """Refuse growth beyond the limit from now on. What was taken stays taken."""
        self._excess = 0

    def take(self, size: int) -> None:
        """Count ``size`` more bytes as taken, or raise OutOfMemory and count nothing."""
        with self._lock:
            if self._excess is not None and self._taken + size > self.limit + self._excess:
                raise OutOfMemory(self.limit, self._taken, size)
            self._taken += size

    def give(self, size: int) -> None:
        """Count ``size`` bytes as free again."""
        with self._lock:
            self._taken -= size

    def reserve(self, size: int) -> None:
        """Count ``size`` bytes of address space as reserved; negative: as free again."""
        with self._lock:
            self.reserved += size


class Memory:
    """The memory of one arena. It lives until the arena and the last reader have let go of it.

    Only then are its bytes free again in the budget.
    """

    def __init__(self, width: int, dtype: DTypeLike, budget: Budget) -> None:
        self._width, self._dtype, self._budget = width, dtype, budget
        self.row_bytes = width * np.dtype(dtype).itemsize
        self._map, size = _reserve(budget, self._reservation(0))
        self._charge = _Charge(budget, size)
        weakref.finalize(self._map, self._charge.release).atexit = False
        self._huge = False  # huge pages were asked for
        self._array: NDArray[Any] | None = self._view()

    @property
    def taken(self) -> int:
        """Bytes taken from the budget: the part of the reservation that may be touched."""
        return self._charge.taken

    def array(self) -> NDArray[Any]:
        """Return the rows. Any thread may ask, and keeps no reference after one short call."""
        while (array := self._array) is None:  # it is being moved
            time.sleep(1e-5)
        return array

    def fits(self, end: int) -> bool:
        """Return whether the reservation has ``end`` bytes."""
        return end <= self._charge.reserved

    def take(self, end: int) -> None:
        """Let the first ``end`` bytes be touched, or raise OutOfMemory and change nothing."""
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
        """Give back the bytes from ``end`` on, which nobody has touched."""
        self._budget.give(self._charge.taken - end)
        self._charge.taken = end

    def _view(self) -> NDArray[Any]:
        count = self._charge.reserved // self.row_bytes * self._width
        return np.frombuffer(self._map, self._dtype, count).reshape(-1, self._width)

    def _reservation(self, least: int) -> int:
        """Return the bytes of address space to ask for, where ``least`` are needed."""
        budget = self._budget
        smallest = max(min(SMALLEST_RESERVATION, budget.addresses // 4096), self.row_bytes)
        share = (budget.addresses - budget.reserved) // SHARE
        most = max(budget.limit + self.row_bytes, OUTGROWN * least)  # loading may exceed the limit
        return _whole(min(max(share, smallest, OUTGROWN * least), most))

    def _move(self, least: int) -> None:
        """Move to a reservation of at least ``least`` bytes, or raise OutOfMemory."""
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
        """Move once no reader has the array; False if there is no address space."""
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
    """The bytes that a piece of memory takes from a budget, and the addresses that it reserves."""

    def __init__(self, budget: Budget, reserved: int) -> None:
        self._budget = budget
        self.reserved = reserved
        self.taken = 0
        budget.reserve(reserved)

    def release(self) -> None:
        """Give everything back; called when the memory is unmapped."""
        self._budget.give(self.taken)
        self._budget.reserve(-self.reserved)


def _no_addresses(budget: Budget, size: int) -> OutOfMemory:
    return OutOfMemory(budget.limit, budget.held, size, ADDRESS_SPACE)


def _whole(size: int) -> int:
    """Return ``size`` rounded up to huge pages."""
    return -(-size // HUGE) * HUGE


def _reserve(budget: Budget, size: int) -> tuple[mmap.mmap, int]:
    """Return a map of ``size`` bytes, or of fewer where there is no more address space."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    while True:
        try:
            return mmap.mmap(-1, size, flags=flags), size
        except OSError as error:  # strict overcommit, or an address space limit
            if size <= HUGE:
                raise _no_addresses(budget, size) from error
            size = _whole(size // 2)


class Arena:
    """A two-dimensional array [rows, width] of one dtype whose rows appear by chunks.

    ``array`` spans the whole reservation; only its first ``rows`` rows may be touched. It is for
    the thread that grows the arena, and valid until that. Other threads read through ``memory``.
    """

    def __init__(self, width: int, dtype: DTypeLike, budget: Budget) -> None:
        self._budget = budget
        self._memory: Memory | None = Memory(width, dtype, budget)
        self.array: NDArray[Any] = self._memory.array()
        self.rows = 0  # that may be touched now

    @property
    def memory(self) -> Memory:
        """The memory, for a reader that may outlive the arena."""
        assert self._memory is not None, "the arena is closed"
        return self._memory

    @property
    def bytes(self) -> int:
        """Bytes taken from the budget."""
        return self._memory.taken if self._memory is not None else 0

    def grow(self, rows: int) -> None:
        """Make at least ``rows`` rows usable, or raise OutOfMemory and change nothing.

        A chunk is 1/64 of what the arena has: large enough to be rare, small enough to waste
        little. While stored rows are loaded, and for the last rows before the limit, it is what is
        needed and no more. Huge pages start after the first 2 MiB, so that a small table stays
        small.
        """
        if rows <= self.rows:
            return
        memory = self.memory
        taken, wanted = memory.taken, rows * memory.row_bytes
        unit = SMALLEST_CHUNK if wanted <= HUGE else HUGE
        chunk = min(max(taken // 64, unit), LARGEST_CHUNK)
        end = -(-max(wanted, taken + chunk) // unit) * unit
        if self._budget.loading or end - taken > self._budget.free:
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
        """Go back to ``size`` bytes after growing; the rows beyond them were never touched."""
        self.memory.shrink(size)
        self.rows = size // self.memory.row_bytes

    def close(self) -> None:
        """Let go of the memory. It is returned once no reader has it either."""
        self.array = np.empty((0, self.array.shape[1]), self.array.dtype)
        self._memory, self.rows = None, 0
