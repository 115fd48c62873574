"""The records of the version log: each describes the change that made its version.

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

* rows     after-images: whole rows [embedding | state] after the push. Replay needs no arithmetic
           and is idempotent
* table    number of the table, given at creation and never reused
* waiting  keys of the push that have no row yet, with the new totals of their counters, so that
           replaying them is idempotent too
* extra    of a delete: its cause. Of an alter: 1 if the table's counters were dropped, else 0
* step     of a push: the step of the table and of its rows after it. Of a write: the step of its
           rows, which does not move the step of the table
* client.. identify the push, so that retries are recognized; client 0: retries are not recognized

Encoding copies no array; decoding returns read-only views of the frame.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

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
    """Why rows were deleted."""

    REQUEST = 1
    STEP_TTL = 2
    TIME_TTL = 3
    NORM = 4
    CAPACITY = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The client that asked for the change, and the time."""

    client: int = 0  # 0: retries are not recognized
    incarnation: int = 0
    sequence: int = 0
    acknowledged: int = 0  # the client has received every answer up to this sequence
    step: int = 0  # of a push or write: of its rows afterwards; of a delete: of the table
    time_us: int = 0  # microseconds since 1970, by the shard's clock


@dataclass(frozen=True, slots=True, eq=False)
class PushRecord:
    """Rows were created or changed."""

    origin: Origin
    table: int
    keys: Keys  # uint64[n]
    frequencies: NDArray[np.uint64]  # [n], after the push
    rows: Rows  # float32[n, width], after the push
    waiting: Keys  # uint64[m], keys without a row
    totals: NDArray[np.uint32]  # [m], their occurrences, including this push
    imported: bool = False  # a write: the step is that of the rows, not of the table


@dataclass(frozen=True, slots=True, eq=False)
class DeleteRecord:
    """Rows were deleted, and counters of keys without a row."""

    origin: Origin
    table: int
    cause: Cause
    keys: Keys  # uint64[n]


@dataclass(frozen=True, slots=True)
class CreateRecord:
    """A table was created."""

    origin: Origin
    table: int
    schema: dict[str, Any]


@dataclass(frozen=True, slots=True)
class AlterRecord:
    """Settings of a table were changed; its rows stay."""

    origin: Origin
    table: int
    schema: dict[str, Any]  # with the new settings
    dropped: bool  # the counters of keys without a row were dropped


@dataclass(frozen=True, slots=True)
class DropRecord:
    """A table was dropped, with all its rows."""

    origin: Origin
    table: int
    schema: dict[str, Any]  # the record of its creation may be truncated


@dataclass(frozen=True, slots=True)
class BarrierRecord:
    """A mark that a client asked for."""

    origin: Origin
    name: str


Record = PushRecord | DeleteRecord | CreateRecord | AlterRecord | DropRecord | BarrierRecord

CAUSES = {int(cause): cause for cause in Cause}
NO_KEYS, NO_TOTALS = np.empty(0, np.uint64), np.empty(0, np.uint32)
ORIGIN = tuple(field.name for field in dataclasses.fields(Origin))


# ---- encoding: the parts of a payload, in order; arrays are C-contiguous and stay unchanged until
#      the log has written them


def encode_push(
    origin: Origin,
    table: int,
    keys: Keys,
    frequencies: NDArray[np.uint64],
    rows: Rows,
    waiting: Keys = NO_KEYS,
    totals: NDArray[np.uint32] = NO_TOTALS,
) -> list[Part]:
    """Return the parts of a push.

    keys         uint64[n]
    frequencies  uint64[n]           after the push
    rows         float32[n, width]   after the push
    waiting      uint64[m]           keys without a row
    totals       uint32[m]           their occurrences
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
    """Return the parts of a delete of keys uint64[n]."""
    assert keys.dtype == np.uint64
    return [_head(origin, table, 0, len(keys), cause), keys]


def encode_create(origin: Origin, table: int, schema: Mapping[str, Any]) -> list[Part]:
    """Return the parts of a table's creation. ``schema`` must be valid for JSON."""
    return [_head(origin, table), json.dumps(schema, sort_keys=True).encode()]


def encode_write(
    origin: Origin,
    table: int,
    keys: Keys,
    frequencies: NDArray[np.uint64],
    rows: Rows,
) -> list[Part]:
    """Return the parts of a write; arrays as of ``encode_push``."""
    return encode_push(origin, table, keys, frequencies, rows)


def encode_alter(
    origin: Origin, table: int, schema: Mapping[str, Any], *, dropped: bool
) -> list[Part]:
    """Return the parts of an alteration. ``schema`` must be valid for JSON."""
    return [_head(origin, table, extra=dropped), json.dumps(schema, sort_keys=True).encode()]


