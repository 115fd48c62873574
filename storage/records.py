"""Encode and decode the records of the version log. Each record describes one change of the shard.

    record   = head body                                depending on the frame's kind:
    1 push     = head | keys u64[count] | frequencies u64[count] | waiting u64[extra]
               | rows f32[count, width] | totals u32[extra]
    2 delete   = head | keys u64[count]
    3 create   = head | schema, a JSON object
    4 drop     = head | its schema, a JSON object
    5 barrier  = head | name, UTF-8
    6 alter    = head | schema, a JSON object
    7 write    = head | keys u64[count] | frequencies u64[count] | rows f32[count, width]
    head     = client u64 | incarnation u64 | sequence u64 | acknowledged u64 | step i64
             | time_us u64 | table u32 | width u32 | count u32 | extra u32              (64 bytes)

Little-endian; arrays begin at multiples of 8. Fields that a kind does not use are 0.

* rows     whole rows [embedding | state] after the push, so that replay needs no arithmetic and is
           idempotent
* table    number of the table, given at creation and never reused
* waiting  keys of the push that have no row yet; ``totals`` has the new values of their counters,
           so that replay is idempotent for counters, too
* extra    in a push: number of waiting keys. In a delete: its cause. In an alter: 1 if the table's
           counters were dropped, else 0
* step     in a push: the step recorded in the rows, which becomes the table's step. In a write: the
           step of its rows; the table's step does not change
* client, incarnation, sequence, acknowledged
           identify the request, so that a retry of it is recognized; client 0: not recognized

Encoding copies no array. Decoding returns read-only views of the frame.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.errors import Corrupt
from storage.kernels import Keys, Rows
from storage.segment import Frame, Part

HEAD = struct.Struct("<QQQQqQIIII")
MAX_NAME = 1024  # bytes of a barrier's name


class Kind(IntEnum):
    """The kind of a record, and of its frame."""

    PUSH = 1
    DELETE = 2
    CREATE = 3
    DROP = 4
    BARRIER = 5
    ALTER = 6
    WRITE = 7


class Cause(IntEnum):
    """The reason why rows were deleted."""

    REQUEST = 1
    STEP_TTL = 2
    TIME_TTL = 3
    NORM = 4
    CAPACITY = 5


class Origin(NamedTuple):
    """The request that caused a change: client, sequence number, step and time."""

    client: int = 0  # id of the client; 0: retries are not recognized
    incarnation: int = 0  # start of that client process
    sequence: int = 0  # number of the request within the incarnation
    acknowledged: int = 0  # the client has received the answers to all requests up to this number
    step: int = 0  # push or write: step of its rows afterwards; delete: step of the table
    time_us: int = 0  # microseconds since 1970, by the shard's clock


@dataclass(frozen=True, slots=True, eq=False)
class PushRecord:
    """The record of a push or of a write of whole rows: it created or changed rows."""

    origin: Origin
    table: int  # number of the table
    keys: Keys  # uint64[n]
    frequencies: NDArray[np.uint64]  # [n], after the push
    rows: Rows  # float32[n, width], after the push
    waiting: Keys  # uint64[m], keys of the push without a row
    totals: NDArray[np.uint32]  # [m], occurrences of ``waiting``, including this push
    imported: bool = False  # True: a write, which does not change the table's step


@dataclass(frozen=True, slots=True, eq=False)
class DeleteRecord:
    """The record of a delete of keys: of their rows, or of the counters of keys without a row."""

    origin: Origin
    table: int  # number of the table
    cause: Cause
    keys: Keys  # uint64[n]


@dataclass(frozen=True, slots=True)
class CreateRecord:
    """The record of a table's creation."""

    origin: Origin
    table: int  # number of the table
    schema: dict[str, Any]


@dataclass(frozen=True, slots=True)
class AlterRecord:
    """The record of a change of a table's settings. It changes no row."""

    origin: Origin
    table: int  # number of the table
    schema: dict[str, Any]  # with the new settings
    dropped: bool  # the counters of keys without a row were dropped


@dataclass(frozen=True, slots=True)
class DropRecord:
    """The record of a table that was dropped, with all its rows."""

    origin: Origin
    table: int  # number of the table
    schema: dict[str, Any]  # the table's last schema


