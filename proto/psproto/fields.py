"""Read the fields of a message without a protobuf library.

Python code reads the fields one by one, so a peer could make a message expensive by many empty
fields. One budget limits the fields of a whole message, including the fields of nested messages.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from psproto.dtypes import Malformed, TooManyFields

MOST_PARTS = 2048  # pushes and pulls that a message may always have
FIELDS_PER_PART = 16  # that each of them may then have
MOST_FIELDS = MOST_PARTS * FIELDS_PER_PART  # limit of a message; a push or pull adds _PART
NOWHERE = (0, 0)  # extent of a field that the message does not have
_PART = 8  # fields that cost as much as a push or pull


def _read_varint(data: bytes, at: int, end: int, bits: int = 64) -> tuple[int, int]:
    """Return a number of up to ``bits`` bits and the offset after it; leading zeros are allowed."""
    value = shift = 0
    while at < end and shift < bits:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if value >> bits:
                break
            return value, at
        shift += 7
    raise Malformed(f"no varint of {bits} bits ends at byte {at}")


def fields(data: bytes, at: int, end: int, left: list[int]) -> list[tuple[int, int, int]]:
    """Return the fields of the message data[at:end].

    left  budget: the number of fields is subtracted from left[0]; TooManyFields if it exceeds it

    A field is (number, start, end) of its contents, (number, -1, value) for a varint, and
    (0, -1, 0) for other wire types.
    """
    found: list[tuple[int, int, int]] = []
    most = left[0]
    while at < end:
        tag = data[at]
        at += 1
        if tag > 127:
            tag, at = _read_varint(data, at - 1, end, 32)
        kind = tag & 7
        if tag < 8:
            raise Malformed(f"field number 0 before byte {at}")
        if kind == 2:
            if at < end and data[at] < 128:
                length = data[at]
                at += 1
            else:
                length, at = _read_varint(data, at, end, 31)
            if length > end - at:
                raise Malformed(f"field {tag >> 3} is longer than its message at byte {at}")
            found.append((tag >> 3, at, at + length))
            at += length
        elif kind == 0:
            value, at = _read_varint(data, at, end)
            found.append((tag >> 3, -1, value))
        elif kind in (1, 5) and at + (size := 8 if kind == 1 else 4) <= end:
            found.append((0, -1, 0))  # no field has this number
            at += size
        else:
            raise Malformed(f"wire type {kind} of field {tag >> 3} at byte {at}")
        if len(found) > most:
            raise TooManyFields
    left[0] = most - len(found)
    return found


def charge_part(left: list[int]) -> None:
    """Subtract from the budget what a push or pull costs in addition to its fields."""
    left[0] -= _PART
    if left[0] < 0:
        raise TooManyFields


def array(data: bytes, start: int, end: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return data[start:end] as an array: a view, or a copy if it is not aligned."""
    count, rest = divmod(end - start, dtype.itemsize)
    if rest:
        raise Malformed(f"{end - start} bytes are no array of {dtype.itemsize}-byte items")
    if not count:
        return np.empty(0, dtype)
    if start % dtype.itemsize:
        return np.frombuffer(data[start:end], dtype)
    return np.frombuffer(data, dtype, count, start)


def small(kind: Any, parts: list[bytes], most: int = 1 << 31) -> Any:
    """Parse a small message. Protobuf merges several occurrences of a field.

    most  largest size in bytes; Malformed beyond it
    """
    if sum(map(len, parts)) > most:
        raise Malformed(f"{kind.DESCRIPTOR.name} is longer than {most} bytes")
    try:
        if len(parts) == 1:
            return kind.FromString(parts[0])
        message = kind()
        for part in parts:
            message.MergeFromString(part)
    except DecodeError as error:
        raise Malformed(f"{kind.DESCRIPTOR.name}: {error}") from error
    return message
