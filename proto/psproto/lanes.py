"""Encode and decode the messages of the same-host lane, which ps.proto specifies.

A lane is a way to send exchanges without gRPC: the arrays are in regions, memory that client and
server both map. Only small messages go over a Unix socket. A slice of a region has an array of a
request. A room is a slice that receives the arrays of the reply to a pull.

The server copies every array of a request before it checks it. A client that changes a region
meanwhile can therefore do no more than one that sends other arrays.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from psproto import ps_pb2 as pb
from psproto.dtypes import WIRE, Malformed, TooManyFields, wire_dtype
from psproto.fields import FIELDS_PER_PART, MOST_PARTS, fields
from psproto.messages import Exchange, Exchanged, Pulled, PullMessage, PushMessage

LENGTH = Struct("<I")  # the size of a message, which is sent before it
MOST_MESSAGE = 4 << 20  # maximum size of a message on the socket, in bytes
HEADER = Struct("<8sQ16s")  # the header of a region: MAGIC, size in bytes, token of the lane
HEADER_BYTES = 64  # offset of the first slice in a region
MAGIC = b"pslane01"
LARGE = 4 << 20  # bytes from which NumPy puts an array into huge pages
LONGEST_PATH = 107  # bytes of a Unix socket's path
LONG = 16 << 10  # bytes of a message from which its fields are counted before it is parsed
MOST_OTHERS = 128  # maximum number of fields of a LaneRequest that are neither pushes nor pulls
ALIGNMENT = 8  # the offset of each slice is a multiple of it
GPU_ALIGNMENT = 16  # the same in GPU memory
REGISTRATION = 1 << 63  # least id of messages that only register a region of GPU memory

_CREDENTIALS = Struct("iII")  # of the process at the other end of a socket: pid, uid, gid
_U8, _U4, _I8 = np.dtype("<u8"), np.dtype("<u4"), np.dtype("<i8")
_U1 = np.dtype("u1")
_KINDS: tuple[Any, ...] = (_U1, _U4, _U8, *WIRE.values())
_NOTHING = {dtype: np.frombuffer(b"", dtype) for dtype in _KINDS}  # arrays without items
_EMPTY: dict[Any, NDArray[Any]] = {dtype: np.empty(0, dtype) for dtype in (_U8, _U4, _I8)}

Memory = Any  # an object with a writable buffer: the memory of a region


@dataclass(frozen=True)
class GpuRoom:
    """GPU memory that receives the rows of a pull.

    region   number of the region
    offset   offset in the region
    size     bytes
    address  address in this process
    owner    object that keeps the memory mapped
    """

    region: int
    offset: int
    size: int
    address: int
    owner: Any = field(repr=False)


class BadSlice(ValueError):
    """A slice of a request is not in the regions that the client has registered."""


def framed(message: bytes) -> bytes:
    """Return a message with its size before it, as it is sent over the socket."""
    return LENGTH.pack(len(message)) + message


@contextmanager
def reachable(path: Path) -> Iterator[str]:
    """Yield a name for a Unix socket's path that is short enough for the kernel, in a block."""
    if len(os.fsencode(path)) <= LONGEST_PATH:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def peer_user(connection: socket.socket) -> int:
    """Return the user id of the process at the other end of a Unix socket, asked of the kernel.

    It is the effective user id at the time of ``connect`` or ``listen``.
    """
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])


def room_bytes(n: int, dim: int, dtype: int, metadata: bool) -> int:
    """Return the size of a room for the rows of n keys, in bytes.

    dtype     pb.DType of the embeddings
    metadata  whether versions, steps and frequencies follow
    """
    size = n * dim * WIRE[dtype].itemsize
    return _aligned(size) + 24 * n if metadata else size


def _aligned(size: int) -> int:
    return size + ALIGNMENT - 1 & -ALIGNMENT


# ---- the client


def exchange_bytes(exchange: Exchange) -> int:
    """Return the size of the slices and rooms of an exchange, with the gaps that align them."""
    size = 0
    for push in exchange.pushes:
        size += (push.keys.nbytes + 7 & -8) + (push.gradients.nbytes + 7 & -8)
        if push.counts is not None:
            size += push.counts.nbytes + 7 & -8
    for pull in exchange.pulls:
        size += (pull.keys.nbytes + 7 & -8) + (_room_of(pull) + 7 & -8)
    return size


