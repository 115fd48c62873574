"""What a subscriber is told: records of the log and rows of tables as Delta messages.

    Wanted    what the subscriber asked for: tables, content, dtype, coalescing
    Batch     the changes that are told together: one, or the newest values of several
    Deltas    makes the messages

Nothing here waits or knows the network; it runs on the threads of the feed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from psproto import codec, routing
from psproto import ps_pb2 as pb
from psserver.errors import BadRequest
from psserver.schemas import from_json, write_schema
from storage import records
from storage.kernels import Keys, Rows
from storage.records import Cause, Kind
from storage.schema import NAME, TableSchema

CHUNK_BYTES = 1 << 20  # arrays of one message, unless the subscriber says otherwise
MOST_CHUNK_BYTES = 16 << 20
PROGRESS_SECONDS = 1.0
MOST_COALESCE_MS = 60_000
COALESCE_BYTES = 32 << 20  # of records that are coalesced at a time
MAX_TABLES = 4096  # names in one request

DeltaKind = pb.DeltaHeader
_ALL = routing.even_map(1)
_NO_KEYS = np.empty(0, np.uint64)
_NO_STEPS = np.empty(0, np.int64)
_NO_ROWS = np.empty((0, 0), np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a subscriber asked for."""

    tables: frozenset[str]  # none: all
    content: int
    dtype: int
    coalesce_seconds: float
    coalesce_rows: int
    progress_seconds: float
    chunk_bytes: int

    @property
    def coalesces(self) -> bool:
        """Whether several changes may be told as one."""
        return self.coalesce_seconds > 0 or self.coalesce_rows > 0

    def wants(self, table: str) -> bool:
        """Whether a table is subscribed to."""
        return not self.tables or table in self.tables

    def width(self, schema: TableSchema) -> int:
        """Numbers of a row as sent."""
        if self.content == pb.CONTENT_KEYS:
            return 0
        return schema.width if self.content == pb.CONTENT_VALUES_AND_STATE else schema.dim

    def rows_per_message(self, width: int) -> int:
        """Rows of so many numbers that fill a message; at least one."""
        state = self.content == pb.CONTENT_VALUES_AND_STATE
        row = 16 + width * codec.WIRE[self.dtype].itemsize + 16 * state
        return max(1, self.chunk_bytes // row)


def parse(data: bytes) -> pb.SubscribeRequest:
    """A SubscribeRequest; Malformed if it is none."""
    request = pb.SubscribeRequest()
    try:
        request.ParseFromString(data)
    except DecodeError as error:
        raise codec.Malformed(f"SubscribeRequest: {error}") from error
    return request


def read_wanted(request: pb.SubscribeRequest) -> Wanted:
    """What a request asks for, defaults filled in; BadRequest if it breaks a rule."""
    if len(request.tables) > MAX_TABLES:
        raise _bad(f"{len(request.tables)} tables named, {MAX_TABLES} may be")
    for name in request.tables:
        if not NAME.fullmatch(name):
            raise _bad(f"{name[:200]!r} cannot be the name of a table")
    content = request.content or pb.CONTENT_VALUES
    if content not in pb.Content.values():
        raise _bad(f"content {content} is unknown")
    dtype = codec.wire_dtype(request.dtype)
    if content == pb.CONTENT_VALUES_AND_STATE and dtype != pb.DTYPE_FLOAT32:
        raise _bad("state is sent as float32 only")
    if request.start not in pb.Start.values():
        raise _bad(f"start {request.start} is unknown")
    if request.coalesce_ms > MOST_COALESCE_MS:
        raise _bad(f"coalesce_ms must be in 0..{MOST_COALESCE_MS}, got {request.coalesce_ms}")
    if request.chunk_bytes > MOST_CHUNK_BYTES:
        raise _bad(f"chunk_bytes must be in 0..{MOST_CHUNK_BYTES}, got {request.chunk_bytes}")
    return Wanted(
        tables=frozenset(request.tables),
        content=content,
        dtype=dtype,
        coalesce_seconds=request.coalesce_ms / 1000,
        coalesce_rows=request.coalesce_rows,
        progress_seconds=request.progress_ms / 1000 or PROGRESS_SECONDS,
        chunk_bytes=request.chunk_bytes or CHUNK_BYTES,
    )


def _bad(why: str) -> BadRequest:
    return BadRequest("INVALID_ARGUMENT", f"subscription: {why}")


@dataclass(frozen=True, slots=True)
class Told:
    """One change that a batch tells of."""

    version: int
    record: records.Record
    schema: TableSchema | None  # None: a barrier


@dataclass(slots=True)
class Batch:
    """The changes from one commit mark to the next, without those that are not wanted.

    schema_of  the schema of a table by its number; None if the table is long gone: its rows are
               left out, and its end follows
    """

    wanted: Wanted
    schema_of: Callable[[int], TableSchema | None]
    version: int  # of the newest change that was taken, wanted or not
    told: list[Told] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0
    full: bool = False  # takes nothing more

    def takes(self, kind: int) -> bool:
        """Whether a record of this kind can go into the same batch."""
        return not self.told or kind in (Kind.PUSH, Kind.DELETE)

    def take(self, version: int, record: records.Record) -> None:
        """Add the next change."""
        self.version = version
        schema: TableSchema | None = None
        match record:
            case records.Push(table=number, keys=keys) | records.Delete(table=number, keys=keys):
                schema = self.schema_of(number)
                if schema is None or not self.wanted.wants(schema.name) or not len(keys):
                    return
                self.rows += len(keys)
                width = schema.width if isinstance(record, records.Push) else 0
                self.bytes += len(keys) * (16 + 4 * width)
                most = self.wanted.coalesce_rows or self.rows + 1
                self.full = (
                    not self.wanted.coalesces or self.rows >= most or self.bytes >= COALESCE_BYTES
                )
            case records.Create() | records.Drop():
                schema = from_json(record.schema)
                if not self.wanted.wants(schema.name):
                    return
                self.full = True
            case records.Barrier():
                self.full = True
        self.told.append(Told(version, record, schema))

    @property
    def since_us(self) -> int:
        """When the oldest change in here was applied: microseconds since 1970."""
        return self.told[0].record.origin.time_us


def newest(keys: Keys) -> NDArray[np.int64]:
    """Where each distinct key of ``keys`` stands last, ascending."""
    split = routing.split(keys, _ALL)
    last = np.empty(len(split.keys), np.int64)
    last[split.inverse] = np.arange(len(keys))  # the last assignment stays
    last.sort()
    return last


class Deltas:
    """Makes the messages of one subscription.

    head  gives the newest durable version
    """

    def __init__(self, wanted: Wanted, head: Callable[[], int]) -> None:
        self._wanted = wanted
        self._head = head

    def mark(self, kind: DeltaKind.Kind, **fields: Any) -> bytes:
        """A message without arrays."""
        header = pb.DeltaHeader(kind=kind, head=self._head(), **fields)
        return codec.encode_delta(
            codec.Delta(header, _NO_KEYS, _NO_KEYS, _NO_ROWS, _NO_STEPS, _NO_KEYS)
        )

    def created(self, schema: TableSchema, **fields: Any) -> bytes:
        """That there is a table."""
        return self.mark(
            DeltaKind.KIND_TABLE_CREATED,
            table=schema.name,
            dim=schema.dim,
            schema=write_schema(schema),
            **fields,
        )

    def rows(
        self,
        schema: TableSchema,
        version: int,
        keys: Keys,
        versions: NDArray[np.uint64],
        rows: Rows,
        steps: NDArray[np.int64],
        frequencies: NDArray[np.uint64],
        **last: Any,
    ) -> Iterator[bytes]:
        """Values of rows, as many messages as they take.

        keys  uint64[n], distinct; versions uint64[n], or empty where all are ``version``;
              rows float32[n, width or more]; steps int64[n] and frequencies uint64[n], which may
              be empty where they are not wanted
        last  fields of the last message; those before have ``more`` and no token
        """
        wanted, width = self._wanted, self._wanted.width(schema)
        state = wanted.content == pb.CONTENT_VALUES_AND_STATE
        for part, fields in self._parts(len(keys), wanted.rows_per_message(width), last):
            header = pb.DeltaHeader(
                kind=DeltaKind.KIND_ROWS,
                table=schema.name,
                dim=schema.dim,
                width=width,
                dtype=wanted.dtype,  # type: ignore[arg-type]
                version=version,
                head=self._head(),
                **fields,
            )
            values = _NO_ROWS
            if width:
                values = codec.to_wire(np.ascontiguousarray(rows[part, :width]), wanted.dtype)
            yield codec.encode_delta(
                codec.Delta(
                    header,
                    keys[part],
                    versions[part],
                    values,
                    steps[part] if state else _NO_STEPS,
                    frequencies[part] if state else _NO_KEYS,
                )
            )

    def deletes(
        self,
        table: str,
        version: int,
        keys: Keys,
        versions: NDArray[np.uint64],
        cause: Cause,
        **last: Any,
    ) -> Iterator[bytes]:
        """That rows are gone; arguments as of ``rows``."""
        for part, fields in self._parts(len(keys), self._wanted.rows_per_message(0), last):
            header = pb.DeltaHeader(
                kind=DeltaKind.KIND_DELETES,
                table=table,
                version=version,
                head=self._head(),
                cause=cause.name.lower(),
                **fields,
            )
            yield codec.encode_delta(
                codec.Delta(header, keys[part], versions[part], _NO_ROWS, _NO_STEPS, _NO_KEYS)
            )

    def batch(self, batch: Batch, token: bytes, more: bool) -> Iterator[bytes]:
        """The messages of a batch that tells of something; the last one carries the token."""
        last = {"token": token, "more": more, "time_us": batch.told[-1].record.origin.time_us}
        if len(batch.told) == 1:
            yield from self._change(batch.told[0], last)
            return
        pieces = list(self._newest(batch.told, batch.version))
        for piece in pieces[:-1]:
            yield from piece(more=True)
        yield from pieces[-1](**last)

    def _change(self, told: Told, last: dict[str, Any]) -> Iterator[bytes]:
        version, schema = told.version, told.schema
        if schema is None:
            assert isinstance(told.record, records.Barrier)
            name = told.record.name
            yield self.mark(DeltaKind.KIND_BARRIER, version=version, barrier=name, **last)
            return
        match told.record:
            case records.Push(origin, _, keys, frequencies, rows):
                steps = self._steps(len(keys), origin.step)
                yield from self.rows(
                    schema, version, keys, _NO_KEYS, rows, steps, frequencies, **last
                )
            case records.Delete(_, _, cause, keys):
                yield from self.deletes(schema.name, version, keys, _NO_KEYS, cause, **last)
            case records.Create():
                yield self.created(schema, version=version, **last)
            case records.Drop():
                yield self.mark(
                    DeltaKind.KIND_TABLE_DROPPED, table=schema.name, version=version, **last
                )

    def _newest(self, told: Sequence[Told], version: int) -> Iterator[Callable[..., Any]]:
        """Pushes and deletes as their newest values: calls that make messages, by table."""
        tables: dict[int, list[Told]] = {}
        for each in told:
            assert isinstance(each.record, records.Push | records.Delete)
            tables.setdefault(each.record.table, []).append(each)
        for changes in tables.values():
            schema = changes[0].schema
            assert schema is not None
            chosen = newest(np.concatenate([each.record.keys for each in changes]))  # type: ignore[union-attr]
            pushed: list[tuple[Any, ...]] = []
            gone: dict[Cause, list[tuple[Keys, NDArray[np.uint64]]]] = {}
            start = 0
            for each in changes:
                record = each.record
                assert isinstance(record, records.Push | records.Delete)
                end = start + len(record.keys)
                low, high = np.searchsorted(chosen, (start, end))
                at, start = chosen[low:high] - start, end
                if not len(at):
                    continue
                versions = np.full(len(at), each.version, np.uint64)
                if isinstance(record, records.Push):
                    rows = record.rows[at, : self._wanted.width(schema)]
                    steps = self._steps(len(at), record.origin.step)
                    pushed.append((record.keys[at], versions, rows, steps, record.frequencies[at]))
                else:
                    gone.setdefault(record.cause, []).append((record.keys[at], versions))
            for cause, parts in gone.items():
                keys, versions = map(np.concatenate, zip(*parts, strict=True))
                yield partial(self.deletes, schema.name, version, keys, versions, cause)
            if pushed:
                yield partial(
                    self.rows, schema, version, *map(np.concatenate, zip(*pushed, strict=True))
                )

    def _steps(self, count: int, step: int) -> NDArray[np.int64]:
        """The step of a push for each of its rows, where it is wanted."""
        state = self._wanted.content == pb.CONTENT_VALUES_AND_STATE
        return np.full(count if state else 0, step, np.int64)

    def _parts(
        self, count: int, most: int, last: dict[str, Any]
    ) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Ranges of at most so many items, each with the fields of its message."""
        for start in range(0, count, most):
            end = min(start + most, count)
            yield slice(start, end), last if end == count else {"more": True}
