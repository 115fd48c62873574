"""Decode messages. The arrays of a decoded message are views of the received bytes.

Each function raises Malformed if ``data`` is not a valid message of its type. It raises
TooManyFields if the message has more fields than ``budget``, where each push or pull counts as 8
additional fields.

The functions _get_* decode the message data[at:end]. They subtract the number of its fields from
left[0], the remaining budget.
"""

from __future__ import annotations

import numpy as np
from google.protobuf.message import DecodeError

from psproto import ps_pb2 as pb
from psproto.dtypes import WIRE, Malformed, wire_dtype
from psproto.fields import MOST_FIELDS, NOWHERE, array, charge_part, fields, small
from psproto.messages import (
    Delta,
    Exchange,
    Exchanged,
    Pulled,
    PullMessage,
    PushMessage,
    RowsMessage,
)

MOST_HEADER = 4096  # maximum size of a request's header, in bytes
FEW_BYTES = 128  # a reply of fewer bytes is parsed by protobuf, because that is faster
_U8, _U4, _I8 = np.dtype("<u8"), np.dtype("<u4"), np.dtype("<i8")


def _get_pull(data: bytes, at: int, end: int, left: list[int]) -> PullMessage:
    header: list[bytes] = []
    keys = NOWHERE
    for number, start, stop in fields(data, at, end, left):
        if number == 3 and start >= 0:
            keys = start, stop
        elif number == 1 and start >= 0:
            header.append(data[start:stop])
    return PullMessage(small(pb.PullHeader, header, MOST_HEADER), array(data, *keys, _U8))


def _get_push(data: bytes, at: int, end: int, left: list[int]) -> PushMessage:
    header: list[bytes] = []
    keys = counts = gradients = NOWHERE
    for number, start, stop in fields(data, at, end, left):
        if number == 2 or start < 0:  # padding, or no field of this message
            continue
        if number == 1:
            header.append(data[start:stop])
        elif number == 3:
            keys = start, stop
        elif number == 4:
            counts = start, stop
        elif number == 5:
            gradients = start, stop
    parsed: pb.PushHeader = small(pb.PushHeader, header, MOST_HEADER)
    return PushMessage(
        parsed,
        array(data, *keys, _U8),
        array(data, *counts, _U4) if counts[0] != counts[1] else None,
        array(data, *gradients, WIRE[wire_dtype(parsed.dtype)]),
    )


def _get_pulled(data: bytes, at: int, end: int, left: list[int]) -> Pulled:
    header: list[bytes] = []
    at_field = dict.fromkeys((3, 4, 5, 6), NOWHERE)
    for number, start, stop in fields(data, at, end, left):
        if number == 1 and start >= 0:
            header.append(data[start:stop])
        elif number in at_field and start >= 0:
            at_field[number] = start, stop
    parsed: pb.PullResponseHeader = small(pb.PullResponseHeader, header)
    return Pulled(
        parsed,
        array(data, *at_field[3], WIRE[wire_dtype(parsed.dtype)]),
        array(data, *at_field[4], _U8),
        array(data, *at_field[5], _I8),
        array(data, *at_field[6], _U8),
    )


def _get_exchange(
    data: bytes,
    at: int,
    end: int,
    left: list[int],
    pushes: list[PushMessage],
    pulls: list[PullMessage],
) -> None:
    for number, start, stop in fields(data, at, end, left):
        if start < 0:
            continue
        if number == 1:
            charge_part(left)
            pushes.append(_get_push(data, start, stop, left))
        elif number == 2:
            charge_part(left)
            pulls.append(_get_pull(data, start, stop, left))


def _get_exchanged(
    data: bytes,
    at: int,
    end: int,
    left: list[int],
    pushes: list[pb.PushResponse],
    pulls: list[Pulled],
) -> None:
    for number, start, stop in fields(data, at, end, left):
        if number == 1 and start >= 0:
            charge_part(left)
            pushes.append(small(pb.PushResponse, [data[start:stop]]))
        elif number == 2 and start >= 0:
            charge_part(left)
            pulls.append(_get_pulled(data, start, stop, left))


def decode_pull(data: bytes, budget: int = MOST_FIELDS) -> PullMessage:
    """Decode a PullRequest that has at most ``budget`` fields."""
    return _get_pull(data, 0, len(data), [budget])


def decode_push(data: bytes, budget: int = MOST_FIELDS) -> PushMessage:
    """Decode a PushRequest that has at most ``budget`` fields."""
    return _get_push(data, 0, len(data), [budget])


def decode_delete(data: bytes, budget: int = MOST_FIELDS) -> PushMessage:
    """Decode a DeleteRequest of at most ``budget`` fields; counts and gradients stay empty."""
    return _get_push(data, 0, len(data), [budget])


