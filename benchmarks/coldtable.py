"""A table whose rows are in blocks on disk, without a server: our contender among row stores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.rowstores import batches
from storage.arena import Budget
from storage.base import Base
from storage.basestate import BaseState
from storage.block import Block, rows_per_block
from storage.blockfile import BlockFile
from storage.directory import Zones
from storage.emptybase import DATA
from storage.history import History
from storage.initializers import make_initializer
from storage.kernels import Images, Keys, Rows, Slots
from storage.optimizers import make_optimizer
from storage.schema import TableSchema
from storage.slots import HOME, KEY, STEP, VERSION
from storage.table import Table
from storage.tiers.lmdb import Blocks

HISTORY = History((1,))
MEMORY = 8 << 30  # bytes of memory that the table may take


@dataclass(frozen=True, slots=True)
class Written:
    """A block that was written but not committed yet."""

    number: int  # in the base
    keys: Keys  # uint64[count]
    versions: NDArray[np.uint64]  # [count]
    zones: Zones
    slots: Slots | None  # int64[count]  host slots of the rows; None: the rows have none


class ColdTable:
    """A table, the base's file with the blocks of its rows, and a memory map of that file.

    It does what a server does with one table, but without log, directory and threads.

    directory  for the file
    dim        numbers in an embedding; the optimizer is Adagrad
    """

    def __init__(self, directory: Path, dim: int) -> None:
        self.directory, self._dim = directory, dim
        schema = TableSchema(
            name="rows",
            dim=dim,
            optimizer=make_optimizer("adagrad", 0.05, {}),
            initializer=make_initializer("uniform", {}),
        )
        self._width = schema.width
        self._base = Base(directory).open()
        self._file = BlockFile(directory / DATA).open()
        self.budget = Budget(MEMORY)
        self.table = Table(schema, self.budget)
        self.blocks = Blocks(dim, schema.width, self._file, self.budget)
        self.table.store.attach(self.blocks)
        self._buffer = np.empty(2 << 20, np.uint8)
        self._version = 0

    def fill(self, keys: Keys, rows: Rows) -> None:
        """Write all rows to blocks, and sync them. None of them is in host memory afterwards."""
        self._version += 1
        written = []
        for at in batches(len(keys), rows_per_block(self._width)):
            block = self._block(at.stop - at.start)
            block.keys[:], block.rows[:] = keys[at], rows[at]
            block.versions[:], block.steps[:] = self._version, 0
            block.frequencies[:] = 1
            written.append(self._add(block, None))
        self._commit(written)

    def get(self, keys: Keys) -> Rows:
        """Pull the embeddings, after the pieces of the file that are not in memory were read."""
        self.warm(keys)
        return self.pull(keys)

    def pull(self, keys: Keys) -> Rows:
        """Pull the embeddings at once; pieces of the file that are not in memory are waited for."""
        out = np.empty((len(keys), self._dim), np.float32)
        self.table.pull(keys, "serve", out)
        return out

    def warm(self, keys: Keys) -> None:
        """Read the pieces of the file that a pull of these keys needs."""
        pages = self.table.store.pages(keys)
        if pages is not None and not pages.empty:
            pages.warm()
            self.blocks.settle(pages)

    def put(self, keys: Keys, rows: Rows) -> None:
        """Write the rows to host memory. ``sync`` flushes and demotes them."""
        self._version += 1
        count = len(keys)
        versions = np.full(count, self._version, np.uint64)
        stamps = versions, np.zeros(count, np.int64), np.ones(count, np.uint64)
        self.table.put(Images(keys, *stamps, rows))

    def sync(self) -> None:
        """Flush all dirty rows to blocks, and demote all clean rows."""
        self.flush()
        self.demote()

    def flush(self) -> int:
        """Write the dirty rows to blocks, which makes them clean; return their number."""
        host, written = self.table.store.host, []
        scan = host.scan()
        at: int | None = 0
        while at is not None:
            slots, at = scan.find(at, 0, self._version, rows_per_block(self._width))
            slots = slots[host.slots.array[slots, HOME] == 0]
            if len(slots):
                block = self._block(len(slots))
                meta = scan.copy(slots, block.frequencies, block.rows)
                block.keys[:], block.versions[:] = meta[:, KEY], meta[:, VERSION]
                block.steps[:] = meta[:, STEP].view(np.int64)
                written.append(self._add(block, slots))
        self._commit(written)
        return sum(len(each.keys) for each in written)

    def demote(self) -> int:
        """Give up the host copies of all clean rows; return their number."""
        return self.table.store.demote(self.table.store.host.rows)

    def close(self) -> None:
        """Close table, map and file."""
        self.table.close()
        self._file.close()
        self._base.close()

    def _block(self, count: int) -> Block:
        return Block.empty(1, self._width, count, self._buffer)

    def _add(self, block: Block, slots: Slots | None) -> Written:
        """Write a block to the file. Its memory may be used again afterwards.

        slots  see ``Written``
        """
        keys, versions = block.keys.copy(), block.versions.copy()
        return Written(self._base.add(block.seal()), keys, versions, Zones.of(block), slots)

    def _commit(self, written: list[Written]) -> None:
        """Commit new blocks, delete those without live rows, and tell the table of the new ones."""
        for extent in self.blocks.empty():
            self.blocks.remove(extent)
        numbers = [number for _, number in self.blocks.extents()]
        numbers += [each.number for each in written]
        self._base.commit(
            BaseState(
                lineage=bytes(16),
                history=HISTORY,
                version=self._version,
                next_table=2,
                blocks=tuple(numbers),
            )
        )
        self._file.cover(self._base.size)
        for each in written:
            self._adopt(each)

    def _adopt(self, each: Written) -> None:
        """Add a committed block to the tier, and tell the table where its rows are now."""
        offset, store = self._base.offset(each.number), self.table.store
        assert offset is not None  # None: a block of an older release
        extent = self.blocks.add(each.number, offset, len(each.keys), each.zones, verified=True)
        if each.slots is not None:
            store.adopt(extent, each.slots, each.keys, each.versions)
            return
        positions = np.arange(len(each.keys))
        self.blocks.revive(extent, positions, cached=False)
        store.place_cold(each.keys, self.blocks.locations(extent, positions))
