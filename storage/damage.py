"""Find out which rows of a damaged block can still be read.

A block of rows has a checksum of all its bytes, and a sum for each piece of 4 KiB (see sums.py). If
the checksum does not match, the sums tell which pieces are damaged. A row is *lost* if a piece with
its numbers or its metadata (key, version, step, frequency) is damaged. Its norm can be computed
again from its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.block import ROWS, Bytes, RowLayout, header_of, row_layout, unpack
from storage.errors import Corrupt, UnknownFormat
from storage.sums import PIECE, SHIFT, intact

HEADER = 64  # bytes of a block before its keys
COLUMNS = 4  # columns of metadata, 8 bytes per row each


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with one block of rows.

    what    description of the damage
    intact  bool[pieces]  which pieces of 4 KiB have the right sum; none in blocks of format 1
    lost    bool[count]   which rows cannot be read
    """

    what: str
    intact: NDArray[np.bool_]
    lost: NDArray[np.bool_]


def examine(data: Bytes, width: int, count: int, version: int) -> Damage | None:
    """Verify all bytes of a block of rows. Returns None if it is undamaged.

    data     uint8[n], 8-byte aligned, the bytes of the block
    width    float32 numbers per row
    count    number of rows
    version  format of the block, 1 to 3; if it is 1, damage makes all rows unreadable

    The last three describe the block that was written, so that a damaged header is noticed.
    """
    layout = row_layout(width, count, version)
    try:
        unpack(data[: layout.size], "block")
        header = header_of(data)
        if header is not None and (header.kind, header.width, header.length) == (
            ROWS,
            width,
            count,
        ):
            return None
        what = "it is a different block"
    except Corrupt as error:
        what = error.what
    except UnknownFormat as error:
        what = str(error)
    if not layout.pieces or len(data) < layout.size:
        return Damage(what, np.zeros(0, np.bool_), np.ones(count, np.bool_))
    words, body = data[: layout.size].view(np.uint64), layout.sums // 8
    good = np.array([intact(words, 0, body, i) for i in range(layout.pieces)], np.bool_)
    return Damage(what, good, _lost(good, layout, width, count))


def _lost(good: NDArray[np.bool_], layout: RowLayout, width: int, count: int) -> NDArray[np.bool_]:
    """Return which rows are in a damaged piece, bool[count].

    good    bool[pieces]  which pieces are intact
    layout  where the parts of the block are
    """
    before = np.concatenate([[0], np.cumsum(~good)])  # number of damaged pieces before each

    def hit(first: NDArray[np.int64], size: int) -> NDArray[np.bool_]:
        start, stop = (first + SHIFT) // PIECE, (first + size - 1 + SHIFT) // PIECE + 1
        return before[stop] > before[start]

    rows = np.arange(count, dtype=np.int64)
    lost = hit(layout.rows + 4 * width * rows, 4 * width)
    for column in range(COLUMNS):
        lost |= hit(HEADER + 8 * count * column + 8 * rows, 8)
    return lost
