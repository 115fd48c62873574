"""Encode messages as bytes. Arrays are copied only once, into the result.

The functions _put_* append the fields of a message to a _Writer.
"""

from __future__ import annotations

from struct import Struct
from typing import Any

from numpy.typing import NDArray

from psproto import ps_pb2 as pb
from psproto.messages import Delta, Exchange, Exchanged, Keys, Pulled, PullMessage, PushMessage

_NESTED = Struct("<BIB")  # tag and length of a nested message; the length is a varint of 5 bytes
_UNKNOWN = bytes(6)  # in place of the tag and length of a nested message until ``end``
_BYTE = [bytes((byte,)) for byte in range(256)]
_PADDING = [bytes((2 << 3 | 2, spare)) + bytes(spare) for spare in range(8)]


class _Writer:
    """Collects the fields of a message, and joins them in the end."""

    def __init__(self) -> None:
        self._pieces: list[Any] = []
        self._at = 0

    def message(self) -> bytes:
        """Return the message: the appended fields, joined. This copies the arrays, once."""
        return b"".join(self._pieces)

    def small(self, field: int, body: bytes) -> None:
        """Append a field with the contents ``body``: bytes, UTF-8 text or an encoded message.

        Appends nothing if ``body`` is empty.
        """
        if body:
            piece = _BYTE[field << 3 | 2] + varint(len(body)) + body
            self._pieces.append(piece)
            self._at += len(piece)

    def number(self, field: int, value: int) -> None:
        """Append an unsigned number as a varint field; append nothing if it is 0."""
        if value:
            self._append(_BYTE[field << 3] + varint(value))

    def array(self, field: int, array: NDArray[Any] | None) -> None:
        """Append an array, after padding that aligns it to its item size.

        Appends nothing if the array is empty or None.
        """
        if array is None or not (size := array.nbytes):
            return
        item = array.itemsize
        head = _BYTE[field << 3 | 2] + varint(size)
        at = self._at + len(head)
        if at % item:
            padding = _PADDING[-(at + 2) % item]
            self._pieces.append(padding)
            at += len(padding)
        self._pieces += (head, array.data)
        self._at = at + size

    def begin(self, field: int) -> tuple[int, int, int]:
        """Start a nested message in ``field``: what is appended until ``end`` is part of it.

        Returns a mark, the argument for ``end``.
        """
        pieces = self._pieces
        pieces.append(_UNKNOWN)
        self._at += 6
        return field, len(pieces) - 1, self._at

    def end(self, mark: tuple[int, int, int]) -> None:
        """End the nested message for which ``begin`` returned ``mark``, and fill in its length."""
        field, piece, start = mark
        n = self._at - start
        low = n & 0x7F | n << 1 & 0x7F00 | n << 2 & 0x7F0000 | n << 3 & 0x7F000000
        self._pieces[piece] = _NESTED.pack(field << 3 | 2, low | 0x80808080, n >> 28)

    def _append(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._at += len(piece)


def varint(value: int) -> bytes:
    """Return an unsigned number as a protobuf varint: 7 bits per byte, lowest first."""
    if value < 1 << 7:
        return _BYTE[value]
    if value < 1 << 14:
        return _BYTE[value & 127 | 128] + _BYTE[value >> 7]
    if value < 1 << 21:
        return _BYTE[value & 127 | 128] + _BYTE[value >> 7 & 127 | 128] + _BYTE[value >> 14]
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _put_push(writer: _Writer, push: PushMessage) -> None:
    writer.small(1, push.header.SerializeToString())
    writer.array(3, push.keys)
    writer.array(4, push.counts)
    writer.array(5, push.gradients)


def _put_pull(writer: _Writer, pull: PullMessage) -> None:
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


def encode_pull(pull: PullMessage) -> bytes:
    """Return the bytes of a PullRequest."""
    writer = _Writer()
    _put_pull(writer, pull)
    return writer.message()


def encode_push(push: PushMessage) -> bytes:
    """Return the bytes of a PushRequest."""
    writer = _Writer()
    _put_push(writer, push)
    return writer.message()


def encode_delete(header: pb.PushHeader, keys: Keys) -> bytes:
    """Return the bytes of a DeleteRequest for ``keys``, uint64[n]."""
    writer = _Writer()
    writer.small(1, header.SerializeToString())
    writer.array(3, keys)
    return writer.message()


def encode_exchange(exchange: Exchange) -> bytes:
    """Return the bytes of an ExchangeRequest."""
    writer = _Writer()
    _put_exchange(writer, exchange)
    return writer.message()


def encode_stream_request(header: pb.StreamRequestHeader, exchange: Exchange) -> bytes:
    """Return the bytes of a StreamRequest."""
    writer = _Writer()
    writer.small(1, header.SerializeToString())
    mark = writer.begin(2)
    _put_exchange(writer, exchange)
    writer.end(mark)
    return writer.message()


def encode_pulled(pulled: Pulled) -> bytes:
    """Return the bytes of a PullResponse."""
    writer = _Writer()
    _put_pulled(writer, pulled)
    return writer.message()


def encode_delta(delta: Delta) -> bytes:
    """Return the bytes of a Delta."""
    writer = _Writer()
    writer.small(1, delta.header.SerializeToString())
    writer.array(3, delta.keys)
    writer.array(4, delta.versions)
    writer.array(5, delta.rows)
    writer.array(6, delta.steps)
    writer.array(7, delta.frequencies)
    return writer.message()


def encode_exchanged(exchanged: Exchanged) -> bytes:
    """Return the bytes of an ExchangeResponse."""
    writer = _Writer()
    _put_exchanged(writer, exchanged)
    return writer.message()


def encode_stream_response(id: int, answer: Exchanged | pb.Status) -> bytes:
    """Return the bytes of a StreamResponse to the request ``id``; a Status reports an error."""
    writer = _Writer()
    writer.number(1, id)
    if isinstance(answer, pb.Status):
        body = answer.SerializeToString()  # sent even if empty, to mark the reply as an error
        writer._append(_BYTE[3 << 3 | 2] + varint(len(body)) + body)
    else:
        mark = writer.begin(2)
        _put_exchanged(writer, answer)
        writer.end(mark)
    return writer.message()