def encode_drop(origin: Origin, table: int, schema: Mapping[str, Any]) -> list[Part]:
    """Return the parts of a table's drop. ``schema`` must be valid for JSON."""
    return [_head(origin, table), json.dumps(schema, sort_keys=True).encode()]


def encode_barrier(origin: Origin, name: str) -> list[Part]:
    """Return the parts of a barrier. The service made sure that ``name`` fits into MAX_NAME."""
    return [_head(origin), name.encode()]


def _head(origin: Origin, table: int = 0, width: int = 0, count: int = 0, extra: int = 0) -> bytes:
    return HEAD.pack(
        origin.client,
        origin.incarnation,
        origin.sequence,
        origin.acknowledged,
        origin.step,
        origin.time_us,
        table,
        width,
        count,
        extra,
    )


# ---- decoding


def decode(frame: Frame) -> Record:
    """Return the record of a frame, with read-only views of its payload. Raises Corrupt.

    The frame's checksum was correct, so Corrupt means a bug in the writer, or another release.
    """
    where = f"record of version {frame.version}"
    if len(frame.payload) < HEAD.size:
        raise Corrupt(where, f"{len(frame.payload)} bytes, too short for the head of a record")
    *who, table, width, count, extra = HEAD.unpack_from(frame.payload)
    origin = Origin(**dict(zip(ORIGIN, who, strict=True)))
    body = frame.payload[HEAD.size :]
    match frame.kind:
        case Kind.PUSH | Kind.WRITE:
            imported = frame.kind == Kind.WRITE
            if imported:
                _require(where, body, None, extra=extra)
            arrays = _push_arrays(where, body, width, count, extra)
            return PushRecord(origin, table, *arrays, imported=imported)
        case Kind.DELETE:
            _require(where, body, count * 8, width=width)
            if extra not in CAUSES:
                raise Corrupt(where, f"unknown cause {extra} of a delete")
            return DeleteRecord(origin, table, CAUSES[extra], _array(body, "<u8", count, 0))
        case Kind.CREATE:
            _require(where, body, None, width=width, count=count, extra=extra)
            return CreateRecord(origin, table, _schema(where, body))
        case Kind.ALTER:
            _require(where, body, None, width=width, count=count)
            if extra > 1:
                raise Corrupt(where, f"extra of an alteration must be 0 or 1, got {extra}")
            return AlterRecord(origin, table, _schema(where, body), bool(extra))
        case Kind.DROP:
            _require(where, body, None, width=width, count=count, extra=extra)
            return DropRecord(origin, table, _schema(where, body))
        case Kind.BARRIER:
            _require(where, body, None, table=table, width=width, count=count, extra=extra)
            return BarrierRecord(origin, _name(where, body))
    raise Corrupt(where, f"unknown kind {frame.kind}: damaged, or written by a newer release")


def _push_arrays(
    where: str, body: memoryview, width: int, count: int, extra: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return keys, frequencies, rows, waiting and totals of a push. Raises Corrupt."""
    _require(where, body, count * (16 + 4 * width) + 12 * extra)
    if not width:
        raise Corrupt(where, "rows must have a width above 0")
    start = 16 * count + 8 * extra
    return (
        _array(body, "<u8", count, 0),
        _array(body, "<u8", count, 8 * count),
        _array(body, "<f4", count * width, start).reshape(count, width),
        _array(body, "<u8", extra, 16 * count),
        _array(body, "<u4", extra, start + 4 * count * width),
    )


def _require(where: str, body: memoryview, size: int | None, **unused: int) -> None:
    """Raise Corrupt unless the body has its size (None: any) and unused fields are 0."""
    for field, value in unused.items():
        if value:
            raise Corrupt(where, f"{field} must be 0 in this kind of record, got {value}")
    if size is not None and len(body) != size:
        raise Corrupt(where, f"{len(body)} bytes after the head, which declares {size}")


def _array(body: memoryview, dtype: str, count: int, offset: int) -> NDArray[Any]:
    """Return ``count`` numbers of the body: a view if they are aligned, as in a frame of a log."""
    array = np.frombuffer(body, dtype, count, offset) if count else np.empty(0, dtype)
    return array if array.flags.aligned else array.copy()


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
        raise Corrupt(where, f"a name of {len(body)} bytes, the limit is {MAX_NAME}")
    try:
        return str(body, "utf-8")
    except UnicodeDecodeError as error:
        raise Corrupt(where, f"the name is not UTF-8: {error}") from error