def _room_of(pull: PullMessage) -> int:
    """Return the size of the room of a pull, in bytes."""
    head = pull.header
    if head.prefetch or pull.gpu_room is not None:
        return 0
    return room_bytes(len(pull.keys), pull.dim, wire_dtype(head.dtype), head.with_metadata)


def encode_request(
    header: pb.StreamRequestHeader, exchange: Exchange, memory: Memory, region: int, at: int
) -> tuple[bytes, list[int]]:
    """Copy the arrays of an exchange to a region.

    Returns (bytes of the LaneRequest, offset of the room of each pull in the region).

    header  id and timeout of the request
    memory  memory of the region
    region  number of the region
    at      offset in the region, a multiple of 8; ``exchange_bytes(exchange)`` bytes there are
            overwritten

    The gradients in ``exchange`` are replaced by their copies in the region: the arrays of the
    caller may change, and the request may have to be encoded again.
    """
    request = pb.LaneRequest(id=header.id, timeout_ms=header.timeout_ms)
    for push in exchange.pushes:
        sent = request.pushes.add()
        sent.header.CopyFrom(push.header)
        _put(sent.keys, push.keys, memory, region, at)
        at += push.keys.nbytes + 7 & -8
        if push.counts is not None:
            _put(sent.counts, push.counts, memory, region, at)
            at += push.counts.nbytes + 7 & -8
        push.gradients = _put(sent.gradients, push.gradients, memory, region, at)
        at += push.gradients.nbytes + 7 & -8
    rooms = []
    for pull in exchange.pulls:
        asked = request.pulls.add()
        asked.header.CopyFrom(pull.header)
        _put(asked.keys, pull.keys, memory, region, at)
        at += pull.keys.nbytes + 7 & -8
        if (far := pull.gpu_room) is not None:
            asked.rows.region, asked.rows.offset, asked.rows.size = far.region, far.offset, far.size
        room, size = asked.room, _room_of(pull)
        room.region, room.offset, room.size = region, at, size
        rooms.append(at)
        at += size + 7 & -8
    return request.SerializeToString(), rooms


def _put(
    slice: pb.Slice, array: NDArray[Any], memory: Memory, region: int, at: int
) -> NDArray[Any]:
    """Copy an array to a region; describe it in ``slice``; return the copy, which is flat.

    memory  memory of the region
    region  number of the region
    at      offset in the region
    """
    slice.region, slice.offset, slice.size = region, at, array.nbytes
    if not array.nbytes:
        return array
    copy = np.frombuffer(memory, array.dtype, array.size, at)
    copy[:] = array.reshape(-1)
    return copy


def decode_response(data: bytes) -> pb.StreamResponse:
    """Parse a StreamResponse without arrays. Raises Malformed."""
    try:
        reply: pb.StreamResponse = pb.StreamResponse.FromString(data)
    except DecodeError as error:
        raise Malformed(f"StreamResponse: {error}") from error
    return reply


def exchanged(
    reply: pb.ExchangeResponse, exchange: Exchange, memory: Memory, rooms: Sequence[int]
) -> Exchanged:
    """Return the reply to an exchange, with arrays that are views of the rooms.

    memory  memory of the region with the rooms
    rooms   offset of the room of each pull

    Raises Malformed if the reply has another number of pulls.
    """
    answers = reply.pulls
    if len(answers) != len(exchange.pulls):
        raise Malformed(f"expected {len(exchange.pulls)} pulls, got {len(answers)}")
    pulls = [
        _pulled(answer.header, pull, memory, at)
        for answer, pull, at in zip(answers, exchange.pulls, rooms, strict=True)
    ]
    return Exchanged(list(reply.pushes), pulls)


