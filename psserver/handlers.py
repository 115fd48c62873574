"""Build gRPC handlers. Every method is admitted, counted and answered in the same way."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from psproto import codec
from psserver.checkpoints import Checkpoints
from psserver.connections import Connections
from psserver.door import Context, Handler
from psserver.errors import Refused
from psserver.limits import Limits, Reservation
from psserver.pool import Pool
from psserver.security.guard import Actor, Guard
from psserver.security.verbs import PATHS
from psserver.status import abort, code_of, reason_of, status_of
from psserver.work import Progress
from psserver.workers import Workers

PROGRESS_SECONDS = 0.2  # seconds between two progress messages


class Handlers:
    """Builds gRPC handlers from methods of the service.

    An error that a method raises is sent as the status of its call. A method is not called if the
    caller has none of its verbs.

    guard    finds out who calls, and what the caller may do
    arrived  counts a complete message for ``connections``: arrived(``context.peer()``, its bytes)
    """

    def __init__(
        self,
        limits: Limits,
        workers: Workers,
        checkpoints: Checkpoints,
        connections: Connections,
        guard: Guard,
    ) -> None:
        self._limits = limits
        self._workers = workers
        self._checkpoints = checkpoints
        self.arrived = connections.arrived
        self._guard = guard

    def count_error(self, method: str, error: Exception) -> None:
        """Count a failed request in the statistics of ``method``."""
        status, stats = status_of(error), self._limits.stats
        code, reason = code_of(status).name, reason_of(status)
        stats.failed(method, code, reason)
        stats.recent.add(method, code, reason, status.message)

    def counted(
        self, name: str, call: Callable[[Any, Context, Actor], Awaitable[Any]]
    ) -> Callable[[Any, Context, Actor], Awaitable[Any]]:
        """Wrap a handler: count each call while it runs; refuse it if too many are running.

        name  name of the gRPC method
        call  handler: function of (request, context, who calls)
        """

        async def counted(data: Any, context: Context, actor: Actor) -> Any:
            try:
                self._limits.begin_call()
            except Exception as error:
                self.count_error(name, error)
                del data
                await abort(context, error)
            work = call(data, context, actor)
            del data  # see ``abort``
            try:
                return await work
            finally:
                self._limits.end_call()

        return counted

    def guarded(
        self, name: str, call: Callable[[Any, Context, Actor], Awaitable[Any]]
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        """Wrap the handler of a stream: find out who calls, and end it when the policy forbids it.

        name  name of the gRPC method
        call  handler: function of (request, context, who calls)
        """
        path = PATHS[name]

        async def guarded(data: Any, context: Context) -> Any:
            try:
                actor = self._guard.actor(path, context, context.peer())
                work = call(data, context, actor)
                del data  # see ``abort``
                with actor.watched():
                    return await work
            except Refused as error:
                self.count_error(name, error)
                await abort(context, error)

        return guarded

    def unary(
        self,
        name: str,
        method: Callable[[bytes, float, Reservation, Actor], Awaitable[bytes]],
        *,
        arrays: bool = True,
        during_restore: bool = False,
    ) -> Handler:
        """Build the handler of a method that takes and returns one encoded message.

        name            name of the gRPC method
        method          function of (request, deadline in monotonic seconds, reservation of bytes in
                        flight, who calls) that returns the response
        arrays          requests may contain arrays; False: they must be small
        during_restore  the method may be called while a restore blocks the shard
        """
        limits, guard, path = self._limits, self._guard, PATHS[name]

        async def call(data: bytes, context: Context) -> bytes:
            remaining = context.time_remaining()
            deadline = math.inf if remaining is None else time.monotonic() + remaining
            began, reservation, size, peer = False, None, len(data), context.peer()
            self.arrived(peer, size)
            try:
                actor = guard.actor(path, context, peer)
                limits.begin_call()
                began = True
                client = limits.client(peer, actor.name) if arrays else None
                reservation = limits.admit(
                    size,
                    client=client,
                    arrays=arrays,
                    during_restore=during_restore,
                    budget=actor.budget,
                )
                answer = await method(data, deadline, reservation, actor)
                task = asyncio.current_task()  # ends when the answer is sent
                assert task is not None
                reservation.release_after(task, len(answer))
                del task
                return answer
            except Exception as error:
                self.count_error(name, error)
                del data
                await abort(context, error)
                raise AssertionError("abort returned") from None
            finally:
                if reservation is not None:
                    reservation.release()
                if began:
                    limits.end_call()

        return grpc.unary_unary_rpc_method_handler(call)

    def message(
        self,
        kind: type[Message],
        method: Callable[..., Awaitable[Message]],
        *,
        during_restore: bool = False,
        with_actor: bool = False,
    ) -> Handler:
        """Build the handler of a method that takes and returns one protobuf message.

        kind            class of the request
        method          function of (request, deadline in monotonic seconds); returns the response
        during_restore  the method may be called while a restore blocks the shard
        with_actor      the method has a third parameter: who calls
        """

        async def call(data: bytes, deadline: float, _: Reservation, actor: Actor) -> bytes:
            request = parse(kind, data)
            actor.require(request)
            who = (actor,) if with_actor else ()
            async with actor.recorded(request):
                return bytes((await method(request, deadline, *who)).SerializeToString())

        return self.unary(method_of(kind), call, arrays=False, during_restore=during_restore)

    def blocking(
        self,
        kind: type[Message],
        method: Callable[..., Message],
        pool: Pool,
        *,
        during_restore: bool = False,
        with_actor: bool = False,
    ) -> Handler:
        """Build the handler of a method that blocks, and therefore runs on a thread of ``pool``.

        kind            class of the request
        method          function of the request; returns the response
        during_restore  the method may be called while a restore blocks the shard
        with_actor      the method has a second parameter: who calls
        """

        async def call(
            data: bytes, deadline: float, reservation: Reservation, actor: Actor
        ) -> bytes:
            request = parse(kind, data)
            actor.require(request)
            work = partial(method, request, actor) if with_actor else partial(method, request)
            async with actor.recorded(request):
                done = await self._workers.run(pool, work, deadline, reservation)
                return bytes(done.SerializeToString())

        return self.unary(method_of(kind), call, arrays=False, during_restore=during_restore)

    def long(self, kind: type[Message], method: Callable[[Any, Progress], Message]) -> Handler:
        """Build the handler of a long operation. It sends progress messages, then the result.

        kind    class of the request
        method  function of (request, progress to update) that returns the result; it blocks, so it
                runs on a worker thread
        """

        async def answers(request: Any, actor: Actor) -> AsyncIterator[Message]:
            progress = self._checkpoints.work.progress()
            progress.principal = actor.name
            work = self._workers.start_long(method, request, progress)
            try:
                while not (await asyncio.wait([work], timeout=PROGRESS_SECONDS))[0]:
                    yield progress.message()
                yield work.result()
            finally:
                progress.given_up = True
                if not work.done():
                    work.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

        return self._stream_out(kind, answers)

    def many(self, kind: type[Message], method: Callable[[Any], Iterator[Message]]) -> Handler:
        """Build the handler of a long operation that sends many messages.

        kind    class of the request
        method  function of the request that returns a generator of messages; both run on a worker
                thread

        The next message is made only after the previous one was sent.
        """

        async def answers(request: Any, _: Actor) -> AsyncIterator[Message]:
            loop = asyncio.get_running_loop()
            with self._workers.slot() as pool:
                found = await loop.run_in_executor(pool, method, request)
                try:
                    while True:
                        following = loop.run_in_executor(pool, next, found, None)
                        item = await asyncio.shield(following)
                        if item is None:
                            return
                        yield item
                finally:
                    await asyncio.wait([following])
                    await loop.run_in_executor(pool, found.close)  # type: ignore[attr-defined]

        return self._stream_out(kind, answers)

    def _stream_out(
        self, kind: type[Message], method: Callable[[Any, Actor], AsyncIterator[Message]]
    ) -> Handler:
        """Build the handler of a method that answers one request with many messages.

        kind    class of the request
        method  function of (request, who calls); returns an asynchronous iterator of messages
        """

        async def call(data: bytes, context: Context, actor: Actor) -> None:
            request = parse(kind, data)
            actor.require(request)
            async with actor.recorded(request):
                async for message in method(request, actor):
                    await context.write(bytes(message.SerializeToString()))

        name = method_of(kind)
        served = self.counted(name, self.served(name, call))
        return grpc.unary_stream_rpc_method_handler(self.guarded(name, served))

    def served(
        self, name: str, call: Callable[[bytes, Context, Actor], Awaitable[None]]
    ) -> Callable[[bytes, Context, Actor], Awaitable[None]]:
        """Wrap a handler that answers one message with many: admit the message before the call.

        name  name of the gRPC method
        call  handler: function of (request, context, who calls) that sends the answers

        An error becomes the status of the call.
        """

        async def served(data: bytes, context: Context, actor: Actor) -> None:
            self.arrived(actor.peer, len(data))
            try:
                reservation = self._limits.admit(len(data), arrays=False, budget=actor.budget)
                try:
                    await call(data, context, actor)
                finally:
                    reservation.release()
            except Exception as error:
                self.count_error(name, error)
                del data
                await abort(context, error)

        return served


def parse(kind: type[Message], data: bytes) -> Message:
    """Parse a protobuf message of class ``kind``. Raises Malformed."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise codec.Malformed(f"{kind.DESCRIPTOR.name}: {error}") from error


def method_of(kind: type[Message]) -> str:
    """Return the name of the method whose request has the class ``kind``: PullRequest -> "Pull"."""
    return str(kind.DESCRIPTOR.name).removesuffix("Request")
