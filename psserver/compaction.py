"""Move the live rows of sparse and small blocks of the base to new blocks.

The base (the on-disk copy of all rows) consists of immutable blocks. A row in a block is *live*
until the row is pushed or deleted, or moved to a new block. A *sparse* block has few live rows
left. It keeps its space on the disk until all its live rows have moved. Many small blocks are
merged too, because each block takes at least one page on the disk, and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from psserver.packing import copy_rows
from storage.block import Block, disk_bytes, rows_per_block
from storage.kernels import Slots
from storage.tiers.lmdb import Blocks

SPARSE = 1 / 2  # blocks with a smaller share of live rows are always moved
LESS = 9 / 10  # the same while the blocks of a table take more than ROOMY times their live rows
ROOMY = 1.15
URGENT = 4 / 3  # the same while another flush is waited for
SMALL_BYTES = 1 << 20  # bytes of blocks for which disk space does not matter
PART = 32  # a commit moves at most 1/PART of the live rows of a table
MOST_SMALL = 16  # number of small blocks of a table that are not merged
LEAST_MOVED = 2  # full blocks whose rows may be moved by any flush


class Source(NamedTuple):
    """A block whose live rows are going to be moved."""

    extent: int  # the block in the tier
    number: int  # the block in the base
    positions: Slots  # int64[n], positions in the block of the rows to move
    size: int  # number of rows of the block
    format: int  # of the block


class Run(NamedTuple):
    """Rows of one old block that are next to each other in a new block."""

    extent: int  # the old block
    positions: Slots  # int64[n], positions in the old block
    first: int  # position in the new block of the first row


def roomy(blocks: Blocks, width: int, urgent: bool = False) -> bool:
    """Return whether the blocks of a table take much more space than their live rows need.

    width   float32 numbers per row
    urgent  whether another flush is waited for: then they may take more
    """
    share = URGENT if urgent else ROOMY
    return blocks.bytes > share * blocks.live_rows * disk_bytes(width) + SMALL_BYTES


def choose(blocks: Blocks, width: int, small: set[int]) -> list[Source]:
    """Return the blocks whose live rows the next commit should move. Must run on the engine thread.

    blocks   the blocks of a table
    width    float32 numbers per row
    small    numbers of the small blocks of the table; those that are gone are removed

    A row that is moved takes space twice until the next commit. So a commit moves at most 1/PART of
    the live rows, or the rows of two full blocks if that is more. Rows of a damaged block move
    first, except those that cannot be read.
    """
    numbers = dict(blocks.extents())
    small.intersection_update(numbers.values())
    chosen = blocks.damaged() + blocks.sparse(SPARSE)
    if len(small) > MOST_SMALL:
        chosen += [extent for extent, number in numbers.items() if number in small]
    if roomy(blocks, width):
        chosen += blocks.sparse(LESS)
    left = max(blocks.live_rows // PART, LEAST_MOVED * rows_per_block(width))
    sources = []
    for extent in dict.fromkeys(chosen):
        live = blocks.live(extent)
        positions = np.flatnonzero(live & ~blocks.lost(extent))
        if not len(positions):
            continue
        left -= len(positions)
        if left < 0:
            break
        found = extent, numbers[extent], positions, len(live), blocks.format(extent)
        sources.append(Source(*found))
    return sources


def moved_blocks(
    table: int, width: int, sources: Iterable[Source], read: Callable[[Source], tuple[Block, Slots]]
) -> Iterator[tuple[Block, list[Run]]]:
    """Yield (new block without a checksum, origins of its rows) with the live rows of old blocks.

    table    number of the table
    width    float32 numbers per row
    sources  the old blocks
    read     returns an old block, and the positions of those rows to move that can be read
    """
    most = rows_per_block(width)
    block, runs, used = Block.empty(table, width, most), list[Run](), 0
    for source in sources:
        found, readable = read(source)
        at, end = 0, len(readable)
        while at < end:
            count = min(end - at, most - used)
            positions = readable[at : at + count]
            copy_rows(found, positions, block, slice(used, used + count))
            runs.append(Run(source.extent, positions, used))
            at, used = at + count, used + count
            if used == most:
                yield block, runs
                block, runs, used = Block.empty(table, width, most), [], 0
    if used:
        last = Block.empty(table, width, used)
        copy_rows(block, slice(used), last, slice(None))
        yield last, runs


def moved_rows(runs: Iterable[Run]) -> dict[int, Slots]:
    """Return which rows of old blocks were copied to new blocks: extent -> int64[n], positions."""
    found: dict[int, list[Slots]] = {}
    for run in runs:
        found.setdefault(run.extent, []).append(run.positions)
    return {extent: np.concatenate(positions) for extent, positions in found.items()}
