"""A table with rows in memory and in blocks of a base, where tests move them as a shard does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bases import STATE
from numpy.typing import NDArray

from storage.arena import Budget
from storage.base import Base
from storage.block import Block
from storage.blockfile import BlockFile
from storage.directory import Zones
from storage.initializers import make_initializer
from storage.optimizers import make_optimizer
from storage.schema import TableSchema
from storage.slots import find_changed
from storage.table import Table
from storage.tiers.lmdb import Blocks

DIM = 3
ALL = (1 << 48) - 1


class Tiered:
    """A table with a base. Keys are small; a row of version v was pushed at step v."""

    def __init__(self, directory: Path, **schema: Any) -> None:
        optimizer = make_optimizer("adagrad", None, {})
        initializer = make_initializer("uniform", {})
        settings = {"name": "t", "dim": DIM, "optimizer": optimizer, "initializer": initializer}
        settings |= schema
        self.base = Base(directory, map_bytes=1 << 20).open()
        self.file = BlockFile(directory / "data.mdb").open()
        self.table = Table(TableSchema(**settings), Budget(1 << 30))
        self.width = self.table.schema.width
        self.blocks = Blocks(DIM, self.width, self.file, Budget(1 << 30))
        self.store = self.table.store
        self.store.attach(self.blocks)
        self.listed: list[int] = []  # numbers of the blocks of the base
        self.version = 0

    # ---- changes

    def push(self, keys: Any, counts: Any = 1, step: int | None = None, scale: float = 1.0) -> None:
        array = np.unique(np.asarray(keys, np.uint64))
        self.version += 1
        step = self.version if step is None else step
        values = (array % np.uint64(97) + np.uint64(self.version)).astype(np.float32) * scale
        gradients = np.repeat(values[:, None], DIM, axis=1)
        many = np.broadcast_to(np.asarray(counts, np.uint32), len(array)).copy()
        self.table.push(array, gradients, many, version=self.version, step=step)
        self.table.evictor.pushed(self.version, step, float(self.version))

    def promote(self, keys: Any) -> None:
        """Do what a push does that is refused after its rows were promoted."""
        array = np.unique(np.asarray(keys, np.uint64))
        locations, _ = self.store.find(array)
        self.store.promote(array[locations > 0], locations[locations > 0])

    def delete(self, keys: Any) -> None:
        self.version += 1
        self.table.delete(np.unique(np.asarray(keys, np.uint64)))

    def demote(self, count: int) -> int:
        return self.store.demote(count)

    def cool(self) -> None:
        """Make all rows cold."""
        self.flush()
        while self.demote(1):
            pass
        assert self.store.host.rows == 0

    # ---- blocks

    def flush(self, most: int = 40) -> None:
        self.write(most)()

    def write(self, most: int = 40) -> Callable[[], None]:
        """Write dirty rows to blocks of ``most`` rows; return what adopts them."""
        host = self.store.host
        slots = np.empty(host.slots.used, np.int64)
        found, _ = find_changed(
            host.slots.memory, 0, host.slots.used, 0, self.version, slots, dirty=True
        )
        slots = slots[:found]
        parts = [slots[at : at + most] for at in range(0, found, most)]
        written = []
        for part in parts:
            rows = np.empty((len(part), self.width), np.float32)
            host.gather(part, rows)
            written.append((part, *self._add(host.meta(part), rows)))

        def adopt() -> None:
            for slots, extent, meta in self._commit(written):
                self.store.adopt(extent, slots, meta[:, 0].copy(), meta[:, 1].copy())

        return adopt

    def rewrite(self, extents: list[int]) -> Callable[[], None]:
        """Copy the live rows of some blocks to one new block; return what moves them there."""
        parts = [(extent, np.flatnonzero(self.blocks.live(extent))) for extent in extents]
        parts = [(extent, at) for extent, at in parts if len(at)]
        if not parts:
            return lambda: None
        meta = np.concatenate([self.blocks.columns(extent)[at] for extent, at in parts])
        rows = np.concatenate([self.blocks.rows_of(extent)[at] for extent, at in parts])
        written = [(parts, *self._add(meta, rows))]

        def move() -> None:
            for parts, new, _ in self._commit(written):
                first = 0
                for extent, at in parts:
                    self.store.move(extent, at, new, first)
                    first += len(at)

        return move

    def collect(self) -> int:
        """Delete the blocks without live rows, and return how many they were."""
        gone = [self.blocks.remove(extent) for extent in self.blocks.empty()]
        if gone:
            self.listed = [number for number in self.listed if number not in gone]
            self._save()
        return len(gone)

    def _add(self, meta: NDArray[Any], rows: NDArray[Any]) -> tuple[Block, int]:
        block = Block.empty(1, self.width, len(meta))
        block.keys[:], block.versions[:] = meta[:, 0], meta[:, 1]
        block.steps[:], block.frequencies[:] = meta[:, 2].view(np.int64), meta[:, 3]
        block.rows[:] = rows
        return block, self.base.add(block.seal(DIM))

    def _commit(self, written: list[tuple[Any, Block, int]]) -> list[tuple[Any, int, NDArray[Any]]]:
        self.listed += [number for _, _, number in written]
        self._save()
        found = []
        for what, block, number in written:
            offset = self.base.offset(number)
            assert offset is not None
            extent = self.blocks.add(number, offset, len(block.keys), Zones.of(block), True)
            found.append((what, extent, self.blocks.columns(extent)))
        return found

    def _save(self) -> None:
        listed = tuple(sorted(self.listed))
        state = dataclasses.replace(
            STATE, version=self.version, blocks=listed, cells=0, directory=0, distinct=False
        )
        self.base.commit(state)
        self.file.cover(self.base.size)

    # ---- what is there

    def rows(self) -> dict[int, tuple[int, bytes]]:
        """Return (version, metadata and row as bytes) of each key."""
        dump = self.table.dump()
        pairs = zip(dump.keys.tolist(), dump.meta, dump.rows, strict=True)
        return {key: (int(meta[1]), meta.tobytes() + row.tobytes()) for key, meta, row in pairs}

    def check(self) -> None:
        """The index, the slots and the bits of blocks agree."""
        keys = self.store.keys()
        locations = self.store.find(keys)[0]
        codes = locations >> np.uint64(56)
        assert int((codes == self.store.host.code).sum()) == self.store.host.rows
        assert self.store.meta(locations)[:, 0].tolist() == keys.tolist()

    def close(self) -> None:
        self.table.close()
        self.file.close()
        self.base.close()
