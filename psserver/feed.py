"""Subscriptions: send every change of a shard, in order, to each subscriber.

A subscriber is a cursor over the files of the version log. Changes that it has not read are on
disk, not in a queue. So a slow or stopped subscriber costs only a file descriptor and one or two
messages in memory. Two threads of the feed read the files and make messages, for one subscriber
after the other. Each subscription then waits until gRPC has sent its messages before it asks for
more. Only durable changes are sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
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
from storage.histogram import Histogram
from storage.versionlog import VersionLog


class Lag(NamedTuple):
    """How far the slowest subscriber is behind the shard, in changes and in seconds."""

    versions: int  # number of durable changes not sent yet
    seconds: float  # age of the oldest change that is being sent


class Feed:
    """Runs all subscriptions to the changes of one shard.

    bytes     bytes sent since the start of the server
    messages  messages sent since the start of the server
    """

    def __init__(
        self, shard: Shard, engine: Engine, log: VersionLog, *, max_subscribers: int
    ) -> None:
        """Create the feed of ``shard``; ``open`` must follow.

        max_subscribers  maximum number of subscriptions at the same time
        """
        self.source = Source(shard, engine, log)
        self.bytes = 0
        self.messages = 0
        self._most = max_subscribers
        self._running: dict[Subscription, asyncio.Task[Any]] = {}

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Allow subscriptions, which must run on ``loop``."""
        self.source.open(loop)

    def close(self) -> None:
        """Stop the threads. All subscriptions must have ended."""
        self.source.close()

    def wake(self) -> None:
        """Tell the subscriptions that there are new durable changes. Any thread may call this."""
        self.source.wake()

    def settled(self, version: int, level: int) -> Awaitable[int]:
        """Return an awaitable that waits until a version is as durable as ``level`` requires.

        level  a pb.Durability

        The result of the awaitable is the newest durable version.
        """
        return self.source.settled(version, level)

    def acknowledged(self, version: int) -> None:
        """Note that the push with this version is acknowledged now, for the freshness."""
        if self.source.readers:
            self.source.freshness.acknowledged(version)

    @property
    def freshness(self) -> Histogram:
        """Seconds from the acknowledgement of each push until it was written to a subscriber."""
        return self.source.freshness.seconds

    def drain(self) -> None:
        """End all subscriptions, because the server stops.

        Each subscriber gets a last message. A subscriber that does not read is disconnected without
        one, because that message would wait until it reads.
        """
        self.source.draining = True
        self.source.signal()
        for subscription, task in self._running.items():
            if subscription.sender.writing:
                task.cancel()

    async def serve(
        self,
        data: bytes,
        write: Write,
        check: Callable[[pb.SubscribeRequest], None] = lambda _: None,
    ) -> None:
        """Serve one subscription until it fails or the server stops. Never returns normally.

        data   encoded SubscribeRequest
        write  sends one message; waits while the subscriber does not read
        check  raises PermissionDenied if the subscriber may not read these tables

        Always ends by raising an error, which the caller sends to the subscriber.
        """
        request = parse(data)
        check(request)
        wanted = read_wanted(request)
        self.source.check_draining()
        if len(self._running) >= self._most:
            raise TooLarge(
                "TOO_MANY_SUBSCRIBERS",
                f"this shard already has {self._most} subscribers, its limit (max_subscribers)",
            )
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
        """Number of open subscriptions."""
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
        """Count a sent message of ``size`` bytes."""
        self.bytes += size
        self.messages += 1

    def _start(self, request: pb.SubscribeRequest, wanted: Wanted) -> Position:
        """Return the position in the log at which a subscription starts.

        It is the position in ``request.token``. Without a token, ``request.start`` selects a
        snapshot, the earliest or the latest change. Raises BadRequest, LogDiverged or
        VersionInFuture for a token that this shard cannot continue from.
        """
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
        """Raise an error unless a subscription can continue from the position in its token.

        tables  digest of the table names in the request

        Raises LogDiverged if the token belongs to a different log, BadRequest if it belongs to a
        subscription to other tables, VersionInFuture if its version is not durable on this shard.
        """
        log = self.source.log
        if position.lineage != log.lineage:
            raise LogDiverged(
                f"the token belongs to the log with lineage {position.lineage.hex()}, but this"
                f" shard's log has lineage {log.lineage.hex()}: subscribe again with a snapshot"
            )
        if not log.history.contains(position.epoch, position.newest):
            raise LogDiverged(
                f"version {position.newest} of epoch {position.epoch:016x} in the token is not part"
                " of this shard's history, because its data directory was replaced by an older"
                " copy: subscribe again with a snapshot"
            )
        if position.tables != tables:
            raise BadRequest(
                "INVALID_ARGUMENT",
                "the token belongs to a subscription to other tables: request the same tables, or"
                " subscribe without the token",
            )
        if position.newest > log.durable:
            raise VersionInFuture(
                f"the token has version {position.newest}, but the newest durable version of shard"
                f" {self.source.shard.number} is {log.durable}: subscribe again with a snapshot"
            )