def decode_exchange(data: bytes, budget: int = MOST_FIELDS) -> Exchange:
    """Decode an ExchangeRequest that has at most ``budget`` fields, nested ones included."""
    exchange = Exchange([], [])
    _get_exchange(data, 0, len(data), [budget], exchange.pushes, exchange.pulls)
    return exchange


def decode_stream_request(
    data: bytes, budget: int = MOST_FIELDS
) -> tuple[pb.StreamRequestHeader, Exchange]:
    """Decode a StreamRequest into its header (id, timeout) and its pushes and pulls.

    budget  maximum number of fields, nested ones included
    """
    header: list[bytes] = []
    exchange, left = Exchange([], []), [budget]
    for number, start, stop in fields(data, 0, len(data), left):
        if start < 0:
            continue
        if number == 1:
            header.append(data[start:stop])
        elif number == 2:
            _get_exchange(data, start, stop, left, exchange.pushes, exchange.pulls)
    return small(pb.StreamRequestHeader, header, MOST_HEADER), exchange


def decode_stream_header(data: bytes, budget: int = MOST_FIELDS) -> pb.StreamRequestHeader:
    """Decode only the header (id, timeout) of a StreamRequest; skip its pushes and pulls."""
    found = fields(data, 0, len(data), [budget])
    header = [data[start:stop] for number, start, stop in found if number == 1 and start >= 0]
    parsed: pb.StreamRequestHeader = small(pb.StreamRequestHeader, header, MOST_HEADER)
    return parsed


def decode_rows(data: bytes) -> RowsMessage:
    """Decode a WriteRowsRequest. The lengths of its arrays are not checked (see RowsMessage)."""
    table, width = b"", 0
    found = dict.fromkeys((3, 4, 5, 6), NOWHERE)
    for number, start, stop in fields(data, 0, len(data), [MOST_FIELDS]):
        if number == 1 and start >= 0:
            table = data[start : min(stop, start + MOST_HEADER)]
        elif number == 2 and start < 0:
            width = stop & 0xFFFFFFFF
        elif number in found and start >= 0:
            found[number] = start, stop
    try:
        name = table.decode()
    except UnicodeDecodeError as error:
        raise Malformed("WriteRowsRequest: the table's name is not UTF-8") from error
    view = memoryview(data)
    return RowsMessage(name, width, *(view[start:stop] for start, stop in found.values()))


def decode_pulled(data: bytes) -> Pulled:
    """Decode a PullResponse."""
    return _get_pulled(data, 0, len(data), [MOST_FIELDS])


def decode_delta(data: bytes) -> Delta:
    """Decode a Delta, a change that a server sends to its subscribers."""
    header: list[bytes] = []
    at_field = dict.fromkeys((3, 4, 5, 6, 7), NOWHERE)
    for number, start, stop in fields(data, 0, len(data), [MOST_FIELDS]):
        if number == 1 and start >= 0:
            header.append(data[start:stop])
        elif number in at_field and start >= 0:
            at_field[number] = start, stop
    parsed: pb.DeltaHeader = small(pb.DeltaHeader, header)
    return Delta(
        parsed,
        array(data, *at_field[3], _U8),
        array(data, *at_field[4], _U8),
        array(data, *at_field[5], WIRE[wire_dtype(parsed.dtype)]),
        array(data, *at_field[6], _I8),
        array(data, *at_field[7], _U8),
    )


def decode_exchanged(data: bytes) -> Exchanged:
    """Decode an ExchangeResponse."""
    exchanged = Exchanged([], [])
    _get_exchanged(data, 0, len(data), [MOST_FIELDS], exchanged.pushes, exchanged.pulls)
    return exchanged


def decode_stream_response(data: bytes) -> tuple[int, Exchanged | pb.Status]:
    """Decode a StreamResponse; return (id of the request, its reply).

    The reply is a pb.Status with the error if the request failed.
    """
    if len(data) < FEW_BYTES:
        parsed = _parsed(data)
        if parsed.HasField("error"):
            return parsed.id, parsed.error
        if not parsed.exchange.pulls:
            return parsed.id, Exchanged(list(parsed.exchange.pushes), [])
    id = 0
    exchanged, left = Exchanged([], []), [MOST_FIELDS]
    error: list[bytes] = []
    for number, start, stop in fields(data, 0, len(data), left):
        if number == 1 and start < 0:
            id = stop
        elif number == 2 and start >= 0:
            _get_exchanged(data, start, stop, left, exchanged.pushes, exchanged.pulls)
        elif number == 3 and start >= 0:
            error.append(data[start:stop])
    return id, small(pb.Status, error) if error else exchanged


def _parsed(data: bytes) -> pb.StreamResponse:
    try:
        parsed: pb.StreamResponse = pb.StreamResponse.FromString(data)
    except DecodeError as error:
        raise Malformed(f"StreamResponse: {error}") from error
    return parsed
