"""Read the rows of the base as of one flush, while later flushes go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np

from psserver.capture import Capture
from psserver.packing import reduced
from storage.base import Base
from storage.block import BLOCK_BYTES, Data
from storage.directory import BlockEntry, unpack
from storage.errors import Corrupt


class PinnedBase:
    """The rows of the base (the on-disk copy of all rows) as of one flush.

    captured  the shard at the version of the flush
    numbers   numbers of all blocks of the base. They must be pinned while the rows are read, so
              that no later flush deletes them
    """

    def __init__(
        self,
        base: Base,
        captured: Capture,
        suspect: Callable[[int, int], None] = lambda table, block: None,
    ) -> None:
        """Note the blocks that the base has now. No flush may run meanwhile.

        suspect  called with (number of the table, number of the block) if a block is damaged
        """
        assert base.state is not None
        self.captured = captured
        self.numbers = base.state.blocks
        self._base, self._suspect = base, suspect
        end = len(self.numbers) - base.state.cells
        self._directory = self.numbers[end - base.state.directory : end]

    def rows(self, after: int = 0) -> Iterator[Data]:
        """Yield the bytes of sealed blocks with all rows that changed after version ``after``.

        Each is valid until the next is requested. A block of which all rows are wanted is returned
        as it is stored. Rows that changed since the version of the flush may be missing: the log
        has them. Any thread may call this. Raises Corrupt if a block is damaged.
        """
        buffer = np.empty(BLOCK_BYTES, np.uint8)
        dims = {each.number: each.table.schema.dim for each in self.captured.tables}
        for entry in self._entries():
            if entry.zones.greatest_version <= after:
                continue
            try:
                block = self._base.block(entry.number, buffer)
            except Corrupt as error:
                raise self._named(entry, error) from error
            kept = entry.live & (block.versions > np.uint64(after))
            if kept.all():
                yield block.data
            elif kept.any():
                yield reduced(block, kept).seal(dims[entry.table])

    def _named(self, entry: BlockEntry, error: Corrupt) -> Corrupt:
        """Return the error for a damaged block, with the name of its table."""
        self._suspect(entry.table, entry.number)
        names = {each.number: json.loads(each.schema)["name"] for each in self.captured.tables}
        live = int(np.count_nonzero(entry.live))
        where = f"{error.where} of table {names.get(entry.table, '')!r}, with {live} live rows"
        return Corrupt(where, error.what)

    def _entries(self) -> Iterator[BlockEntry]:
        """Yield the entries of the directory: which rows of each block are current."""
        for number in self._directory:
            yield from unpack(self._base.block(number), f"block {number} of the directory")
