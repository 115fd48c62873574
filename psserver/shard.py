"""One shard's part of every table, without a network.

Not thread-safe: the engine thread is the only caller. Changes are applied in the order of the
calls; each gets the next version and, where the shard has a log, is appended to it.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psproto import ps_pb2 as pb
from psproto.codec import WIRE, Exchanged, Pulled, to_wire
from psproto.routing import ShardMap
from psserver.errors import BadRequest, NoLog, Overloaded, TooLarge, VersionInFuture
from psserver.schemas import DURABILITIES, from_json, to_json
from psserver.sessions import Sessions
from storage import block as blocks
from storage import records
from storage.arena import Budget
from storage.basestate import BaseState, BaseTable
from storage.block import Block
from storage.errors import Corrupt, UnknownTable
from storage.eviction.contract import FIRST_STEP
from storage.eviction.sweep import Sweep
from storage.kernels import Keys, Rows
from storage.records import Cause, Kind, Origin
from storage.schema import NAME, Durability, TableSchema
from storage.table import Mode, Table, TableStats, Tally
from storage.tiers.base import Scan
from storage.versionlog import VersionLog

MAX_BACKLOG = 256 << 20  # bytes appended and not yet written
MAX_DROPPED = 4096  # tables that were dropped and whose schemas are remembered
RECORD = 64  # bytes of a record beside its arrays, and more than a barrier's name needs beside it
SWEEPING, URGENT = 0.03, 0.5  # shares of the engine's time for eviction
_NO_VERSIONS, _NO_STEPS = np.empty(0, np.uint64), np.empty(0, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Who asks for a change of which rows, and what is to be true when it is answered."""

    table: str
    keys: Keys  # uint64[n], distinct and of this shard
    client: int  # 0: not protected against repetition
    incarnation: int
    sequence: int
    acknowledged: int
    durability: Durability | None = None  # None: the table's


@dataclass(frozen=True, slots=True, kw_only=True)
class Push(Change):
    """A push whose gradients are finite."""

    counts: NDArray[np.uint32]  # [n]
    gradients: Rows  # float32[n, dim]
    step: int
    lr: float | None


@dataclass(frozen=True, slots=True)
class Pull:
    """A pull whose keys are of this shard."""

    table: str
    keys: Keys  # uint64[n]
    dtype: int
    mode: Mode
    with_metadata: bool
    min_version: int


class Tombstones(NamedTuple):
    """Rows that one change deleted."""

    table: int  # its number
    keys: Keys
    version: int
    cause: Cause


