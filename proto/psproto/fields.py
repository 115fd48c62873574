"""Split an encoded message into its fields without a protobuf library.

Python code reads the fields one by one, so a message of many empty fields would take much time. A
budget limits the number of fields of a message, including the fields of nested messages.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from psproto.dtypes import Malformed, TooManyFields

MOST_PARTS = 2048  # pushes and pulls that fit into the budget, with FIELDS_PER_PART fields each
FIELDS_PER_PART = 16
MOST_FIELDS = MOST_PARTS * FIELDS_PER_PART  # default budget of a message, in fields
NOWHERE = (0, 0)  # (start, end) of a field that the message does not have
# number of the field that begins with this byte, if it has contents (wire type 2); else 0
_CONTENTS = tuple(tag >> 3 if tag < 128 and tag & 7 == 2 else 0 for tag in range(256))
_PART = 8  # what a push or pull costs in addition to its fields, in fields


def _read_varint(data: bytes, at: int, end: int, bits: int = 64) -> tuple[int, int]:
    """Return (the varint at data[at:end], the offset after it).

    Raises Malformed if it needs more than ``bits`` bits or does not end before ``end``. Leading
    zeros are allowed.
    """
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
    raise Malformed(f"the varint that ends at byte {at} is cut off or exceeds {bits} bits")


def _read_length(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Return the same as ``_read_varint(data, at, end, 31)``, but faster for 2, 3 and 5 bytes."""
    if at + 5 <= end:
        first, second, third, fourth, fifth = data[at : at + 5]
        if first > 127:
            if second < 128:
                return first & 127 | second << 7, at + 2
            if third < 128:
                return first & 127 | (second & 127) << 7 | third << 14, at + 3
            if fourth > 127 and fifth < 8:
                low = first & 127 | (second & 127) << 7 | (third & 127) << 14
                return low | (fourth & 127) << 21 | fifth << 28, at + 5
    return _read_varint(data, at, end, 31)


def fields(data: bytes, at: int, end: int, left: list[int]) -> list[tuple[int, int, int]]:
    """Return one tuple for each field of the message data[at:end], in order.

    left  left[0] is the budget; the number of fields is subtracted from it

    (field number, start, end)  a field with contents data[start:end]
    (field number, -1, value)   a varint
    (0, -1, 0)                  a number of fixed size, which is ignored: no message here has one

    Raises Malformed if the message is invalid, TooManyFields if it has more fields than the budget.
    """
    found: list[tuple[int, int, int]] = []
    for count in range(left[0] + 1):
        if at >= end:
            left[0] -= count
            return found
        number = _CONTENTS[data[at]]
        if number and at + 1 < end:
            length = data[at + 1]
            at += 2
            if length > 127:
                length, at = _read_length(data, at - 1, end)
            stop = at + length
            if stop > end:
                raise _too_long(number, at)
            found.append((number, at, stop))
            at = stop
        else:
            field, at = _read_field(data, at, end)
            found.append(field)
    raise TooManyFields


def _read_field(data: bytes, at: int, end: int) -> tuple[tuple[int, int, int], int]:
    """Return (the first field of data[at:end], the offset after it), whatever its type.

    The field is a tuple as in ``fields``. Raises Malformed.
    """
    tag, at = (data[at], at + 1) if data[at] < 128 else _read_varint(data, at, end, 32)
    number, kind = tag >> 3, tag & 7
    if not number:
        raise Malformed(f"the field before byte {at} has the number 0, which is not valid")
    if kind == 2:
        length, at = _read_varint(data, at, end, 31)
        if length > end - at:
            raise _too_long(number, at)
        return (number, at, at + length), at + length
    if kind == 0:
        value, at = _read_varint(data, at, end)
        return (number, -1, value), at
    if kind in (1, 5) and at + (size := 8 if kind == 1 else 4) <= end:
        return (0, -1, 0), at + size  # no field has this number
    raise Malformed(f"wire type {kind} of field {number} at byte {at} is unsupported or cut off")


def _too_long(number: int, at: int) -> Malformed:
    return Malformed(f"field {number} at byte {at} is longer than the rest of its message")


def charge_part(left: list[int]) -> None:
    """Subtract the fixed cost of one push or pull, 8 fields, from the budget left[0].

    The fields of the push or pull are subtracted separately. Raises TooManyFields if less than 8
    is left.
    """
    left[0] -= _PART
    if left[0] < 0:
        raise TooManyFields


def array(data: bytes, start: int, end: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return data[start:end] as an array: a view if it is aligned to its item size, else a copy.

    Raises Malformed if the length is not a multiple of the item size.
    """
    size = dtype.itemsize
    count, rest = divmod(end - start, size)
    if rest:
        raise Malformed(f"array length must be a multiple of {size} bytes, got {end - start}")
    if not count:
        return np.empty(0, dtype)
    if start % size:
        return np.frombuffer(data[start:end], dtype)
    return np.frombuffer(data, dtype, count, start)


def small(kind: Any, parts: list[bytes], most: int = 1 << 31) -> Any:
    """Parse a small message, which is the contents of a field, with protobuf.

    kind   protobuf class of the message
    parts  contents of the field, once for each time that it occurs; they are merged
    most   maximum size of all parts together, in bytes

    Raises Malformed if the parts are larger or invalid.
    """
    size = len(parts[0]) if len(parts) == 1 else sum(map(len, parts))
    if size > most:
        raise Malformed(f"{kind.DESCRIPTOR.name} must have at most {most} bytes, got {size}")
    try:
        if len(parts) == 1:
            return kind.FromString(parts[0])
        message = kind()
        for part in parts:
            message.MergeFromString(part)
    except DecodeError as error:
        raise Malformed(f"{kind.DESCRIPTOR.name}: {error}") from error
    return message
