"""Rows on their way from a file into a table: what every file format of an import delivers.

The source of an import is a list of pieces. A piece is one file, or one array in a file. Its rows
are read in order, in batches of limited size, from any row on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from psclient.errors import InvalidArgument

BATCH_BYTES = 32 << 20  # maximum size in memory of a batch of rows


@dataclass(frozen=True, slots=True)
class Target:
    """The table to which the rows of a file will be written."""

    table: str
    dim: int
    width: int  # numbers in a row: embedding and optimizer state
    optimizer: str


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch of rows that were read from a file, in the order of the file."""

    keys: NDArray[np.uint64]  # [n]
    rows: NDArray[np.float32]  # [n, dim], or [n, width] with optimizer state
    steps: NDArray[np.int64] | None  # [n]; None: the file has no such column
    frequencies: NDArray[np.int64] | None  # [n]; None: the file has no such column


class Piece(Protocol):
    """Rows in one file, or in one array of a file."""

    @property
    def rows(self) -> int:
        """Number of rows."""

    @property
    def label(self) -> str:
        """Path of the file, and the name of the array if the file has several."""

    @property
    def state(self) -> str | None:
        """Why the optimizer state is not read; None: it is read, or the table has none."""

    def read(self, start: int = 0) -> Iterator[Rows]:
        """Yield the rows from row ``start`` on, in batches.

        Numbers need not be finite. Raises InvalidArgument, which names the file, if anything else
        is wrong.
        """

    def place(self, row: int) -> str:
        """Return where a row is in the file: its number, and its byte offset if it has one."""


def batch_rows(target: Target) -> int:
    """Return how many rows of a table a batch may have."""
    return max(1, BATCH_BYTES // (8 * target.width + 24))


def not_finite(rows: Rows) -> NDArray[np.intp]:
    """Return the indices of the rows of a batch that contain NaN or an infinity."""
    return np.flatnonzero(~np.isfinite(rows.rows).all(axis=1))


def refusal(piece: Piece, start: int, rows: Rows, row: int) -> InvalidArgument:
    """Return the error for a row that contains NaN or an infinity.

    start  number in the piece of the batch's first row
    row    index of the row in the batch
    """
    numbers = rows.rows[row]
    position = int(np.argmin(np.isfinite(numbers)))
    return InvalidArgument(
        f"{piece.label}: {piece.place(start + row)}: key {int(rows.keys[row])}: numbers must be"
        f" finite as float32, got {numbers[position]} at position {position}"
    )
