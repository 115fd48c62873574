"""Load rows from disk into host memory: the part that runs on the engine thread."""

from __future__ import annotations

from psserver.tables import Tables
from storage.blockscan import ColdPages
from storage.kernels import Slots
from storage.tiers.base import Scan

SLICE_BYTES = 256 << 10  # bytes of rows that the engine copies per call


class Preloads:
    """The calls of the preloader that must run on the engine thread.

    tables  the tables of the shard
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def numbers(self) -> list[int]:
        """Return the numbers of all tables."""
        return [entry.number for entry in self._tables]

    def begin(self, number: int) -> tuple[Scan, int] | None:
        """Return (scan of a table's rows on disk, rows per slice).

        None: the table was dropped, has no rows on disk, or they do not fit into host memory.
        """
        entry = self._tables.numbered(number)
        if entry is None or entry.table.store.blocks is None:
            return None
        store, blocks = entry.table.store, entry.table.store.blocks
        if not 0 < blocks.rows <= store.room():
            return None
        return blocks.scan(), max(1, SLICE_BYTES // (4 * entry.schema.width))

    def pages(self, number: int, places: Slots) -> ColdPages | None:
        """Return the pages of some rows on disk; None if the table was dropped."""
        entry = self._tables.numbered(number)
        if entry is None or entry.table.store.blocks is None:
            return None
        return entry.table.store.blocks.pages(places, whole=True, meta=True)

    def load(self, number: int, pages: ColdPages, places: Slots) -> int:
        """Copy rows to host memory; return how many.

        pages  the pages of the rows, already read

        Raises Corrupt if a row is damaged, and OutOfMemory if there is no room.
        """
        entry = self._tables.numbered(number)
        if entry is None or entry.table.store.blocks is None:
            return 0
        entry.table.store.blocks.settle(pages)
        return entry.table.load(places)
