"""Check columns of a Parquet file and convert them to NumPy arrays.

A column is accepted only if its values can be stored exactly. The functions ``require_*`` check the
column's type before any row is read. The functions ``to_*`` check and convert values. Both raise
BadColumn with the column and the rule; ``to_*`` adds the row.

Arguments of all functions:

arrow   the module pyarrow
name    name of the column, for errors
kind    pyarrow type of the column
column  pyarrow array with the column's values
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

KEYS = "integers of up to 64 bits or decimal(p, 0)"
WHOLE = "cast it to int64 (pandas turns integers with missing values into doubles)"
HASH = "turn strings into keys with psclient.hash_keys"


class BadColumn(Exception):
    """A column violates a rule.

    rule  what the column must contain, and what it contains
    row   index of the first invalid row; None if the type of the column is invalid
    """

    def __init__(self, column: str, rule: str, row: int | None = None) -> None:
        super().__init__(f"column {column!r} {rule}")
        self.row = row


# ---- types


def require_keys(arrow: Any, name: str, kind: Any) -> None:
    """Raise BadColumn unless the type ``kind`` can hold keys: integers, or decimals of scale 0."""
    types, kind = arrow.types, _stored(arrow, kind)
    if types.is_integer(kind) or (types.is_decimal(kind) and kind.scale == 0):
        return
    hint = f": {HASH}" if types.is_string(kind) or types.is_large_string(kind) else ""
    raise BadColumn(name, f"must contain {KEYS}, but its type is {kind}{hint}")


def require_integers(arrow: Any, name: str, kind: Any) -> None:
    """Raise BadColumn unless the type ``kind`` is an integer type."""
    kind = _stored(arrow, kind)
    if not arrow.types.is_integer(kind):
        hint = f": {WHOLE}" if arrow.types.is_floating(kind) else ""
        raise BadColumn(name, f"must contain integers, but its type is {kind}{hint}")


def require_lists(arrow: Any, name: str, kind: Any, length: int) -> None:
    """Raise BadColumn unless the type ``kind`` is a list of floats.

    If it is a list of fixed size, the size must be ``length``.
    """
    types = arrow.types
    fixed = types.is_fixed_size_list(kind)
    if not (fixed or types.is_list(kind) or types.is_large_list(kind)) or not types.is_floating(
        kind.value_type
    ):
        raise BadColumn(
            name, f"must contain lists of float16, float32 or float64, but its type is {kind}"
        )
    if fixed and kind.list_size != length:
        raise BadColumn(name, f"must contain lists of {length} numbers, got {kind.list_size}")


def _stored(arrow: Any, kind: Any) -> Any:
    """Return ``kind``, or the type of the dictionary's values for a dictionary-encoded column."""
    return kind.value_type if arrow.types.is_dictionary(kind) else kind


# ---- values


def to_keys(arrow: Any, name: str, column: Any) -> NDArray[np.uint64]:
    """Convert a column of keys to uint64[n]. Negative keys keep their 64 bits."""
    column = _plain(arrow, name, column)
    if arrow.types.is_decimal(column.type):
        return _decimals(arrow, name, column)
    values = column.to_numpy(zero_copy_only=False)
    if arrow.types.is_signed_integer(column.type):
        return np.asarray(values.astype(np.int64).view(np.uint64))
    return np.asarray(values.astype(np.uint64))


def _decimals(arrow: Any, name: str, column: Any) -> NDArray[np.uint64]:
    """Convert a column of decimals of scale 0 to keys, uint64[n]."""
    column = column.cast(arrow.decimal128(38, 0))
    words = np.frombuffer(column.buffers()[1], np.uint64).reshape(-1, 2)
    low, high = words[column.offset : column.offset + len(column)].T
    negative = (high == np.uint64(2**64 - 1)) & (low >= np.uint64(2**63))
    _refuse(name, "must contain keys in -2^63..2^64-1", (high != 0) & ~negative)
    return np.ascontiguousarray(low)


def to_integers(arrow: Any, name: str, column: Any, bounds: tuple[int, int]) -> NDArray[np.int64]:
    """Convert a column of integers to int64[n].

    bounds  smallest and largest valid value; BadColumn if a value is outside
    """
    low, high = bounds
    values = _plain(arrow, name, column).to_numpy(zero_copy_only=False)
    outside = values > high
    if values.dtype.kind == "i":
        outside |= values < low
    if outside.any():
        row = int(outside.argmax())
        raise BadColumn(name, f"must be in {low}..{high}, got {values[row]}", row)
    return np.asarray(values.astype(np.int64))


def to_matrix(name: str, column: Any, length: int, *, finite: bool = True) -> NDArray[np.float32]:
    """Convert a column of lists to float32[n, length].

    Raises BadColumn if a list does not have ``length`` numbers, or, with ``finite``, if a number is
    not finite as float32.
    """
    n = len(column)
    _refuse_nulls(name, column)
    numbers = column.flatten()
    if not hasattr(column.type, "list_size"):
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        wrong = lengths != length
        if wrong.any():
            row = int(wrong.argmax())
            raise BadColumn(name, f"must have {length} numbers, got {lengths[row]}", row)
    if numbers.null_count:
        row = int(numbers.is_null().to_numpy(zero_copy_only=False).argmax()) // length
        raise BadColumn(name, "must not contain null", row)
    values = numbers.to_numpy(zero_copy_only=False).reshape(n, length)
    with np.errstate(over="ignore"):
        matrix = np.asarray(values.astype(np.float32, copy=False))
    if finite and not np.isfinite(matrix).all():
        row, position = np.argwhere(~np.isfinite(matrix))[0].tolist()
        rule = f"must be finite as float32, got {values[row, position]} at position {position}"
        raise BadColumn(name, rule, row)
    return matrix


def _plain(arrow: Any, name: str, column: Any) -> Any:
    """Return a column, decoded if it is dictionary-encoded. Raises BadColumn if it has nulls."""
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    _refuse_nulls(name, column)
    return column


def _refuse_nulls(name: str, column: Any) -> None:
    """Raise BadColumn if a column has nulls."""
    if column.null_count:
        _refuse(name, "must not be null", column.is_null().to_numpy(zero_copy_only=False))


def _refuse(name: str, rule: str, broken: NDArray[np.bool_]) -> None:
    """Raise BadColumn for the first row at which ``broken`` (bool[n]) is True, if there is one."""
    if broken.any():
        raise BadColumn(name, rule, int(broken.argmax()))
