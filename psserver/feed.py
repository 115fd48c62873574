"""Subscriptions: every change of a shard, in order, to whoever follows it.

A subscriber is a cursor over the log's files. Nothing is queued for it: what it has not taken is on
disk, and a slow or stopped one costs a file descriptor and a message or two. Files are read, and
messages made, on two threads of their own, one step at a time for each subscriber, which then waits
until gRPC has taken the messages; the log says when there is more. Only durable versions are sent.

    tail       the log from the subscriber's version on
    snapshot   every row, then the log
    catch-up   rows of versions above the subscriber's, and what was deleted since, then the log:
               for a subscriber whose place in the log has been cut off

A scan takes the shard's version V, then goes through the rows a slice at a time, while pushes go
on. The engine thread copies the slices, so rows are whole, and a push waits for a slice at most.
Rows of versions above V are left out: the log has them, and the subscriber gets it from V on. Once
it has had the log up to the shard's version at the end of the scan, it is at a state of the shard,
and is told so. A slot that is used again between two slices is no exception: the row in it is of a
version above V.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from psproto import ps_pb2 as pb
from psserver.deltas import Batch, DeltaKind, Deltas, Wanted, newest, parse, read_wanted
from psserver.engine import Engine
from psserver.errors import (
    BadRequest,
    Draining,
    LogDiverged,
    TooLarge,
    VersionCompacted,
    VersionInFuture,
)
from psserver.position import AFTER_SCAN, SCANS, WHEN_CUT_OFF, Phase, Position, decode, digest
from psserver.schemas import from_json
from psserver.shard import Shard
from psserver.tombstones import Tombstones
from psserver.views import TableList
from storage import records
from storage.errors import Compacted
from storage.schema import TableSchema
from storage.segment import Frame
from storage.tiers.base import KEY, STEP, VERSION, Scan
from storage.versionlog import VersionLog

THREADS = 2
READ_BYTES = 1 << 20  # of the log, at a time
STEP_BYTES = 1 << 20  # of messages made at a time
SLICE_BYTES = 256 << 10  # of rows that the engine thread copies at a time
SLICE_TOMBSTONES = 4096  # changes whose deletes are taken at a time

Result = TypeVar("Result")
Write = Callable[[bytes], Awaitable[None]]


class Lag(NamedTuple):
    """How far the slowest subscriber is behind."""

    versions: int
    seconds: float  # since the oldest change that is on its way was applied


class Feed:
    """The subscriptions of one shard."""

    def __init__(
        self, shard: Shard, engine: Engine, log: VersionLog, *, max_subscribers: int
    ) -> None:
        self.shard = shard
        self.engine = engine
        self.log = log
        self.boot = int.from_bytes(os.urandom(8), "little") | 1  # tells processes apart
        self.moved = asyncio.Event()  # set, and replaced, whenever there is more to send
        self.draining = False
        self.bytes = 0  # sent, ever
        self.messages = 0
        self._most = max_subscribers
        self._running: dict[_Subscription, asyncio.Task[Any]] = {}
        self._pool = ThreadPoolExecutor(THREADS, "feed")

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin; subscriptions run on ``loop``."""
        self.loop = loop

    def close(self) -> None:
        """Stop the threads; the subscriptions have ended."""
        self._pool.shutdown()

    def wake(self) -> None:
        """Tell the subscriptions that there is more; from any thread."""
        with suppress(RuntimeError):  # the loop is gone, and with it who waits
            self.loop.call_soon_threadsafe(self._wake)

    def drain(self) -> None:
        """End the subscriptions. Those whose subscribers do not read are cancelled: their last
        word would wait behind what was not read.
        """
        self.draining = True
        self._wake()
        for subscription, task in self._running.items():
            if subscription.writing:
                task.cancel()

    async def serve(self, data: bytes, write: Write) -> None:
        """Answer a SubscribeRequest; ends by raising only."""
        request = parse(data)
        wanted = read_wanted(request)
        if self.draining:
            raise Draining("the server is stopping")
        if len(self._running) >= self._most:
            raise TooLarge("TOO_MANY_SUBSCRIBERS", f"{self._most} subscribers are here, the limit")
        subscription = _Subscription(self, wanted, self._begin(request, wanted), write)
        task = asyncio.current_task()
        assert task is not None
        self._running[subscription] = task
        try:
            await subscription.run()
        finally:
            del self._running[subscription]

    @property
    def subscribers(self) -> int:
        """How many there are."""
        return len(self._running)

    @property
    def lag(self) -> Lag:
        """How far the slowest subscriber is behind; from any thread."""
        there = list(self._running)
        newest, now = self.log.durable, time.time()
        versions = max((newest - each.position.version for each in there), default=0)
        since = min((each.since for each in there), default=now)
        return Lag(max(versions, 0), max(now - since, 0.0))

    async def work(self, call: Callable[[], Result]) -> Result:
        """Run ``call`` on a thread of the feed. A cancelled caller still waits for its end."""
        running = self.loop.run_in_executor(self._pool, call)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            while not running.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait({running})
            raise

    async def settled(self, version: int, level: int) -> int:
        """Wait until a version is as safe as a pb.Durability asks; return the newest on disk."""
        log = self.log
        if level == pb.DURABILITY_FSYNC and version > log.durable:
            await self._logged(version, durable=True)
        elif level == pb.DURABILITY_LOG and version > log.written:
            await self._logged(version, durable=False)
        return log.durable

    async def durable(self, version: int) -> None:
        """Wait until a version is on disk."""
        await self.settled(version, pb.DURABILITY_FSYNC)

    async def _logged(self, version: int, *, durable: bool) -> None:
        reached = asyncio.Event()
        tell = partial(self.loop.call_soon_threadsafe, reached.set)
        self.log.wait(version, durable, lambda: _quietly(tell))
        await reached.wait()

    def _wake(self) -> None:
        moved, self.moved = self.moved, asyncio.Event()
        moved.set()

    def _begin(self, request: pb.SubscribeRequest, wanted: Wanted) -> Position:
        """Where a subscription starts."""
        log, tables = self.log, digest(wanted.tables)
        if request.token:
            position = decode(request.token)
            self._check(position, tables)
            return position
        position = Position(
            lineage=log.lineage,
            epoch=log.epoch,
            tables=tables,
            phase=Phase.TAIL,
            version=log.durable,
        )
        match request.start:
            case pb.START_LATEST:
                return position
            case pb.START_EARLIEST:
                return replace(position, version=log.first - 1)
        return replace(position, phase=Phase.SNAPSHOT, version=0)

    def _check(self, position: Position, tables: int) -> None:
        """Refuse a position that is none in this history."""
        log = self.log
        if (position.lineage, position.epoch) != (log.lineage, log.epoch):
            raise LogDiverged(
                f"the token is of lineage {position.lineage.hex()}, epoch {position.epoch};"
                f" the log of lineage {log.lineage.hex()}, epoch {log.epoch}"
            )
        if position.tables != tables:
            raise BadRequest("INVALID_ARGUMENT", "the token is of a subscription to other tables")
        if position.version > log.durable:
            raise VersionInFuture(
                f"the token stands at version {position.version}, shard {self.shard.number} is"
                f" at {log.durable}"
            )


