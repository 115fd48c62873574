"""The slots of a tier that pushes can write: which are in use, and what is known about their rows.

A slot is the index of a row in the tier's memory. This module keeps one entry of 32 bytes per slot.
An entry never crosses a cache line, so that one prefetch reaches all of it:

    key uint64 | version << 16 | frequency >> 16 | step << 16 | frequency & 0xffff | home uint64

``home`` is the location of the row's clean copy: an equal row in a block on disk. It is 0 for a
dirty row, which has no such copy. A free slot has version 0, which no row has, and its key is the
next free slot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.arena import Arena, Budget, Memory
from storage.kernels import ABSENT, AHEAD, Keys, Slots, inline, jit, prefetch

Meta = NDArray[np.uint64]  # [n, 4]: key, version, step (the bits of an int64), frequency
# Versions are below 2^48, steps in -2^47..2^47-1; a frequency stops counting at 2^32-1.
Entries = NDArray[np.uint64]  # [capacity, 4]; see above
Homes = NDArray[np.uint64]  # locations of clean copies; 0: dirty

KEY, VERSION, STEP, FREQUENCY = range(4)  # columns of Meta
HOME = 3  # column of Entries
LOOK = 1 << 16  # slots that a scan looks at per call; more would make other threads wait
EVERY = 1 << 62  # a number of slots that is never reached: no limit


@inline
def _frequency(entries: Any, slot: Any) -> Any:
    low = np.uint64(0xFFFF)
    return (entries[slot, 1] & low) << np.uint64(16) | (entries[slot, 2] & low)


@inline
def _stamp(entries: Any, slot: Any, version: Any, step: Any, frequency: Any) -> None:
    """Write version, step and frequency of a row into its entry; a frequency stops at 2^32-1."""
    shift, low = np.uint64(16), np.uint64(0xFFFF)
    kept = min(np.uint64(frequency), np.uint64(0xFFFFFFFF))
    entries[slot, 1] = np.uint64(version) << shift | kept >> shift
    entries[slot, 2] = np.uint64(step) << shift | (kept & low)


@jit
def _create(entries: Any, slots: Any, keys: Any) -> None:
    """Write the entries of new rows: their keys, and version, step, frequency and home 0.

    slots  int64[n]
    keys   uint64[n]
    """
    for i in range(slots.shape[0]):
        slot = slots[i]
        entries[slot, 0] = keys[i]
        entries[slot, 1] = 0
        entries[slot, 2] = 0
        entries[slot, 3] = 0


@jit
def _touch(entries: Any, slots: Any, counts: Any, step: int, version: int, homes: Any) -> Any:
    """Record a push in the entries of its rows, which become dirty.

    slots   int64[n]   distinct slots
    counts  uint32[n]  occurrences of each key in the push, added to its frequency
    step, version      recorded in every row
    homes   uint64[n]  written from index 0 on: the homes of the rows that were clean

    Returns how many rows were clean.
    """
    n, clean = slots.shape[0], 0
    for i in range(n):
        if i + AHEAD < n:
            prefetch(entries, slots[i + AHEAD], 0)
        slot = slots[i]
        _stamp(entries, slot, version, step, _frequency(entries, slot) + np.uint64(counts[i]))
        homes[clean] = entries[slot, 3]
        clean += entries[slot, 3] != 0
        entries[slot, 3] = 0
    return clean


@jit
def _record(
    entries: Any,
    slots: Any,
    keys: Any,
    versions: Any,
    steps: Any,
    frequencies: Any,
    homes: Any,
    targets: Any,
) -> Any:
    """Write the entries of whole rows, unless the slot has a newer row. The rows become dirty.

    slots    int64[n]   distinct slots; n also for keys, versions, steps and frequencies
    homes    uint64[n]  written from index 0 on: the homes of the rows that were clean
    targets  int64[n]   written: the slot of each row, or ABSENT if the slot has a newer row

    Returns how many of the overwritten rows were clean.
    """
    n, clean = slots.shape[0], 0
    for i in range(n):
        if i + AHEAD < n:
            prefetch(entries, slots[i + AHEAD], 0)
        slot = slots[i]
        targets[i] = ABSENT
        if entries[slot, 1] >> np.uint64(16) > versions[i]:
            continue
        targets[i] = slot
        entries[slot, 0] = keys[i]
        _stamp(entries, slot, versions[i], steps[i], frequencies[i])
        homes[clean] = entries[slot, 3]
        clean += entries[slot, 3] != 0
        entries[slot, 3] = 0
    return clean


@jit
def _unpack(entries: Any, slots: Any, out: Any) -> None:
    """Read entries: out[i] = key, version, step (the bits of an int64), frequency.

    out  uint64[n, 4]
    """
    for i in range(slots.shape[0]):
        slot = slots[i]
        out[i, 0] = entries[slot, 0]  # before the version, which `_release` clears before the key
        out[i, 1] = entries[slot, 1] >> np.uint64(16)
        out[i, 2] = np.uint64(np.int64(entries[slot, 2]) >> np.int64(16))
        out[i, 3] = _frequency(entries, slot)


@jit
def _frequencies(entries: Any, slots: Any, out: Any) -> None:
    for i in range(slots.shape[0]):
        out[i] = _frequency(entries, slots[i])


@jit
def _release(entries: Any, slots: Any, first: Any, homes: Any) -> Any:
    """Add ``slots`` to the list of free slots.

    first  head of the list so far; ABSENT if it is empty
    homes  uint64[n]  written: location of each row's clean copy on disk; 0 if it has none

    Returns the new head. The list is kept in the entries, so it takes no memory, and a delete
    cannot fail for lack of memory.
    """
    for i in range(slots.shape[0]):
        slot = slots[i]
        homes[i] = entries[slot, 3]
        entries[slot, 1] = 0
        entries[slot, 0] = np.uint64(first)
        entries[slot, 3] = 0
        first = slot
    return first


@jit
def _reuse(entries: Any, first: Any, slots: Any) -> Any:
    """Fill ``slots`` with free slots, and return the new head of the list of free slots.

    first  head of the list, which must have at least n entries
    slots  int64[n]  written

    Returns ABSENT if the list is empty afterwards.
    """
    for i in range(slots.shape[0]):
        slots[i] = first
        first = np.int64(entries[first, 0])
    return first


@jit
def _changed(
    entries: Any, start: int, stop: int, after: int, upto: int, dirty: bool, slots: Any
) -> Any:
    """Find slots in start..stop-1 whose row has a version in after+1..upto.

    dirty  whether to find only dirty rows
    slots  int64[n]  written from index 0 on, ascending; n is the maximum to find

    Returns (number of slots found, slot to continue at).
    """
    found = 0
    for slot in range(start, stop):
        version = np.int64(entries[slot, 1] >> np.uint64(16))
        if after < version <= upto and not (dirty and entries[slot, 3] != 0):
            if found == slots.shape[0]:
                return found, slot
            slots[found] = slot
            found += 1
    return found, stop


@jit
def _cut(entries: Any, first: Any, used: int) -> Any:
    """Remove the slots with numbers of at least ``used`` from the list of free slots.

    first  head of the list; ABSENT if it is empty

    Returns (new head, number of slots in the new list).
    """
    head, last, count = np.int64(ABSENT), np.int64(ABSENT), 0
    while first != ABSENT:
        following = np.int64(entries[first, 0])
        if first < used:
            if last == ABSENT:
                head = first
            else:
                entries[last, 0] = np.uint64(first)
            last = first
            count += 1
        first = following
    if last != ABSENT:
        entries[last, 0] = np.uint64(np.int64(ABSENT))
    return head, count


@jit
def _settle(entries: Any, slots: Any, homes: Any) -> None:
    for i in range(slots.shape[0]):
        entries[slots[i], 3] = homes[i]


@jit
def _same(entries: Any, slots: Any, keys: Any, versions: Any, out: Any) -> None:
    """Set out[i] to whether slots[i] has a dirty row with key keys[i] and version versions[i]."""
    for i in range(slots.shape[0]):
        slot = slots[i]
        version = entries[slot, 1] >> np.uint64(16)
        out[i] = (
            entries[slot, 0] == keys[i]
            and version == versions[i]
            and version != 0
            and entries[slot, 3] == 0
        )


@jit
def _waiting(entries: Any, slots: Any, upto: int, out: Any) -> None:
    """Set out[i] to whether slots[i] has a dirty row with a version in 1..upto."""
    for i in range(slots.shape[0]):
        version = np.int64(entries[slots[i], 1] >> np.uint64(16))
        out[i] = 0 < version <= upto and entries[slots[i], 3] == 0


def unpack(entries: Entries, slots: Slots) -> Meta:
    """Return a copy of the metadata (key, version, step, frequency) of the rows in some slots."""
    meta = np.empty((len(slots), 4), np.uint64)
    _unpack(entries, np.ascontiguousarray(slots), meta)  # else compiled for strided slots too
    return meta


def find_changed(
    memory: Memory, start: int, stop: int, after: int, upto: int, out: Slots, dirty: bool = False
) -> tuple[int, int]:
    """Find slots in start..stop-1 whose row has a version in after+1..upto. Any thread may call it.

    memory  memory of the entries
    out     int64[n]  written from index 0 on, ascending; n is the maximum to find
    dirty   find only dirty rows

    Returns (number of slots found, slot to continue at).
    """
    found, end = 0, start
    while end < stop:  # in short calls, because the memory may have to move
        part = min(end + LOOK, stop)
        more, end = _changed(memory.array(), end, part, after, upto, dirty, out[found:])
        found += more
        if end < part:  # the limit is reached
            break
    return found, end


class SlotEntries:
    """The slots of one tier, with the key, metadata and home of the row in each.

    used  number of slots ever allocated; slots from this number on have no entry
    """

    def __init__(self, budget: Budget) -> None:
        self._arena = Arena(4, np.uint64, budget)
        self.used = 0
        self._first_free = ABSENT  # of the list of free slots
        self.free = 0  # slots below ``used`` without a row

    @property
    def rows(self) -> int:
        """Number of slots in use."""
        return self.used - self.free

    @property
    def bytes(self) -> int:
        """Bytes of memory taken from the budget."""
        return self._arena.bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of memory that one entry takes."""
        return self._arena.memory.row_bytes

    @property
    def array(self) -> Entries:
        """The entries, uint64[capacity, 4]; valid until the next call of ``allocate``."""
        return self._arena.array

    @property
    def memory(self) -> Memory:
        """The memory of the entries, for readers on other threads."""
        return self._arena.memory

    def needed(self, count: int) -> int:
        """Return how many slots the tier's memory must have before ``count`` more are allocated."""
        return self.used + max(0, count - self.free)

    def allocate(self, count: int, *, exact: bool = False) -> Slots:
        """Allocate ``count`` slots for new rows, and return them as int64[count].

        exact  take no more memory than is needed

        Their entries are undefined. Raises OutOfMemory, and changes nothing then.
        """
        used = self.needed(count)
        self._arena.grow(used, exact=exact)
        recycled = count - (used - self.used)
        slots = np.empty(count, np.int64)
        self._first_free = _reuse(self._arena.array, self._first_free, slots[:recycled])
        slots[recycled:] = np.arange(self.used, used)
        self.free -= recycled
        self.used = used
        return slots

    def release(self, slots: Slots) -> Homes:
        """Free some slots. Returns the homes of their rows, uint64[n]; 0 for dirty rows."""
        homes = np.empty(len(slots), np.uint64)
        self._first_free = _release(self._arena.array, slots, self._first_free, homes)
        self.free += len(slots)
        return homes

    @property
    def capacity(self) -> int:
        """Number of slots for which there is memory."""
        return self._arena.rows

    def cut(self, used: int) -> None:
        """Remove the slots with numbers of at least ``used``, and give back their memory.

        All of them must be free.
        """
        self._first_free, self.free = _cut(self._arena.array, self._first_free, used)
        self.used = used
        self._arena.release(used)

    def create(self, keys: Keys, slots: Slots) -> None:
        """Write the entries of new rows: version, step and frequency 0, and dirty."""
        _create(self._arena.array, slots, keys)

    def touch(self, slots: Slots, counts: NDArray[Any], step: int, version: int) -> Homes:
        """Record a push in the entries of its rows, which become dirty.

        slots   int64[n]   distinct slots
        counts  uint32[n]  occurrences of each key in the push, added to its frequency
        step, version      recorded in every row

        Returns the homes of the rows that were clean, uint64[m].
        """
        homes = np.empty(len(slots), np.uint64)
        return homes[: _touch(self._arena.array, slots, counts, step, version, homes)]

    def record(
        self,
        slots: Slots,
        keys: Keys,
        versions: NDArray[np.uint64],
        steps: NDArray[np.int64],
        frequencies: NDArray[np.uint64],
    ) -> tuple[Slots, Homes]:
        """Write the entries of whole rows, unless the slot has a newer row. The rows become dirty.

        Returns (int64[n], the slot of each row, or ABSENT if the slot has a newer row; uint64[m],
        homes of the overwritten rows that were clean).
        """
        homes, targets = np.empty(len(slots), np.uint64), np.empty(len(slots), np.int64)
        clean = _record(
            self._arena.array, slots, keys, versions, steps, frequencies, homes, targets
        )
        return targets, homes[:clean]

    def meta(self, slots: Slots) -> Meta:
        """Return a copy of the metadata (key, version, step, frequency) of each row."""
        return unpack(self._arena.array, slots)

    def frequencies(self, slots: Slots, out: NDArray[np.uint64]) -> None:
        """Copy the frequencies of some rows to ``out``, uint64[n]."""
        _frequencies(self._arena.array, slots, out)

    def settle(self, slots: Slots, homes: Homes) -> None:
        """Make rows clean: ``homes``, uint64[n], are the locations of their copies in blocks."""
        _settle(self._arena.array, slots, homes)

    def same(self, slots: Slots, keys: Keys, versions: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return bool[n]: whether slots[i] has a dirty row with keys[i] and versions[i]."""
        out = np.empty(len(slots), np.bool_)
        _same(self._arena.array, slots, keys, versions, out)
        return out

    def waiting(self, slots: Slots, upto: int) -> NDArray[np.bool_]:
        """Return bool[n]: whether slots[i] has a dirty row with a version in 1..upto."""
        out = np.empty(len(slots), np.bool_)
        _waiting(self._arena.array, slots, upto, out)
        return out

    def close(self) -> None:
        """Close the entries. The memory is freed as soon as no scan refers to it."""
        self._arena.close()
        self.used = self.free = 0
        self._first_free = ABSENT
