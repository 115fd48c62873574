"""Verify the blocks on disk of a shard: the calls that run on the engine thread."""

from __future__ import annotations

from queue import SimpleQueue
from typing import NamedTuple

from psserver.tables import Tables
from storage import rescue
from storage.blockcheck import BlockCheck
from storage.damage import Damage
from storage.kernels import Keys


class DamagedBlock(NamedTuple):
    """A damaged block of a table."""

    table: str  # name of the table
    number: int  # of the block
    live: int  # number of its rows that are the current rows of their keys
    lost: int  # number of these rows that cannot be read
    what: str  # what is wrong with the block


class BlockChecks:
    """The calls of the scrubber that must run on the engine thread.

    tables    the tables of the shard
    suspects  (number of the table, number of the block) for blocks of which a request has noticed
              damage; None: the server stops
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self.suspects: SimpleQueue[tuple[int, int] | None] = tables.suspects

    def numbers(self) -> list[int]:
        """Return the numbers of all tables, ascending."""
        return sorted(entry.number for entry in self._tables)

    def number_of(self, name: str) -> int:
        """Return the number of the table with this name. Raises UnknownTable."""
        return self._tables.get(name).number

    def count(self, number: int | None = None) -> tuple[int, int]:
        """Return (number of blocks, their bytes on disk) of one table, or of all (None)."""
        count = size = 0
        for entry in self._tables:
            blocks = entry.table.store.blocks
            if blocks is not None and number in (None, entry.number):
                count, size = count + len(blocks), size + blocks.bytes
        return count, size

    def counts(self, name: str) -> tuple[int, int]:
        """Return how many blocks of a table are known to be damaged, and how many of their rows
        cannot be read. Any thread may call this.
        """
        entry = self._tables.find(name)
        blocks = None if entry is None else entry.table.store.blocks
        return (0, 0) if blocks is None else blocks.damage_counts

    def begin(self, number: int) -> BlockCheck | None:
        """Return a reader that verifies the blocks of a table; None if there are none."""
        entry = self._tables.numbered(number)
        if entry is None or entry.table.store.blocks is None:
            return None
        return entry.table.store.blocks.check()

    def known(self, number: int, block: int) -> bool:
        """Return whether a block of a table is known to be damaged."""
        entry = self._tables.numbered(number)
        blocks = None if entry is None else entry.table.store.blocks
        return blocks is not None and block in blocks.damaged_numbers()

    def record(self, number: int, block: int, damage: Damage | None) -> DamagedBlock | None:
        """Record the result of a check of a block. Returns the block if its damage is new.

        number  number of the table
        damage  what is wrong with the block; None: nothing

        If there is damage, no flush may run meanwhile.
        """
        entry = self._tables.numbered(number)
        store = None if entry is None else entry.table.store
        if store is None or store.blocks is None:
            return None
        if not rescue.record(store.blocks, store.host.slots, block, damage):
            return None
        return next((each for each in self.damaged(number) if each.number == block), None)

    def damaged(self, number: int) -> list[DamagedBlock]:
        """Return the blocks of a table that are known to be damaged and have live rows."""
        entry = self._tables.numbered(number)
        blocks = None if entry is None else entry.table.store.blocks
        if entry is None or blocks is None:
            return []
        found = []
        for extent in blocks.damaged():
            damage = blocks.damage(extent)
            assert damage is not None
            live, lost = int(blocks.live(extent).sum()), int(blocks.lost(extent).sum())
            name = entry.schema.name
            found.append(DamagedBlock(name, blocks.number(extent), live, lost, damage.what))
        return found

    def lost_keys(self, number: int, block: int) -> Keys | None:
        """Return the keys of the rows that cannot be read of a damaged block; None: it is gone.

        Searches the whole index of the table.
        """
        entry = self._tables.numbered(number)
        blocks = None if entry is None else entry.table.store.blocks
        if entry is None or blocks is None or block not in blocks.damaged_numbers():
            return None
        return rescue.lost_keys(blocks, entry.table.store.index, blocks.damaged_numbers()[block])

    def readable(self) -> bool:
        """Return whether damaged blocks have rows that a flush can move to new blocks."""
        for entry in self._tables:
            blocks = entry.table.store.blocks
            if blocks is not None:
                for extent in blocks.damaged():
                    if (blocks.live(extent) & ~blocks.lost(extent)).any():
                        return True
        return False
