"""Convert log records and table rows to Delta messages, which subscribers receive.

Nothing here waits or uses the network. It runs on the threads of the feed (feed.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psproto import codec, routing
from psproto import ps_pb2 as pb
from psserver.batches import Batch, LoggedChange
from psserver.schemas import write_schema
from psserver.wanted import Wanted
from storage import records
from storage.history import History
from storage.kernels import Keys, Rows
from storage.records import Cause
from storage.schema import TableSchema

EPOCHS = 256  # maximum number of epochs (one per server start) sent to a subscriber

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


def newest(keys: Keys) -> NDArray[np.int64]:
    """Return the index of the last occurrence of each distinct key; the indices ascend."""
    split = routing.split(keys, _ALL)
    last = np.empty(len(split.keys), np.int64)
    last[split.inverse] = np.arange(len(keys))  # the last assignment wins
    last.sort()
    return last


class Deltas:
    """Makes the encoded Delta messages of one subscription."""

    def __init__(self, wanted: Wanted, head: Callable[[], int], history: History) -> None:
        """Prepare the messages of a subscription.

        wanted   tables and contents that the subscriber asked for
        head     returns the newest durable version of the shard
        history  epochs (random numbers of server starts) of the log; the newest EPOCHS are sent
                 with some messages
        """
        self._wanted = wanted
        self._head = head
        self._history = pb.History(
            epochs=history.epochs[-EPOCHS:], ends=history.ends[-EPOCHS + 1 :]
        )

    def mark(self, kind: DeltaKind.Kind, **fields: Any) -> bytes:
        """Return an encoded message without rows.

        kind    type of the message, for example KIND_BARRIER
        fields  further fields of its DeltaHeader
        """
        if kind in WITH_HISTORY:
            fields["history"] = self._history
        header = pb.DeltaHeader(kind=kind, head=self._head(), **fields)
        return codec.encode_delta(
            codec.Delta(header, _NO_KEYS, _NO_KEYS, _NO_ROWS, _NO_STEPS, _NO_KEYS)
        )

    def progress(self, *, first: bool = False, **fields: Any) -> bytes:
        """Return an encoded message that reports the subscriber's position, without a change.

        first   this is the first message of the stream, which also contains the log's history
        fields  further fields of its DeltaHeader, for example the position
        """
        if first:
            fields["history"] = self._history
        return self.mark(DeltaKind.KIND_PROGRESS, **fields)

    def created(self, schema: TableSchema, **fields: Any) -> bytes:
        """Return an encoded message that reports that a table exists, with its schema.

        fields  further fields of its DeltaHeader
        """
        return self._of_table(DeltaKind.KIND_TABLE_CREATED, schema, fields)

    def altered(self, schema: TableSchema, **fields: Any) -> bytes:
        """Return an encoded message that reports new settings of a table.

        schema  schema with the new settings
        fields  further fields of its DeltaHeader
        """
        return self._of_table(DeltaKind.KIND_TABLE_ALTERED, schema, fields)

    def _of_table(self, kind: DeltaKind.Kind, schema: TableSchema, fields: dict[str, Any]) -> bytes:
        """Return an encoded message about a table, with its schema.

        kind    type of the message
        fields  further fields of its DeltaHeader
        """
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
        """Yield encoded messages that contain new values of rows of one table.

        version      version of the newest change in the messages
        keys         uint64[n], distinct
        versions     uint64[n], version of each row; empty: all have ``version``
        rows         float32[n, width or more]; width depends on the requested content
        steps        int64[n], step of each row; may be empty if optimizer state is not requested
        frequencies  uint64[n]; may be empty if optimizer state is not requested
        last         header fields of the last message, for example the token; in all messages
                     before it, only ``more`` is set instead
        """
        wanted, width = self._wanted, self._wanted.width(schema)
        if wanted.content != pb.CONTENT_VALUES_AND_STATE:
            steps, frequencies = _NO_STEPS, _NO_KEYS
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
            values = self._values(rows[part], width)
            columns = (keys[part], versions[part], values, steps[part], frequencies[part])
            yield codec.encode_delta(codec.Delta(header, *columns))

    def _values(self, rows: Rows, width: int) -> NDArray[Any]:
        """Return the first ``width`` numbers of each row, in the dtype that was requested."""
        if not width:
            return _NO_ROWS
        return codec.to_wire_clamped(np.ascontiguousarray(rows[:, :width]), self._wanted.dtype)

    def deletes(
        self,
        table: str,
        version: int,
        keys: Keys,
        versions: NDArray[np.uint64],
        cause: Cause,
        **last: Any,
    ) -> Iterator[bytes]:
        """Yield encoded messages that report deleted rows of one table.

        version   version of the newest change in the messages
        keys      uint64[n], distinct
        versions  uint64[n], version of each delete; empty: all have ``version``
        cause     why the rows were deleted
        last      header fields of the last message, for example the token; in all messages before
                  it, only ``more`` is set instead
        """
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
        """Yield the encoded messages of a batch, which must have at least one change.

        token  encoded position after the batch; only the last message contains it
        more   whether further messages of the same snapshot follow the batch
        """
        last = {"token": token, "more": more, "time_us": batch.changes[-1].record.origin.time_us}
        if len(batch.changes) == 1:
            yield from self._change(batch.changes[0], last)
            return
        pieces = list(self._newest(batch.changes, batch.version))
        for piece in pieces[:-1]:
            yield from piece(more=True)
        yield from pieces[-1](**last)

    def _change(self, change: LoggedChange, last: dict[str, Any]) -> Iterator[bytes]:
        """Yield the encoded messages of a single change.

        last  header fields of the last message
        """
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
        """Merge changes of rows: keep only the newest change of each key.

        sequence  pushes and deletes, oldest first
        version   version of the newest change

        Yields functions, for each table first those for its deletes, then one for its rows. A call
        of a function returns an iterator of encoded messages. Its keyword arguments are header
        fields to set in the last of these messages.
        """
        tables: dict[int, list[LoggedChange]] = {}
        for each in sequence:
            assert isinstance(each.record, records.PushRecord | records.DeleteRecord)
            tables.setdefault(each.record.table, []).append(each)
        for changes in tables.values():
            schema = changes[0].schema
            assert schema is not None
            pushed, gone = self._last_changes(changes, schema)
            for cause, parts in gone.items():
                keys, versions = map(np.concatenate, zip(*parts, strict=True))
                yield partial(self.deletes, schema.name, version, keys, versions, cause)
            if pushed:
                yield partial(
                    self.rows, schema, version, *map(np.concatenate, zip(*pushed, strict=True))
                )

    def _last_changes(
        self, changes: Sequence[LoggedChange], schema: TableSchema
    ) -> tuple[list[tuple[Any, ...]], dict[Cause, list[tuple[Keys, NDArray[np.uint64]]]]]:
        """Select the newest change of each key of one table.

        changes  pushes and deletes of the table, oldest first

        Returns (pushed, deleted). Each entry of ``pushed`` has (keys, versions, rows, steps,
        frequencies) of one push; ``deleted`` has (keys, versions) of each delete, by its cause.
        """
        chosen = newest(np.concatenate([each.record.keys for each in changes]))  # type: ignore[union-attr]
        pushed: list[tuple[Any, ...]] = []
        deleted: dict[Cause, list[tuple[Keys, NDArray[np.uint64]]]] = {}
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
                deleted.setdefault(record.cause, []).append((record.keys[at], versions))
        return pushed, deleted

    def _steps(self, count: int, step: int) -> NDArray[np.int64]:
        """Return ``step`` as int64[count]; int64[0] if optimizer state is not requested."""
        state = self._wanted.content == pb.CONTENT_VALUES_AND_STATE
        return np.full(count if state else 0, step, np.int64)

    def _parts(
        self, count: int, most: int, last: dict[str, Any]
    ) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Divide ``count`` items among messages: yield (slice of the items, header fields).

        most  maximum number of items in a message, >= 1
        last  header fields of the last message; all others have only ``more`` set
        """
        for start in range(0, count, most):
            end = min(start + most, count)
            yield slice(start, end), last if end == count else {"more": True}
