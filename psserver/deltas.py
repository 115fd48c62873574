"""Records of the log and rows of tables as Delta messages.

    Batch     the changes that are sent together: one, or the newest values of several
    Deltas    makes the messages

Nothing here waits or uses the network. It runs on the threads of the feed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psproto import codec, routing
from psproto import ps_pb2 as pb
from psserver.schemas import from_json, write_schema
from psserver.wanted import Wanted
from storage import records
from storage.history import History
from storage.kernels import Keys, Rows
from storage.records import Cause, Kind
from storage.schema import TableSchema

COALESCE_BYTES = 32 << 20  # bytes of records that one subscription coalesces at a time

EPOCHS = 256  # newest epochs that a subscriber is sent

DeltaKind = pb.DeltaHeader
WITH_HISTORY = (
    DeltaKind.KIND_SNAPSHOT,
    DeltaKind.KIND_CATCH_UP,
    DeltaKind.KIND_SNAPSHOT_END,
)
_ALL = routing.even_map(1)
_NO_KEYS = np.empty(0, np.uint64)
_NO_STEPS = np.empty(0, np.int64)
_NO_ROWS = np.empty((0, 0), np.float32)


@dataclass(frozen=True, slots=True)
class LoggedChange:
    """One change of a batch."""

    version: int
    record: records.Record
    schema: TableSchema | None  # None: a barrier


@dataclass(slots=True)
class Batch:
    """The wanted changes from one commit mark to the next.

    most       bytes of records beyond which the batch is full
    schema_of  returns the schema of a table by its number. None if the table was dropped long ago:
               its rows are left out, and its drop follows
    """

    wanted: Wanted
    most: int
    schema_of: Callable[[int], TableSchema | None]
    version: int  # of the newest change read, wanted or not
    changes: list[LoggedChange] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0
    full: bool = False  # accepts no further change

    def takes(self, kind: int) -> bool:
        """Return whether a record of this kind can go into the same batch."""
        return not self.changes or kind in (Kind.PUSH, Kind.WRITE, Kind.DELETE)

    def take(self, version: int, record: records.Record) -> None:
        """Add the next change."""
        self.version = version
        schema: TableSchema | None = None
        match record:
            case (
                records.PushRecord(table=number, keys=keys)
                | records.DeleteRecord(table=number, keys=keys)
            ):
                schema = self.schema_of(number)
                if schema is None or not self.wanted.wants(schema.name) or not len(keys):
                    return
                self.rows += len(keys)
                width = schema.width if isinstance(record, records.PushRecord) else 0
                self.bytes += len(keys) * (16 + 4 * width)
                most = self.wanted.coalesce_rows or self.rows + 1
                self.full = (
                    not self.wanted.coalesces or self.rows >= most or self.bytes >= self.most
                )
            case records.CreateRecord() | records.AlterRecord() | records.DropRecord():
                schema = from_json(record.schema)
                if not self.wanted.wants(schema.name):
                    return
                self.full = True
            case records.BarrierRecord():
                self.full = True
        self.changes.append(LoggedChange(version, record, schema))

    @property
    def since_us(self) -> int:
        """Microseconds since 1970 when the oldest change of the batch was applied."""
        return self.changes[0].record.origin.time_us


def newest(keys: Keys) -> NDArray[np.int64]:
    """Return the index of the last occurrence of each distinct key, ascending."""
    split = routing.split(keys, _ALL)
    last = np.empty(len(split.keys), np.int64)
    last[split.inverse] = np.arange(len(keys))  # the last assignment wins
    last.sort()
    return last


class Deltas:
    """Makes the messages of one subscription."""

    def __init__(self, wanted: Wanted, head: Callable[[], int], history: History) -> None:
        """Store the parts. ``head`` returns the newest durable version."""
        self._wanted = wanted
        self._head = head
        self._history = pb.History(
            epochs=history.epochs[-EPOCHS:], ends=history.ends[-EPOCHS + 1 :]
        )

    def mark(self, kind: DeltaKind.Kind, **fields: Any) -> bytes:
        """Return a message without arrays."""
        if kind in WITH_HISTORY:
            fields["history"] = self._history
        header = pb.DeltaHeader(kind=kind, head=self._head(), **fields)
        return codec.encode_delta(
            codec.Delta(header, _NO_KEYS, _NO_KEYS, _NO_ROWS, _NO_STEPS, _NO_KEYS)
        )

    def progress(self, *, first: bool = False, **fields: Any) -> bytes:
        """Return the message that nothing is new; the first one has the history."""
        if first:
            fields["history"] = self._history
        return self.mark(DeltaKind.KIND_PROGRESS, **fields)

    def created(self, schema: TableSchema, **fields: Any) -> bytes:
        """Return the message that a table exists."""
        return self._of_table(DeltaKind.KIND_TABLE_CREATED, schema, fields)

    def altered(self, schema: TableSchema, **fields: Any) -> bytes:
        """Return the message that a table has other settings."""
        return self._of_table(DeltaKind.KIND_TABLE_ALTERED, schema, fields)

    def _of_table(self, kind: DeltaKind.Kind, schema: TableSchema, fields: dict[str, Any]) -> bytes:
        return self.mark(
            kind,
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
        """Yield the messages that contain these rows.

        keys         uint64[n], distinct
        versions     uint64[n], or empty if all are ``version``
        rows         float32[n, width or more]
        steps        int64[n], may be empty if state is not wanted
        frequencies  uint64[n], may be empty if state is not wanted
        last         fields of the last message; the messages before it have ``more`` and no token
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
                values = codec.to_wire_clamped(
                    np.ascontiguousarray(rows[part, :width]), wanted.dtype
                )
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
        """Yield the messages that these rows were deleted; arguments as of ``rows``."""
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
        """Yield the messages of a batch with changes; the last one carries the token."""
        last = {"token": token, "more": more, "time_us": batch.changes[-1].record.origin.time_us}
        if len(batch.changes) == 1:
            yield from self._change(batch.changes[0], last)
            return
        pieces = list(self._newest(batch.changes, batch.version))
        for piece in pieces[:-1]:
            yield from piece(more=True)
        yield from pieces[-1](**last)

    def _change(self, change: LoggedChange, last: dict[str, Any]) -> Iterator[bytes]:
        version, schema = change.version, change.schema
        if schema is None:
            assert isinstance(change.record, records.BarrierRecord)
            name = change.record.name
            yield self.mark(DeltaKind.KIND_BARRIER, version=version, barrier=name, **last)
            return
        match change.record:
            case records.PushRecord(origin, _, keys, frequencies, rows):
                steps = self._steps(len(keys), origin.step)
                yield from self.rows(
                    schema, version, keys, _NO_KEYS, rows, steps, frequencies, **last
                )
            case records.DeleteRecord(_, _, cause, keys):
                yield from self.deletes(schema.name, version, keys, _NO_KEYS, cause, **last)
            case records.CreateRecord():
                yield self.created(schema, version=version, **last)
            case records.AlterRecord():
                yield self.altered(schema, version=version, **last)
            case records.DropRecord():
                yield self.mark(
                    DeltaKind.KIND_TABLE_DROPPED, table=schema.name, version=version, **last
                )

    def _newest(
        self, sequence: Sequence[LoggedChange], version: int
    ) -> Iterator[Callable[..., Any]]:
        """Yield, by table, calls that make messages of the newest value of each key."""
        tables: dict[int, list[LoggedChange]] = {}
        for each in sequence:
            assert isinstance(each.record, records.PushRecord | records.DeleteRecord)
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
                assert isinstance(record, records.PushRecord | records.DeleteRecord)
                end = start + len(record.keys)
                low, high = np.searchsorted(chosen, (start, end))
                at, start = chosen[low:high] - start, end
                if not len(at):
                    continue
                versions = np.full(len(at), each.version, np.uint64)
                if isinstance(record, records.PushRecord):
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
        """Return the step of a push for each of its rows; empty if state is not wanted."""
        state = self._wanted.content == pb.CONTENT_VALUES_AND_STATE
        return np.full(count if state else 0, step, np.int64)

    def _parts(
        self, count: int, most: int, last: dict[str, Any]
    ) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Yield ranges of at most ``most`` items, each with the fields of its message."""
        for start in range(0, count, most):
            end = min(start + most, count)
            yield slice(start, end), last if end == count else {"more": True}
