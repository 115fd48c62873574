"""Rows in the blocks of the base (the on-disk copy of all rows), read in place from a memory map.

The tier of one table for rows that are not in memory. Blocks are immutable: a flush writes them,
and this tier only reads them. A place is the position of a row in an *extent*, which is a small
number that stands for a block while the tier has it:

    place = extent << 16 | position

In memory the tier keeps two bits per row of a block. *live*: the row in the block is the current
value of its key. *cached*: the row also has a slot in host memory, which the index refers to. A row
that is live but not cached is *cold*: the index refers to its place here.

The first use of each 4 KiB piece of a block compares its bytes with the sum of the piece that the
block contains (see block.py), so that damage on the disk is noticed when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from storage.arena import Budget
from storage.blockfile import BlockFile
from storage.directory import Zones
from storage.index import Locations
from storage.kernels import Keys, Rows, Slots
from storage.slots import Meta
from storage.tiers.base import Scan

POSITION_BITS = 16  # low bits of a place that contain the position in the block


class ColdPages:
    """The pieces of the file that hold some rows, to be made ready by another thread.

    ``Blocks.pages`` makes it on the engine thread, any thread calls ``warm``, and the engine thread
    passes it to ``Blocks.settle``. Nothing stays reserved in between: the rows may move or change.
    """

    def warm(self) -> None:
        """Read the pieces into memory, and verify those that were never verified.

        Any thread may call this. Releases the GIL. Raises OSError if the disk fails. Damage is not
        raised here but by ``Blocks.settle``, because the block may be gone by now.
        """
        raise NotImplementedError


class Blocks:
    """The blocks of one table. See Tier for the contract.

    dim     numbers in an embedding
    width   float32 numbers per row
    file    the memory map of the base's file
    budget  memory budget of the shard; the bits of the rows are taken from it

    Only the engine thread may call the methods, except those of scans, and ``ColdPages.warm``.
    """

    name: ClassVar[str] = "lmdb"
    code: ClassVar[int] = 3

    def __init__(self, dim: int, width: int, file: BlockFile, budget: Budget) -> None:
        raise NotImplementedError

    @property
    def rows(self) -> int:
        """Number of cold rows: live rows that have no slot in host memory."""
        raise NotImplementedError

    @property
    def live_rows(self) -> int:
        """Number of live rows, cold or cached."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """Bytes that the blocks take on disk, in whole pages."""
        raise NotImplementedError

    @property
    def memory(self) -> int:
        """Bytes of memory taken from the budget."""
        raise NotImplementedError

    # ---- the contract of a tier

    def gather(self, places: Slots, out: Rows) -> None:
        """Copy the first columns of rows to ``out``. Raises Corrupt if a row is damaged."""
        raise NotImplementedError

    def meta(self, places: Slots) -> Meta:
        """Return a copy of the metadata of each row. Raises Corrupt if it is damaged."""
        raise NotImplementedError

    def scan(self) -> Scan:
        """Return a scan of the cold rows, by number of their block and position in it.

        ``start`` of ``Scan.find`` is block number << 16 | position. Blocks that are added during
        the scan are included.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Forget all blocks and free the memory."""
        raise NotImplementedError

    # ---- blocks

    def add(self, number: int, offset: int, count: int, zones: Zones, verified: bool) -> int:
        """Add a block of the base, and return its extent. None of its rows is live yet.

        number    of the block in the base; larger than those of all blocks so far
        offset    of the block in the file, from ``Base.offset``
        count     number of rows
        zones     bounds of the metadata of its rows
        verified  its bytes are known to be undamaged, so that no piece is verified later

        Reads the header of the block. Raises Corrupt if it is damaged or does not fit, and
        OutOfMemory. Verifies a block of format 1, which has no sums, as a whole.
        """
        raise NotImplementedError

    def remove(self, extent: int) -> int:
        """Forget a block without live rows, and return its number. The extent is reused.

        Call this before the commit that deletes the block. The block must be in ``empty()``.
        """
        raise NotImplementedError

    def extents(self) -> Iterator[tuple[int, int]]:
        """Yield (extent, number) of each block, by ascending number."""
        raise NotImplementedError

    def zones(self, extent: int) -> Zones:
        """Return the bounds of the metadata of all rows of a block."""
        raise NotImplementedError

    def sparse(self, share: float) -> list[int]:
        """Return extents with live rows, but fewer than ``share`` of all rows; fewest first."""
        raise NotImplementedError

    def empty(self) -> list[int]:
        """Return extents without live rows, except those that a scan is reading now."""
        raise NotImplementedError

    # ---- contents

    def keys(self, extent: int) -> Keys:
        """Return the keys of all rows of a block, a view of the map. Raises Corrupt."""
        raise NotImplementedError

    def versions(self, extent: int) -> NDArray[np.uint64]:
        """Return the versions of all rows of a block, a view of the map. Raises Corrupt."""
        raise NotImplementedError

    def columns(self, extent: int) -> Meta:
        """Return a copy of the metadata of all rows of a block. Raises Corrupt."""
        raise NotImplementedError

    def rows_of(self, extent: int) -> Rows:
        """Return all rows of a block, float32[count, width], a view of the map. Raises Corrupt."""
        raise NotImplementedError

    # ---- bits

    def locations(self, extent: int, positions: Slots) -> Locations:
        """Return the locations of rows of a block, uint64[n]."""
        raise NotImplementedError

    def revive(self, extent: int, positions: Slots, cached: bool) -> None:
        """Make rows live. cached: whether they have a slot in host memory, too."""
        raise NotImplementedError

    def forget(self, places: Slots) -> None:
        """Make rows neither live nor cached: their copies here are out of date. Skips ABSENT."""
        raise NotImplementedError

    def cache(self, places: Slots) -> None:
        """Mark rows as cached: they got a slot in host memory."""
        raise NotImplementedError

    def uncache(self, places: Slots) -> None:
        """Mark rows as not cached: their slots in host memory were given up."""
        raise NotImplementedError

    def live(self, extent: int) -> NDArray[np.bool_]:
        """Return which rows of a block are live, bool[count], a copy."""
        raise NotImplementedError

    def cold(self, extent: int) -> NDArray[np.bool_]:
        """Return which rows of a block are live and not cached, bool[count], a copy."""
        raise NotImplementedError

    # ---- reading ahead

    def pages(self, places: Slots, meta: bool = False) -> ColdPages:
        """Return the pieces of the file that ``gather`` would read; ABSENT is skipped.

        meta  also those that ``meta`` would read
        """
        raise NotImplementedError

    def settle(self, pages: ColdPages) -> None:
        """Remember which pieces ``ColdPages.warm`` has verified.

        Raises Corrupt if it found a damaged piece of a block that the tier still has.
        """
        raise NotImplementedError

    def unverified(self, places: Slots) -> bool:
        """Return whether ``gather`` of these places would have to verify a piece."""
        raise NotImplementedError
