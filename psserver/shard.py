"""Hold one shard's rows of every table, and apply changes to them; no networking.

Only the engine thread may call these methods, except where a docstring allows any thread. Changes
are applied in the order of the calls. Each change gets the next version, and is appended to the log
if the shard has one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psproto import lanes, names
from psproto import ps_pb2 as pb
from psproto.codec import Exchanged, Pulled, to_wire_clamped
from psproto.routing import ShardMap
from psserver.afterimages import ImageBuffers
from psserver.cuts import Cuts
from psserver.errors import BadRequest, NoLog, StepTooFar, TooLarge, VersionInFuture
from psserver.fills import Fills
from psserver.preloads import Preloads
from psserver.pushroom import CheckedPush, PushRoom
from psserver.reads import ColdRead as ColdRead
from psserver.reads import ShardReads, pull_to_room, pulled_bytes, record_bytes, rows_for
from psserver.recovery import Recovery
from psserver.requests import Change, Delete, Pull, Push, check_order
from psserver.schemas import DURABILITIES, to_json
from psserver.sequencer import MAX_BACKLOG, RECORD, Sequencer
from psserver.sessions import WINDOW, Sessions
from psserver.sweeps import Sweeps
from psserver.tables import TableEntry, Tables
from psserver.tablesettings import TableSettings
from psserver.tombstonequeue import TombstoneQueue
from storage import records
from storage.arena import Budget
from storage.blockfile import BlockFile
from storage.errors import NoRoom, OutOfMemory
from storage.gpu.gpu import Gpu
from storage.kernels import Images, Keys, Rows
from storage.records import Cause, Kind
from storage.schema import TableSchema
from storage.versionlog import VersionLog

_NO_ROWS = np.empty(0, np.float32)
_NO_VERSIONS, _NO_STEPS = np.empty(0, np.uint64), np.empty(0, np.int64)


class Shard(ShardReads):
    """The tables of one shard, their common version, and the sessions (records of applied pushes)
    of its clients.

    number          index of the shard
    shard_map       maps keys to shards
    memory_bytes    memory budget of the tables
    reply_bytes     maximum size of the arrays in a reply, in bytes
    max_tables      maximum number of tables
    max_sessions    maximum number of sessions
    session_ttl     seconds after which an unused session may be replaced by that of a new client
    session_pushes  maximum number of pushes recorded per session
    clock           returns monotonic seconds
    now             returns seconds since 1970, so that subscribers see the age of a change
    log             version log; None: the shard has none, or gets it later by ``attach``
    max_tombstones  maximum number of recorded deletes, for subscribers that reconnect
    max_backlog     refuse changes while more bytes than this wait to be written to the log
    disk_bytes      maximum size of the rows on disk; pushes beyond it are refused; 0: no limit
    settings        settings of single tables, by name
    gpu             the GPU for rows that are used often; None: there is none
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
        session_pushes: int = WINDOW,
        clock: Callable[[], float],
        now: Callable[[], float] = time.time,
        log: VersionLog | None = None,
        max_tombstones: int = 1 << 20,
        max_backlog: int = MAX_BACKLOG,
        disk_bytes: int = 0,
        settings: Mapping[str, TableSettings] | None = None,
        gpu: Gpu | None = None,
    ) -> None:
        self.number = number
        self.shard_map = shard_map
        self.budget, self.gpu = Budget(memory_bytes), gpu
        owned = np.count_nonzero(shard_map.shard_of_bucket == number)
        self._reply_bytes = reply_bytes
        self._max_tables = max_tables
        super().__init__(
            Tables(self.budget, float(owned) / len(shard_map.shard_of_bucket), settings or {}, gpu),
            Sequencer(
                Sessions(max_sessions, session_ttl, clock, session_pushes), now, log, max_backlog
            ),
            TombstoneQueue(max_tombstones),
            ImageBuffers(),
        )
        self.pushroom = PushRoom(self.budget, self._tables, disk_bytes)
        self.recovery = Recovery(self.budget, self._tables, self._sequencer, self._tombstones)
        self.fills = Fills(self._tables, self._sequencer)
        self.preloads = Preloads(self._tables)
        self.sweeps = Sweeps(self._tables, self._sequencer, self._delete)
        self.cuts = Cuts()

    def attach(self, log: VersionLog) -> None:
        """Append all later changes to ``log``, whose last version must be the shard's version."""
        assert log.last == self.version
        self._sequencer.log = log

    def keep_in(self, file: BlockFile) -> None:
        """Let rows that are not in use leave memory, once they are in ``file``, the open map of the
        base's file. Call before the first table is created. The shard closes the file.
        """
        self._tables.file = file

    def cover(self, size: int) -> None:
        """Make the first ``size`` bytes of the base's file readable. Call when it has grown."""
        if self._tables.file is not None:
            self._tables.file.cover(size)

    def on_pressure(self, call: Callable[[], None]) -> None:
        """Call ``call`` whenever memory is nearly full of rows that the next flush must write."""
        self._tables.pressed = call

    def close(self) -> None:
        """Free the memory of all tables. The shard must not be used afterwards."""
        for entry in self._tables:
            entry.table.close()
        self.close_file()

    def close_file(self) -> None:
        """Close the base's file. Rows that are only there cannot be read afterwards."""
        if self._tables.file is not None:
            self._tables.file.close()

    # ---- tables

    def create_table(self, schema: TableSchema) -> TableSchema:
        """Create a table, or do nothing if one of this name exists with an equal schema.

        Returns the schema. Raises SchemaMismatch if one exists with a different schema,
        TableLoading if one of this name is being filled, and the errors of ``require_creatable``.
        """
        entry = self._tables.find(schema.name)
        if entry is not None:
            entry.schema.require_equal(schema)
            return entry.schema
        self._tables.require_unclaimed(schema.name)
        self.require_creatable(schema)
        self._create(schema)
        return schema

    def require_creatable(self, schema: TableSchema) -> None:
        """Check that a table could be created, apart from whether its name is in use.

        Raises BadRequest for an invalid name, TooLarge if the shard has max_tables tables, NoLog if
        the table needs a log but the shard has none.
        """
        if problem := names.problem("table", schema.name):
            raise BadRequest("INVALID_ARGUMENT", problem)
        if len(self._tables) >= self._max_tables:
            raise TooLarge(
                "TOO_MANY_TABLES",
                f"this shard already has {self._max_tables} tables, its limit (max_tables)",
            )
        if schema.durability == "fsync" and self._sequencer.log is None:
            raise NoLog

    def _create(self, schema: TableSchema) -> None:
        """Create a table, as the next version. The caller has checked that this is allowed."""
        number = self._tables.next_number
        parts = records.encode_create(self._sequencer.origin(), number, to_json(schema))
        self._sequencer.reserve([RECORD + len(parts[1])])
        self._tables.add(number, schema, self.version + 1)
        self._sequencer.append(Kind.CREATE, parts)

    def alter_table(
        self, name: str, change: Callable[[TableSchema], TableSchema]
    ) -> tuple[TableSchema, int]:
        """Change settings of a table, as the next version, and keep its rows. Does nothing if the
        new schema equals the present one.

        change  called with the present schema; returns the new one, or raises

        Returns (new schema, number of admission counters that were dropped because the new
        admission rule cannot use them). Raises OutOfMemory, DiskFull, Overloaded or the errors of
        ``change``; then nothing has changed.
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
        """Drop a table, as the next version, and free its memory. Raises UnknownTable."""
        entry = self._tables.get(name)
        self._tables.require_unclaimed(name)
        parts = records.encode_drop(self._sequencer.origin(), entry.number, to_json(entry.schema))
        self._sequencer.reserve([RECORD + len(parts[1])])
        self._tables.remove(entry)
        self._sequencer.append(Kind.DROP, parts)

    # ---- rows

    def exchange(
        self, pushes: Sequence[Push], pulls: Sequence[Pull], *, exceed: bool = False
    ) -> Exchanged:
        """Apply the pushes, each as one version, then read rows for the pulls.

        exceed  exceed the memory budget if the rows of the pushes do not fit

        All pushes and pulls are checked, and disk space is reserved, before the first push is
        applied. Raises NoRoom, and applies nothing then, if room for the pushes needs a flush. Two
        errors can still occur in a later push: OutOfMemory, and RowOverflow if an earlier push
        changed the same row. Then the earlier pushes stay applied; a retry of the call does not
        apply them again.
        """
        if not pushes:
            return Exchanged([], list(map(self._pull, self._check_pulls(pulls), pulls)))
        checked = [self._check_push(push) for push in pushes]
        check_order(pushes)
        entries = self._check_pulls(pulls) if pulls else []
        self._sequencer.reserve([record_bytes(each.entry, each.push) for each in checked])
        if exceed:
            with self.pushroom.exceeding(checked):
                pushed = self._apply(checked)
        else:
            pushed = self._apply(checked)
        return Exchanged(pushed, list(map(self._pull, entries, pulls)))

    def _apply(self, checked: Sequence[CheckedPush]) -> list[pb.PushResponse]:
        """Apply pushes for which there is room in the log. For the errors see ``exchange``."""
        if self.budget.holders:
            self.pushroom.make(checked)
        if len(checked) > 1:  # a single one is checked as it is applied
            for each in checked:
                _check_rows(each)
        pushed: list[pb.PushResponse] = []
        for each in checked:
            try:
                pushed.append(self._push(each))
            except OutOfMemory as error:
                pushed.append(self._exceed(each, error, bool(pushed)))
        return pushed

    def _exceed(self, each: CheckedPush, error: OutOfMemory, begun: bool) -> pb.PushResponse:
        """Apply a push beyond the memory budget, because the room made for it did not suffice.

        error  raised by the push; it is raised again if the budget must not be exceeded
        begun  an earlier push of the same call was applied

        Room is made for each table alone, so that one push may take the room of another. Raises
        NoRoom if nothing was applied yet, and OutOfMemory if no rows can leave.
        """
        if not self.budget.holders or (isinstance(error, NoRoom) and not begun):
            raise error
        if self.budget.crowded:
            raise OutOfMemory(error.budget, error.held, error.wanted, error.what) from error
        with self.pushroom.exceeding([each]):
            return self._push(each)

    def delete(self, change: Delete) -> pb.DeleteResponse:
        """Delete rows, as one version. Ignores keys without a row. A retry changes nothing, and
        returns the version of the first attempt.
        """
        entry = self._tables.get(change.table)
        level = self._level(entry, change)
        applied = self._sequencer.applied(change)
        if applied is not None:
            return pb.DeleteResponse(version=applied, duplicate=True, achieved=level)
        self._sequencer.reserve([RECORD + 8 * len(change.keys)])
        deleted = self._delete(entry, change.keys, Cause.REQUEST, change)
        return pb.DeleteResponse(version=self.version, achieved=level, deleted=deleted)

    def write_rows(
        self, number: int, step: int, keys: Keys, frequencies: NDArray[np.uint64], rows: Rows
    ) -> int:
        """Insert or overwrite whole rows, as one change; return its version.

        number       number of the table, even if it is hidden (still being filled)
        step         training step to store in all rows; the table's own step does not change
        keys         uint64[n], distinct
        frequencies  uint64[n]; stored as at most 2^32 - 1
        rows         float32[n, width], with optimizer state

        The log keeps references to the arrays, so the caller must not change them afterwards.
        Raises UnknownTable if the table was dropped, OutOfMemory, and the errors of
        ``Sequencer.reserve``.
        """
        entry = self._tables.require_number(number)
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
        """Append a named mark to the log, as the next version, and return this version. Checkpoints
        that wait for the mark capture the shard.

        Raises NoLog without a log.
        """
        if self._sequencer.log is None:
            raise NoLog
        parts = records.encode_barrier(self._sequencer.origin(), name)
        self._sequencer.reserve([RECORD + len(parts[1])])
        self._sequencer.append(Kind.BARRIER, parts)
        self.cuts.placed(name, self.capture)
        return self.version

    # ---- single pushes and pulls

    def _check_push(self, push: Push) -> CheckedPush:
        """Check a push against its table, without changing anything.

        Raises UnknownTable, BadRequest for a bad learning rate or dim, StepTooFar, NoLog, or the
        errors of ``Sessions.applied``.
        """
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
                f"table {push.table!r}: gradients must have {schema.dim} numbers (the table's dim),"
                f" got {push.gradients.shape[1]}",
            )
        level, applied = self._level(entry, push), self._sequencer.applied(push)
        if applied is None and push.step > entry.table.evictor.last_step(schema.max_step_ahead):
            at = self.step(push.table)
            raise StepTooFar(push.table, push.step, max(at, 0), schema.max_step_ahead)
        return CheckedPush(push, entry, level, applied)

    def _check_pulls(self, pulls: Sequence[Pull]) -> list[TableEntry]:
        """Check some pulls, and return the table of each.

        Raises UnknownTable; LogDiverged or VersionInFuture if the shard does not have a version
        that a pull requires; TooLarge if the replies together would exceed reply_bytes.
        """
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
                    f"field 'min_version' is {pull.min_version}, but the newest version of shard"
                    f" {self.number} is {self.version}"
                )
        if size > self._reply_bytes:
            raise TooLarge(
                "TOO_MANY_KEYS",
                f"the reply would take {size} bytes, more than the limit of {self._reply_bytes}:"
                " pull fewer keys per request",
            )
        return entries

    def _level(self, entry: TableEntry, change: Change) -> pb.Durability:
        """Return the durability that a change must reach before the server replies: the one that
        the request names, otherwise the table's default.

        Without a log, returns APPLIED, but raises NoLog if the durability would be "fsync".
        """
        level = change.durability or entry.schema.durability
        if self._sequencer.log is None:
            if level == "fsync":
                raise NoLog
            level = "applied"
        return DURABILITIES[level]

    def _push(self, checked: CheckedPush) -> pb.PushResponse:
        """Apply a checked push as the next version. If it was applied before, changes nothing and
        replies with its earlier version.
        """
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
            count, width = len(pushed.slots), entry.width
            images = self._buffers.take(count, width, version, sequencer.log.written)
            table.images(pushed.slots, *images)
            counted = pushed.waiting, pushed.totals
            parts = records.encode_push(origin, entry.number, pushed.keys, *images, *counted)
        sequencer.append(Kind.PUSH, parts, push)
        return pb.PushResponse(version=version, achieved=level)

    def _pull(self, entry: TableEntry, pull: Pull) -> Pulled:
        """Return the reply to a pull that passed its checks.

        entry  table of the pull
        """
        table = entry.table
        if pull.prefetch:
            header = pb.PullResponseHeader(version=self.version, dim=table.schema.dim)
            return Pulled(header, _NO_ROWS, _NO_VERSIONS, _NO_STEPS, _NO_VERSIONS)
        header = pb.PullResponseHeader(
            version=self.version,
            dim=table.schema.dim,
            dtype=pull.dtype,  # type: ignore[arg-type]
        )
        if pull.gpu_room is not None:
            pull_to_room(self.gpu, table, pull)
            return Pulled(header, _NO_ROWS, _NO_VERSIONS, _NO_STEPS, _NO_VERSIONS)
        rows = rows_for(pull, table.schema.dim)
        if rows is None:
            return Pulled(header, _NO_ROWS, _NO_VERSIONS, _NO_STEPS, _NO_VERSIONS)
        locations = table.pull(pull.keys, pull.mode, rows)
        pulled = Pulled(
            header, to_wire_clamped(rows, pull.dtype), _NO_VERSIONS, _NO_STEPS, _NO_VERSIONS
        )
        if pull.with_metadata:
            metadata = map(np.ascontiguousarray, table.metadata(locations))
            pulled.versions, pulled.steps, pulled.frequencies = metadata
        elsewhere = pull.with_metadata or pull.dtype != pb.DTYPE_FLOAT32  # than in the room
        if elsewhere and pull.room is not None and len(pull.keys):
            lanes.fill(pull.room, pulled)
        return pulled

    def _delete(
        self, entry: TableEntry, keys: Keys, cause: Cause, change: Change | None = None
    ) -> int:
        """Delete rows as the next version; return how many existed.

        cause   why they are deleted: a request, or an eviction rule
        change  request of the client; None for an eviction

        The caller must have reserved disk space for the log record.
        """
        gone, rows = entry.table.delete(keys)
        self._tombstones.add(entry.number, gone, self.version + 1, cause)
        origin = self._sequencer.origin(change, entry.table.evictor.step)
        parts = records.encode_delete(origin, entry.number, cause, gone)
        self._sequencer.append(Kind.DELETE, parts, change)
        return rows


def _check_rows(checked: CheckedPush) -> None:
    """Raise RowOverflow if the push, applied alone, would leave infinity or NaN in a row."""
    push = checked.push
    if checked.applied is None:
        checked.entry.table.check_push(
            push.keys, push.gradients, step=push.step, lr=push.lr, largest=push.largest
        )
