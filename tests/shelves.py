"""A tier with some blocks of a base, for tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from bases import STATE
from blocks import rows_to_fill
from numpy.typing import NDArray

from storage.arena import Budget
from storage.base import Base
from storage.block import FORMATS, ROWS, Block
from storage.blockfile import BlockFile
from storage.directory import Zones
from storage.tiers.lmdb import Blocks

DIM, WIDTH = 5, 7
FREE = 1 << 30


def block_of(
    seed: int, count: int = 700, width: int = WIDTH, version: int = 1, form: int = FORMATS[ROWS]
) -> Block:
    """A block of random rows, unsealed. Keys are distinct over all seeds; versions >= version.

    form  format of the block
    """
    random = np.random.default_rng(seed)
    block = rows_to_fill(1, width, count, form)
    block.keys[:] = np.uint64(seed << 32) | np.arange(count, dtype=np.uint64)
    block.versions[:] = random.integers(version, version + 1000, count)
    block.steps[:] = random.integers(-(1 << 47), 1 << 47, count)
    block.frequencies[:] = random.integers(1, 1 << 32, count)
    block.rows.view(np.uint32)[:] = random.integers(0, 1 << 32, (count, width))
    return block


def bits_of(rows: NDArray[Any]) -> Any:
    """Bits of numbers, so that NaN compares equal."""
    return rows.view(np.uint32).tolist()


class Shelf:
    """A base, the map of its file, and a tier with all its blocks."""

    def __init__(self, directory: Path, width: int = WIDTH, dim: int = DIM, **options: int) -> None:
        self.base = Base(directory, map_bytes=1 << 20).open()
        self.file = BlockFile(directory / "data.mdb", **options).open()
        self.blocks = Blocks(dim, width, self.file, Budget(FREE))
        self.kept: dict[int, Block] = {}  # by number
        self.version = 0

    def put(self, *blocks: Block, drop: tuple[int, ...] = ()) -> list[int]:
        """Commit blocks and delete others; return the numbers of the new ones."""
        numbers = [self.base.add(block.seal()) for block in blocks]
        for number in drop:
            del self.kept[number]
        self.kept |= dict(zip(numbers, blocks, strict=True))
        self.version += 1
        listed = tuple(self.kept)
        self.base.commit(dataclasses.replace(STATE, version=self.version, blocks=listed, cells=0))
        self.file.cover(self.base.size)
        return numbers

    def add(self, number: int, verified: bool = False) -> int:
        offset = self.base.offset(number)
        assert offset is not None
        block = self.kept[number]
        return self.blocks.add(number, offset, len(block), Zones.of(block), verified)

    def shelve(self, *blocks: Block) -> list[int]:
        """Commit blocks, add them to the tier with all rows cold, and return their extents."""
        extents = [self.add(number) for number in self.put(*blocks)]
        for extent, block in zip(extents, blocks, strict=True):
            self.blocks.revive(extent, np.arange(len(block)), False)
        return extents

    def damage(self, extent: int, at: int, bit: int = 0) -> None:
        """Flip a bit of a block in the file."""
        number = dict(self.blocks.extents())[extent]
        offset = self.base.offset(number)
        assert offset is not None
        with open(self.file.path, "r+b") as file:
            file.seek(offset + at)
            byte = file.read(1)[0]
            file.seek(offset + at)
            file.write(bytes([byte ^ 1 << bit]))

    def check(self) -> None:
        """All blocks of the tier have the contents that were committed."""
        for extent, number in self.blocks.extents():
            self.check_block(extent, self.kept[number])

    def check_block(self, extent: int, block: Block) -> None:
        places = np.random.default_rng(1).permutation(len(block)) | extent << 16
        for numbers in (DIM, block.width):
            out = np.empty((len(places), numbers), np.float32)
            self.blocks.gather(places, out)
            assert bits_of(out) == bits_of(block.rows[places & 0xFFFF, :numbers])
        meta = self.blocks.meta(places)
        assert meta.tolist() == meta_of(block)[places & 0xFFFF].tolist()
        assert self.blocks.columns(extent).tolist() == meta_of(block).tolist()
        assert self.blocks.keys(extent).tolist() == block.keys.tolist()
        assert self.blocks.versions(extent).tolist() == block.versions.tolist()
        assert bits_of(self.blocks.rows_of(extent)) == bits_of(block.rows)

    def close(self) -> None:
        self.blocks.close()
        self.file.close()
        self.base.close()


def meta_of(block: Block) -> NDArray[np.uint64]:
    return np.stack(
        [block.keys, block.versions, block.steps.view(np.uint64), block.frequencies], axis=1
    )


def places_of(extent: int, *positions: int) -> NDArray[np.int64]:
    """Return the places of some rows of a block."""
    return np.array(positions, np.int64) | extent << 16
