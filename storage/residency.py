"""Remember which pages of blocks are in memory, so that most reads of rows on disk need not wait.

Only the system knows whether a page of a file is in memory (in the file cache). To ask it takes
about as long as to read some rows. So the answer for all pages of a block is kept for some time:

    note      on the engine: keep the answer of a look at the pages of some blocks
    read      on the engine: note that some pages were read into memory a moment ago
    at_hand   on the engine: were all pages of some rows in memory when they were last looked at?

A page may leave memory after the look. Then the engine waits for the disk, about 0.1 ms per page.
The system takes pages that were not used for long first, and not only one of them. So ``at_hand``
looks again at a few blocks that are drawn from those of the rows. If any page has left them, it
answers no, and forgets all earlier answers.

The answers are in the records of the blocks (extents.py):

    LOOKED    time of the last look at the block, in milliseconds of ``clock``; 0: never
    WHOLE     1: all pages with rows or metadata were verified and in memory then; 0: unknown
    resident  one bit per page, like the seen bits: whether it was in memory
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.blockfile import PAGE, BlockFile, mincore
from storage.extents import (
    BODY,
    COUNT,
    LOOKED,
    NUMBER,
    POSITION_BITS,
    ROWS_AT,
    START,
    WHOLE,
    Extents,
    get_bit,
    set_bit,
)
from storage.inplace import HEADER
from storage.kernels import Slots, inline, jit
from storage.sums import PIECE, SHIFT, SHIFT_WORDS

WINDOW = 1000  # milliseconds for which the answer of a look is used
SAMPLES = 8  # rows per request whose blocks are looked at again
MOST = 1 << 16  # pages of a block
ALL = np.uint64(2**64 - 1)

Words = NDArray[np.uint64]  # [blocks, words] one bit per page


def clock() -> int:
    """Return the milliseconds of a clock that never goes back."""
    return time.monotonic_ns() // 1_000_000


@inline
def _marked(
    records: Any, seen_at: Any, resident_at: Any, extent: Any, start: Any, stop: Any
) -> Any:
    """Return whether the bytes start..stop-1 of the file were verified and in memory."""
    base = np.int64(records[extent, START]) - SHIFT
    for piece in range((start - base) // PIECE, (stop - 1 - base) // PIECE + 1):
        seen = get_bit(records, extent, seen_at, piece)
        if seen & get_bit(records, extent, resident_at, piece) == 0:
            return False
    return True


@jit
def all_marked(
    records: Any,
    seen_at: int,
    resident_at: int,
    width: int,
    size: int,
    meta: bool,
    places: Any,
    since: int,
) -> Any:
    """Return whether all pages of rows were verified, and in memory when last looked at.

    records      uint64[extents, words]
    seen_at      first word of the seen bits in a record
    resident_at  first word of the resident bits in a record
    width        float32 numbers per row
    size         bytes of each row to read
    meta         whether the pages with the metadata are needed, too
    places       int64[n]  extent << 16 | position; negative ones are skipped
    since        looks before this time do not count
    """
    for i in range(places.shape[0]):
        if places[i] < 0:
            continue
        extent = places[i] >> 16
        if np.int64(records[extent, LOOKED]) < since:
            return False
        if records[extent, WHOLE] != 0:
            continue
        position = places[i] & 0xFFFF
        at = np.int64(records[extent, ROWS_AT]) + position * 4 * width
        if not _marked(records, seen_at, resident_at, extent, at, at + size):
            return False
        if meta:
            at = np.int64(records[extent, START]) + HEADER + 8 * position
            for _ in range(4):
                if not _marked(records, seen_at, resident_at, extent, at, at + 8):
                    return False
                at += 8 * np.int64(records[extent, COUNT])
    return True


@jit
def look(address: Any, starts: Any, pages: Any, page: int, states: Any, out: Any) -> None:
    """Ask the system which pages of some blocks are in memory.

    address  of the memory map of the file
    starts   int64[n]   offset of each block's first page
    pages    int64[n]   number of its pages
    page     bytes in a page of the system
    states   uint8[]    scratch, at least one element for each page of a block
    out      uint64[n, words]  written: one bit per page
    """
    for i in range(starts.shape[0]):
        out[i] = 0
        base = np.uintp(address) + np.uintp(starts[i])
        if mincore(base, np.uintp(pages[i] * page), np.uintp(states.ctypes.data)) != 0:
            continue
        for j in range(pages[i]):
            out[i, j >> 6] |= np.uint64(states[j] & 1) << np.uint64(j & 63)


@jit
def note(
    records: Any,
    seen_at: int,
    resident_at: int,
    extents: Any,
    numbers: Any,
    found: Any,
    since: int,
    when: int,
) -> Any:
    """Store the answers of ``look``, except for blocks that are gone by now.

    records, seen_at, resident_at, since  see ``all_marked``
    extents  int64[n]   of the blocks
    numbers  uint64[n]  of the blocks in the base
    found    uint64[n, words]  one bit per page
    when     time before the look

    Returns whether a page has left memory that was there at a look at ``since`` or later.
    """
    lost: Any = False
    for i in range(extents.shape[0]):
        extent = extents[i]
        if records[extent, COUNT] == 0 or records[extent, NUMBER] != numbers[i]:
            continue
        fresh = np.int64(records[extent, LOOKED]) >= since
        pieces = (np.int64(records[extent, BODY]) + SHIFT_WORDS + PIECE // 8 - 1) // (PIECE // 8)
        whole = np.uint64(1)
        for j in range(found.shape[1]):
            before = records[extent, resident_at + j]
            lost |= fresh and before & ~found[i, j] != 0
            records[extent, resident_at + j] = found[i, j]
            count: Any = min(max(pieces - 64 * j, 0), 64)
            wanted = ~(ALL << np.uint64(count)) if count < 64 else ALL
            if found[i, j] & records[extent, seen_at + j] & wanted != wanted:
                whole = np.uint64(0)
        records[extent, WHOLE] = whole
        records[extent, LOOKED] = np.uint64(when)
    return lost


@jit
def read(
    records: Any,
    resident_at: int,
    extents: Any,
    numbers: Any,
    pieces: Any,
    since: int,
    when: int,
) -> None:
    """Note that pages were read into memory, except those of blocks that are gone by now.

    extents, numbers  see ``note``; the blocks of all pages
    pieces            int64[m]  extent << 16 | number of the piece in its block
    when              time before the pages were read
    """
    there = np.zeros(records.shape[0], np.bool_)
    for i in range(extents.shape[0]):
        extent = extents[i]
        if records[extent, COUNT] == 0 or records[extent, NUMBER] != numbers[i]:
            continue
        there[extent] = True
        if np.int64(records[extent, LOOKED]) < since:
            records[extent, resident_at:] = 0
            records[extent, WHOLE] = 0
            records[extent, LOOKED] = np.uint64(when)
    for i in range(pieces.shape[0]):
        if there[pieces[i] >> 16]:
            set_bit(records, pieces[i] >> 16, resident_at, pieces[i] & 0xFFFF)


class Look:
    """A look at the pages of some blocks, for another thread than the engine's.

    extents  int64[n]   of the blocks
    numbers  uint64[n]  of the blocks in the base
    found    uint64[n, words]  one bit per page, valid after ``run``; None before
    when     time of the look, see ``clock``
    """

    def __init__(self, file: BlockFile, extents: Extents, chosen: NDArray[np.int64]) -> None:
        """Choose the blocks with some extents, int64[n]. Must run on the engine thread."""
        records = extents.records
        self._file = file
        self.extents, self.numbers = chosen, records[chosen, NUMBER]
        self._starts = records[chosen, START].view(np.int64) - SHIFT
        words = records[chosen, BODY].view(np.int64) + (SHIFT_WORDS + PIECE // 8 - 1)
        self._pages = words // (PIECE // 8)
        self._shape = len(chosen), extents.words - extents.resident_at
        self.found: Words | None = None
        self.when = clock()

    def run(self) -> Words:
        """Look at the pages, and return ``found``. Any thread may call this."""
        self.when = clock()
        found = self.found = np.zeros(self._shape, np.uint64)
        memory = self._file.bytes  # stays mapped meanwhile, even if the file gets a larger map
        address = np.uint64(memory.ctypes.data)
        look(address, self._starts, self._pages, PAGE, np.empty(MOST, np.uint8), found)
        return found


class Residency:
    """Which pages of the blocks of one table are in memory. Only the engine thread may use it.

    file     the memory map of the base's file
    extents  the records of the blocks
    """

    def __init__(self, file: BlockFile, extents: Extents) -> None:
        self._file, self._extents = file, extents
        self._distrusted = 0  # time before which no look counts
        self._turn = 0  # of drawing rows whose blocks are looked at again

    @property
    def since(self) -> int:
        """Time before which a look does not count any more."""
        return max(clock() - WINDOW, self._distrusted)

    def at_hand(self, places: Slots, size: int, meta: bool) -> bool:
        """Return whether all pages of some rows are verified and in memory, as far as it is known.

        places  int64[n]; ABSENT is skipped
        size    bytes of each row to read
        meta    whether the pages with the metadata are needed, too
        """
        extents, since = self._extents, self.since
        at = extents.seen_at, extents.resident_at, extents.width
        if not all_marked(extents.records, *at, size, meta, places, since):
            return False
        cold = places[places >= 0]
        self._turn = (self._turn + 1) % 1024
        step = max(1, len(cold) // SAMPLES)
        return not self.look(np.unique(cold[self._turn % step :: step] >> POSITION_BITS))

    def look(self, chosen: NDArray[np.int64]) -> bool:
        """Look at blocks on this thread.

        chosen  int64[n], extents of the blocks

        Returns whether a page has left memory since an earlier look. Then no earlier look counts.
        """
        each = Look(self._file, self._extents, chosen)
        each.run()
        if lost := self.note(each):
            self._distrusted = each.when
        return lost

    def note(self, each: Look) -> bool:
        """Keep the answer of a look that was run, and replace earlier answers by it.

        Returns whether a page was in memory then but is not now. If the look ran on another thread,
        it may be the other way round.
        """
        extents = self._extents
        assert each.found is not None
        at = extents.records, extents.seen_at, extents.resident_at
        return bool(note(*at, each.extents, each.numbers, each.found, self.since, each.when))

    def read(self, each: Look, pieces: NDArray[np.int64], when: int) -> None:
        """Note that pages were read into memory.

        each    the blocks of all pages
        pieces  int64[m]  extent << 16 | number of the piece in its block
        when    time before the pages were read
        """
        extents = self._extents
        at = extents.records, extents.resident_at
        read(*at, each.extents, each.numbers, pieces, self.since, when)
