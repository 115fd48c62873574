"""Read blocks on other threads than the engine's: for a request, or one after another."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage import inplace
from storage.blockfile import BlockFile
from storage.extents import (
    COUNT,
    NUMBER,
    POSITION_BITS,
    SIZE,
    START,
    Extents,
    Reader,
    Records,
    ready,
    unpack_zones,
)
from storage.inplace import HEADER
from storage.kernels import Rows, Slots
from storage.residency import Look, clock
from storage.slots import FREQUENCY, LOOK, Meta
from storage.sums import PIECE, SHIFT

_POSITION = (1 << POSITION_BITS) - 1


def list_pages(
    extents: Extents,
    records: Records,
    places: Slots,
    numbers: int,
    meta: bool,
    norms: bool = False,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """List the pages of the file that contain rows.

    numbers  float32 numbers to read of each row
    meta     also list the pages with the metadata
    norms    list the pages with the rows' norms instead, where the block has norms

    Returns (``pages``, ``pieces``, ``fresh``) of ``inplace.list_pages``.
    """
    most = len(places) * (-(-4 * numbers // PIECE) + 1 + (4 if meta else 0))
    pages, pieces = np.empty(most, np.int64), np.empty(most, np.int64)
    fresh, counts = np.empty((most, inplace.FRESH), np.int64), np.empty(2, np.int64)
    sizes = extents.seen_at, extents.width, 4 * numbers
    inplace.list_pages(records, *sizes, norms, meta, places, pages, pieces, fresh, counts)
    return pages[: counts[0]], pieces[: counts[0]], fresh[: counts[1]]


class ColdPages:
    """The pages of the file that hold some rows, to be made ready by another thread.

    ``Blocks.pages`` makes it on the engine thread, any thread calls ``warm``, and the engine thread
    passes it to ``Blocks.settle``. Nothing stays reserved in between: the rows may move or change.

    pieces  int64[n]     the pieces that are needed, see ``inplace.list_pages``
    fresh   int64[m, 5]  those that were not verified yet, see there
    good    bool[m]      which of ``fresh`` are intact; valid after ``warm``
    blocks  the blocks of the pieces
    every   whether ``warm`` also looks which other pages of the blocks are in memory
    when    time before ``warm`` read the pages, see ``residency.clock``; 0: it did not yet
    """

    def __init__(
        self,
        file: BlockFile,
        pages: NDArray[np.int64],
        pieces: NDArray[np.int64],
        fresh: NDArray[np.int64],
        blocks: Look,
        every: bool,
    ) -> None:
        """Store the arguments. pages: offset of each page, which may occur more than once."""
        self._file, self._pages = file, pages
        self.pieces, self.fresh, self.blocks, self.every = pieces, fresh, blocks, every
        self.good = np.zeros(len(fresh), np.bool_)
        self.when = 0

    @property
    def empty(self) -> bool:
        """True if there is nothing to read: all pages are in memory, as far as it is known."""
        return not len(self._pages)

    def warm(self) -> None:
        """Read the pages into memory, and verify those that were never verified.

        Any thread may call this. Releases the GIL. Raises OSError if the disk fails. Damage is not
        raised here but by ``Blocks.settle``, because the block may be gone by now.
        """
        when, pages = clock(), self._pages
        if len(self.fresh):
            first = np.unique(self.fresh[:, 0], return_index=True)[1]
            fresh = self.fresh = self.fresh[first]
            sums = (
                fresh[:, 3] + 8 * fresh[:, 4] + 4 * ((fresh[:, 0] - fresh[:, 3] + SHIFT) // PIECE)
            )
            pages = np.concatenate([pages, sums & -PIECE])
        self._file.warm(np.sort(pages), PIECE)
        self.good = np.zeros(len(self.fresh), np.bool_)
        inplace.verify_pages(self._file.words, self.fresh, self.good)
        if self.every:
            self.blocks.run()
        self.when = when


class BlockScan(Reader):
    """A scan of the cold rows of a table. See Scan for the contract.

    ``start`` of ``find`` is block number << 16 | position. Each call finds rows of one block. The
    block is not deleted before the next call or the end of the scan, so that ``copy`` can read it.
    Blocks that are added during the scan are included.
    """

    def __init__(self, dim: int, extents: Extents, file: BlockFile) -> None:
        """Begin at the first block.

        dim      numbers in an embedding
        extents  the blocks
        file     the map of the file that contains them
        """
        super().__init__(extents.memory)
        self._dim, self._extents, self._file = dim, extents, file
        extents.register(self)

    def find(
        self, start: int, after: int, upto: int, limit: int, look: int = LOOK
    ) -> tuple[Slots, int | None]:
        places = np.empty(limit, np.int64)
        looked = 0
        while looked < look:
            if not self._extents.enter(self, start >> POSITION_BITS):
                return places[:0], None
            number, extent = self.number, self.extent
            records = self.memory.array()
            position = start & _POSITION if number == start >> POSITION_BITS else 0
            count = int(records[extent, COUNT])
            zones = unpack_zones(records[extent])
            found, end = 0, count
            if zones.least_version <= upto and zones.greatest_version > after:
                end = min(count, position + look - looked)
                found, end = self._search(records, extent, position, end, after, upto, places)
            looked += max(1, end - position)
            start = number << POSITION_BITS | end if end < count else number + 1 << POSITION_BITS
            if found:
                return places[:found], start
        return places[:0], start

    def cold_places(self, start: int, limit: int) -> tuple[Slots, int | None]:
        """Find cold rows of any version, without reading the disk. Only for the engine thread.

        For ``start``, ``limit`` and the result see ``find``.
        """
        if not self._extents.enter(self, start >> POSITION_BITS):
            return np.empty(0, np.int64), None
        position = start & _POSITION if self.number == start >> POSITION_BITS else 0
        found = np.flatnonzero(self._extents.cold(self.extent)[position:])[:limit] + position
        following = self.number + 1 << POSITION_BITS
        if len(found) == limit:
            following = self.number << POSITION_BITS | int(found[-1]) + 1
        return found | self.extent << POSITION_BITS, following

    def hold(self, places: Slots) -> Slots:
        """Enter the block of some places, which must all be in one, and return those that are cold.

        Some of the places may be gone by now. Only for the engine thread.
        """
        extent = int(places[0]) >> POSITION_BITS
        records = self.memory.array()
        number, count = int(records[extent, NUMBER]), int(records[extent, COUNT])
        if not count or not self._extents.enter(self, number) or self.number != number:
            return places[:0]  # the block has no cold rows any more
        places = places[(places & _POSITION) < count]
        found: Slots = places[self._extents.cold(extent)[places & _POSITION]]
        return found

    def _search(
        self,
        records: Records,
        extent: int,
        start: int,
        stop: int,
        after: int,
        upto: int,
        places: Slots,
    ) -> tuple[int, int]:
        """Find cold rows of one block; see ``inplace.find_cold``. Raises Corrupt."""
        extents = self._extents
        begin, count = int(records[extent, START]), int(records[extent, COUNT])
        column = begin + HEADER + 8 * count
        first, last = column + 8 * start, column + 8 * stop
        self._file.warm(np.array([first]), last - first)
        self._file.warm(np.array([begin + int(records[extent, SIZE]) - 1]), 1)  # a page of sums
        words = self._file.words
        if not ready(records, extents.seen_at, words, extent, first, last, False):
            raise extents.corrupt(self._file.path, extent)
        at = extents.live_at, extents.cached_at, extents.promoted_at
        return inplace.find_cold(  # type: ignore[no-any-return]
            records, *at, words, extent, start, stop, after, upto, places
        )

    def copy(self, places: Slots, frequencies: NDArray[Any], rows: Rows) -> Meta:
        self._warm(places, rows.shape[1], True)
        records, seen_at, width = self.memory.array(), self._extents.seen_at, self._extents.width
        words, floats = self._file.words, self._file.floats
        meta = np.empty((len(places), 4), np.uint64)
        self._check(
            inplace.gather(records, seen_at, words, floats, width, places, rows, False), places
        )
        self._check(inplace.read_meta(records, seen_at, words, places, meta, False), places)
        frequencies[:] = meta[:, FREQUENCY]
        return meta

    def measure(self, places: Slots, norms: NDArray[Any]) -> Meta:
        dim = self._dim
        self._warm(places, dim, True, norms=True)
        records, seen_at, width = self.memory.array(), self._extents.seen_at, self._extents.width
        words, floats = self._file.words, self._file.floats
        meta = np.empty((len(places), 4), np.uint64)
        self._check(
            inplace.measure(records, seen_at, words, floats, width, dim, places, norms), places
        )
        self._check(inplace.read_meta(records, seen_at, words, places, meta, False), places)
        return meta

    def read(self, places: Slots, out: Rows) -> None:
        self._warm(places, out.shape[1], False)
        records, seen_at, width = self.memory.array(), self._extents.seen_at, self._extents.width
        words, floats = self._file.words, self._file.floats
        self._check(
            inplace.gather(records, seen_at, words, floats, width, places, out, False), places
        )

    def _warm(self, places: Slots, numbers: int, meta: bool, norms: bool = False) -> None:
        """Read the pages with rows into memory. See ``list_pages`` for the parameters."""
        records = self.memory.array()
        pages, _, _ = list_pages(self._extents, records, places, numbers, meta, norms)
        self._file.warm(np.sort(pages), PIECE)

    def _check(self, intact: int, places: Slots) -> None:
        """Raise Corrupt unless ``intact``, the result of a kernel, is the number of places."""
        if intact < len(places):
            raise self._extents.corrupt(self._file.path, int(places[intact]) >> POSITION_BITS)
