"""gRPC method handlers: admit, parse, call, count, answer; the same for every method."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message

from psproto import codec
from psproto import ps_pb2 as pb
from psserver.checkpoints import Checkpoints
from psserver.errors import Starting
from psserver.limits import Limits, Reservation
from psserver.status import abort, code_of, reason_of, status_of
from psserver.work import Progress
from psserver.workers import Workers

PROGRESS_SECONDS = 0.2  # between two messages about the progress of long work

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
Handler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"


class Door:
    """The way to the methods, a grpc.GenericRpcHandler: refuses calls until it is opened."""

    def __init__(self) -> None:
        self._handlers: tuple[grpc.GenericRpcHandler, ...] = ()
        self._closed = grpc.stream_stream_rpc_method_handler(_refuse)  # fits all four kinds

    def open(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        """Let calls in from now on."""
        self._handlers = handlers

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if not self._handlers and handler_call_details.method.startswith("/ps.v1."):
            return self._closed
        found = (each.service(handler_call_details) for each in self._handlers)
        return next((each for each in found if each is not None), None)


async def _refuse(_: Any, context: Context) -> None:
    await abort(context, Starting())


class Handlers:
    """Make handlers from methods."""

    def __init__(self, limits: Limits, workers: Workers, checkpoints: Checkpoints) -> None:
        self._limits = limits
        self._workers = workers
        self._checkpoints = checkpoints

    def count_error(self, method: str, error: Exception) -> None:
        """Count a request that was refused or failed."""
        status = status_of(error)
        self._limits.stats.failed(method, code_of(status).name, reason_of(status))

    def counted(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """The same call, counted while it lasts."""

        async def counted(data: Any, context: Context) -> Any:
            self._limits.begin_call()
            try:
                return await call(data, context)
            finally:
                self._limits.end_call()

        return counted

    def unary(
        self,
        name: str,
        method: Callable[[bytes, float, Reservation], Awaitable[bytes]],
        *,
        during_restore: bool = False,
    ) -> Handler:
        """A method that takes and returns one encoded message."""

        async def call(data: bytes, context: Context) -> bytes:
            remaining = context.time_remaining()
            deadline = math.inf if remaining is None else time.monotonic() + remaining
            reservation: Reservation | None = None
            try:
                reservation = self._limits.admit(len(data), during_restore=during_restore)
                answer = await method(data, deadline, reservation)
                reservation.resize(len(answer))
                task = asyncio.current_task()  # it ends once the answer is sent
                assert task is not None
                reservation.release_after(task)
                del task
                return answer
            except Exception as error:
                self.count_error(name, error)
                await abort(context, error)
                raise AssertionError("abort returned") from None
            finally:
                if reservation is not None:
                    reservation.release()

        return grpc.unary_unary_rpc_method_handler(self.counted(call))

    def message(
        self,
        kind: type[Message],
        method: Callable[[Any, float], Awaitable[Message]],
        *,
        during_restore: bool = False,
    ) -> Handler:
        """A method that takes and returns one protobuf message."""

        async def call(data: bytes, deadline: float, _: Reservation) -> bytes:
            return bytes((await method(_parse(kind, data), deadline)).SerializeToString())

        return self.unary(_name_of(kind), call, during_restore=during_restore)

    def blocking(
        self, kind: type[Message], method: Callable[[Any], Message], *, during_restore: bool = False
    ) -> Handler:
        """A method that runs on a thread."""

        async def call(request: Any, deadline: float) -> Message:
            return await self._workers.run(method, request, deadline)

        return self.message(kind, call, during_restore=during_restore)

    def long(self, kind: type[Message], method: Callable[[Any, Progress], Message]) -> Handler:
        """A method that sends messages about the progress of long work, then its result."""

        async def answers(request: Any) -> AsyncIterator[Message]:
            progress = self._checkpoints.work.progress()
            work = self._workers.submit(method, request, progress)
            try:
                while not (await asyncio.wait([work], timeout=PROGRESS_SECONDS))[0]:
                    yield pb.CheckpointProgress(bytes=progress.bytes, total=progress.total)
                yield work.result()
            finally:
                progress.given_up = True
                if not work.done():
                    work.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

        return self._stream_out(kind, answers)

    def many(self, kind: type[Message], method: Callable[[Any], Iterator[Message]]) -> Handler:
        """A method that sends many messages, each made once the one before is on its way."""

        async def answers(request: Any) -> AsyncIterator[Message]:
            found = await self._workers.submit(method, request)
            try:
                while True:
                    following: asyncio.Future[Message | None]
                    following = self._workers.submit(next, found, None)
                    item = await asyncio.shield(following)
                    if item is None:
                        return
                    yield item
            finally:
                await asyncio.wait([following])
                await self._workers.submit(found.close)  # type: ignore[attr-defined]

        return self._stream_out(kind, answers)

    def _stream_out(
        self, kind: type[Message], method: Callable[[Any], AsyncIterator[Message]]
    ) -> Handler:
        async def call(data: bytes, context: Context) -> None:
            try:
                reservation = self._limits.admit(len(data))
                try:
                    async for message in method(_parse(kind, data)):
                        await context.write(bytes(message.SerializeToString()))
                finally:
                    reservation.release()
            except Exception as error:
                self.count_error(_name_of(kind), error)
                await abort(context, error)

        return grpc.unary_stream_rpc_method_handler(self.counted(call))


def _parse(kind: type[Message], data: bytes) -> Message:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise codec.Malformed(f"{kind.DESCRIPTOR.name}: {error}") from error


def _name_of(kind: type[Message]) -> str:
    """The method that takes such messages."""
    return str(kind.DESCRIPTOR.name).removesuffix("Request")
