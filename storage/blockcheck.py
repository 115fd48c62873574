"""Verify the blocks of a table one after another, on another thread than the engine's."""

from __future__ import annotations

import numpy as np

from storage.blockfile import BlockFile
from storage.damage import Damage, examine
from storage.extents import COUNT, SIZE, START, Extents, Reader, block_format

BUFFER = np.uint64  # so that a block begins at a multiple of 8 bytes


class BlockCheck(Reader):
    """Verifies blocks of one table. The block that is being verified is not deleted meanwhile.

    extents  the blocks
    file     the map of the file that contains them
    """

    def __init__(self, extents: Extents, file: BlockFile) -> None:
        super().__init__(extents.memory)
        self._extents, self._file = extents, file
        self._buffer = np.empty(0, BUFFER)
        extents.register(self)

    def next(self, number: int) -> bool:
        """Hold the next block with live rows; its number is at least ``number``.

        Returns False, and holds none then, if there is no such block. The attribute ``number`` is
        the number of the block.
        """
        return self._extents.enter(self, number, cached=True)

    @property
    def size(self) -> int:
        """Size in bytes of the block that is held."""
        return int(self.memory.array()[self.extent, SIZE])

    def examine(self) -> Damage | None:
        """Read the block that is held, and verify all its bytes. Returns None if it is undamaged.

        Leaves in memory only the pages of the file that were there before. Raises OSError if the
        disk fails.
        """
        record = self.memory.array()[self.extent]
        size, count = int(record[SIZE]), int(record[COUNT])
        if len(self._buffer) < -(-size // 8):
            self._buffer = np.empty(-(-size // 8), BUFFER)
        data = self._buffer.view(np.uint8)[:size]
        self._file.copy(int(record[START]), data)
        width = self._extents.width
        return examine(data, width, count, block_format(record))
