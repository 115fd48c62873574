"""Answer pulls, pushes, deletes and exchanges: decode and check the request, run it, encode it.

An exchange is a message with several pushes and pulls, which are applied together. Requests run on
the engine, the thread that reads and writes the rows of a shard.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from psproto import codec
from psproto import ps_pb2 as pb
from psserver.checks import Checks
from psserver.coldruns import ColdRuns, Held, Lane
from psserver.config import ServerConfig
from psserver.engine import Engine
from psserver.feed import Feed
from psserver.limits import Limits, Reservation
from psserver.requests import Delete, Pull, Push
from psserver.security.guard import Actor
from psserver.shard import Shard
from psserver.workers import Workers
from storage.versionlog import VersionLog

# Limits for work on the event loop itself, so that it takes at most a few milliseconds:
AT_ONCE = 4 << 20  # bytes of a message, or of the rows that it reads or writes
AT_ONCE_PARTS = 64  # pushes and pulls in an exchange
AT_ONCE_FIELDS = 512  # protobuf fields in a message; a push or a pull counts as several
# (has pushes, has pulls) -> name under which an exchange is counted
METHODS = {
    (True, True): "Exchange",
    (True, False): "Push",
    (False, True): "Pull",
    (False, False): "Exchange",
}

Result = TypeVar("Result")
Header = pb.StreamRequestHeader | None  # None: the message did not arrive on a stream
# function of (message, maximum number of fields); raises codec.TooManyFields. It returns the
# exchange, or an error with which to answer it
Decode = Callable[[Any, int], tuple[Header, "codec.Exchange | Exception"]]
# A submitted exchange: time of arrival, request, and the future of its result or an error
Begun = tuple[float, codec.Exchange | None, "asyncio.Future[codec.Exchanged | Held] | Exception"]


@dataclass(slots=True)
class Checked:
    """A decoded exchange that passed the checks, and the requests for the shard made from it."""

    exchange: codec.Exchange
    pushes: list[Push]
    pulls: list[Pull]


Read = tuple[Header, Checked | Exception]  # a message that was read; the error is of the checks


class Exchanges:
    """Answers the gRPC methods that read and write rows. Must be used on the event loop.

    runs  runs exchanges on the engine, and reads rows from disk for them
    log   version log; None: the shard has none
    feed  reports which versions are durable; None: the shard has no version log

    In all methods, ``deadline`` is in monotonic seconds (work that has not started by then is
    refused), and ``reservation`` counts the bytes of the request and its reply as in flight.
    """

    def __init__(
        self,
        shard: Shard,
        engine: Engine,
        limits: Limits,
        workers: Workers,
        config: ServerConfig,
        log: VersionLog | None,
        feed: Feed | None,
        runs: ColdRuns,
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._limits = limits
        self._workers = workers
        self._checks = Checks(shard, config.max_keys)
        self._max_reply = config.max_message_bytes
        self._log = log
        self._feed = feed
        self._runs = runs

    async def pull(
        self, data: bytes, deadline: float, reservation: Reservation, actor: Actor
    ) -> bytes:
        """Run the encoded PullRequest ``data``; return the encoded PullResponse.

        deadline     monotonic seconds; after it the pull is not started
        reservation  bytes in flight of the request and its reply
        actor        who calls
        """
        done = await self._exchange(actor.checking(_decode_pull), data, deadline, reservation)
        return codec.encode_pulled(done.pulls[0])

    async def push(
        self, data: bytes, deadline: float, reservation: Reservation, actor: Actor
    ) -> bytes:
        """Run the encoded PushRequest ``data``; return the encoded PushResponse.

        deadline     monotonic seconds; after it the push is not started
        reservation  bytes in flight of the request and its reply
        actor        who calls
        """
        done = await self._exchange(actor.checking(_decode_push), data, deadline, reservation)
        return bytes(done.pushes[0].SerializeToString())

    async def exchange(
        self, data: bytes, deadline: float, reservation: Reservation, actor: Actor
    ) -> bytes:
        """Run the encoded ExchangeRequest ``data``; return the encoded ExchangeResponse.

        deadline     monotonic seconds; after it the exchange is not started
        reservation  bytes in flight of the request and its reply
        actor        who calls
        """
        done = await self._exchange(actor.checking(_decode_exchange), data, deadline, reservation)
        return codec.encode_exchanged(done)

    async def delete(
        self, data: bytes, deadline: float, reservation: Reservation, actor: Actor
    ) -> bytes:
        """Run the encoded DeleteRequest ``data``; return the encoded DeleteResponse.

        deadline     monotonic seconds; after it the delete is not started
        reservation  bytes in flight of the request and its reply
        actor        who calls
        """
        start, over = time.perf_counter(), await self._turn(data, deadline, reservation)
        begin, read = time.perf_counter(), partial(self._read_delete, actor)
        with _given_up(over):
            change = self._at_once(read, data, len(data))
            if change is None:
                change = await self._on_thread(read, data, reservation)
            async with actor.recorded_rows(change.table, len(change.keys)):
                work = self._engine.submit(lambda: self._shard.delete(change), deadline)
                self._limits.turns.passed(work, len(data), time.perf_counter() - begin, over)
                done = await self._finish_delete(work, reservation)
        seconds, keys, stats = time.perf_counter() - start, change.keys, self._limits.stats
        stats.used("Delete", change.table, len(keys), keys.nbytes)
        stats.served("Delete", "unary", len(keys), keys.nbytes, 0, seconds)
        return bytes(done.SerializeToString())

    async def _finish_delete(
        self, work: asyncio.Future[pb.DeleteResponse], reservation: Reservation
    ) -> pb.DeleteResponse:
        """Wait until a delete has run and is as durable as it requires; return its response."""
        try:
            done = await work
        except asyncio.CancelledError:
            reservation.release_after(self._engine.submit(lambda: None))
            raise
        if self._feed is not None:
            done.durable_version = await self._feed.settled(done.version, done.achieved)
        return done

    async def _exchange(
        self, decode: Decode, data: bytes, deadline: float, reservation: Reservation
    ) -> codec.Exchanged:
        """Run the pushes and pulls of one message and return their results.

        decode       converts ``data`` to an exchange
        data         encoded message
        deadline     monotonic seconds; after it the exchange is not started
        reservation  bytes in flight of the message and its reply
        """
        start, over = time.perf_counter(), await self._turn(data, deadline, reservation)
        begin = time.perf_counter()
        with _given_up(over):
            read = self.read_at_once(decode, data, len(data))
            if read is None:
                read = await self.read_on_thread(decode, data, reservation)
            begun = self.begin(read[1], start, deadline, reservation)
        del read
        self._limits.turns.passed(begun[2], len(data), time.perf_counter() - begin, over)
        try:
            return await self.finish(begun)
        except asyncio.CancelledError:
            reservation.release_after(self._engine.submit(lambda: None))
            raise
        finally:
            del begun

    async def _turn(
        self, data: bytes, deadline: float, reservation: Reservation
    ) -> asyncio.Future[None] | None:
        """Wait for the turn of the request ``data`` of a unary call, if the server is busy.

        Returns what ``Turns.passed`` needs. Raises Overloaded or DeadlinePassed.
        """
        turns, client = self._limits.turns, reservation.client
        if client is None or (turns.free() and not client.blocked):
            return None
        return await turns.turn(client, len(data), deadline)

    def read_at_once(self, decode: Decode, data: Any, size: int) -> Read | None:
        """Decode and check a small message. Returns (header, exchange or error of the checks).

        decode  converts the encoded message ``data`` to (header, exchange)
        size    bytes of the message and its arrays

        Returns None if the message is large: call ``read_on_thread`` for it. The header is None
        unless the message arrived on a stream. An error of the checks is returned, not raised, so
        that the caller gets the header too. Raises Malformed if the message cannot be decoded.
        """
        return self._at_once(partial(self._read, decode), data, size)

    async def read_on_thread(self, decode: Decode, data: Any, reservation: Reservation) -> Read:
        """Decode and check a message of any size on a worker thread.

        The arguments, result and errors are those of ``read_at_once``, but the result is not None.

        reservation  bytes in flight of the message
        """
        return await self._on_thread(partial(self._read, decode), data, reservation)

    def _at_once(self, read: Callable[[Any, int], Result], data: Any, size: int) -> Result | None:
        """Return ``read(data, maximum number of protobuf fields)``; None if that would take long.

        read  decodes and checks the encoded message ``data``
        size  bytes of the message and its arrays
        """
        if size <= AT_ONCE:
            try:
                return read(data, AT_ONCE_FIELDS)
            except codec.TooManyFields:
                pass
        return None

    async def _on_thread(
        self, read: Callable[[Any, int], Result], data: Any, reservation: Reservation
    ) -> Result:
        """Return ``read(data, maximum number of protobuf fields)``, called on a worker thread.

        read         decodes and checks the encoded message ``data``
        reservation  bytes in flight of the message

        The thread releases the interpreter lock often, so that the event loop stays responsive.
        """
        work = partial(read, data, codec.MOST_FIELDS)
        del data
        return await self._workers.run(self._workers.checks, work, reservation=reservation)

    def _read(self, decode: Decode, data: Any, budget: int) -> Read:
        """Decode and check a message. Returns (header, exchange or error of the checks).

        decode  converts the encoded message ``data`` to (header, exchange)
        budget  maximum number of protobuf fields; raises codec.TooManyFields if there are more
        """
        header, exchange = decode(data, budget)
        if isinstance(exchange, Exception):
            return header, exchange
        try:
            pushes = list(map(self._checks.push, exchange.pushes))
            pulls = list(map(self._checks.pull, exchange.pulls))
        except Exception as error:  # its traceback would keep the request in memory
            return header, error.with_traceback(None)
        return header, Checked(exchange, pushes, pulls)

    def _read_delete(self, actor: Actor, data: bytes, budget: int) -> Delete:
        """Decode and check a delete.

        actor   who calls
        budget  maximum number of protobuf fields; raises codec.TooManyFields if there are more
        """
        message = codec.decode_delete(data, budget)
        actor.require_right("delete", message.header.table)
        return self._checks.delete(message)

    def begin(
        self,
        checked: Checked | Exception,
        start: float,
        deadline: float,
        reservation: Reservation,
        lane: Lane | None = None,
    ) -> Begun:
        """Submit an exchange to the engine and return at once. Pass the result to ``finish``.

        checked      second part of a Read: an exchange, or an error, which ``finish`` then raises
        start        time of arrival, in seconds of ``time.perf_counter``
        deadline     monotonic seconds; after it the exchange is not started
        reservation  bytes in flight of the message; the bytes of the reply are added
        lane         keeps the exchanges of a stream in order; None: it has no order

        If the exchange is refused, the reservation is released before this returns.
        """
        if isinstance(checked, Exception):
            reservation.release()
            return start, None, checked
        pushes, pulls = checked.pushes, checked.pulls
        try:
            if pulls:
                reservation.add(min(self._shard.reply_bytes(pulls), self._max_reply))
        except Exception as error:  # its traceback would keep the request in memory
            reservation.release()
            return start, None, error.with_traceback(None)
        small = self._is_small(pushes, pulls)
        work = self._runs.submit(pushes, pulls, deadline, lane, at_once=small)
        return start, checked.exchange, work

    def _is_small(self, pushes: list[Push], pulls: list[Pull]) -> bool:
        """Return whether these pushes and pulls are so small that the event loop may run them.

        They are if they take at most a few milliseconds and need not wait for the disk.
        """
        if len(pushes) + len(pulls) > AT_ONCE_PARTS:
            return False
        size = self._shard.size(pushes) if pushes else 0
        if pulls:
            size += self._shard.size(pulls)
        return size <= AT_ONCE and (self._log is None or self._log.room > 2 * size)

    def finish_now(self, begun: Begun) -> codec.Exchanged | None:
        """Do the same as ``finish`` if that does not wait and raises no error; else return None.

        The caller calls ``count`` later, when the reply was sent.
        """
        _, exchange, work = begun
        if isinstance(work, Exception) or exchange is None or not work.done():
            return None
        if work.exception() is not None or (exchange.pushes and self._feed is not None):
            return None
        done = work.result()
        return None if isinstance(done, Held) else done

    def count(self, begun: Begun, done: codec.Exchanged, via: str) -> None:
        """Count an exchange for which ``finish_now`` returned ``done``.

        via  how it arrived: "stream" or "shm"
        """
        start, exchange, _ = begun
        assert exchange is not None
        self._count(exchange, done, start, via)

    async def finish(self, begun: Begun, via: str = "unary") -> codec.Exchanged:
        """Wait until an exchange has run and its pushes are as durable as they require.

        begun  returned by ``begin``; if it contains an error, the error is raised
        via    how the exchange arrived, for the statistics: "unary", "stream" or "shm"

        Counts the requests in the statistics and returns the results of the exchange.
        """
        start, exchange, work = begun
        try:
            if isinstance(work, Exception):
                raise work
            done = await work
            if isinstance(done, Held):
                done = await self._runs.finish(done)
        finally:
            del begun, work  # an error refers to this frame, which must not refer to the error
        assert exchange is not None
        if self._feed is not None:
            for pushed in done.pushes:
                pushed.durable_version = await self._feed.settled(pushed.version, pushed.achieved)
        self._count(exchange, done, start, via)
        return done

    def _count(
        self, exchange: codec.Exchange, done: codec.Exchanged, start: float, via: str
    ) -> None:
        """Count an exchange that succeeded, and its pushes and pulls, in the statistics.

        start  time of arrival, in seconds of ``time.perf_counter``
        via    how it arrived: "unary", "stream" or "shm"
        """
        seconds, stats = time.perf_counter() - start, self._limits.stats
        keys = received = sent = 0
        for push in exchange.pushes:
            size = push.keys.nbytes + push.gradients.nbytes
            stats.used("Push", push.header.table, len(push.keys), size)
            keys += len(push.keys)
            received += size
        for pull, pulled in zip(exchange.pulls, done.pulls, strict=True):
            size = pulled.embeddings.nbytes
            if pull.gpu_room is not None:  # has the rows instead
                via, size = "cuda", pull.gpu_room.size
            stats.used("Pull", pull.header.table, len(pull.keys), pull.keys.nbytes + size)
            keys += len(pull.keys)
            received += pull.keys.nbytes
            sent += size
        if self._feed is not None:
            for pushed in done.pushes:
                self._feed.acknowledged(pushed.version)
        method = METHODS[bool(exchange.pushes), bool(exchange.pulls)]
        stats.served(method, via, keys, received, sent, seconds)


@contextmanager
def _given_up(over: asyncio.Future[None] | None) -> Iterator[None]:
    """End the turn of a request if the block, which begins the request, raises an error.

    over  returned by ``Exchanges._turn``
    """
    try:
        yield
    except BaseException:
        if over is not None:
            over.cancel()
        raise


def _decode_pull(data: bytes, budget: int) -> tuple[Header, codec.Exchange]:
    return None, codec.Exchange([], [codec.decode_pull(data, budget)])


def _decode_push(data: bytes, budget: int) -> tuple[Header, codec.Exchange]:
    return None, codec.Exchange([codec.decode_push(data, budget)], [])


def _decode_exchange(data: bytes, budget: int) -> tuple[Header, codec.Exchange]:
    return None, codec.decode_exchange(data, budget)