def _pulled(header: pb.PullResponseHeader, pull: PullMessage, memory: Memory, at: int) -> Pulled:
    """Return the reply to a pull. It has no arrays if the table has another dim than expected."""
    n, dim, head = len(pull.keys), pull.dim, pull.header
    dtype = wire_dtype(header.dtype)
    if not n or head.prefetch or header.dim != dim or dtype != wire_dtype(head.dtype):
        return Pulled(header, np.empty(0, WIRE[dtype]), _EMPTY[_U8], _EMPTY[_I8], _EMPTY[_U8])
    if pull.gpu_room is not None:
        nothing = np.empty(0, WIRE[dtype]), _EMPTY[_U8], _EMPTY[_I8], _EMPTY[_U8]
        return Pulled(header, *nothing, pull.gpu_room)
    columns = _columns(memory, at, n, dim, dtype, head.with_metadata)
    for column in columns if head.with_metadata else columns[:1]:
        column.flags.writeable = False  # like those of a gRPC message, so that kernels are shared
    return Pulled(header, *columns)


# ---- the server


def parse(data: bytes) -> pb.LaneRequest:
    """Parse a LaneRequest. Raises Malformed.

    Empty pushes and pulls take two bytes each, but protobuf needs hundreds for each.
    """
    if len(data) > LONG:
        fields(data, 0, len(data), [MOST_PARTS + MOST_OTHERS])
    try:
        request: pb.LaneRequest = pb.LaneRequest.FromString(data)
    except DecodeError as error:
        raise Malformed(f"LaneRequest: {error}") from error
    return request


def request_bytes(request: pb.LaneRequest) -> int:
    """Return the size of the slices of a request, in bytes, as the client claims it."""
    size = 0
    for push in request.pushes:
        size += push.keys.size + push.counts.size + push.gradients.size
    for pull in request.pulls:
        size += pull.keys.size
    return size


def decode_request(
    request: pb.LaneRequest,
    regions: Mapping[int, Memory],
    budget: int,
    gpu_regions: Mapping[int, Any] | None = None,
) -> Exchange:
    """Return the exchange of a request, with copies of its arrays and views of its rooms.

    regions      the regions of the client in host memory, by number
    budget       maximum number of fields; each push or pull counts as FIELDS_PER_PART (16)
    gpu_regions  those in GPU memory: objects with ``address`` and ``size``

    Raises BadSlice, Malformed if a dtype is unknown, and TooManyFields.
    """
    if FIELDS_PER_PART * (len(request.pushes) + len(request.pulls)) > budget:
        raise TooManyFields
    pushes, pulls = [], []
    for push in request.pushes:
        header = push.header
        keys = _copied(regions, push.keys, _U8, "keys")
        counts = _copied(regions, push.counts, _U4, "counts")
        gradients = _copied(regions, push.gradients, WIRE[wire_dtype(header.dtype)], "gradients")
        pushes.append(PushMessage(header, keys, counts if len(counts) else None, gradients))
    for pull in request.pulls:
        keys = _copied(regions, pull.keys, _U8, "keys")
        room = _room(regions, pull.room)
        far = _gpu_room(pull, gpu_regions or {}) if pull.HasField("rows") else None
        pulls.append(PullMessage(pull.header, keys, room=room, gpu_room=far))
    return Exchange(pushes, pulls)


