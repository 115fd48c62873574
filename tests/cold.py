"""A table with a cold tier, flushed as a shard would flush it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from bases import STATE
from blocks import rows_to_fill
from numpy.typing import NDArray

from storage.arena import Budget
from storage.base import Base
from storage.block import Block, rows_per_block
from storage.blockfile import BlockFile
from storage.directory import Zones
from storage.gpu.gpu import Gpu
from storage.schema import TableSchema
from storage.slots import FREQUENCY, KEY, STEP, VERSION, Meta, find_changed
from storage.table import Table
from storage.tiers.lmdb import Blocks


class ColdTable:
    """A table whose budget is so small that most rows are in the blocks of a base.

    version  of the last push
    """

    def __init__(
        self, schema: TableSchema, directory: Path, budget: int, gpu: Gpu | None = None
    ) -> None:
        self.base = Base(directory, map_bytes=1 << 20).open()
        self.file = BlockFile(directory / "data.mdb").open()
        self.budget = Budget(budget)
        self.table = Table(schema, self.budget)
        if gpu is not None:
            self.table.attach_gpu(gpu)
        self.blocks = Blocks(schema.dim, schema.width, self.file, self.budget)
        self.table.store.attach(self.blocks)
        self.commits = 0

    def _block(self, meta: Meta, rows: NDArray[np.float32]) -> Block:
        block = rows_to_fill(1, rows.shape[1], len(rows))
        block.keys[:], block.versions[:] = meta[:, KEY], meta[:, VERSION]
        block.steps[:] = meta[:, STEP].view(np.int64)
        block.frequencies[:], block.rows[:] = meta[:, FREQUENCY], rows
        return block

    def _store(self, block: Block) -> int:
        """Commit a block, and return its extent."""
        number = self.base.add(block.seal(self.table.schema.dim))
        self._commit(number)
        offset = self.base.offset(number)
        assert offset is not None
        return self.blocks.add(number, offset, len(block), Zones.of(block), verified=True)

    def _commit(self, *more: int) -> None:
        self.commits += 1
        listed = (*(number for _, number in self.blocks.extents()), *more)
        state = dataclasses.replace(STATE, version=self.commits, blocks=listed, cells=0)
        self.base.commit(state)
        self.file.cover(self.base.size)

    def flush(self) -> int:
        """Write all dirty rows to blocks, and make them clean; return how many there were."""
        store = self.table.store
        entries = store.host.slots
        slots = np.empty(entries.used, np.int64)
        found, _ = find_changed(entries.memory, 0, entries.used, 0, 1 << 47, slots, dirty=True)
        most = rows_per_block(self.table.schema.width)
        for start in range(0, found, most):
            part = slots[start : min(start + most, found)]
            rows = np.empty((len(part), self.table.schema.width), np.float32)
            store.host.gather(part, rows)
            meta = entries.meta(part)
            extent = self._store(self._block(meta, rows))
            store.adopt(extent, part, meta[:, KEY].copy(), meta[:, VERSION].copy())
        self._drop_empty()
        return found

    def reflush(self, share: float = 1.0) -> int:
        """Move the live rows of sparse blocks to new blocks; return how many blocks there were."""
        sparse = self.blocks.sparse(share)
        for old in sparse:
            positions = np.flatnonzero(self.blocks.live(old))
            block = self._block(
                self.blocks.columns(old)[positions], self.blocks.rows_of(old)[positions]
            )
            self.table.store.move(old, positions, self._store(block), 0)
        self._drop_empty()
        return len(sparse)

    def _drop_empty(self) -> None:
        for extent in self.blocks.empty():
            self.blocks.remove(extent)
        self._commit()

    def close(self) -> None:
        self.table.close()
        self.file.close()
        self.base.close()
