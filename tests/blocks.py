"""Make blocks (storage/block.py) from arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from storage.block import FORMATS, ROWS, Block, row_layout
from storage.kernels import Keys, Rows


def pack_rows(
    table: int,
    keys: Keys,
    versions: NDArray[np.uint64],
    steps: NDArray[np.int64],
    frequencies: NDArray[np.uint64],
    rows: Rows,
) -> memoryview:
    """Return the bytes of a sealed block of rows, with copies of the arrays.

    table        number of the table
    keys         uint64[n]
    versions, steps, frequencies  [n]  metadata of the rows
    rows         float32[n, width]
    """
    block = Block.empty(table, rows.shape[1], len(keys))
    block.keys[:], block.versions[:], block.steps[:] = keys, versions, steps
    block.frequencies[:], block.rows[:] = frequencies, rows
    return block.seal()


def rows_to_fill(table: int, width: int, count: int, version: int = FORMATS[ROWS]) -> Block:
    """Return a block of rows to fill. version: its format."""
    size = row_layout(width, count, version).size
    return Block._over(np.zeros(size, np.uint8), table, ROWS, width, count, version)


def pack_tombstones(
    table: int, keys: Keys, versions: NDArray[np.uint64], causes: NDArray[np.uint32]
) -> memoryview:
    """Return the bytes of a sealed block of tombstones, with copies of the arrays.

    table     number of the table
    keys      uint64[n]
    versions  uint64[n]  log version of each delete
    causes    uint32[n]  Cause of each delete
    """
    block = Block.tombstones(table, len(keys))
    block.keys[:], block.versions[:], block.causes[:] = keys, versions, causes
    return block.seal()
