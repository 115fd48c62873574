"""What is known in memory about the blocks of one table: where they are, and bits of their rows.

An *extent* is a small number that stands for a block. When the block is gone, its extent is used
again. A place is extent << 16 | position of a row in the block. Each extent has one record of
64-bit words, so that a kernel finds everything about a row with one or two cache misses:

    record = fields, see below | live bits | cached bits | promoted bits | seen bits | resident bits

live      one bit per row: the row is the current value of its key
cached    one bit per row: the row is live, and has a slot in host memory, too
promoted  one bit per row: the row was once copied from here to a slot. If it is live and cached,
          it was not pushed since: it was only loaded, or its push failed
seen      one bit per piece of 4 KiB of the block (see sums.py): its sum was verified
resident  one bit per piece: the page that contains it was in memory; see residency.py

A row that is live and not cached is *cold*.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left, insort
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.arena import Arena, Budget, Memory
from storage.block import BLOCK_BYTES, FORMATS, ROWS, RowLayout, row_layout
from storage.damage import Damage
from storage.directory import Zones
from storage.errors import Corrupt
from storage.kernels import Slots, inline, jit
from storage.sums import PIECE, SHIFT, intact

POSITION_BITS = 16  # low bits of a place that contain the position in the block
NONE = -1  # no block
FIRST_LINE = 8  # words of a cache line

# Fields of a record. Offsets are in bytes, in the file; a free extent has COUNT 0.
ROWS_AT, START, BODY, COUNT, NUMBER, LIVE, CACHED, SIZE = range(8)
ZONES = 8  # first of six fields with the bounds of the metadata
GREATEST_VERSION = ZONES + 1
NORM_ZONES = ZONES + 6  # least and greatest norm, two float32
NORMS_AT = ZONES + 7
LOOKED, WHOLE = ZONES + 8, ZONES + 9
FIELDS = 18
# ROWS_AT  offset of the first row           START   offset of the block
# BODY     words before the sums             COUNT   number of rows
# NUMBER   of the block in the base          LIVE    number of live rows
# CACHED   number of cached rows             SIZE    bytes of the block
# NORMS_AT offset of the first norm; 0: the block has none, it is of an older format
# LOOKED   when it was looked whether the    WHOLE   1: all of them were, and all are verified
#          pages are in memory

Records = NDArray[np.uint64]  # [capacity, words]


@inline
def get_bit(records: Any, extent: Any, first: Any, bit: Any) -> Any:
    """Return bit number ``bit`` of the bits that begin at word ``first`` of a record."""
    return (records[extent, first + (bit >> 6)] >> np.uint64(bit & 63)) & np.uint64(1)


@inline
def set_bit(records: Any, extent: Any, first: Any, bit: Any) -> None:
    """Set bit number ``bit`` of the bits that begin at word ``first`` of a record."""
    records[extent, first + (bit >> 6)] |= np.uint64(1) << np.uint64(bit & 63)


@inline
def clear_bit(records: Any, extent: Any, first: Any, bit: Any) -> None:
    """Clear bit number ``bit`` of the bits that begin at word ``first`` of a record."""
    records[extent, first + (bit >> 6)] &= ~(np.uint64(1) << np.uint64(bit & 63))


@jit
def mark(records: Any, live_at: int, cached_at: int, places: Any, live: int, cached: int) -> Any:
    """Set or clear the live and cached bits of rows, and update the counts of their blocks.

    records    uint64[extents, words]
    live_at    first word of the live bits
    cached_at  first word of the cached bits
    places     int64[n]  negative ones are skipped
    live       1: set the live bits, 0: clear them, -1: leave them
    cached     1: set the cached bits of rows that are live then, 0: clear them

    Returns by how much the numbers of (live, cached) rows grew.
    """
    more_live, more_cached = np.int64(0), np.int64(0)
    for i in range(places.shape[0]):
        if places[i] < 0:
            continue
        extent, position = places[i] >> 16, places[i] & 0xFFFF
        was = np.int64(get_bit(records, extent, live_at, position))
        had = np.int64(get_bit(records, extent, cached_at, position))
        alive = was if live < 0 else live
        holds = cached & alive
        if alive:
            set_bit(records, extent, live_at, position)
        else:
            clear_bit(records, extent, live_at, position)
        if holds:
            set_bit(records, extent, cached_at, position)
        else:
            clear_bit(records, extent, cached_at, position)
        more_live += alive - was
        more_cached += holds - had
        records[extent, LIVE] = np.uint64(np.int64(records[extent, LIVE]) + alive - was)
        records[extent, CACHED] = np.uint64(np.int64(records[extent, CACHED]) + holds - had)
    return more_live, more_cached


@jit
def set_bits(records: Any, first: int, places: Any) -> None:
    """Set one bit of each row, among the bits that begin at word ``first`` of a record.

    records  uint64[extents, words]
    places   int64[n]  negative ones are skipped
    """
    for i in range(places.shape[0]):
        if places[i] >= 0:
            set_bit(records, places[i] >> 16, first, places[i] & 0xFFFF)


@jit
def ready(
    records: Any, seen_at: int, words: Any, extent: Any, start: Any, stop: Any, remember: bool
) -> Any:
    """Verify the pieces of a block that contain the bytes start..stop-1 of the file.

    records   uint64[extents, words]
    seen_at   first word of the seen bits
    words     uint64[]  the map of the file
    remember  set the seen bits of the pieces; only the engine thread may do that

    Returns whether all of them are intact.
    """
    begin = np.int64(records[extent, START])
    base = begin - SHIFT
    for piece in range((start - base) // PIECE, (stop - 1 - base) // PIECE + 1):
        if get_bit(records, extent, seen_at, piece) == 0:
            if not intact(words, begin >> 3, np.int64(records[extent, BODY]), piece):
                return False
            if remember:
                set_bit(records, extent, seen_at, piece)
    return True


class Reader:
    """Reads blocks on another thread than the engine's. A block that it holds is not removed.

    memory  the records of the blocks
    extent  of the block that it holds; NONE (-1): none
    number  of this block in the base; NONE: none
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.extent = self.number = NONE


