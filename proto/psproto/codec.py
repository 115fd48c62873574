"""Arrays <-> the messages of ps.proto that carry them.

A protobuf library copies a ``bytes`` field when it parses and again at each access. Here arrays are
views of the received message, and are copied once into the one that is sent:

    message  = *( header | padding | array | message )
    header   = tag length <small message, parsed by protobuf>
    padding  = tag length *7 zero              aligns the array that follows to its item size
    array    = tag length <little-endian items>
    length   = varint; five bytes wide for messages, whose lengths are known only afterwards

Any field order, unknown fields and unaligned arrays (copied) are understood, as from any protobuf
library; tests hold both against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numba import njit
from numpy.typing import NDArray

from psproto import ps_pb2 as pb

Keys = NDArray[np.uint64]
Rows = NDArray[np.float32]

WIRE: dict[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_BFLOAT16: np.dtype("<u2"),  # numpy has no bfloat16; these are its bits
    pb.DTYPE_FLOAT16: np.dtype("<f2"),
}
STEPS = 1 << 47  # the step of a push is in -STEPS..STEPS - 1
MOST_FIELDS = 1 << 16  # in one message; only hostile ones have as many
_U8, _U4, _I8 = np.dtype("<u8"), np.dtype("<u4"), np.dtype("<i8")
_BYTE = [bytes((byte,)) for byte in range(256)]
_PADDING = [bytes((2 << 3 | 2, spare)) + bytes(spare) for spare in range(8)]
_NOWHERE = (0, 0)  # extent of a field that the message does not have


class Malformed(ValueError):
    """The bytes are not the message they claim to be."""


@dataclass(slots=True)
class Pull:
    """One PullRequest."""

    header: pb.PullHeader
    keys: Keys  # uint64[n]


@dataclass(slots=True)
class Push:
    """One PushRequest."""

    header: pb.PushHeader
    keys: Keys  # uint64[n]
    counts: NDArray[np.uint32] | None  # [n]; None: each 1
    gradients: NDArray[Any]  # flat, in the wire dtype


@dataclass(slots=True)
class Pulled:
    """One PullResponse."""

    header: pb.PullResponseHeader
    embeddings: NDArray[Any]  # flat or [n, dim], in the wire dtype
    versions: NDArray[np.uint64]  # empty where not asked for, and so the next two
    steps: NDArray[np.int64]
    frequencies: NDArray[np.uint64]


@dataclass(slots=True)
class Exchange:
    """One ExchangeRequest."""

    pushes: Sequence[Push]
    pulls: Sequence[Pull]


@dataclass(slots=True)
class Exchanged:
    """One ExchangeResponse."""

    pushes: Sequence[pb.PushResponse]
    pulls: Sequence[Pulled]


@dataclass(slots=True)
class Delta:
    """One Delta. Arrays that it has no use for are empty."""

    header: pb.DeltaHeader
    keys: Keys  # uint64[n]
    versions: NDArray[np.uint64]  # [n]; empty: the header's
    rows: NDArray[Any]  # flat or [n, width], in the wire dtype
    steps: NDArray[np.int64]  # [n] or empty, and so the next
    frequencies: NDArray[np.uint64]


# ---- numbers


def wire_dtype(number: int) -> int:
    """The dtype that a header means: unspecified is float32; Malformed if unknown."""
    number = number or pb.DTYPE_FLOAT32
    if number not in WIRE:
        raise Malformed(f"dtype {number} is not one of {sorted(WIRE)}")
    return number


@njit(nogil=True, cache=True, error_model="numpy")
def _round_bfloat16(bits: Any, out: Any) -> None:
    for i in range(bits.shape[0]):
        b = bits[i]
        rounded = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[i] = (b >> np.uint32(16)) | np.uint32(0x40) if nan else rounded


def to_wire(values: Rows, dtype: int) -> NDArray[Any]:
    """float32 numbers as they travel: themselves, or the nearest 16-bit ones, ties to even."""
    if dtype == pb.DTYPE_FLOAT32:
        return values
    if dtype == pb.DTYPE_FLOAT16:
        with np.errstate(over="ignore"):  # infinity; the server refuses it by name
            return values.astype(np.float16)
    values = np.ascontiguousarray(values)
    out = np.empty(values.shape, np.uint16)
    _round_bfloat16(values.reshape(-1).view(np.uint32), out.reshape(-1))
    return out


def from_wire(values: NDArray[Any], dtype: int) -> Rows:
    """The float32 numbers that ``values`` stand for; a view where they are float32."""
    if dtype == pb.DTYPE_FLOAT32:
        return values
    if dtype == pb.DTYPE_FLOAT16:
        return values.astype(np.float32)
    return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)


# ---- writing


class _Writer:
    """Collects the pieces of a message and knows the offset that the next one will have."""

    def __init__(self) -> None:
        self._pieces: list[Any] = []
        self._at = 0

    def message(self) -> bytes:
        """The message; the only copy of its arrays."""
        return b"".join(self._pieces)

    def small(self, field: int, body: bytes) -> None:
        """A header, a number already encoded, or nothing if it is empty."""
        if body:
            self._append(_BYTE[field << 3 | 2] + _varint(len(body)) + body)

    def number(self, field: int, value: int) -> None:
        if value:
            self._append(_BYTE[field << 3] + _varint(value))

    def array(self, field: int, array: NDArray[Any] | None) -> None:
        """An array, after the padding that aligns it."""
        if array is None or not array.size:
            return
        size, item = array.nbytes, array.itemsize
        head = _BYTE[field << 3 | 2] + _varint(size)
        at = self._at + len(head)
        if at % item:
            padding = _PADDING[-(at + 2) % item]
            self._pieces.append(padding)
            at += len(padding)
        self._pieces += (head, array.data)
        self._at = at + size

    def begin(self, field: int) -> tuple[int, int, int]:
        """Start a message within the message; ``end`` takes what this returns."""
        self._append(bytes(6))
        return field, len(self._pieces) - 1, self._at

    def end(self, mark: tuple[int, int, int]) -> None:
        field, piece, start = mark
        n = self._at - start
        wide = (
            n & 127 | 128,
            n >> 7 & 127 | 128,
            n >> 14 & 127 | 128,
            n >> 21 & 127 | 128,
            n >> 28,
        )
        self._pieces[piece] = bytes((field << 3 | 2, *wide))

    def _append(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._at += len(piece)


def _varint(value: int) -> bytes:
    if value < 128:
        return _BYTE[value]
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _put_push(writer: _Writer, push: Push) -> None:
    writer.small(1, push.header.SerializeToString())
    writer.array(3, push.keys)
    writer.array(4, push.counts)
    writer.array(5, push.gradients)


def _put_pull(writer: _Writer, pull: Pull) -> None:
    writer.small(1, pull.header.SerializeToString())
    writer.array(3, pull.keys)


def _put_pulled(writer: _Writer, pulled: Pulled) -> None:
    writer.small(1, pulled.header.SerializeToString())
    writer.array(3, pulled.embeddings)
    writer.array(4, pulled.versions)
    writer.array(5, pulled.steps)
    writer.array(6, pulled.frequencies)


def _put_exchange(writer: _Writer, exchange: Exchange) -> None:
    for push in exchange.pushes:
        mark = writer.begin(1)
        _put_push(writer, push)
        writer.end(mark)
    for pull in exchange.pulls:
        mark = writer.begin(2)
        _put_pull(writer, pull)
        writer.end(mark)


def _put_exchanged(writer: _Writer, exchanged: Exchanged) -> None:
    for push in exchanged.pushes:
        mark = writer.begin(1)
        writer._append(push.SerializeToString())
        writer.end(mark)
    for pulled in exchanged.pulls:
        mark = writer.begin(2)
        _put_pulled(writer, pulled)
        writer.end(mark)


def encode_pull(pull: Pull) -> bytes:
    """A PullRequest."""
    writer = _Writer()
    _put_pull(writer, pull)
    return writer.message()


def encode_push(push: Push) -> bytes:
    """A PushRequest."""
    writer = _Writer()
    _put_push(writer, push)
    return writer.message()


def encode_delete(header: pb.PushHeader, keys: Keys) -> bytes:
    """A DeleteRequest."""
    writer = _Writer()
    writer.small(1, header.SerializeToString())
    writer.array(3, keys)
    return writer.message()


def encode_exchange(exchange: Exchange) -> bytes:
    """An ExchangeRequest."""
    writer = _Writer()
    _put_exchange(writer, exchange)
    return writer.message()


def encode_stream_request(header: pb.StreamRequestHeader, exchange: Exchange) -> bytes:
    """A StreamRequest."""
    writer = _Writer()
    writer.small(1, header.SerializeToString())
    mark = writer.begin(2)
    _put_exchange(writer, exchange)
    writer.end(mark)
    return writer.message()


def encode_pulled(pulled: Pulled) -> bytes:
    """A PullResponse."""
    writer = _Writer()
    _put_pulled(writer, pulled)
    return writer.message()


def encode_delta(delta: Delta) -> bytes:
    """A Delta."""
    writer = _Writer()
    writer.small(1, delta.header.SerializeToString())
    writer.array(3, delta.keys)
    writer.array(4, delta.versions)
    writer.array(5, delta.rows)
    writer.array(6, delta.steps)
    writer.array(7, delta.frequencies)
    return writer.message()


def encode_exchanged(exchanged: Exchanged) -> bytes:
    """An ExchangeResponse."""
    writer = _Writer()
    _put_exchanged(writer, exchanged)
    return writer.message()


def encode_stream_response(id: int, answer: Exchanged | pb.Status) -> bytes:
    """A StreamResponse."""
    writer = _Writer()
    writer.number(1, id)
    if isinstance(answer, pb.Status):
        body = answer.SerializeToString()  # an empty one too: it says that this is no exchange
        writer._append(_BYTE[3 << 3 | 2] + _varint(len(body)) + body)
    else:
        mark = writer.begin(2)
        _put_exchanged(writer, answer)
        writer.end(mark)
    return writer.message()


# ---- reading


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


def _get_pull(data: bytes, at: int, end: int) -> Pull:
    header: list[bytes] = []
    keys = _NOWHERE
    for number, start, stop in _fields(data, at, end):
        if start < 0:
            continue
        if number == 1:
            header.append(data[start:stop])
        elif number == 3:
            keys = start, stop
    return Pull(_parse(pb.PullHeader, header), _array(data, *keys, _U8))


def _get_push(data: bytes, at: int, end: int) -> Push:
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
    return Push(
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


def _get_exchange(data: bytes, at: int, end: int, pushes: list[Push], pulls: list[Pull]) -> None:
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


def decode_pull(data: bytes) -> Pull:
    """A PullRequest; Malformed if it is none."""
    return _get_pull(data, 0, len(data))


def decode_push(data: bytes) -> Push:
    """A PushRequest; Malformed if it is none."""
    return _get_push(data, 0, len(data))


def decode_delete(data: bytes) -> Push:
    """A DeleteRequest, as a push without gradients; Malformed if it is none."""
    return _get_push(data, 0, len(data))


def decode_exchange(data: bytes) -> Exchange:
    """An ExchangeRequest; Malformed if it is none."""
    pushes: list[Push] = []
    pulls: list[Pull] = []
    _get_exchange(data, 0, len(data), pushes, pulls)
    return Exchange(pushes, pulls)


def decode_stream_request(data: bytes) -> tuple[pb.StreamRequestHeader, Exchange]:
    """A StreamRequest; Malformed if it is none."""
    header: list[bytes] = []
    pushes: list[Push] = []
    pulls: list[Pull] = []
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