@dataclass(frozen=True, slots=True)
class Holdings:
    """A table on this shard, for a reader that goes through its rows while pushes go on."""

    schema: TableSchema
    number: int
    version: int  # of the shard
    step: int  # the largest that was pushed to it
    tiers: list[tuple[str, Scan, int]]  # name, rows, bytes
    stats: TableStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a table knows of some keys now; 0 and empty for those without a row."""

    version: int  # of the shard
    number: int  # of the table
    created: int  # version of its creation
    tiers: list[str]
    versions: NDArray[np.uint64]  # [n]
    steps: NDArray[np.int64]  # [n]
    frequencies: NDArray[np.uint64]  # [n]
    embeddings: Rows  # float32[n, dim]
    waiting: NDArray[np.uint32]  # [n]  occurrences that are counted towards admission
    step: int  # the largest that was pushed to the table
    schema: TableSchema
    forgets: str  # how keys may have been pushed that have neither row nor counter


class Standing(NamedTuple):
    """Which tables there are at one version."""

    version: int
    horizon: int  # deletes up to this version may have lost their tombstones
    tables: tuple[tuple[int, TableSchema, int], ...]  # number, schema, version of the creation


@dataclass(frozen=True, slots=True)
class Captive:
    """A table of a captured shard."""

    base: BaseTable
    table: Table
    width: int
    rows: int
    counters: int  # exact ones
    edits: int  # of a sketch; see Gate
    scan: Scan


@dataclass(slots=True)
class Held:
    """A table, its number in the log and the version of its creation."""

    table: Table
    number: int
    created: int


@dataclass(frozen=True, slots=True)
class Captured:
    """The shard at one version, for a reader that goes through the rows while pushes go on."""

    version: int
    next_table: int
    tables: tuple[Captive, ...]
    sessions: bytes
    tombstones: tuple[Tombstones, ...]
    horizon: int  # deletes up to this version may have lost their tombstones


class Shard:
    """The tables of one shard, their common version and the sessions of the clients.

    reply_bytes     largest reply, in bytes of arrays
    max_tombstones  deleted keys that are remembered for subscribers that come back
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
    ) -> None:
        self.number = number
        self.shard_map = shard_map
        self.budget = Budget(memory_bytes)
        self.version = 0
        self.sessions = Sessions(max_sessions, session_ttl, clock)
        owned = np.count_nonzero(shard_map.shard_of_bucket == number)
        self._share = float(owned) / len(shard_map.shard_of_bucket)  # of the keys
        self._ruled: list[int] = []  # numbers of the tables from which rows leave by themselves
        self._swept = self._expired = 0  # which of these had its turn last
        self._reply_bytes = reply_bytes
        self._max_tables = max_tables
        self._tables: dict[str, Held] = {}
        self._numbered: dict[int, Held] = {}
        self._next_table = 1
        self._schemas: dict[int, TableSchema] = {}  # by number; of dropped tables too
        self._log = log
        self._now = now
        self._buffers: deque[tuple[int, NDArray[np.uint8]]] = deque()  # with the version in them
        self._tombstones: list[Tombstones] = []
        self._forgotten = 0  # of them, from the first on; removed many at a time
        self._tombstone_keys = 0
        self._max_tombstones = max_tombstones
        self.tombstone_horizon = 0

    def attach(self, log: VersionLog) -> None:
        """Append changes to ``log`` from now on; it holds the shard's version and none after."""
        assert log.last == self.version
        self._log = log

    def create_table(self, schema: TableSchema) -> TableSchema:
        """Create a table, or find it with an equal schema; SchemaMismatch if another."""
        held = self._tables.get(schema.name)
        if held is not None:
            held.table.schema.require_equal(schema)
            return held.table.schema
        if len(self._tables) >= self._max_tables:
            raise TooLarge("TOO_MANY_TABLES", f"{self._max_tables} tables exist, the limit")
        if schema.durability == "fsync" and self._log is None:
            raise NoLog
        parts = records.encode_create(self._origin(), self._next_table, to_json(schema))
        self._reserve([RECORD + len(parts[1])])
        self._add_table(self._next_table, schema, self.version + 1)
        self._append(Kind.CREATE, parts)
        return schema

    def describe(self, name: str) -> tuple[TableSchema, TableStats]:
        """Schema and size of a table."""
        table = self._table(name)
        return table.schema, table.stats()

    def tables(self) -> list[str]:
        """Names of the tables, sorted."""
        return sorted(self._tables)

    def drop_table(self, name: str) -> None:
        """Drop a table and return its memory."""
        held = self._held(name)
        schema = to_json(held.table.schema)
        parts = records.encode_drop(self._origin(), held.number, schema)
        self._reserve([RECORD + len(parts[1])])
        self._remove_table(held)
        self._append(Kind.DROP, parts)

    def delete(self, change: Change) -> pb.DeleteResponse:
        """Delete rows; keys without one are left alone."""
        held = self._held(change.table)
        level = self._level(change)
        known = self._applied(change)
        if known is not None:
            return pb.DeleteResponse(version=known, duplicate=True, achieved=level)
        self._reserve([RECORD + 8 * len(change.keys)])
        deleted = self._delete(held, change.keys, Cause.REQUEST, change)
        return pb.DeleteResponse(version=self.version, achieved=level, deleted=deleted)

    def write_rows(
        self, name: str, step: int, keys: Keys, frequencies: NDArray[np.uint64], rows: Rows
    ) -> int:
        """Write whole rows over those that are there, as one change; returns its version.

        keys  uint64[n], distinct; frequencies uint64[n]; rows float32[n, width]; nobody may change
              these arrays any more: the log has no copy
        step  of all of them, as it is given
        """
        held, n = self._held(name), len(keys)
        self._reserve([RECORD + n * (16 + 4 * rows.shape[1])])
        version = self.version + 1
        versions, steps = np.full(n, version, np.uint64), np.full(n, step, np.int64)
        frequencies = np.minimum(frequencies, np.uint64(0xFFFFFFFF))
        held.table.put(keys, versions, steps, frequencies, rows)
        origin = self._origin(step=step)
        held.table.evictor.pushed(version, step, origin.time_us / 1e6)
        self._append(Kind.PUSH, records.encode_push(origin, held.number, keys, frequencies, rows))
        return version

    def scan(self, name: str) -> tuple[TableSchema, int, Scan]:
        """A table's rows as they are now and will be, to be copied by slices on this thread."""
        table = self._table(name)
        return table.schema, self.version, table.scan()

    def holdings(self, name: str) -> Holdings:
        """What there is of a table, to be read by slices."""
        held = self._held(name)
        table = held.table
        return Holdings(
            table.schema,
            held.number,
            self.version,
            table.evictor.step,
            table.tiers(),
            table.stats(),
        )

    def step(self, name: str) -> int:
        """The largest step that was pushed to a table; 0 if none was."""
        step = self._table(name).evictor.step
        return step if step > FIRST_STEP else 0

    def holds(self, number: int) -> bool:
        """Whether the table of this number is still there."""
        return number in self._numbered

    def known(self, name: str, keys: Keys) -> Known:
        """What a table knows of distinct keys of this shard."""
        held = self._held(name)
        table = held.table
        embeddings = np.empty((len(keys), table.schema.dim), np.float32)
        locations = table.pull(keys, "serve", embeddings)
        versions, steps, frequencies = table.metadata(locations)
        waiting = np.where(locations == 0, table.gate.waiting(keys), 0).astype(np.uint32)
        forgets, stale = table.gate.forgets, table.evictor.stale(self._now())
        if not forgets and table.gate.cap and stale > held.created:
            forgets = f"counters last touched up to version {stale} have expired"
        return Known(
            version=self.version,
            number=held.number,
            created=held.created,
            tiers=table.tiers_of(locations),
            versions=versions,
            steps=steps,
            frequencies=frequencies,
            embeddings=embeddings,
            waiting=waiting,
            step=table.evictor.step,
            schema=table.schema,
            forgets=forgets,
        )

    # ---- eviction

    def tick(self) -> float:
        """Take the next slice of the background's eviction, of one table after the other.

        Returns the share of this thread's time that it should have; 0: nothing is to be done.
        Raises what a delete may raise for want of room in the log; the rows stay then.
        """
        seconds, ruled = self._now(), self._ruled
        if not ruled:
            return 0.0
        self._expired = (self._expired + 1) % len(ruled)
        table = self._numbered[ruled[self._expired]].table
        if stale := table.evictor.stale(seconds):
            table.gate.expire(stale + 1)
        for _ in ruled:
            self._swept = (self._swept + 1) % len(ruled)
            held = self._numbered[ruled[self._swept]]
            table, evictor = held.table, held.table.evictor
            if evictor.due(len(table), seconds):
                try:
                    self._evict(held, evictor.tick(table.view(), seconds))
                except BaseException:
                    evictor.again()
                    raise
                return URGENT if evictor.excess(len(table)) * 16 > len(table) else SWEEPING
        return 0.0

    def sweep(self, name: str, dry: bool) -> tuple[int, Sweep]:
        """A sweep by all rules of a table, to be done by ``sweep_slice``; and the table's number.

        dry  only count
        """
        held = self._held(name)
        return held.number, held.table.evictor.sweep(dry=dry)

    def sweep_slice(self, number: int, sweep: Sweep) -> None:
        """Take the next slice of a sweep; UnknownTable if the table was dropped meanwhile."""
        held = self._numbered.get(number)
        if held is None:
            schema = self._schemas.get(number)
            raise UnknownTable(schema.name if schema else str(number))
        view = held.table.view()
        victims = sweep.slice(view, held.table.evictor.now(self._now()))
        self._evict(held, victims.keys(view))

    def tally(self, name: str) -> tuple[Tally, int]:
        """What the rules of a table did, and how many counters were dropped for age or room."""
        table = self._table(name)
        return table.tally, table.gate.dropped

    def _evict(self, held: Held, victims: dict[Cause, Keys]) -> None:
        """Evict what a slice found: all of it or, where the log has no room, none."""
        self._reserve([RECORD + 8 * len(keys) for keys in victims.values()])
        evicted = held.table.tally.evicted
        for cause, keys in victims.items():
            evicted[cause] = evicted.get(cause, 0) + self._delete(held, keys, cause)

    def _delete(self, held: Held, keys: Keys, cause: Cause, change: Change | None = None) -> int:
        """Delete rows as the next version, for which the log has room; how many there were."""
        gone, rows = held.table.delete(keys)
        self._bury(Tombstones(held.number, gone, self.version + 1, cause))
        origin = self._origin(change, held.table.evictor.step)
        parts = records.encode_delete(origin, held.number, cause, gone)
        self._append(Kind.DELETE, parts, change)
        return rows

    def barrier(self, name: str) -> int:
        """Mark this moment in the log, and return its version."""
        if self._log is None:
            raise NoLog
        parts = records.encode_barrier(self._origin(), name)
        self._reserve([RECORD + len(parts[1])])
        self._append(Kind.BARRIER, parts)
        return self.version

    def exchange(self, pushes: Sequence[Push], pulls: Sequence[Pull]) -> Exchanged:
        """Apply the pushes, then read the pulls.

        Every part is checked, and room in the log reserved, before the first push is applied.
        OutOfMemory alone may come between two pushes; the earlier one is applied then, and the same
        call under the same sequence numbers completes it.
        """
        known = [self._check_push(push) for push in pushes]
        _check_order(pushes)
        self._check_pulls(pulls)
        self._reserve([self._record_bytes(push) for push in pushes])
        pushed = [self._push(push, version) for push, version in zip(pushes, known, strict=True)]
        return Exchanged(pushed, [self._pull(pull) for pull in pulls])

    def size(self, parts: Sequence[Push | Pull]) -> int:
        """About how many bytes of rows these are about, and more than their records take. From any
        thread; a table that is not there counts nothing.
        """
        size = 0
        for part in parts:
            held = self._tables.get(part.table)
            if held is not None:
                size += RECORD + len(part.keys) * (16 + 4 * held.table.schema.width)
        return size

    def reply_bytes(self, pulls: Sequence[Pull]) -> int:
        """Bytes of arrays in the reply to these. From any thread; none of a table that is not
        there.
        """
        size = 0
        for pull in pulls:
            held = self._tables.get(pull.table)
            if held is not None:
                size += self._pulled_bytes(pull, held.table.schema.dim)
        return size

    def dump(self) -> dict[str, Any]:
        """Copies of everything the shard holds, for tests: as large as the shard."""
        return {name: self._tables[name].table.dump() for name in self.tables()}

    # ---- subscribers

    def schema_of(self, number: int) -> TableSchema | None:
        """Of a table that has had this number; None once it is long dropped. From any thread."""
        return self._schemas.get(number)

    def standing(self) -> Standing:
        """Which tables there are, by number."""
        tables = sorted(self._tables.values(), key=lambda held: held.number)
        return Standing(
            self.version,
            self.tombstone_horizon,
            tuple((held.number, held.table.schema, held.created) for held in tables),
        )

    def rows_of(self, number: int) -> Scan | None:
        """The rows of a table; None if there is none of this number any more."""
        held = self._numbered.get(number)
        return None if held is None else held.table.scan()

    def tombstones(self, after: int, limit: int) -> list[Tombstones]:
        """The oldest ones of versions above ``after``: so many of them, and whole versions."""
        dead = self._tombstones
        start = bisect_right(dead, after, lo=self._forgotten, key=lambda each: each.version)
        end = min(start + limit, len(dead))
        while start < end < len(dead) and dead[end].version == dead[end - 1].version:
            end += 1
        return dead[start:end]

    # ---- base and log

    def capture(self) -> Captured:
        """The shard as it is now, to be read through while pushes go on."""
        return Captured(
            self.version,
            self._next_table,
            tuple(self._capture(held) for held in self._tables.values()),
            self.sessions.pack(),
            tuple(self._tombstones[self._forgotten :]),
            self.tombstone_horizon,
        )

    def load_state(self, state: BaseState) -> None:
        """Begin from a base state; its blocks come next."""
        self.version = state.version
        self._next_table = state.next_table
        self.tombstone_horizon = state.horizon
        self.sessions.unpack(state.sessions)
        for table in state.tables:
            self._add_table(table.number, from_json(json.loads(table.schema)), table.created)
            if table.policy:
                self._numbered[table.number].table.evictor.load(table.policy)

    def load_block(self, block: Block) -> None:
        """Take in a block of the base; blocks come in the order in which they were made."""
        held = self._numbered.get(block.table)
        if held is None:  # dropped before the state was committed
            return
        table = held.table
        match block.kind:
            case blocks.ROWS:
                table.put(block.keys, block.versions, block.steps, block.frequencies, block.rows)
                if len(block.keys):
                    table.evictor.loaded(int(block.versions.max()), int(block.steps.max()))
                return
            case blocks.COUNTERS:
                table.put_counters(block.keys, block.totals, block.versions)
                return
            case blocks.CELLS:
                try:
                    table.gate.load_cells(block.start, block.cells)
                except ValueError as error:
                    raise Corrupt(f"sketch of table {table.schema.name!r}", str(error)) from error
                return
        for version in np.unique(block.versions):
            chosen = block.versions == version
            keys = block.keys[chosen].copy()
            table.delete(keys, before=int(version))
            cause = Cause(int(block.causes[chosen][0]))
            self._bury(Tombstones(block.table, keys, int(version), cause))

    def replay(self, version: int, record: records.Record) -> None:
        """Apply a record of the log once more; records come in their order."""
        self.version = version
        match record:
            case records.Create():
                self._add_table(record.table, from_json(record.schema), version)
                return
            case records.Barrier():
                return
        held = self._numbered.get(record.table)
        if held is None:
            raise Corrupt(f"record of version {version}", f"there is no table {record.table}")
        match record:
            case records.Push(origin, _, keys, frequencies, rows, waiting, totals):
                versions = np.full(len(keys), version, np.uint64)
                steps = np.full(len(keys), origin.step, np.int64)
                held.table.put(keys, versions, steps, frequencies, rows)
                since = np.full(len(waiting), version, np.uint64)
                held.table.put_counters(waiting, totals, since)
                held.table.evictor.pushed(version, origin.step, origin.time_us / 1e6)
            case records.Delete(origin, number, cause, keys):
                held.table.delete(keys)
                self._bury(Tombstones(number, keys.copy(), version, cause))
            case records.Drop(origin):
                self._remove_table(held)
        if origin.client:
            self.sessions.record(
                origin.client, origin.incarnation, origin.sequence, origin.acknowledged, version
            )

    def recovered(self) -> None:
        """Base and log are loaded; Corrupt if only a part of something was."""
        for held in self._numbered.values():
            try:
                held.table.gate.begin(self.version)
            except ValueError as error:
                name = held.table.schema.name
                raise Corrupt(f"sketch of table {name!r}", str(error)) from error
        self.sessions.replayed()

    def _capture(self, held: Held) -> Captive:
        table = held.table
        base = BaseTable(
            number=held.number,
            schema=json.dumps(to_json(table.schema), sort_keys=True),
            created=held.created,
            policy=table.evictor.pack(),
        )
        gate, width = table.gate, table.schema.width
        counters = 0 if len(gate.cells()) else gate.entries
        return Captive(base, table, width, len(table), counters, gate.edits, table.scan())

    def _add_table(self, number: int, schema: TableSchema, created: int) -> None:
        held = Held(Table(schema, self.budget, self._share), number, created)
        self._tables[schema.name] = self._numbered[number] = held
        if schema.evictions:
            self._ruled.append(number)
        self._next_table = max(self._next_table, number + 1)
        self._schemas[number] = schema
        if len(self._schemas) > len(self._tables) + MAX_DROPPED:
            del self._schemas[next(each for each in self._schemas if each not in self._numbered)]

    def _remove_table(self, held: Held) -> None:
        held.table.close()
        del self._tables[held.table.schema.name], self._numbered[held.number]
        if held.number in self._ruled:
            self._ruled.remove(held.number)

    def _bury(self, dead: Tombstones) -> None:
        """Remember deleted rows, and forget the oldest ones beyond the limit."""
        if not len(dead.keys):
            return
        self._tombstones.append(dead)
        self._tombstone_keys += len(dead.keys)
        while self._tombstone_keys > self._max_tombstones:
            oldest = self._tombstones[self._forgotten]
            self._forgotten += 1
            self._tombstone_keys -= len(oldest.keys)
            self.tombstone_horizon = max(self.tombstone_horizon, oldest.version)
        if self._forgotten > max(1024, len(self._tombstones) // 2):
            del self._tombstones[: self._forgotten]
            self._forgotten = 0

    def _origin(self, change: Change | None = None, step: int = 0) -> Origin:
        now = int(self._now() * 1e6)
        if change is None:
            return Origin(step=step, time_us=now)
        return Origin(
            client=change.client,
            incarnation=change.incarnation,
            sequence=change.sequence,
            acknowledged=change.acknowledged,
            step=step,
            time_us=now,
        )

    def _reserve(self, sizes: Sequence[int]) -> None:
        """Make sure that records of so many bytes can be appended, or change nothing."""
        if self._log is None or not sizes:
            return
        if self._log.backlog > MAX_BACKLOG:
            raise Overloaded(f"the log is {self._log.backlog} bytes behind, {MAX_BACKLOG} may be")
        self._log.reserve(*sizes)

    def _append(self, kind: Kind, parts: Sequence[Any], change: Change | None = None) -> None:
        """Give the change that was just applied its version, its record and its session."""
        self.version += 1
        if self._log is not None:
            self._log.append(self.version, kind, parts)
        if change is not None and change.client:
            self.sessions.record(
                change.client,
                change.incarnation,
                change.sequence,
                change.acknowledged,
                self.version,
            )

    def _record_bytes(self, push: Push) -> int:
        return RECORD + len(push.keys) * (16 + 4 * self._table(push.table).schema.width)

    def _images(self, table: Table, slots: Any) -> tuple[NDArray[Any], Rows]:
        """Frequencies uint64[n] and rows float32[n, width] in memory that the log has done with."""
        count, width = len(slots), table.schema.width
        size = count * (8 + 4 * width)
        buffer = None
        if self._buffers and self._log is not None and self._buffers[0][0] <= self._log.written:
            buffer = self._buffers.popleft()[1]
        if buffer is None or len(buffer) < size:
            buffer = np.empty(size, np.uint8)
        self._buffers.append((self.version + 1, buffer))
        frequencies = buffer[: 8 * count].view(np.uint64)
        rows = buffer[8 * count : size].view(np.float32).reshape(count, width)
        table.images(slots, frequencies, rows)
        return frequencies, rows

    # ---- checks

    def _held(self, name: str) -> Held:
        held = self._tables.get(name)
        if held is not None:
            return held
        if not NAME.fullmatch(name):
            raise BadRequest(
                "INVALID_ARGUMENT",
                "table name must be 1..128 letters, digits or any of _ . / - and start with a"
                f" letter, a digit or _, got {name[:200]!r}",
            )
        raise UnknownTable(name)

    def _table(self, name: str) -> Table:
        return self._held(name).table

    def _level(self, change: Change) -> pb.Durability:
        """What will be true once the change is answered."""
        level = change.durability or self._table(change.table).schema.durability
        if self._log is None:
            if level == "fsync":
                raise NoLog
            level = "applied"
        return DURABILITIES[level]

    def _check_push(self, push: Push) -> int | None:
        """Refuse a push that cannot be applied; the version under which it was, or None."""
        schema = self._table(push.table).schema
        dim = schema.dim
        if push.lr is not None:
            try:
                schema.optimizer.require_lr(push.lr)
            except ValueError as error:
                raise BadRequest("INVALID_ARGUMENT", f"table {push.table!r}: {error}") from error
        if len(push.keys) and push.gradients.shape[1] != dim:
            raise BadRequest(
                "DIM_MISMATCH",
                f"table {push.table!r} has dim {dim}, the gradients have {push.gradients.shape[1]}",
            )
        self._level(push)
        return self._applied(push)

    def _applied(self, push: Change) -> int | None:
        """The version under which the change was applied already, or None."""
        if not push.client:
            return None
        return self.sessions.applied(
            push.client, push.incarnation, push.sequence, push.acknowledged
        )

    def _pulled_bytes(self, pull: Pull, dim: int) -> int:
        return len(pull.keys) * (dim * WIRE[pull.dtype].itemsize + 24 * pull.with_metadata)

    def _check_pulls(self, pulls: Sequence[Pull]) -> None:
        size = 0
        for pull in pulls:
            size += self._pulled_bytes(pull, self._table(pull.table).schema.dim)
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

    def _push(self, push: Push, known: int | None) -> pb.PushResponse:
        """Apply a push, unless it was already, under the version ``known``."""
        level = self._level(push)
        if known is not None:
            return pb.PushResponse(version=known, duplicate=True, achieved=level)
        held = self._held(push.table)
        pushed = held.table.push(
            push.keys,
            push.gradients,
            push.counts,
            version=self.version + 1,
            step=push.step,
            lr=push.lr,
        )
        origin = self._origin(push, pushed.step)
        held.table.evictor.pushed(self.version + 1, pushed.step, origin.time_us / 1e6)
        parts: Sequence[Any] = ()
        if self._log is not None:
            frequencies, rows = self._images(held.table, pushed.slots)
            counted = pushed.waiting, pushed.totals
            parts = records.encode_push(
                origin, held.number, pushed.keys, frequencies, rows, *counted
            )
        self._append(Kind.PUSH, parts, push)
        return pb.PushResponse(version=self.version, achieved=level)

    def _pull(self, pull: Pull) -> Pulled:
        table = self._table(pull.table)
        rows = np.empty((len(pull.keys), table.schema.dim), np.float32)
        locations = table.pull(pull.keys, pull.mode, rows)
        header = pb.PullResponseHeader(
            version=self.version,
            dim=table.schema.dim,
            dtype=pull.dtype,  # type: ignore[arg-type]
        )
        embeddings = to_wire(rows, pull.dtype)
        if not pull.with_metadata:
            return Pulled(header, embeddings, _NO_VERSIONS, _NO_STEPS, _NO_VERSIONS)
        return Pulled(header, embeddings, *map(np.ascontiguousarray, table.metadata(locations)))


def _check_order(pushes: Sequence[Push]) -> None:
    """Refuse pushes of an exchange of which one could leave the next without its session.

    A push makes its client forget what it acknowledges, and what is far behind it. So those of one
    client must be of one incarnation, ascend, and acknowledge nothing of the exchange itself.
    """
    if len(pushes) < 2:
        return
    firsts: dict[int, Push] = {}
    lasts: dict[int, Push] = {}
    for push in pushes:
        if not push.client:
            continue
        first, last = firsts.setdefault(push.client, push), lasts.get(push.client)
        if last is not None and not (
            push.incarnation == last.incarnation
            and push.sequence > last.sequence
            and push.acknowledged < first.sequence
        ):
            raise BadRequest(
                "INVALID_ARGUMENT",
                "pushes of one client in an exchange must be of one incarnation, ascend, and"
                f" acknowledge none of each other: client {push.client:#x} has incarnation"
                f" {push.incarnation} sequence {push.sequence} acknowledged {push.acknowledged}"
                f" behind incarnation {last.incarnation} sequence {last.sequence}",
            )
        lasts[push.client] = push