class Extents:
    """The records of the blocks of one table.

    width    float32 numbers per row
    live     number of live rows
    cached   number of cached rows
    cold_rows  number of cold rows
    bytes    bytes of the blocks on disk, in whole pages
    table    name of the table, for errors
    suspect  called with the number of a block, on any thread, when damage of it is noticed
    damaged  what is wrong with each damaged block, by number

    Only the engine thread may change them.
    """

    def __init__(self, width: int, budget: Budget) -> None:
        most = max(1, BLOCK_BYTES // (32 + 4 * width))  # in format 1, too
        pieces = row_layout(width, most, FORMATS[ROWS]).pieces
        self.width, self._budget = width, budget
        self.most = most  # rows of a block
        self.live_at = FIELDS
        self.cached_at = self.live_at + -(-most // 64)
        self.promoted_at = self.cached_at + -(-most // 64)
        self.seen_at = self.promoted_at + -(-most // 64)
        self.resident_at = self.seen_at + -(-pieces // 64)
        self.words = self.resident_at + -(-pieces // 64)  # of a record
        self._arena = Arena(-(-self.words // FIRST_LINE) * FIRST_LINE, np.uint64, budget)
        self._used = 0  # extents ever in use
        self._free: list[int] = []
        self._numbers: list[int] = []  # of the blocks, ascending
        self._by_number: dict[int, int] = {}  # block number -> extent
        self._readers: weakref.WeakSet[Reader] = weakref.WeakSet()
        self._lock = threading.Lock()  # held while a block is added, removed, or entered
        self.live = self.cached = self.cold_rows = self.bytes = 0
        self.table = ""
        self.suspect: Callable[[int], None] = lambda number: None
        self.damaged: dict[int, Damage] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def records(self) -> Records:
        """The records, for the engine thread; valid until the next call of ``add``."""
        return self._arena.array

    @property
    def memory(self) -> Memory:
        """The memory of the records, for other threads."""
        return self._arena.memory

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory taken from the budget."""
        return self._arena.bytes

    def add(self, number: int, start: int, count: int, layout: RowLayout, zones: Zones) -> int:
        """Add a block, none of whose rows is live, and return its extent.

        number  of the block in the base
        start   offset of the block in the file
        count   number of rows, 1..``most``
        layout  where the parts of the block are
        zones   bounds of the metadata of its rows

        Raises OutOfMemory, and changes nothing then.
        """
        if not self._free:
            self._arena.grow(self._used + 1)
            self._free.append(self._used)
            self._used += 1
        extent = self._free.pop()
        record = self.records[extent]
        record[:] = 0
        record[[ROWS_AT, START, BODY]] = start + layout.rows, start, layout.sums // 8
        record[[NUMBER, SIZE]] = number, layout.size
        record[ZONES : ZONES + 7] = _pack(zones)
        record[NORMS_AT] = start + layout.norms if layout.norms else 0
        record[COUNT] = count
        self.bytes += _pages(layout.size)
        with self._lock:
            self._by_number[number] = extent
            insort(self._numbers, number)
        return extent

    def remove(self, extent: int) -> int:
        """Forget a block without live rows, and return its number. Its extent is used again."""
        record = self.records[extent]
        assert record[COUNT], "the extent must have a block"
        assert not record[LIVE], "the block must have no live rows"
        number = int(record[NUMBER])
        self.bytes -= _pages(int(record[SIZE]))
        with self._lock:
            del self._by_number[number]
            self._numbers.remove(number)
        self.damaged.pop(number, None)
        record[COUNT] = 0
        self._free.append(extent)
        return number

    def size_of(self, extents: list[int]) -> int:
        """Return the bytes that some blocks take on disk, in whole pages."""
        return sum(_pages(self.field(extent, SIZE)) for extent in extents)

    def corrupt(self, path: Path, extent: int) -> Corrupt:
        """Return the error for a read of a damaged block, which is examined soon.

        path  file that contains the block

        Any thread may call this, while the block is here.
        """
        record = self._arena.memory.array()[extent]
        number = int(record[NUMBER])
        if number not in self.damaged:
            self.suspect(number)
        where = (
            f"{path}: block {number} of table {self.table!r}, with {int(record[LIVE])} live rows"
        )
        return Corrupt(where, "the sum of a piece does not match")

    def by_number(self) -> list[tuple[int, int]]:
        """Return (extent, number) of each block, by ascending number."""
        return [(self._by_number[number], number) for number in self._numbers]

    def extent_of(self, number: int) -> int | None:
        """Return the extent of the block with this number; None if it is gone."""
        return self._by_number.get(number)

    def following(self, number: int, most: int) -> NDArray[np.int64]:
        """Return the extents of up to ``most`` blocks, numbered ``number`` or higher, in order."""
        at = bisect_left(self._numbers, number)
        extents = [self._by_number[each] for each in self._numbers[at : at + most]]
        return np.array(extents, np.int64)

    def register(self, reader: Reader) -> None:
        """Allow a reader to call ``enter``. Blocks that it holds stay as long as it exists."""
        self._readers.add(reader)

    def enter(self, reader: Reader, number: int, *, cached: bool = False) -> bool:
        """Let go of the block that a reader holds, and make it hold the next one worth reading.

        number  number in the base from which to look for a block with cold or promoted rows
        cached  whether a block whose live rows are all cached is worth reading, too

        Any thread may call this. Returns False if there is no such block; the reader then holds
        none.
        """
        records = reader.memory.array()
        with self._lock:
            reader.extent = reader.number = NONE
            for at in range(bisect_left(self._numbers, number), len(self._numbers)):
                extent = self._by_number[self._numbers[at]]
                if self._has_cold(records[extent]) or (cached and records[extent, LIVE]):
                    reader.extent, reader.number = extent, self._numbers[at]
                    return True
        return False

    def _has_cold(self, record: NDArray[np.uint64]) -> bool:
        """Return whether a block has cold or promoted rows. Any thread may call this.

        The engine thread may be between changing one count and the other, so equal counts do not
        prove that there is no cold row.
        """
        if record[LIVE] > record[CACHED]:
            return True
        live = record[self.live_at : self.cached_at]
        cached = record[self.cached_at : self.promoted_at]
        return bool((live & (~cached | record[self.promoted_at : self.seen_at])).any())

    def copies(self, extents: list[int]) -> Records:
        """Return copies of the records of some blocks, without the bits after the live bits."""
        found: Records = self.records[:, : self.cached_at][extents]
        return found

    def live_bits(self, extent: int) -> NDArray[np.bool_]:
        """Return which rows of a block are live, bool[count], a copy."""
        return bits(self.records[extent], self.live_at, self.field(extent, COUNT))

    def cold(self, extent: int) -> NDArray[np.bool_]:
        """Return which rows of a block are live and not cached, bool[count], a copy."""
        cached = bits(self.records[extent], self.cached_at, self.field(extent, COUNT))
        return self.live_bits(extent) & ~cached

    def held(self) -> dict[int, int]:
        """Return the blocks that readers hold now: block number -> extent."""
        with self._lock:
            return {each.number: each.extent for each in self._readers if each.number != NONE}

    def field(self, extent: int, field: int) -> int:
        """Return one field of a record, for example COUNT."""
        return int(self.records[extent, field])

    def fields(self, field: int) -> NDArray[np.uint64]:
        """Return one field of all records, a view; free extents have COUNT 0."""
        return self.records[: self._used, field]

    def zones(self, extent: int) -> Zones:
        """Return the bounds of the metadata of all rows of a block."""
        return unpack_zones(self.records[extent])

    def see(self, extent: int) -> None:
        """Mark all pieces of a block as verified."""
        self.records[extent, self.seen_at : self.resident_at] = 2**64 - 1

    def see_pieces(self, extent: int, intact: NDArray[np.bool_]) -> None:
        """Mark the pieces of a block that are intact, bool[pieces], as verified, and no others."""
        self.records[extent, WHOLE] = 0
        words = self.records[extent, self.seen_at : self.resident_at]
        packed = np.zeros(8 * len(words), np.uint8)
        found = np.packbits(intact, bitorder="little")
        packed[: len(found)] = found
        words[:] = packed.view(np.uint64)

    def mark(self, places: Slots, live: int, cached: int) -> None:
        """Change the bits of rows; see the kernel ``mark`` for the parameters."""
        more_live, more_cached = mark(
            self.records, self.live_at, self.cached_at, places, live, cached
        )
        self.live += int(more_live)
        self.cached += int(more_cached)
        self._count_cold()

    def _count_cold(self) -> None:
        before, self.cold_rows = self.cold_rows, self.live - self.cached
        self._budget.cold_rows += self.cold_rows - before

    def promote(self, places: Slots) -> None:
        """Set the promoted bits of rows."""
        set_bits(self.records, self.promoted_at, places)

    def promoted(self, extent: int) -> NDArray[np.bool_]:
        """Return which rows of a block have their promoted bit set, bool[count], a copy."""
        return bits(self.records[extent], self.promoted_at, self.field(extent, COUNT))

    def close(self) -> None:
        """Free the memory once no other thread reads it."""
        with self._lock:
            self._numbers, self._by_number = [], {}
        self._arena.close()
        self._used, self._free = 0, []
        self.damaged.clear()
        self.live = self.cached = self.bytes = 0
        self._count_cold()


def bits(record: NDArray[np.uint64], first: int, count: int) -> NDArray[np.bool_]:
    """Return ``count`` bits that begin at word ``first`` of a record, as bool[count], a copy."""
    packed = record[first : first + -(-count // 64)].view(np.uint8)
    return np.unpackbits(packed, count=count, bitorder="little").view(np.bool_)


def _pack(zones: Zones) -> NDArray[np.uint64]:
    return np.array(
        [
            zones.least_version,
            zones.greatest_version,
            zones.least_step % 2**64,
            zones.greatest_step % 2**64,
            zones.least_frequency,
            zones.greatest_frequency,
            _norms(zones).view(np.uint64)[0],
        ],
        np.uint64,
    )


def _norms(zones: Zones) -> NDArray[np.float32]:
    return np.array([zones.least_norm, zones.greatest_norm], np.float32)


def unpack_zones(record: NDArray[np.uint64]) -> Zones:
    """Return the bounds of the metadata that a record contains."""
    fields = record[ZONES : ZONES + 7]
    versions, steps, frequencies = fields[:2], fields[2:4].view(np.int64), fields[4:6]
    norms = fields[6:].view(np.float32)
    return Zones(
        least_version=int(versions[0]),
        greatest_version=int(versions[1]),
        least_step=int(steps[0]),
        greatest_step=int(steps[1]),
        least_frequency=int(frequencies[0]),
        greatest_frequency=int(frequencies[1]),
        least_norm=float(norms[0]),
        greatest_norm=float(norms[1]),
    )


def block_format(record: NDArray[np.uint64]) -> int:
    """Return the format of the block that a record describes; see block.py."""
    if record[NORMS_AT]:
        return 3
    return 2 if int(record[SIZE]) - 8 * int(record[BODY]) >= 8 else 1  # format 1 has no sums


def _pages(size: int) -> int:
    """Return the bytes of the whole pages that a block of ``size`` bytes takes."""
    return -(-(size + SHIFT) // PIECE) * PIECE
