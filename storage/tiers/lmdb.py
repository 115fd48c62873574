"""Rows in the blocks of the base (the on-disk copy of all rows), read in place from a memory map.

The tier of one table for rows that are not in memory. Blocks are immutable: a flush writes them,
and this tier only reads them. A place is the position of a row in an *extent*, which is a small
number that stands for a block while the tier has it:

    place = extent << 16 | position

In memory the tier keeps two bits per row of a block. *live*: the row in the block is the current
value of its key. *cached*: the row also has a slot in host memory, which the index refers to. A row
that is live but not cached is *cold*: the index refers to its place here.

The first use of each 4 KiB piece of a block compares its bytes with the sum of the piece that the
block contains (see sums.py), so that damage on the disk is noticed when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from storage import inplace
from storage.arena import Budget
from storage.block import ROWS, header_of, row_layout, unpack
from storage.blockcheck import BlockCheck
from storage.blockfile import BlockFile
from storage.blockscan import BlockScan, ColdPages, list_pages
from storage.damage import Damage
from storage.directory import Zones
from storage.errors import Corrupt
from storage.extents import (
    COUNT,
    GREATEST_VERSION,
    LIVE,
    NORMS_AT,
    NUMBER,
    POSITION_BITS,
    ROWS_AT,
    START,
    Extents,
    bits,
    block_format,
    ready,
    unpack_zones,
)
from storage.index import Locations, locations_of
from storage.inplace import HEADER
from storage.kernels import Keys, Rows, Slots
from storage.residency import Look, Residency
from storage.slots import VERSION, Meta

Listed = tuple[int, Zones, NDArray[np.bool_]]  # of a block: number, bounds, which rows are live
Listing = Callable[[], list[Listed]]

LOOK_SHARE = 8  # a read of at least 1/LOOK_SHARE of the blocks looks at all of their pages


class Blocks:
    """The blocks of one table. See Tier for the contract.

    dim     numbers in an embedding
    width   float32 numbers per row
    file    the memory map of the base's file
    budget  memory budget of the shard; the bits of the rows are taken from it
    table   name of the table, for errors
    suspect called with the number of a block, on any thread, when damage of it is noticed

    Only the engine thread may call the methods. Other threads may use scans and ``ColdPages.warm``.
    """

    name: ClassVar[str] = "lmdb"
    code: ClassVar[int] = 3

    def __init__(
        self,
        dim: int,
        width: int,
        file: BlockFile,
        budget: Budget,
        table: str = "",
        suspect: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.dim, self.width = dim, width
        self.file = file
        self.records = Extents(width, budget)
        self.records.table, self.records.suspect = table, suspect
        self.residency = Residency(file, self.records)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.records)

    @property
    def rows(self) -> int:
        """Number of cold rows: live rows that have no slot in host memory."""
        return self.records.cold_rows

    @property
    def live_rows(self) -> int:
        """Number of live rows, cold or cached."""
        return self.records.live

    @property
    def bytes(self) -> int:
        """Bytes that the blocks take on disk, in whole pages."""
        return self.records.bytes

    @property
    def memory(self) -> int:
        """Bytes of memory taken from the budget."""
        return self.records.memory_bytes

    # ---- the contract of a tier

    def gather(self, places: Slots, out: Rows) -> None:
        """Copy the first columns of rows to ``out``. Raises Corrupt if a row is damaged."""
        extents, words, floats = self.records, self.file.words, self.file.floats
        records, seen_at = extents.records, extents.seen_at
        self._check(
            inplace.gather(records, seen_at, words, floats, self.width, places, out, True), places
        )

    def meta(self, places: Slots) -> Meta:
        """Return a copy of the metadata of each row. Raises Corrupt if it is damaged."""
        out = np.empty((len(places), 4), np.uint64)
        records, seen_at = self.records.records, self.records.seen_at
        self._check(inplace.read_meta(records, seen_at, self.file.words, places, out, True), places)
        return out

    def scan(self) -> BlockScan:
        """Return a scan of the cold rows, by number of their block and position in it."""
        return BlockScan(self.dim, self.records, self.file)

    def close(self) -> None:
        """Forget all blocks and free the memory."""
        self.records.close()

    # ---- blocks

    def add(self, number: int, offset: int, count: int, zones: Zones, verified: bool) -> int:
        """Add a block of the base, and return its extent. None of its rows is live yet.

        number    of the block in the base
        offset    of the block in the file, from ``Base.offset``; the file must cover all of it
        count     number of rows
        zones     bounds of the metadata of its rows
        verified  its bytes are known to be undamaged, so that no piece is verified later

        Reads the header of the block. Raises Corrupt if it is damaged or does not fit, and
        OutOfMemory. Verifies a block of format 1, which has no sums, as a whole.
        """
        where = f"{self.file.path}: block {number} of table {self.records.table!r}"
        header = header_of(self.file.bytes[offset : offset + HEADER])
        expected = (ROWS, self.width, count)
        if header is None or (header.kind, header.width, header.length) != expected:
            raise Corrupt(where, f"expected (kind, width and rows) = {expected}")
        if not 1 <= count <= self.records.most:
            raise Corrupt(where, f"expected 1 to {self.records.most} rows, got {count}")
        if header.format == 1 and not verified:
            unpack(self.file.bytes[offset : offset + header.size], where)
            verified = True
        layout = row_layout(self.width, count, header.format)
        extent = self.records.add(number, offset, count, layout, zones)
        if verified:  # a flush has just written it, so it is in memory
            self.records.see(extent)
            self.residency.look(np.array([extent]))
        return extent

    def remove(self, extent: int) -> int:
        """Forget a block without live rows, and return its number. The extent is reused.

        The block must be in ``empty()``. Call this before the commit that deletes the block.
        """
        return self.records.remove(extent)

    def extents(self) -> Iterator[tuple[int, int]]:
        """Yield (extent, number) of each block, by ascending number."""
        yield from self.records.by_number()

    def listing(self, extents: list[int]) -> Listing:
        """Note which rows of some blocks are live now.

        The returned function may be called once, later and on another thread. It returns (number,
        bounds of the metadata of all rows, which rows are live) of each block.
        """
        records, at = self.records.copies(extents), self.records.live_at
        return lambda: [
            (int(record[NUMBER]), unpack_zones(record), bits(record, at, int(record[COUNT])))
            for record in records
        ]

    def zones(self, extent: int) -> Zones:
        """Return the bounds of the metadata of all rows of a block."""
        return self.records.zones(extent)

    def format(self, extent: int) -> int:
        """Return the format of a block; see block.py."""
        return block_format(self.records.records[extent])

    def sparse(self, share: float) -> list[int]:
        """Return the blocks whose share of live rows is above 0 but below ``share``.

        Returns their extents, those with the smallest share first.
        """
        live, count = self.records.fields(LIVE), self.records.fields(COUNT)
        chosen = np.flatnonzero((count > 0) & (live > 0) & (live < share * count))
        order = np.argsort(live[chosen] / count[chosen], kind="stable")
        return [int(extent) for extent in chosen[order]]

    def empty(self) -> list[int]:
        """Return extents without live rows, except those that a scan is reading now."""
        live, count = self.records.fields(LIVE), self.records.fields(COUNT)
        held = self.records.held().values()
        return [int(e) for e in np.flatnonzero((count > 0) & (live == 0)) if int(e) not in held]

    def size_of(self, extents: list[int]) -> int:
        """Return the bytes that some blocks take on disk, in whole pages."""
        return self.records.size_of(extents)

    def held(self) -> list[int]:
        """Return the numbers of the blocks that scans are reading now.

        Even after ``close``, these blocks must not be deleted from the base.
        """
        return list(self.records.held())

    # ---- contents

    def keys(self, extent: int) -> Keys:
        """Return the keys of all rows of a block, a view of the map. Raises Corrupt."""
        return self._column(extent, 0)

    def versions(self, extent: int) -> NDArray[np.uint64]:
        """Return the versions of all rows of a block, a view of the map. Raises Corrupt."""
        return self._column(extent, 1)

    def columns(self, extent: int) -> Meta:
        """Return a copy of the metadata of all rows of a block. Raises Corrupt."""
        start, count = self.records.field(extent, START) + HEADER, self._count(extent)
        self._ready(extent, start, start + 32 * count)
        out = np.empty((count, 4), np.uint64)
        inplace.copy_columns(self.file.words, start // 8, out)
        return out

    def rows_of(self, extent: int) -> Rows:
        """Return all rows of a block, float32[count, width], a view of the map. Raises Corrupt."""
        start, count = self.records.field(extent, ROWS_AT), self._count(extent)
        self._ready(extent, start, start + 4 * count * self.width)
        numbers = self.file.floats[start // 4 : start // 4 + count * self.width]
        return numbers.reshape(count, self.width)

    def norms(self, extent: int) -> NDArray[np.float32] | None:
        """Return the norms of the embeddings of all rows of a block, a view of the map.

        Returns None if the block is of an older format, without norms. Raises Corrupt.
        """
        start, count = self.records.field(extent, NORMS_AT), self._count(extent)
        if not start:
            return None
        self._ready(extent, start, start + 4 * count)
        return self.file.floats[start // 4 : start // 4 + count]

    def _column(self, extent: int, column: int) -> NDArray[np.uint64]:
        """Return a column of the metadata of a block: 0 keys, 1 versions. Raises Corrupt."""
        count = self._count(extent)
        start = self.records.field(extent, START) + HEADER + 8 * count * column
        self._ready(extent, start, start + 8 * count)
        return self.file.words[start // 8 : start // 8 + count]

    def _ready(self, extent: int, start: int, stop: int) -> None:
        """Verify a part of a block: the bytes start..stop-1 of the file. Raises Corrupt."""
        records, seen_at = self.records.records, self.records.seen_at
        if not ready(records, seen_at, self.file.words, extent, start, stop, True):
            raise self.records.corrupt(self.file.path, extent)

    # ---- damage

    def newer(self, places: Slots, versions: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return for each row whether its version is newer than the one in ``versions``, uint64[n].

        Reads the versions of rows only if the bounds of their blocks leave it open. A row whose
        version cannot be read is not newer.
        """
        greatest = self.records.fields(GREATEST_VERSION)[places >> POSITION_BITS]
        out: NDArray[np.bool_] = greatest > versions
        for i in np.flatnonzero(out).tolist():
            with suppress(Corrupt):
                out[i] = self.meta(places[i : i + 1])[0, VERSION] > versions[i]
                continue
            out[i] = False
        return out

    def check(self) -> BlockCheck:
        """Return a reader that verifies blocks as a whole, on another thread."""
        return BlockCheck(self.records, self.file)

    def checked(self, number: int, damage: Damage | None) -> bool:
        """Record the result of a ``BlockCheck`` of a block. Returns whether its damage is new.

        number  of the block, which may be gone by now
        damage  what is wrong with it; None: nothing
        """
        extents = self.records
        extent = extents.extent_of(number)
        if extent is None:
            return False
        if damage is None:
            extents.damaged.pop(number, None)
            extents.see(extent)
            return False
        new = number not in extents.damaged
        extents.damaged[number] = damage
        extents.see_pieces(extent, damage.intact)
        return new

    def damaged_numbers(self) -> dict[int, int]:
        """Return number -> extent of the blocks that are known to be damaged and have live rows.

        Any thread may call this.
        """
        extents = self.records
        found = [(number, extents.extent_of(number)) for number in list(extents.damaged)]
        return {n: e for n, e in found if e is not None and extents.field(e, LIVE)}

    def damaged(self) -> list[int]:
        """Return the extents of the blocks that are known to be damaged and have live rows."""
        return list(self.damaged_numbers().values())

    @property
    def damage_counts(self) -> tuple[int, int]:
        """Number of blocks that are known to be damaged, and of their rows that cannot be read."""
        damaged = self.damaged()
        return len(damaged), sum(int(self.lost(extent).sum()) for extent in damaged)

    def damage(self, extent: int) -> Damage | None:
        """Return what is wrong with a block, as far as it is known; None: nothing."""
        return self.records.damaged.get(self.records.field(extent, NUMBER))

    def lost(self, extent: int) -> NDArray[np.bool_]:
        """Return which rows of a block are live but cannot be read, as far as it is known."""
        damage, live = self.damage(extent), self.live(extent)
        return np.zeros_like(live) if damage is None else live & damage.lost

    def number(self, extent: int) -> int:
        """Return the number in the base of a block."""
        return self.records.field(extent, NUMBER)

    # ---- bits

    def locations(self, extent: int, positions: Slots) -> Locations:
        """Return the locations of rows of a block, uint64[n]."""
        return locations_of(self._places(extent, positions), self.code)

    def revive(self, extent: int, positions: Slots, cached: bool) -> None:
        """Make rows live. cached: whether they have a slot in host memory, too."""
        self.records.mark(self._places(extent, positions), 1, int(cached))

    def forget(self, places: Slots) -> None:
        """Make rows neither live nor cached: their copies here are out of date. Skips ABSENT."""
        self.records.mark(places, 0, 0)

    def cache(self, places: Slots) -> None:
        """Mark live rows as cached: they were copied to host memory. Skips ABSENT."""
        self.records.mark(places, -1, 1)
        self.records.promote(places)

    def uncache(self, places: Slots) -> None:
        """Mark rows as not cached: their slots in host memory were given up. Skips ABSENT."""
        self.records.mark(places, -1, 0)

    def live(self, extent: int) -> NDArray[np.bool_]:
        """Return which rows of a block are live, bool[count], a copy."""
        return self.records.live_bits(extent)

    def cold(self, extent: int) -> NDArray[np.bool_]:
        """Return which rows of a block are live and not cached, bool[count], a copy."""
        return self.records.cold(extent)

    def _count(self, extent: int) -> int:
        return self.records.field(extent, COUNT)

    def _places(self, extent: int, positions: Slots) -> Slots:
        return positions.astype(np.int64) | np.int64(extent << POSITION_BITS)

    def promoted(self, extent: int) -> NDArray[np.bool_]:
        """Return for which rows of a block ``cache`` was ever called, bool[count], a copy."""
        return self.records.promoted(extent)

    # ---- reading ahead

    def pages(self, places: Slots, *, whole: bool = False, meta: bool = False) -> ColdPages:
        """Return the pages of the file that contain rows. ABSENT is skipped.

        whole  the pages of whole rows; otherwise only of the embeddings
        meta   also the pages of the rows' metadata

        The result is empty if all pages are verified and in memory, as far as it is known. If they
        are not, a read of the rows waits for the disk.
        """
        extents, numbers = self.records, self.width if whole else self.dim
        if self.residency.at_hand(places, 4 * numbers, meta):
            places = places[:0]
        listed = list_pages(extents, extents.records, places, numbers, meta)
        chosen = np.flatnonzero(np.bincount(places[places >= 0] >> POSITION_BITS))
        every = LOOK_SHARE * len(chosen) >= len(extents)
        return ColdPages(self.file, *listed, Look(self.file, extents, chosen), every)

    def settle(self, pages: ColdPages) -> None:
        """Remember which pages ``ColdPages.warm`` has read and verified.

        Raises Corrupt if it found a damaged page of a block that the tier still has.
        """
        records, seen_at = self.records.records, self.records.seen_at
        bad = inplace.remember(records, seen_at, pages.fresh, pages.good)
        if pages.blocks.found is not None:
            self.residency.note(pages.blocks)
        if pages.when:
            self.residency.read(pages.blocks, pages.pieces, pages.when)
        if bad >= 0:
            raise self.records.corrupt(self.file.path, int(pages.fresh[bad, 2]))

    def unverified(self, places: Slots) -> bool:
        """Return whether ``gather`` of whole rows would have to verify a page."""
        records = self.records.records
        return len(list_pages(self.records, records, places, self.width, False)[2]) > 0

    def _check(self, intact: int, places: Slots) -> None:
        """Raise Corrupt unless ``intact``, the result of a kernel, is the number of places."""
        if intact < len(places):
            raise self.records.corrupt(self.file.path, int(places[intact]) >> POSITION_BITS)
