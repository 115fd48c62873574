"""Pulls, pushes, deletes and exchanges: decode, check, hand to the engine, encode."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from psproto import codec
from psserver.checks import Checks
from psserver.config import ServerConfig
from psserver.engine import Engine
from psserver.feed import Feed
from psserver.limits import Limits, Reservation
from psserver.requests import Pull, Push
from psserver.shard import Shard
from storage.versionlog import VersionLog

AT_ONCE = 4 << 20  # bytes of rows, a millisecond's work: the loop does no more itself

# its start, what was asked for, and how it goes
Begun = tuple[float, codec.Exchange | None, "asyncio.Future[codec.Exchanged] | Exception"]


class Exchanges:
    """The methods that read and write rows of one shard."""

    def __init__(
        self,
        shard: Shard,
        engine: Engine,
        limits: Limits,
        config: ServerConfig,
        log: VersionLog | None,
        feed: Feed | None,
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._limits = limits
        self._checks = Checks(shard, config.max_keys)
        self._max_reply = config.max_message_bytes
        self._log = log
        self._feed = feed

    async def pull(self, data: bytes, deadline: float, reservation: Reservation) -> bytes:
        """Answer an encoded PullRequest."""
        exchange = codec.Exchange([], [codec.decode_pull(data)])
        done = await self._exchange(exchange, deadline, reservation)
        return codec.encode_pulled(done.pulls[0])

    async def push(self, data: bytes, deadline: float, reservation: Reservation) -> bytes:
        """Answer an encoded PushRequest."""
        exchange = codec.Exchange([codec.decode_push(data)], [])
        done = await self._exchange(exchange, deadline, reservation)
        return bytes(done.pushes[0].SerializeToString())

    async def exchange(self, data: bytes, deadline: float, reservation: Reservation) -> bytes:
        """Answer an encoded ExchangeRequest."""
        exchange = codec.decode_exchange(data)
        return codec.encode_exchanged(await self._exchange(exchange, deadline, reservation))

    async def delete(self, data: bytes, deadline: float, reservation: Reservation) -> bytes:
        """Answer an encoded DeleteRequest."""
        start = time.perf_counter()
        change = self._checks.delete(codec.decode_delete(data))
        try:
            done = await self._engine.submit(lambda: self._shard.delete(change), deadline)
        except asyncio.CancelledError:
            reservation.release_after(self._engine.submit(lambda: None))
            raise
        if self._feed is not None:
            done.durable_version = await self._feed.settled(done.version, done.achieved)
        seconds, keys = time.perf_counter() - start, change.keys
        self._limits.stats.served("Delete", change.table, len(keys), keys.nbytes, seconds)
        return bytes(done.SerializeToString())

    async def _exchange(
        self, exchange: codec.Exchange, deadline: float, reservation: Reservation
    ) -> codec.Exchanged:
        begun = self.begin(exchange, deadline, reservation)
        try:
            return await self.finish(begun)
        except asyncio.CancelledError:
            reservation.release_after(self._engine.submit(lambda: None))
            raise
        finally:
            del begun

    def begin(self, exchange: codec.Exchange, deadline: float, reservation: Reservation) -> Begun:
        """Check an exchange and hand it to the engine, or release its reservation."""
        start = time.perf_counter()
        try:
            pushes = [self._checks.push(push) for push in exchange.pushes]
            pulls = [self._checks.pull(pull) for pull in exchange.pulls]
            reservation.add(min(self._shard.reply_bytes(pulls), self._max_reply))
        except Exception as error:  # without the frames, which have the request
            reservation.release()
            return start, None, error.with_traceback(None)
        work = self._engine.submit(
            lambda: self._shard.exchange(pushes, pulls),
            deadline,
            at_once=self._is_small([*pushes, *pulls]),
        )
        return start, exchange, work

    def _is_small(self, parts: Sequence[Push | Pull]) -> bool:
        """Whether the loop may do this itself: it is soon done, and waits for no disk."""
        size = self._shard.size(parts)
        return size <= AT_ONCE and (self._log is None or self._log.room > 2 * size)

    async def finish(self, begun: Begun) -> codec.Exchanged:
        """Wait for the engine, and count what was served."""
        start, exchange, work = begun
        try:
            if isinstance(work, Exception):
                raise work
            done = await work
        finally:
            del begun, work  # an error has this frame, which must not have the error
        assert exchange is not None
        if self._feed is not None:
            for pushed in done.pushes:
                pushed.durable_version = await self._feed.settled(pushed.version, pushed.achieved)
        seconds, served = time.perf_counter() - start, self._limits.stats.served
        for push in exchange.pushes:
            arrays = push.keys.nbytes + push.gradients.nbytes
            served("Push", push.header.table, len(push.keys), arrays, seconds)
        for pull, pulled in zip(exchange.pulls, done.pulls, strict=True):
            arrays = pull.keys.nbytes + pulled.embeddings.nbytes
            served("Pull", pull.header.table, len(pull.keys), arrays, seconds)
        return done