class _Tail:
    """The messages of the log from a position on; used on one thread of the feed at a time."""

    def __init__(self, feed: Feed, wanted: Wanted, deltas: Deltas, position: Position) -> None:
        self.position = position
        self.seen = position.version  # newest version taken from the log
        self.gathering = 0.0  # monotonic seconds since when changes wait for others; 0: none do
        self.since = 0.0  # when the oldest change of the last messages was applied
        self._log = feed.log
        self._known_schema = feed.shard.schema_of
        self._read: dict[int, TableSchema] = {}  # of tables whose creation was read here
        self._wanted = wanted
        self._deltas = deltas
        self._cursor = feed.log.cursor(position.version)
        self._frames: list[Frame] = []  # read and not taken, the next one last
        self._batch = self._next_batch()

    def close(self) -> None:
        """Close the file."""
        self._cursor.close()

    @property
    def within(self) -> bool:
        """Whether a snapshot or catch-up is not complete yet."""
        return self.position.phase != Phase.TAIL

    def messages(self, flush: bool) -> list[bytes]:
        """What there is to send now; the position moves behind it. Compacted: it was cut off.

        flush  also changes that might wait for others
        """
        out: list[bytes] = []
        size = 0
        while size < STEP_BYTES:
            if self.within and self.position.version >= self.position.until:
                out.append(self._end())
            whole = self._fill()
            if not whole and not (flush and self._batch.told):
                break
            made = list(self._tell())
            out += made
            size += sum(map(len, made))
        self.gathering = self.gathering or time.monotonic() if self._batch.told else 0.0
        if not self._batch.told and self._batch.version > self.position.version:
            self._move()
            out.append(self.progress())
        return out

    def progress(self) -> bytes:
        """That there is nothing new up to here."""
        position = self.position
        return self._deltas.mark(
            DeltaKind.KIND_PROGRESS,
            version=position.version,
            token=position.encode(),
            more=self.within,
        )

    def _next_batch(self) -> Batch:
        return Batch(self._wanted, self._schema_of, self.seen)

    def _schema_of(self, number: int) -> TableSchema | None:
        """Of a table at this place in the log, which a shard that has started since may not know:
        if it was dropped before the base was made.
        """
        return self._known_schema(number) or self._read.get(number)

    def _fill(self) -> bool:
        """Take changes into the batch; whether it is to be told now."""
        batch, until = self._batch, self.position.until if self.within else None
        while not batch.full:
            if not self._frames:
                self._frames = self._cursor.read(max_bytes=READ_BYTES)[::-1]
                if not self._frames:
                    return False
            if not batch.takes(self._frames[-1].kind):
                return True
            frame = self._frames.pop()
            record = records.decode(frame)
            if isinstance(record, records.Create):
                self._read[record.table] = from_json(record.schema)
            batch.take(frame.version, record)
            if isinstance(record, records.Drop):
                self._read.pop(record.table, None)
            self.seen = frame.version
            if frame.version == until:
                return True
        return True

    def _tell(self) -> Iterator[bytes]:
        """Messages of the batch, and begin the next."""
        batch = self._batch
        self._move()
        self._batch = self._next_batch()
        if batch.told:
            self.since = batch.since_us / 1e6
            position = self.position
            yield from self._deltas.batch(batch, position.encode(), self.within)

    def _move(self) -> None:
        self.position = replace(self.position, version=self._batch.version)

    def _end(self) -> bytes:
        self.position = replace(self.position, phase=Phase.TAIL, after=0, until=0, boot=0)
        return self._deltas.mark(
            DeltaKind.KIND_SNAPSHOT_END,
            version=self.position.version,
            token=self.position.encode(),
        )


