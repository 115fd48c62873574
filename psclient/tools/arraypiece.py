"""Rows whose fields are arrays: keys, embeddings, optimizer state, steps, frequencies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.errors import InvalidArgument
from psclient.rows import FREQUENCIES, STEPS
from psclient.tools.incoming import Rows, Target, batch_rows
from psclient.tools.stored import BFLOAT16, Stored, as_float32, dtype_name


@dataclass(frozen=True, slots=True)
class ArrayPiece:
    """Rows in arrays of equal length.

    target     the table
    embedding  float[n, dim]; float[n] if dim is 1
    keys       integers[n]; or the key of row 0, and each row has the key of the row before, plus 1
    states     arrays whose numbers per row, one array after the other, are the optimizer state;
               empty: rows get the optimizer state of new rows
    step       integers[n]; None: the largest step pushed to the table
    frequency  integers[n]; None: 1
    state      why the optimizer state is not read; None: it is read, or the table has none
    """

    target: Target
    embedding: Stored
    keys: Stored | int
    states: tuple[Stored, ...] = ()
    step: Stored | None = None
    frequency: Stored | None = None
    state: str | None = None

    def __post_init__(self) -> None:
        """Raise InvalidArgument if the dtype or shape of an array is wrong."""
        _require_numbers(self.embedding, "embedding")
        shape, dim = tuple(self.embedding.shape), self.target.dim
        if not (len(shape) == 2 and shape[1] == dim) and not (len(shape) == dim == 1):
            raise InvalidArgument(
                f"{self.embedding.label}: 'embedding' must have shape [n, {dim}] (table"
                f" {self.target.table!r}, dim {dim}), got {list(shape)}"
            )
        named = [("key", self.keys), ("step", self.step), ("frequency", self.frequency)]
        for name, array in named:
            if array is not None and not isinstance(array, int):
                _require_integers(array, name, self.rows)
        self._require_states()

    def _require_states(self) -> None:
        """Raise InvalidArgument if the arrays of the optimizer state have a wrong dtype or size."""
        if not self.states:
            return
        for array in self.states:
            _require_numbers(array, "state")
            if not array.shape or array.shape[0] != self.rows:
                raise InvalidArgument(
                    f"{array.label}: 'state' must have {self.rows:,} rows, as the embeddings have,"
                    f" got shape {list(array.shape)}"
                )
        got, expected = sum(map(per_row, self.states)), self.target.width - self.target.dim
        if got != expected:
            raise InvalidArgument(
                f"{self.states[0].label}: 'state' must have {expected} numbers per row (optimizer"
                f" {self.target.optimizer!r}, dim {self.target.dim}), got {got}"
            )

    @property
    def label(self) -> str:
        """Path of the file with the embeddings, and the name of their array."""
        return self.embedding.label

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.embedding.shape[0]

    def read(self, start: int = 0) -> Iterator[Rows]:
        """Yield the rows from row ``start`` on, in batches."""
        arrays = [self.embedding, self.keys, *self.states, self.step, self.frequency]
        size = batch_rows(self.target)
        try:
            for first in range(start, self.rows, size):
                yield self._batch(first, min(first + size, self.rows))
        finally:
            for each in arrays:
                if each is not None and not isinstance(each, int):
                    each.close()

    def _batch(self, start: int, stop: int) -> Rows:
        """Read the rows start..stop-1."""
        matrices = [as_float32(each, start, stop) for each in (self.embedding, *self.states)]
        return Rows(
            self._keys(start, stop),
            matrices[0] if len(matrices) == 1 else np.concatenate(matrices, axis=1),
            _bounded(self.step, "step", STEPS, start, stop),
            _bounded(self.frequency, "frequency", FREQUENCIES, start, stop),
        )

    def _keys(self, start: int, stop: int) -> NDArray[np.uint64]:
        """Return the keys of the rows start..stop-1. Negative keys keep their 64 bits."""
        if isinstance(self.keys, int):
            return np.arange(self.keys + start, self.keys + stop, dtype=np.int64).view(np.uint64)
        values = self.keys.read(start, stop)
        if values.dtype.kind == "i":
            return values.astype(np.int64).view(np.uint64)
        return values.astype(np.uint64)

    def place(self, row: int) -> str:
        """Return where a row is: its number, and its byte offset in the file if it has one."""
        at = self.embedding.offset(row)
        return f"row {row} (counted from 0" + (")" if at is None else f", at byte {at:,})")


def chosen_state(
    target: Target, arrays: Sequence[Stored], optimizer: str | None
) -> tuple[tuple[Stored, ...], str | None]:
    """Return (arrays of the optimizer state to read, why none is read or None).

    arrays     the arrays of optimizer state that the file has
    optimizer  the optimizer that the file names; None: it names none
    """
    if target.width == target.dim:
        return (), None
    if not arrays:
        return (), f"the file has none that fits the optimizer {target.optimizer!r}"
    if optimizer != target.optimizer:
        named = f"is that of {optimizer!r}" if optimizer else "is of an unknown optimizer"
        return (), f"the state in the file {named}, but the table's optimizer is" + (
            f" {target.optimizer!r}; if it is the same state, name the array: --map state=NAME"
        )
    return tuple(arrays), None


def per_row(array: Stored) -> int:
    """Return how many numbers an array has per row."""
    return int(np.prod(array.shape[1:], dtype=np.int64))


def _require_numbers(array: Stored, field: str) -> None:
    """Raise InvalidArgument unless an array contains floats."""
    if array.dtype != BFLOAT16 and np.dtype(array.dtype).kind != "f":
        raise InvalidArgument(
            f"{array.label}: {field!r} must be float16, bfloat16, float32 or float64, got"
            f" {dtype_name(array.dtype)}"
        )


def _require_integers(array: Stored, field: str, rows: int) -> None:
    """Raise InvalidArgument unless an array has the shape [rows] and contains integers."""
    if array.dtype == BFLOAT16 or np.dtype(array.dtype).kind not in "iu":
        raise InvalidArgument(
            f"{array.label}: {field!r} must be integers, got {dtype_name(array.dtype)}"
        )
    if tuple(array.shape) != (rows,):
        raise InvalidArgument(
            f"{array.label}: {field!r} must have one integer for each of the {rows:,} embeddings,"
            f" got shape {list(array.shape)}"
        )


def _bounded(
    array: Stored | None, field: str, bounds: tuple[int, int], start: int, stop: int
) -> NDArray[np.int64] | None:
    """Return rows start..stop-1 of an array of integers, or None if there is no array.

    bounds  smallest and largest valid value; InvalidArgument if a value is outside
    """
    if array is None:
        return None
    values: NDArray[Any] = array.read(start, stop)
    low, high = bounds
    outside = values > high if values.dtype.kind == "u" else (values < low) | (values > high)
    if outside.any():
        row = int(outside.argmax())
        raise InvalidArgument(
            f"{array.label}: row {start + row} (counted from 0): {field!r} must be in"
            f" {low}..{high}, got {values[row]}"
        )
    return values.astype(np.int64)
