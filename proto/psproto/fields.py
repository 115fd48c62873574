"""The fields of a message, read without a protobuf library.

A message is read by Python code, field by field, so a peer could make it expensive with many empty
fields. One budget limits the fields of a whole message, those of its parts included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from psproto.dtypes import Malformed, TooManyFields

MOST_PARTS = 2048  # pushes and pulls in one message, at the least
FIELDS_PER_PART = 16  # at the least, the part itself included
MOST_FIELDS = MOST_PARTS * FIELDS_PER_PART  # in one message; a part counts as several
NOWHERE = (0, 0)  # extent of a field that the message does not have
_PART = 8  # fields that a part is as expensive as


def _read_varint(data: bytes, at: int, end: int, bits: int = 64) -> tuple[int, int]:
    """A number of so many bits, and where it ends; leading zeros may fill its widest form."""
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
    """Return the fields of the message data[at:end], and take their number from ``left[0]``.

    A field is its number, the start and the end of its contents; or its number, -1 and its value
    where it is a varint; or 0, -1, 0 for other wire types.
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
    """Take from the budget what a part costs beyond its fields: a header, arrays, checks."""
    left[0] -= _PART
    if left[0] < 0:
        raise TooManyFields


def array(data: bytes, start: int, end: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A view of data[start:end] as items, or a copy where they are not aligned."""
    count, rest = divmod(end - start, dtype.itemsize)
    if rest:
        raise Malformed(f"{end - start} bytes are no array of {dtype.itemsize}-byte items")
    if not count:
        return np.empty(0, dtype)
    if start % dtype.itemsize:
        return np.frombuffer(data[start:end], dtype)
    return np.frombuffer(data, dtype, count, start)


def small(kind: Any, parts: list[bytes], most: int = 1 << 31) -> Any:
    """Return a small message of its occurrences, which protobuf merges.

    most  bytes; Malformed beyond
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