class _Subscription:
    """One subscriber."""

    def __init__(self, feed: Feed, wanted: Wanted, position: Position, write: Write) -> None:
        self.position = position  # of what was written
        self.since = float("inf")  # seconds since 1970, when what is being written was applied
        self.writing = False
        self._feed = feed
        self._wanted = wanted
        self._write = write
        self._deltas = Deltas(wanted, lambda: feed.log.durable)

    async def run(self) -> None:
        """Send until something is wrong."""
        while True:
            if self.position.phase in SCANS:
                self.since = time.time()
                await self._scan()
                self.since = float("inf")
            else:
                tail = _Tail(self._feed, self._wanted, self._deltas, self.position)
                try:
                    await self._tail(tail)
                except Compacted:
                    self._cut_off()
                finally:
                    tail.close()

    async def _send(self, messages: list[bytes]) -> None:
        feed = self._feed
        for message in messages:
            self.writing = True
            await self._write(message)
            self.writing = False
            feed.bytes += len(message)
            feed.messages += 1

    # ---- the log

    async def _tail(self, tail: _Tail) -> None:
        """Send changes as they become durable."""
        feed, wanted = self._feed, self._wanted
        flush = False
        position = self.position
        if position.phase == Phase.TAIL and feed.log.first <= position.version + 1:
            await self._send([tail.progress()])
        idle = time.monotonic()  # since when nothing was sent
        while True:
            if feed.draining:
                raise Draining("the server is stopping")
            moved = feed.moved
            hurry = flush or not wanted.coalesce_seconds or tail.within
            messages = await feed.work(partial(tail.messages, hurry))
            if messages:
                self.since = tail.since or float("inf")
                await self._send(messages)
                self.position, self.since, tail.since = tail.position, float("inf"), 0.0
                idle = time.monotonic()
                flush = False
                continue
            due = idle + wanted.progress_seconds
            if tail.gathering:
                due = tail.gathering + wanted.coalesce_seconds
            late = tail.seen >= feed.log.durable and not await _told(moved, due)
            flush = late and bool(tail.gathering)
            if late and not flush:
                await self._send([tail.progress()])
                idle = time.monotonic()

    def _cut_off(self) -> None:
        """The log no longer has what comes next: scan the rows for it."""
        position = self.position
        self.position = replace(
            position,
            phase=WHEN_CUT_OFF[position.phase],
            after=position.version,
            until=0,
            table=0,
            slot=0,
            boot=0,
        )

    # ---- the rows

    async def _scan(self) -> None:
        """Send the rows of versions above ``after``, as they were at ``version``."""
        feed = self._feed
        standing = await feed.engine.submit(feed.shard.table_list)
        position = self.position
        if position.boot != feed.boot:  # not begun, or by another process
            position = replace(position, version=standing.version, table=0, slot=0, boot=feed.boot)
            if position.after < standing.horizon and position.after:
                position = self._forgotten(position, standing.horizon)
            await feed.durable(position.version)
            whole = position.phase == Phase.SNAPSHOT and not position.after
            await self._mark(
                position, DeltaKind.KIND_SNAPSHOT if whole else DeltaKind.KIND_CATCH_UP
            )
        if position.table == 0 and not await self._beginning(standing):
            return
        for number, schema, created in standing.tables:
            if created <= position.version and self._wanted.wants(schema.name):
                await self._table(number, schema)
        until = await feed.engine.submit(lambda: feed.shard.version)
        await feed.durable(until)  # else what is below it may become another history
        self.position = replace(
            self.position, phase=AFTER_SCAN[position.phase], until=until, table=0, slot=0
        )

    def _forgotten(self, position: Position, horizon: int) -> Position:
        """Where to go on if not all deletes behind ``after`` are remembered."""
        if position.phase == Phase.SNAPSHOT:
            return replace(position, after=0)
        raise VersionCompacted(position.after, self._feed.log.first - 1, horizon)

    async def _mark(self, position: Position, kind: DeltaKind.Kind, **fields: Any) -> None:
        """Send a message without arrays that belongs to the scan."""
        version = fields.pop("version", position.version)
        self._check_draining()
        message = self._deltas.mark(
            kind, version=version, token=position.encode(), more=True, **fields
        )
        await self._send([message])
        self.position = position

    def _check_draining(self) -> None:
        if self._feed.draining:
            raise Draining("the server is stopping")

    async def _beginning(self, standing: TableList) -> bool:
        """Send tables and deletes; False if the scan must begin again."""
        position, feed = self.position, self._feed
        token, names = position.encode(), {}
        for number, schema, created in standing.tables:
            if created <= position.version and self._wanted.wants(schema.name):
                names[number] = schema.name
                message = self._deltas.created(schema, version=created, token=token, more=True)
                await self._send([message])
        at = position.after
        while at and at < position.version:
            dead = await feed.engine.submit(partial(self._tombstones, at))
            if dead is None:
                self.position = replace(position, boot=0)
                return False
            if not dead:
                break
            at = dead[-1].version
            dead = [each for each in dead if each.version <= position.version]
            self._check_draining()
            await self._send(
                await feed.work(lambda dead=dead: list(self._deletes(dead, names, token)))  # type: ignore[misc]
            )
        return True

    def _tombstones(self, after: int) -> list[Tombstones] | None:
        """Some of the deletes above a version; None if they are forgotten. On the engine thread."""
        shard = self._feed.shard
        if after < shard.tombstone_horizon:
            return None
        return shard.tombstones(after, SLICE_TOMBSTONES)

    def _deletes(
        self, dead: list[Tombstones], names: dict[int, str], token: bytes
    ) -> Iterator[bytes]:
        groups: dict[tuple[int, records.Cause], list[Tombstones]] = {}
        for each in dead:
            if each.table in names:
                groups.setdefault((each.table, each.cause), []).append(each)
        for (number, cause), some in groups.items():
            keys = np.concatenate([each.keys for each in some])
            versions = np.repeat(
                np.array([each.version for each in some], np.uint64),
                [len(each.keys) for each in some],
            )
            last = newest(keys)
            yield from self._deltas.deletes(
                names[number],
                self.position.version,
                keys[last],
                versions[last],
                cause,
                token=token,
                more=True,
            )

    async def _table(self, number: int, schema: TableSchema) -> None:
        """Send the rows of a table that are not sent yet."""
        feed, position = self._feed, self.position
        if number < position.table:
            return
        slot: int | None = position.slot if number == position.table else 0
        width = self._wanted.width(schema)
        limit = self._wanted.rows_per_message(width)
        while slot is not None:
            self._check_draining()
            scan = await feed.engine.submit(partial(feed.shard.rows_of, number))
            if scan is None:  # dropped: the log says so behind ``version``
                return
            find = partial(scan.find, slot, position.after, position.version, limit)
            places, slot = await feed.work(find)
            position = replace(
                position,
                table=number + (slot is None),
                slot=0 if slot is None else slot,
            )
            copied = [
                await feed.engine.submit(partial(_copy, scan, some, width))
                for some in _slices(places, 32 + 4 * width)
            ]
            if copied:
                make = partial(self._make_rows, schema, copied, position)
                await self._send(await feed.work(make))
            self.position = position

    def _make_rows(
        self, schema: TableSchema, copied: list[tuple[Any, ...]], position: Position
    ) -> list[bytes]:
        """The message of a slice of rows; none if all have newer versions by now."""
        meta, frequencies, rows = map(np.concatenate, zip(*copied, strict=True))
        versions = meta[:, VERSION]
        still = (versions > position.after) & (versions <= position.version)
        if not still.all():
            meta, frequencies, rows = meta[still], frequencies[still], rows[still]
        return list(
            self._deltas.rows(
                schema,
                position.version,
                np.ascontiguousarray(meta[:, KEY]),
                np.ascontiguousarray(meta[:, VERSION]),
                rows,
                np.ascontiguousarray(meta[:, STEP]).view(np.int64),
                frequencies,
                token=position.encode(),
                more=True,
            )
        )


def _slices(places: Any, row_bytes: int) -> Iterator[Any]:
    most = max(1, SLICE_BYTES // row_bytes)
    for start in range(0, len(places), most):
        yield places[start : start + most]


def _copy(scan: Scan, places: Any, width: int) -> tuple[Any, Any, Any]:
    """Metadata, frequencies and the first ``width`` numbers of rows. On the engine thread."""
    frequencies = np.empty(len(places), np.uint64)
    rows = np.empty((len(places), width), np.float32)
    return scan.copy(places, frequencies, rows), frequencies, rows


def _quietly(call: Callable[[], Any]) -> None:
    with suppress(RuntimeError):  # the loop is gone, and with it who waits
        call()


async def _told(event: asyncio.Event, due: float) -> bool:
    """Wait for an event until a monotonic time; whether it came."""
    try:
        async with asyncio.timeout(max(due - time.monotonic(), 0)):
            await event.wait()
    except TimeoutError:
        return False
    return True
