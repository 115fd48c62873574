"""Subscriptions: every change of a shard, in order, sent to whoever follows it.

A subscriber is a cursor over the log's files. Nothing is queued for it: what it has not read is on
disk, and a slow or stopped subscriber costs a file descriptor and a message or two. Two threads of
the feed read files and make messages, one step at a time per subscriber. The subscription then
waits until gRPC has taken the messages. Only durable versions are sent.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any, NamedTuple

from psproto import ps_pb2 as pb
from psserver.engine import Engine
from psserver.errors import BadRequest, LogDiverged, TooLarge, VersionInFuture
from psserver.position import Phase, Position, decode, digest
from psserver.sender import Write
from psserver.shard import Shard
from psserver.source import Source
from psserver.subscription import Subscription
from psserver.wanted import Wanted, parse, read_wanted
from storage.versionlog import VersionLog


class Lag(NamedTuple):
    """The lag of the slowest subscriber."""

    versions: int
    seconds: float  # age of the oldest change that is being sent


class Feed:
    """The subscriptions of one shard.

    bytes     bytes sent since the start
    messages  messages sent since the start
    """

    def __init__(
        self, shard: Shard, engine: Engine, log: VersionLog, *, max_subscribers: int
    ) -> None:
        """Store the parts. ``open`` must follow, on the loop."""
        self.source = Source(shard, engine, log)
        self.bytes = 0
        self.messages = 0
        self._most = max_subscribers
        self._running: dict[Subscription, asyncio.Task[Any]] = {}

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Serve subscriptions that run on ``loop``."""
        self.source.open(loop)

    def close(self) -> None:
        """Stop the threads. The subscriptions have ended."""
        self.source.close()

    def wake(self) -> None:
        """Report that there is more to send. Any thread may call this."""
        self.source.wake()

    async def settled(self, version: int, level: int) -> int:
        """Wait until a version is as safe as the pb.Durability ``level`` asks.

        Returns the newest durable version.
        """
        return await self.source.settled(version, level)

    def drain(self) -> None:
        """End the subscriptions. A subscriber that does not read is cancelled, since its last
        message would wait for it to read.
        """
        self.source.draining = True
        self.source.signal()
        for subscription, task in self._running.items():
            if subscription.sender.writing:
                task.cancel()

    async def serve(self, data: bytes, write: Write) -> None:
        """Answer a SubscribeRequest. Ends only by raising."""
        request = parse(data)
        wanted = read_wanted(request)
        self.source.check_draining()
        if len(self._running) >= self._most:
            raise TooLarge("TOO_MANY_SUBSCRIBERS", f"{self._most} subscribers are here, the limit")
        start = self._start(request, wanted)
        subscription = Subscription(self.source, wanted, start, write, self._count)
        task = asyncio.current_task()
        assert task is not None
        self._running[subscription] = task
        self.source.readers = len(self._running)
        try:
            await subscription.run()
        finally:
            del self._running[subscription]
            self.source.readers = len(self._running)

    @property
    def subscribers(self) -> int:
        """Number of subscribers."""
        return len(self._running)

    @property
    def lag(self) -> Lag:
        """Lag of the slowest subscriber. Any thread may read it."""
        senders = [each.sender for each in list(self._running)]
        newest, now = self.source.log.durable, time.time()
        versions = max((newest - each.position.version for each in senders), default=0)
        since = min((each.since for each in senders), default=now)
        return Lag(max(versions, 0), max(now - since, 0.0))

    def _count(self, size: int) -> None:
        self.bytes += size
        self.messages += 1

    def _start(self, request: pb.SubscribeRequest, wanted: Wanted) -> Position:
        """Return where a subscription starts."""
        log, tables = self.source.log, digest(wanted.tables)
        if request.token:
            position = decode(request.token)
            self._check(position, tables)
            return replace(position, epoch=log.history.epoch)
        position = Position(
            lineage=log.lineage,
            epoch=log.history.epoch,
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
        """Refuse a position that is not in this history."""
        log = self.source.log
        if position.lineage != log.lineage:
            raise LogDiverged(
                f"the token is of lineage {position.lineage.hex()}, the log of {log.lineage.hex()}"
            )
        if not log.history.contains(position.epoch, position.newest):
            raise LogDiverged(
                f"the token is of version {position.newest} in epoch {position.epoch:016x}, which"
                " is not part of this shard's history: its data directory was put back from a copy"
            )
        if position.tables != tables:
            raise BadRequest("INVALID_ARGUMENT", "the token is of a subscription to other tables")
        if position.newest > log.durable:
            raise VersionInFuture(
                f"the token is of version {position.newest}, shard"
                f" {self.source.shard.number} is at {log.durable}"
            )
