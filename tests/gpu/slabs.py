"""Slabs in pieces for the tests of kernels, and the arguments that all kernels begin with."""

from __future__ import annotations

from typing import Any

import numpy as np

SHIFT = 4  # pieces of 16 rows


def aligned(*shape: int) -> Any:
    """An array of NaN that begins at a multiple of 64 bytes."""
    size = int(np.prod(shape))
    raw = np.full(size + 16, np.nan, np.float32)
    start = -raw.ctypes.data % 64 // 4
    return raw[start : start + size].reshape(shape)


class Slab:
    """Rows of a width, in pieces; what is not a row is NaN."""

    def __init__(self, rows: Any) -> None:
        self.capacity, self.width = rows.shape
        self.stride = -(-self.width // 4) * 4
        self.pieces = []
        for at in range(0, self.capacity, 1 << SHIFT):
            piece, some = aligned(1 << SHIFT, self.stride), rows[at : at + (1 << SHIFT)]
            piece[: len(some), : self.width] = some
            self.pieces.append(piece)
        self.table = np.array([piece.ctypes.data for piece in self.pieces], np.uint64)

    @property
    def rows(self) -> Any:
        return np.concatenate(self.pieces)[: self.capacity, : self.width]

    @property
    def rest(self) -> Any:
        """The numbers that no kernel may write."""
        return np.concatenate(self.pieces)[:, self.width :]

    def head(self, slots: Any, count: int) -> list[Any]:
        """Return the arguments of a kernel up to the number of columns."""
        n = np.int64(len(slots))
        table, places = np.uint64(self.table.ctypes.data), np.uint64(slots.ctypes.data)
        return [table, np.int32(SHIFT), np.int64(self.stride), places, n, np.int32(count)]
