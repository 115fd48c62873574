"""Read the rows of the base as of one flush, while later flushes go on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from psserver.capture import Capture
from psserver.packing import reduced
from storage.base import Base
from storage.block import BLOCK_BYTES, Data
from storage.directory import BlockEntry, unpack


class PinnedBase:
    """The rows of the base (the on-disk copy of all rows) as of one flush.

    captured  the shard at the version of the flush
    numbers   numbers of all blocks of the base. They must be pinned while the rows are read, so
              that no later flush deletes them
    """

    def __init__(self, base: Base, captured: Capture) -> None:
        """Note the blocks that the base has now. No flush may run meanwhile."""
        assert base.state is not None
        self.captured = captured
        self.numbers = base.state.blocks
        self._base = base
        end = len(self.numbers) - base.state.cells
        self._directory = self.numbers[end - base.state.directory : end]

    def rows(self, after: int = 0) -> Iterator[Data]:
        """Yield the bytes of sealed blocks with all rows that changed after version ``after``.

        Each is valid until the next is requested. A block of which all rows are wanted is returned
        as it is stored. Rows that changed since the version of the flush may be missing: the log
        has them. Any thread may call this. Raises Corrupt if a block is damaged.
        """
        buffer = np.empty(BLOCK_BYTES, np.uint8)
        for entry in self._entries():
            if entry.zones.greatest_version <= after:
                continue
            block = self._base.block(entry.number, buffer)
            kept = entry.live & (block.versions > np.uint64(after))
            if kept.all():
                yield block.data
            elif kept.any():
                yield reduced(block, kept).seal()

    def _entries(self) -> Iterator[BlockEntry]:
        """Yield the entries of the directory: which rows of each block are current."""
        for number in self._directory:
            yield from unpack(self._base.block(number), f"block {number} of the directory")