@dataclass(frozen=True, slots=True)
class BarrierRecord:
    """The record of a barrier: a named mark that a client put into the log. Changes no table."""

    origin: Origin
    name: str


Record = PushRecord | DeleteRecord | CreateRecord | AlterRecord | DropRecord | BarrierRecord

CAUSES = {int(cause): cause for cause in Cause}
NO_KEYS, NO_TOTALS = np.empty(0, np.uint64), np.empty(0, np.uint32)
ORIGIN = Origin._fields


# ---- encoding: each function returns the payload of a frame as a list of buffers, in order.
#      Arrays must be C-contiguous. They are not copied, so the caller must not change them until
#      the log has written them.


def encode_push(
    origin: Origin,
    table: int,
    keys: Keys,
    frequencies: NDArray[np.uint64],
    rows: Rows,
    waiting: Keys = NO_KEYS,
    totals: NDArray[np.uint32] = NO_TOTALS,
) -> list[Part]:
    """Return the log record of a push as a list of buffers.

    origin       the request
    table        number of the table
    keys         uint64[n]
    frequencies  uint64[n]           after the push
    rows         float32[n, width]   after the push
    waiting      uint64[m]           keys of the push without a row
    totals       uint32[m]           occurrences of ``waiting``, including this push
    """
    count, width = rows.shape
    assert keys.shape == frequencies.shape == (count,)
    assert keys.dtype == frequencies.dtype == waiting.dtype == np.uint64
    assert waiting.shape == totals.shape
    assert rows.dtype == np.float32
    assert totals.dtype == np.uint32
    head = _head(origin, table, width, count, len(waiting))
    if not len(waiting):
        return [head, keys, frequencies, rows]
    return [head, keys, frequencies, waiting, rows, totals]


def encode_delete(origin: Origin, table: int, cause: Cause, keys: Keys) -> list[Part]:
    """Return the log record of deleted keys as a list of buffers.

    origin  the request, or the shard's own eviction
    table   number of the table
    keys    uint64[n]
    """
    assert keys.dtype == np.uint64
    return [_head(origin, table, 0, len(keys), cause), keys]


def encode_create(origin: Origin, table: int, schema: Mapping[str, Any]) -> list[Part]:
    """Return the log record of a created table as a list of buffers.

    table   number of the table
    schema  must be serializable as JSON
    """
    return [_head(origin, table), json.dumps(schema, sort_keys=True).encode()]


def encode_write(
    origin: Origin,
    table: int,
    keys: Keys,
    frequencies: NDArray[np.uint64],
    rows: Rows,
) -> list[Part]:
    """Return the log record of rows that were written whole, as a list of buffers.

    For the parameters see ``encode_push``.
    """
    return encode_push(origin, table, keys, frequencies, rows)


def encode_alter(
    origin: Origin, table: int, schema: Mapping[str, Any], *, dropped: bool
) -> list[Part]:
    """Return the log record of an altered table as a list of buffers.

    table    number of the table
    schema   the new schema; must be serializable as JSON
    dropped  whether the counters of keys without a row were dropped
    """
    return [_head(origin, table, extra=dropped), json.dumps(schema, sort_keys=True).encode()]


def encode_drop(origin: Origin, table: int, schema: Mapping[str, Any]) -> list[Part]:
    """Return the log record of a dropped table as a list of buffers.

    table   number of the table
    schema  the table's last schema; must be serializable as JSON
    """
    return [_head(origin, table), json.dumps(schema, sort_keys=True).encode()]


def encode_barrier(origin: Origin, name: str) -> list[Part]:
    """Return the log record of a barrier as a list of buffers.

    name  at most 1024 bytes (MAX_NAME) in UTF-8, which the caller has checked
    """
    return [_head(origin), name.encode()]


def _head(origin: Origin, table: int = 0, width: int = 0, count: int = 0, extra: int = 0) -> bytes:
    return HEAD.pack(*origin, table, width, count, extra)


# ---- decoding


