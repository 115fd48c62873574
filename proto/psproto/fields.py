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


def fields(data: bytes, at: int, end: int, left: list[int]) -> list[tuple[int, int, int]]:
    """Return one tuple for each field of the message data[at:end], in order.

    left  left[0] is the budget; the number of fields is subtracted from it

    (field number, start, end)  a field with contents data[start:end]
    (field number, -1, value)   a varint
    (0, -1, 0)                  a number of fixed size, which is ignored: no message here has one

    Raises Malformed if the message is invalid, TooManyFields if it has more fields than the budget.
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
            raise Malformed(f"the field before byte {at} has the number 0, which is not valid")
        if kind == 2:
            if at < end and data[at] < 128:
                length = data[at]
                at += 1
            else:
                length, at = _read_varint(data, at, end, 31)
            if length > end - at:
                raise Malformed(
                    f"field {tag >> 3} at byte {at} is longer than the rest of its message"
                )
            found.append((tag >> 3, at, at + length))
            at += length
        elif kind == 0:
            value, at = _read_varint(data, at, end)
            found.append((tag >> 3, -1, value))
        elif kind in (1, 5) and at + (size := 8 if kind == 1 else 4) <= end:
            found.append((0, -1, 0))  # no field has this number
            at += size
        else:
            raise Malformed(
                f"wire type {kind} of field {tag >> 3} at byte {at} is unsupported or cut off"
            )
        if len(found) > most:
            raise TooManyFields
    left[0] = most - len(found)
    return found


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
    count, rest = divmod(end - start, dtype.itemsize)
    if rest:
        raise Malformed(
            f"array length must be a multiple of {dtype.itemsize} bytes, got {end - start}"
        )
    if not count:
        return np.empty(0, dtype)
    if start % dtype.itemsize:
        return np.frombuffer(data[start:end], dtype)
    return np.frombuffer(data, dtype, count, start)


def small(kind: Any, parts: list[bytes], most: int = 1 << 31) -> Any:
    """Parse a small message, which is the contents of a field, with protobuf.

    kind   protobuf class of the message
    parts  contents of the field, once for each time that it occurs; they are merged
    most   maximum size of all parts together, in bytes

    Raises Malformed if the parts are larger or invalid.
    """
    if sum(map(len, parts)) > most:
        raise Malformed(
            f"{kind.DESCRIPTOR.name} must have at most {most} bytes, got {sum(map(len, parts))}"
        )
    try:
        if len(parts) == 1:
            return kind.FromString(parts[0])
        message = kind()
        for part in parts:
            message.MergeFromString(part)
    except DecodeError as error:
        raise Malformed(f"{kind.DESCRIPTOR.name}: {error}") from error
    return message
