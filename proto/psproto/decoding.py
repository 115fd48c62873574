"""Bytes to messages: the arrays are views of what was received."""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from psproto import ps_pb2 as pb
from psproto.dtypes import WIRE, Malformed, wire_dtype
from psproto.messages import Delta, Exchange, Exchanged, Pulled, PullMessage, PushMessage

MOST_FIELDS = 1 << 16  # in one message; only hostile ones have as many
_U8, _U4, _I8 = np.dtype("<u8"), np.dtype("<u4"), np.dtype("<i8")
_NOWHERE = (0, 0)  # extent of a field that the message does not have


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


def _fields(data: bytes, at: int, end: int) -> list[tuple[int, int, int]]:
    """Fields of the message data[at:end]: number and extent of the contents (2), or, with -1 in
    place of the start, the number and value of a varint; number 0 for other wire types.
    """
    found = []
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
        if len(found) > MOST_FIELDS:
            raise Malformed(f"more than {MOST_FIELDS} fields in one message")
    return found


def _array(data: bytes, start: int, end: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A view of data[start:end] as items, or a copy where they are not aligned."""
    count, rest = divmod(end - start, dtype.itemsize)
    if rest:
        raise Malformed(f"{end - start} bytes are no array of {dtype.itemsize}-byte items")
    if not count:
        return np.empty(0, dtype)
    if start % dtype.itemsize:
        return np.frombuffer(data[start:end], dtype)
    return np.frombuffer(data, dtype, count, start)


def _parse(kind: Any, parts: list[bytes]) -> Any:
    """A small message from its occurrences, which protobuf merges."""
    try:
        if len(parts) == 1:
            return kind.FromString(parts[0])
        message = kind()
        for part in parts:
            message.MergeFromString(part)
    except DecodeError as error:
        raise Malformed(f"{kind.DESCRIPTOR.name}: {error}") from error
    return message


def _get_pull(data: bytes, at: int, end: int) -> PullMessage:
    header: list[bytes] = []
    keys = _NOWHERE
    for number, start, stop in _fields(data, at, end):
        if start < 0:
            continue
        if number == 1:
            header.append(data[start:stop])
        elif number == 3:
            keys = start, stop
    return PullMessage(_parse(pb.PullHeader, header), _array(data, *keys, _U8))


def _get_push(data: bytes, at: int, end: int) -> PushMessage:
    header: list[bytes] = []
    keys = counts = gradients = _NOWHERE
    for number, start, stop in _fields(data, at, end):
        if start < 0:
            continue
        if number == 1:
            header.append(data[start:stop])
        elif number == 3:
            keys = start, stop
        elif number == 4:
            counts = start, stop
        elif number == 5:
            gradients = start, stop
    parsed: pb.PushHeader = _parse(pb.PushHeader, header)
    return PushMessage(
        parsed,
        _array(data, *keys, _U8),
        _array(data, *counts, _U4) if counts[0] != counts[1] else None,
        _array(data, *gradients, WIRE[wire_dtype(parsed.dtype)]),
    )


def _get_pulled(data: bytes, at: int, end: int) -> Pulled:
    header: list[bytes] = []
    at_field = {3: (0, 0), 4: (0, 0), 5: (0, 0), 6: (0, 0)}
    for number, start, stop in _fields(data, at, end):
        if number == 1 and start >= 0:
            header.append(data[start:stop])
        elif number in at_field and start >= 0:
            at_field[number] = start, stop
    parsed: pb.PullResponseHeader = _parse(pb.PullResponseHeader, header)
    return Pulled(
        parsed,
        _array(data, *at_field[3], WIRE[wire_dtype(parsed.dtype)]),
        _array(data, *at_field[4], _U8),
        _array(data, *at_field[5], _I8),
        _array(data, *at_field[6], _U8),
    )


def _get_exchange(
    data: bytes, at: int, end: int, pushes: list[PushMessage], pulls: list[PullMessage]
) -> None:
    for number, start, stop in _fields(data, at, end):
        if start < 0:
            continue
        if number == 1:
            pushes.append(_get_push(data, start, stop))
        elif number == 2:
            pulls.append(_get_pull(data, start, stop))


def _get_exchanged(data: bytes, at: int, end: int, into: Exchanged) -> None:
    pushes, pulls = list(into.pushes), list(into.pulls)
    for number, start, stop in _fields(data, at, end):
        if number == 1 and start >= 0:
            pushes.append(_parse(pb.PushResponse, [data[start:stop]]))
        elif number == 2 and start >= 0:
            pulls.append(_get_pulled(data, start, stop))
    into.pushes, into.pulls = pushes, pulls


def decode_pull(data: bytes) -> PullMessage:
    """A PullRequest; Malformed if it is none."""
    return _get_pull(data, 0, len(data))


def decode_push(data: bytes) -> PushMessage:
    """A PushRequest; Malformed if it is none."""
    return _get_push(data, 0, len(data))


def decode_delete(data: bytes) -> PushMessage:
    """A DeleteRequest, as a push without gradients; Malformed if it is none."""
    return _get_push(data, 0, len(data))


def decode_exchange(data: bytes) -> Exchange:
    """An ExchangeRequest; Malformed if it is none."""
    pushes: list[PushMessage] = []
    pulls: list[PullMessage] = []
    _get_exchange(data, 0, len(data), pushes, pulls)
    return Exchange(pushes, pulls)


def decode_stream_request(data: bytes) -> tuple[pb.StreamRequestHeader, Exchange]:
    """A StreamRequest; Malformed if it is none."""
    header: list[bytes] = []
    pushes: list[PushMessage] = []
    pulls: list[PullMessage] = []
    for number, start, stop in _fields(data, 0, len(data)):
        if start < 0:
            continue
        if number == 1:
            header.append(data[start:stop])
        elif number == 2:
            _get_exchange(data, start, stop, pushes, pulls)
    return _parse(pb.StreamRequestHeader, header), Exchange(pushes, pulls)


def decode_pulled(data: bytes) -> Pulled:
    """A PullResponse; Malformed if it is none."""
    return _get_pulled(data, 0, len(data))


def decode_delta(data: bytes) -> Delta:
    """A Delta; Malformed if it is none."""
    header: list[bytes] = []
    at_field = {3: (0, 0), 4: (0, 0), 5: (0, 0), 6: (0, 0), 7: (0, 0)}
    for number, start, stop in _fields(data, 0, len(data)):
        if number == 1 and start >= 0:
            header.append(data[start:stop])
        elif number in at_field and start >= 0:
            at_field[number] = start, stop
    parsed: pb.DeltaHeader = _parse(pb.DeltaHeader, header)
    return Delta(
        parsed,
        _array(data, *at_field[3], _U8),
        _array(data, *at_field[4], _U8),
        _array(data, *at_field[5], WIRE[wire_dtype(parsed.dtype)]),
        _array(data, *at_field[6], _I8),
        _array(data, *at_field[7], _U8),
    )


def decode_exchanged(data: bytes) -> Exchanged:
    """An ExchangeResponse; Malformed if it is none."""
    exchanged = Exchanged([], [])
    _get_exchanged(data, 0, len(data), exchanged)
    return exchanged


def decode_stream_response(data: bytes) -> tuple[int, Exchanged | pb.Status]:
    """A StreamResponse: id, and the answer or the error; Malformed if it is none."""
    id = 0
    exchanged = Exchanged([], [])
    error: list[bytes] = []
    for number, start, stop in _fields(data, 0, len(data)):
        if number == 1 and start < 0:
            id = stop
        elif number == 2 and start >= 0:
            _get_exchanged(data, start, stop, exchanged)
        elif number == 3 and start >= 0:
            error.append(data[start:stop])
    return id, _parse(pb.Status, error) if error else exchanged