def decode(frame: Frame) -> Record:
    """Return the record of a frame, with read-only views of its payload.

    Raises Corrupt if the payload is not a valid record. The caller has verified the frame's
    checksum, so Corrupt means a bug in the writer, or a record of a newer release.
    """
    where = f"record of version {frame.version}"
    if len(frame.payload) < HEAD.size:
        raise Corrupt(
            where, f"expected at least {HEAD.size} bytes in a record, got {len(frame.payload)}"
        )
    *who, table, width, count, extra = HEAD.unpack_from(frame.payload)
    origin = Origin(**dict(zip(ORIGIN, who, strict=True)))
    body = frame.payload[HEAD.size :]
    match frame.kind:
        case Kind.PUSH:
            return PushRecord(origin, table, *_push_arrays(where, body, width, count, extra))
        case Kind.WRITE:
            _require(where, body, None, extra=extra)
            arrays = _push_arrays(where, body, width, count, extra)
            return PushRecord(origin, table, *arrays, imported=True)
        case Kind.DELETE:
            _require(where, body, count * 8, width=width)
            keys = _array(body, "<u8", count, 0)
            return DeleteRecord(origin, table, _cause(where, extra), keys)
        case Kind.CREATE:
            _require(where, body, None, width=width, count=count, extra=extra)
            return CreateRecord(origin, table, _schema(where, body))
        case Kind.ALTER:
            _require(where, body, None, width=width, count=count)
            return AlterRecord(origin, table, _schema(where, body), _dropped(where, extra))
        case Kind.DROP:
            _require(where, body, None, width=width, count=count, extra=extra)
            return DropRecord(origin, table, _schema(where, body))
        case Kind.BARRIER:
            _require(where, body, None, table=table, width=width, count=count, extra=extra)
            return BarrierRecord(origin, _name(where, body))
    raise Corrupt(
        where, f"unknown kind {frame.kind}: the record is damaged or from a newer release"
    )


def _push_arrays(
    where: str, body: memoryview, width: int, count: int, extra: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return (keys, frequencies, rows, waiting, totals) of a push or write.

    body   the payload after the header
    width, count, extra
           header fields: numbers per row, number of rows, number of waiting keys

    Raises Corrupt if the body does not have the size that the header implies.
    """
    _require(where, body, count * (16 + 4 * width) + 12 * extra)
    if not width:
        raise Corrupt(where, "header field 'width' must be at least 1, got 0")
    start = 16 * count + 8 * extra
    return (
        _array(body, "<u8", count, 0),
        _array(body, "<u8", count, 8 * count),
        _array(body, "<f4", count * width, start).reshape(count, width),
        _array(body, "<u8", extra, 16 * count),
        _array(body, "<u4", extra, start + 4 * count * width),
    )


def _require(where: str, body: memoryview, size: int | None, **unused: int) -> None:
    """Raise Corrupt unless ``body`` has ``size`` bytes and all header fields in ``unused`` are 0.

    size    expected size of the body; None: any
    unused  header fields that this kind of record does not use, by name
    """
    for field, value in unused.items():
        if value:
            raise Corrupt(
                where, f"header field {field!r} must be 0 in this kind of record, got {value}"
            )
    if size is not None and len(body) != size:
        raise Corrupt(where, f"expected {size} bytes after the record's header, got {len(body)}")


def _array(body: memoryview, dtype: str, count: int, offset: int) -> NDArray[Any]:
    """Return ``count`` numbers of ``body`` from byte ``offset`` on.

    The result is a view if the numbers are aligned, as they are in a log file; else a copy.
    """
    array = np.frombuffer(body, dtype, count, offset) if count else np.empty(0, dtype)
    return array if array.flags.aligned else array.copy()


def _cause(where: str, extra: int) -> Cause:
    if extra not in CAUSES:
        raise Corrupt(where, f"unknown cause {extra} in a DELETE record")
    return CAUSES[extra]


def _dropped(where: str, extra: int) -> bool:
    if extra > 1:
        raise Corrupt(where, f"header field 'extra' of an ALTER record must be 0 or 1, got {extra}")
    return bool(extra)


def _schema(where: str, body: memoryview) -> dict[str, Any]:
    try:
        schema = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise Corrupt(where, f"the schema is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise Corrupt(where, "the schema is not a JSON object")
    return schema


def _name(where: str, body: memoryview) -> str:
    if len(body) > MAX_NAME:
        raise Corrupt(where, f"a name may have at most {MAX_NAME} bytes, got {len(body)}")
    try:
        return str(body, "utf-8")
    except UnicodeDecodeError as error:
        raise Corrupt(where, f"the name is not UTF-8: {error}") from error
