"""The directory of a base: which rows of its blocks are current.

A base (the on-disk copy of all rows at one log version) consists of blocks. A row in a block is
*live* while it is the current value of its key: it was not pushed, moved or deleted since. The
directory has one entry for each block of rows that has live rows. It is stored in blocks of kind
DIRECTORY, which contain entries one after another:

    entry   = number u64 | table u32 | width u32 | count u32 | listed u32
              | least version u64 | greatest version u64 | least step i64 | greatest step i64
              | least frequency u64 | greatest frequency u64 | which                 (72 bytes)
    which   = bits u8[(count + 7) / 8]          listed is 2^32-1: bit i % 8 of byte i / 8 is row i
            | dead u16[listed]                  positions of the rows that are not live, ascending
            zeros up to a multiple of 8 bytes

Little-endian. The shorter of the two forms is used, so that a block whose rows are all live takes
no more than the 72 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.block import Block


@dataclass(frozen=True, slots=True, kw_only=True)
class Zones:
    """Bounds of the metadata of some rows, so that readers can skip all of them at once.

    A block's zones are those of all its rows, live or not.
    """

    least_version: int
    greatest_version: int
    least_step: int
    greatest_step: int
    least_frequency: int
    greatest_frequency: int

    @classmethod
    def of(cls, block: Block) -> Zones:
        """Return the bounds of all rows of a block, which must have at least one."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEntry:
    """The entry of one block of rows in the directory."""

    number: int  # the block's number in the base
    table: int  # number of the table
    width: int  # float32 numbers per row
    count: int  # number of rows, live or not
    zones: Zones
    live: NDArray[np.bool_]  # [count]  True for live rows


def pack(entries: Iterable[BlockEntry]) -> Iterator[memoryview]:
    """Yield the bytes of sealed DIRECTORY blocks that contain the entries, in their order."""
    raise NotImplementedError


def unpack(block: Block, where: str) -> list[BlockEntry]:
    """Return the entries in a DIRECTORY block, in their order. Raises Corrupt.

    where  name of the block, for errors
    """
    raise NotImplementedError
