"""One shard's part of every table, without a network.

Not thread-safe: the engine thread is the only caller. Changes are applied in the order of the
calls. Each change gets the next version and, where the shard has a log, is appended to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psproto import names
from psproto import ps_pb2 as pb
from psproto.codec import Exchanged, Pulled, to_wire_clamped
from psproto.routing import ShardMap
from psserver.afterimages import ImageBuffers
from psserver.errors import BadRequest, NoLog, StepTooFar, TooLarge, VersionInFuture
from psserver.fills import Fills
from psserver.reads import ShardReads, pulled_bytes, record_bytes
from psserver.recovery import Recovery
from psserver.requests import Change, Delete, Pull, Push, check_order
from psserver.schemas import DURABILITIES, to_json
from psserver.sequencer import MAX_BACKLOG, RECORD, Sequencer
from psserver.sessions import Sessions
from psserver.sweeps import Sweeps
from psserver.tables import TableEntry, Tables
from psserver.tombstones import TombstoneQueue
from storage import records
from storage.arena import Budget
from storage.kernels import Images, Keys, Rows
from storage.records import Cause, Kind
from storage.schema import TableSchema
from storage.versionlog import VersionLog

_NO_VERSIONS, _NO_STEPS = np.empty(0, np.uint64), np.empty(0, np.int64)


class _CheckedPush(NamedTuple):
    """A push that can be applied, and what was found out about it."""

    push: Push
    entry: TableEntry
    level: pb.Durability
    applied: int | None  # version under which it was applied before


class Shard(ShardReads):
    """The tables of one shard, their common version and the sessions of the clients.

    reply_bytes     largest reply, in bytes of arrays
    max_tombstones  deleted keys that are kept for subscribers that come back
    clock           monotonic seconds
    now             seconds since 1970, for subscribers to see how old a change is
    """

    def __init__(
        self,
        *,
        number: int,
        shard_map: ShardMap,
        memory_bytes: int,
        reply_bytes: int,
        max_tables: int,
        max_sessions: int,
        session_ttl: float,
        clock: Callable[[], float],
        now: Callable[[], float] = time.time,
        log: VersionLog | None = None,
        max_tombstones: int = 1 << 20,
        max_backlog: int = MAX_BACKLOG,
    ) -> None:
        self.number = number
        self.shard_map = shard_map
        self.budget = Budget(memory_bytes)
        owned = np.count_nonzero(shard_map.shard_of_bucket == number)
        self._reply_bytes = reply_bytes
        self._max_tables = max_tables
        super().__init__(
            Tables(self.budget, float(owned) / len(shard_map.shard_of_bucket)),
            Sequencer(Sessions(max_sessions, session_ttl, clock), now, log, max_backlog),
            TombstoneQueue(max_tombstones),
            ImageBuffers(),
        )
        self.recovery = Recovery(self.budget, self._tables, self._sequencer, self._tombstones)
        self.fills = Fills(self._tables, self._sequencer)
        self.sweeps = Sweeps(self._tables, self._sequencer, self._delete)

    def attach(self, log: VersionLog) -> None:
        """Append changes to ``log`` from now on; it ends at the shard's version."""
        assert log.last == self.version
        self._sequencer.log = log

    def close(self) -> None:
        """Return the memory of all tables; the shard must not be used again."""
        for entry in self._tables:
            entry.table.close()

    # ---- tables

    def create_table(self, schema: TableSchema) -> TableSchema:
        """Create a table, unless it exists with an equal schema; SchemaMismatch for another."""
        entry = self._tables.find(schema.name)
        if entry is not None:
            entry.schema.require_equal(schema)
            return entry.schema
        self._tables.require_unclaimed(schema.name)
        self.require_creatable(schema)
        self._create(schema)
        return schema

    def require_creatable(self, schema: TableSchema) -> None:
        """Refuse a table that cannot be created although none of its name exists."""
        if problem := names.problem("table", schema.name):
            raise BadRequest("INVALID_ARGUMENT", problem)
        if len(self._tables) >= self._max_tables:
            raise TooLarge("TOO_MANY_TABLES", f"{self._max_tables} tables exist, the limit")
        if schema.durability == "fsync" and self._sequencer.log is None:
            raise NoLog

    def _create(self, schema: TableSchema) -> None:
        number = self._tables.next_number
        parts = records.encode_create(self._sequencer.origin(), number, to_json(schema))
        self._sequencer.reserve([RECORD + len(parts[1])])
        self._tables.add(number, schema, self.version + 1)
        self._sequencer.append(Kind.CREATE, parts)

    def alter_table(
        self, name: str, change: Callable[[TableSchema], TableSchema]
    ) -> tuple[TableSchema, int]:
        """Give a table other settings; its rows stay. Nothing changes if the settings are equal.

        change  returns the new schema for the present one, or raises

        Returns the new schema, and how many counters towards admission were dropped; see
        ``Table.alter``. Raises OutOfMemory or DiskFull, and changes nothing then.
        """
        entry = self._tables.get(name)
        self._tables.require_unclaimed(name)
        schema = change(entry.schema)
        if schema == entry.schema:
            return schema, 0
        if schema.durability == "fsync" and self._sequencer.log is None:
            raise NoLog
        origin, stored = self._sequencer.origin(), to_json(schema)
        parts = records.encode_alter(origin, entry.number, stored, dropped=False)
        self._sequencer.reserve([RECORD + len(parts[1])])
        dropped = self._tables.alter(entry, schema, self.version + 1, origin.time_us / 1e6)
        lost = dropped is not None
        parts = records.encode_alter(origin, entry.number, stored, dropped=lost)
        self._sequencer.append(Kind.ALTER, parts)
        return schema, dropped or 0

    def drop_table(self, name: str) -> None:
        """Drop a table and return its memory."""
        entry = self._tables.get(name)
        self._tables.require_unclaimed(name)
        parts = records.encode_drop(self._sequencer.origin(), entry.number, to_json(entry.schema))
        self._sequencer.reserve([RECORD + len(parts[1])])
        self._tables.remove(entry)
        self._sequencer.append(Kind.DROP, parts)

    # ---- rows

    def exchange(self, pushes: Sequence[Push], pulls: Sequence[Pull]) -> Exchanged:
        """Apply the pushes, then read the pulls.

        Every part is checked, and room in the log reserved, before the first push is applied.
        Only OutOfMemory may come between two pushes, or RowOverflow where both change the same row.
        The earlier push is applied then, and a repeated call does not apply it again.
        """
        checked = [self._check_push(push) for push in pushes]
        check_order(pushes)
        entries = self._check_pulls(pulls)
        self._sequencer.reserve([record_bytes(each.entry, each.push) for each in checked])
        if len(checked) > 1:  # a single one is checked as it is applied
            for each in checked:
                _check_rows(each)
        pushed = [self._push(each) for each in checked]
        return Exchanged(pushed, [self._pull(*each) for each in zip(entries, pulls, strict=True)])

    def delete(self, change: Delete) -> pb.DeleteResponse:
        """Delete rows; keys without a row are left alone."""
        entry = self._tables.get(change.table)
        level = self._level(entry, change)
        applied = self._sequencer.applied(change)
        if applied is not None:
            return pb.DeleteResponse(version=applied, duplicate=True, achieved=level)
        self._sequencer.reserve([RECORD + 8 * len(change.keys)])
        deleted = self._delete(entry, change.keys, Cause.REQUEST, change)
        return pb.DeleteResponse(version=self.version, achieved=level, deleted=deleted)

    def write_rows(
        self, name: str, step: int, keys: Keys, frequencies: NDArray[np.uint64], rows: Rows
    ) -> int:
        """Write whole rows over those that are there, as one change; return its version.

        keys         uint64[n], distinct
        frequencies  uint64[n]
        rows         float32[n, width]
        step         of all rows; the step of the table stays

        Nobody may change the arrays afterwards: the log has no copy.
        """
        return self._write_rows(self._tables.get(name), step, keys, frequencies, rows)

    def load_rows(
        self, number: int, step: int, keys: Keys, frequencies: NDArray[np.uint64], rows: Rows
    ) -> int:
        """Write whole rows into the table of this number; see ``write_rows``."""
        entry = self._tables.require_number(number)
        return self._write_rows(entry, step, keys, frequencies, rows)

    def _write_rows(
        self,
        entry: TableEntry,
        step: int,
        keys: Keys,
        frequencies: NDArray[np.uint64],
        rows: Rows,
    ) -> int:
        n = len(keys)
        self._sequencer.reserve([RECORD + n * (16 + 4 * rows.shape[1])])
        version = self.version + 1
        versions, steps = np.full(n, version, np.uint64), np.full(n, step, np.int64)
        frequencies = np.minimum(frequencies, np.uint64(0xFFFFFFFF))
        entry.table.put(Images(keys, versions, steps, frequencies, rows))
        origin = self._sequencer.origin(step=step)
        entry.table.evictor.written(version, origin.time_us / 1e6)
        parts = records.encode_write(origin, entry.number, keys, frequencies, rows)
        self._sequencer.append(Kind.WRITE, parts)
        return version

    def barrier(self, name: str) -> int:
        """Mark this moment in the log, and return its version."""
        if self._sequencer.log is None:
            raise NoLog
        parts = records.encode_barrier(self._sequencer.origin(), name)
        self._sequencer.reserve([RECORD + len(parts[1])])
        self._sequencer.append(Kind.BARRIER, parts)
        return self.version

    # ---- one part of a request

    def _check_push(self, push: Push) -> _CheckedPush:
        """Refuse a push that cannot be applied."""
        entry = self._tables.get(push.table)
        schema = entry.schema
        if push.lr is not None:
            try:
                schema.optimizer.require_lr(push.lr)
            except ValueError as error:
                raise BadRequest("INVALID_ARGUMENT", f"table {push.table!r}: {error}") from error
        if len(push.keys) and push.gradients.shape[1] != schema.dim:
            raise BadRequest(
                "DIM_MISMATCH",
                f"table {push.table!r} has dim {schema.dim}, the gradients have"
                f" {push.gradients.shape[1]}",
            )
        level, applied = self._level(entry, push), self._sequencer.applied(push)
        if applied is None and push.step > entry.table.evictor.last_step(schema.max_step_ahead):
            at = self.step(push.table)
            raise StepTooFar(push.table, push.step, max(at, 0), schema.max_step_ahead)
        return _CheckedPush(push, entry, level, applied)

    def _check_pulls(self, pulls: Sequence[Pull]) -> list[TableEntry]:
        """Return the table of each pull; refuse pulls that cannot be answered."""
        entries = []
        size = 0
        for pull in pulls:
            entry = self._tables.get(pull.table)
            entries.append(entry)
            size += pulled_bytes(entry, pull)
            if pull.min_epoch:
                self._sequencer.require(pull.min_version, pull.min_epoch)
            if pull.min_version > self.version:
                raise VersionInFuture(
                    f"min_version {pull.min_version} asked for, shard {self.number} is at"
                    f" {self.version}"
                )
        if size > self._reply_bytes:
            raise TooLarge(
                "TOO_MANY_KEYS",
                f"the reply would take {size} bytes, the limit is {self._reply_bytes}",
            )
        return entries

    def _level(self, entry: TableEntry, change: Change) -> pb.Durability:
        """Return the durability that the change has once it is answered."""
        level = change.durability or entry.schema.durability
        if self._sequencer.log is None:
            if level == "fsync":
                raise NoLog
            level = "applied"
        return DURABILITIES[level]

    def _push(self, checked: _CheckedPush) -> pb.PushResponse:
        """Apply a push, unless it was applied before."""
        push, entry, level, applied = checked
        if applied is not None:
            return pb.PushResponse(version=applied, duplicate=True, achieved=level)
        table, sequencer, version = entry.table, self._sequencer, self.version + 1
        pushed = table.push(
            push.keys,
            push.gradients,
            push.counts,
            version=version,
            step=push.step,
            lr=push.lr,
            largest=push.largest,
            copied=sequencer.log is not None,
        )
        origin = sequencer.origin(push, pushed.step)
        table.evictor.pushed(version, pushed.step, origin.time_us / 1e6)
        parts: Sequence[Any] = ()
        if sequencer.log is not None:
            count, width = len(pushed.slots), table.schema.width
            images = self._buffers.take(count, width, version, sequencer.log.written)
            table.images(pushed.slots, *images)
            counted = pushed.waiting, pushed.totals
            parts = records.encode_push(origin, entry.number, pushed.keys, *images, *counted)
        sequencer.append(Kind.PUSH, parts, push)
        return pb.PushResponse(version=version, achieved=level)

    def _pull(self, entry: TableEntry, pull: Pull) -> Pulled:
        table = entry.table
        rows = np.empty((len(pull.keys), table.schema.dim), np.float32)
        locations = table.pull(pull.keys, pull.mode, rows)
        header = pb.PullResponseHeader(
            version=self.version,
            dim=table.schema.dim,
            dtype=pull.dtype,  # type: ignore[arg-type]
        )
        embeddings = to_wire_clamped(rows, pull.dtype)
        if not pull.with_metadata:
            return Pulled(header, embeddings, _NO_VERSIONS, _NO_STEPS, _NO_VERSIONS)
        return Pulled(header, embeddings, *map(np.ascontiguousarray, table.metadata(locations)))

    def _delete(
        self, entry: TableEntry, keys: Keys, cause: Cause, change: Change | None = None
    ) -> int:
        """Delete rows as the next version, for which the log has room; return how many."""
        gone, rows = entry.table.delete(keys)
        self._tombstones.add(entry.number, gone, self.version + 1, cause)
        origin = self._sequencer.origin(change, entry.table.evictor.step)
        parts = records.encode_delete(origin, entry.number, cause, gone)
        self._sequencer.append(Kind.DELETE, parts, change)
        return rows


def _check_rows(checked: _CheckedPush) -> None:
    """Raise RowOverflow if the push, applied alone, would leave infinity or NaN in a row."""
    push = checked.push
    if checked.applied is None:
        checked.entry.table.check_push(
            push.keys, push.gradients, step=push.step, lr=push.lr, largest=push.largest
        )