def _copied(
    regions: Mapping[int, Memory], at: pb.Slice, dtype: np.dtype[Any], field: str
) -> NDArray[Any]:
    """Return a copy of a slice as an array, which cannot be written, like one of a gRPC message.

    field  name of the slice, for errors

    Raises BadSlice.
    """
    size, offset = at.size, at.offset
    if not size:
        return _NOTHING[dtype]
    memory = regions.get(at.region, b"")
    end = offset + size
    if size % dtype.itemsize or offset % ALIGNMENT or end > len(memory) or offset < HEADER_BYTES:
        raise _bad_slice(memory, at, dtype.itemsize, field)
    if size < LARGE:
        return np.frombuffer(memory[offset:end], dtype)
    array = np.frombuffer(memory, dtype, size // dtype.itemsize, offset).copy()  # in huge pages
    array.setflags(write=False)
    return array


def _room(regions: Mapping[int, Memory], at: pb.Slice) -> NDArray[np.uint8]:
    """Return the memory of the room that is the slice ``at``. Raises BadSlice."""
    size, offset = at.size, at.offset
    if not size:
        return _NOTHING[_U1]
    memory = regions.get(at.region, b"")
    if offset % ALIGNMENT or offset + size > len(memory) or offset < HEADER_BYTES:
        raise _bad_slice(memory, at, 1, "room")
    return np.frombuffer(memory, np.uint8, size, offset)


def _bad_slice(memory: Memory, at: pb.Slice, item: int, field: str) -> BadSlice:
    """Return the error about a slice that breaks a rule.

    memory  memory of its region; empty: the region is not registered
    item    size of an item of the array, in bytes
    field   name of the slice
    """
    if not len(memory):
        return BadSlice(f"field {field!r}: region {at.region} is not registered")
    return BadSlice(
        f"field {field!r}: expected a multiple of {item} bytes, at a multiple of {ALIGNMENT}, from"
        f" {HEADER_BYTES} on, in region {at.region} of {len(memory)} bytes; got {at.size} bytes at"
        f" {at.offset}"
    )


def _gpu_room(pull: pb.LanePull, regions: Mapping[int, Any]) -> GpuRoom:
    """Check the GPU memory that receives the rows of a pull, and return it. Raises BadSlice."""
    head, at = pull.header, pull.rows
    if wire_dtype(head.dtype) != pb.DTYPE_FLOAT32 or head.with_metadata or head.prefetch:
        raise BadSlice("field 'rows': only for pulls of float32 without metadata")
    memory = regions.get(at.region)
    if memory is None:
        raise BadSlice(f"field 'rows': region {at.region} of GPU memory is not registered")
    if at.offset % GPU_ALIGNMENT or not at.offset <= memory.size - at.size:
        raise BadSlice(
            f"field 'rows': expected a multiple of {GPU_ALIGNMENT} as offset, in region {at.region}"
            f" of {memory.size} bytes; got {at.size} bytes at {at.offset}"
        )
    return GpuRoom(at.region, at.offset, at.size, memory.address + at.offset, memory)


def rows_in(room: NDArray[np.uint8], n: int, dim: int) -> NDArray[np.float32]:
    """Return the part of a room that receives embeddings, as float32[n, dim].

    room  room of at least ``4 * n * dim`` bytes
    """
    return room[: 4 * n * dim].view(np.float32).reshape(n, dim)


def fill(room: NDArray[np.uint8], pulled: Pulled) -> None:
    """Copy the arrays of a reply to its room, except those that are there already.

    room  room whose size is that of the arrays, see ``room_bytes``
    """
    n = pulled.embeddings.size // max(pulled.header.dim, 1)
    columns = _columns(
        room, 0, n, pulled.header.dim, wire_dtype(pulled.header.dtype), len(pulled.versions) > 0
    )
    arrays = (pulled.embeddings.reshape(-1), pulled.versions, pulled.steps, pulled.frequencies)
    for column, array in zip(columns, arrays, strict=True):
        if len(column) and not np.may_share_memory(column, array):
            column[:] = array


def _columns(
    memory: Memory, at: int, n: int, dim: int, dtype: int, metadata: bool
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return (embeddings, versions, steps, frequencies) as flat views of a room.

    memory  memory that contains the room
    at      offset of the room in it
    n       number of keys; not 0
    """
    kind = WIRE[dtype]
    embeddings = np.frombuffer(memory, kind, n * dim, at)
    if not metadata:
        return embeddings, _EMPTY[_U8], _EMPTY[_I8], _EMPTY[_U8]
    at += _aligned(n * dim * kind.itemsize)
    versions, steps, frequencies = (
        np.frombuffer(memory, each, n, at + 8 * n * i) for i, each in enumerate((_U8, _I8, _U8))
    )
    return embeddings, versions, steps, frequencies


def encode_response(id: int, answer: Exchanged | pb.Status) -> bytes:
    """Return the bytes of a StreamResponse without arrays; a Status reports an error."""
    reply = pb.StreamResponse(id=id)
    if isinstance(answer, pb.Status):
        reply.error.CopyFrom(answer)
        return bytes(reply.SerializeToString())
    exchange = reply.exchange
    exchange.SetInParent()
    exchange.pushes.extend(answer.pushes)
    for pulled in answer.pulls:
        exchange.pulls.add().header.CopyFrom(pulled.header)
    return bytes(reply.SerializeToString())
