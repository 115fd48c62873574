"""Serve streams of requests, which may be pipelined.

Replies come in the order of the requests, but a refusal with OVERLOADED comes at once. A stream is
a call of the gRPC method Stream, or a same-host lane (lane.py). Both are served by the same code; a
Caller hides what differs: how messages arrive, and how they are encoded.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Literal

import grpc

from psproto import codec
from psproto import ps_pb2 as pb
from psserver.door import Context
from psserver.errors import Draining, Overloaded
from psserver.exchange import AT_ONCE, AT_ONCE_FIELDS, Begun, Exchanges, Read
from psserver.flow import NOTHING, SERVED, Accept, Caller, Flow, Head, Served
from psserver.handlers import Handlers
from psserver.limits import Limits, Reservation
from psserver.queued import Queued
from psserver.security.budgets import Budget
from psserver.security.guard import Actor
from psserver.status import abort, status_of
from psserver.turns import Client

PIPELINE = 64  # maximum number of requests in flight per stream

Done = tuple[bytes, Begun, codec.Exchanged]  # an encoded reply, and what it is about


class _Stream:
    """Caller that uses the gRPC method Stream.

    arrived  counts a complete message: arrived(name of the connection, bytes)
    actor    who calls
    client   the connection, to which requests are counted
    """

    prompt, via = False, "stream"
    accept: Accept | None = None

    def __init__(
        self, context: Context, arrived: Callable[[str, int], None], actor: Actor, client: Client
    ) -> None:
        self._context = context
        self._peer = actor.peer
        self.client = client
        self._arrived = arrived
        self._actor = actor
        self.write = context.write
        self.size = len
        self.decode = actor.checking(codec.decode_stream_request)
        self.encode = codec.encode_stream_response

    @property
    def budget(self) -> Budget | None:
        return self._actor.budget

    async def read(self) -> bytes | None:
        data: Any = await self._context.read()
        if data is grpc.aio.EOF:
            return None
        self._arrived(self._peer, len(data))
        return bytes(data)

    def send(self, data: bytes) -> bool:
        raise NotImplementedError  # gRPC cannot

    def head(self, message: bytes) -> Head:
        return codec.decode_stream_header(message, AT_ONCE_FIELDS)


class Streams:
    """Serves the streams of all clients.

    exchanges  runs the requests on the shard
    limits     reserves memory for requests
    handlers   counts errors, and reports received messages for the check of connections
    share      bytes; while the requests and replies of a stream in flight take as many or more, no
               further request is read from it
    """

    def __init__(
        self, exchanges: Exchanges, limits: Limits, handlers: Handlers, share: int
    ) -> None:
        self._exchanges = exchanges
        self._limits = limits
        self._handlers = handlers
        self._share = share
        self._streams: dict[asyncio.Task[Any], bool] = {}  # True while it waits for a message
        self._writers: set[asyncio.Task[None]] = set()  # the loop has weak references only

    def drain(self) -> None:
        """End each stream: at once if it waits for a request, otherwise after the replies to its
        requests in flight.

        Set ``Limits.draining`` to True before this call.
        """
        for stream, waits in self._streams.items():
            if waits:
                stream.cancel()

    async def stream(self, _: Any, context: Context, actor: Actor) -> None:
        """Serve one stream until the client ends it, the server stops, or a message of the client
        cannot be decoded.

        The first argument, an iterator over the client's messages, is not used: they are read with
        ``context.read``.

        actor  who calls
        """
        self._limits.stats.streams += 1
        try:
            client = self._limits.client(actor.peer, actor.name)
            caller = _Stream(context, self._handlers.arrived, actor, client)
            broken = await self.serve(caller, "Stream")
        finally:
            self._limits.stats.streams -= 1
        if broken is not None:
            await abort(context, broken)

    async def serve(self, caller: Caller, method: str) -> Exception | None:
        """Serve one stream until the client ends it, the server stops, or a message of the client
        cannot be decoded.

        method  name of the method that failed requests count for

        Returns the error with which to end the stream; None if the client ended it.
        """
        flow = Flow(caller, method)
        if caller.prompt:
            caller.accept = partial(self._accept_now, flow)
        writer = asyncio.create_task(self._write(flow))
        self._writers.add(writer)
        writer.add_done_callback(self._writers.discard)
        try:
            broken = await self._read(flow)
            flow.answers.put_nowait(None)
            await asyncio.shield(writer)
        except BaseException:
            flow.gone = True
            flow.answers.put_nowait(None)
            raise
        finally:
            if flow.refusal is not None:
                flow.refusal.close()
        if broken is not None:
            self._handlers.count_error(method, broken)
        return broken

    async def _read(self, flow: Flow) -> Exception | None:
        """Read requests from the client and start them; pause while too many are in flight.

        Returns the error with which to end the stream: codec.Malformed, or Draining if the server
        stops; None if the client ended the stream. The ``del`` statements free the memory of each
        message as soon as it has been decoded.
        """
        task = flow.reader = asyncio.current_task()
        assert task is not None
        try:
            while not self._limits.draining:
                self._streams[task] = True
                data = await flow.caller.read()
                self._streams[task] = False
                if data is None or flow.gone:
                    return None
                accepted: Awaitable[None] | None
                if data is SERVED:
                    accepted, flow.refusal = flow.refusal, None
                else:
                    accepted = self._accept(flow, data)
                del data
                if accepted is not None:
                    await accepted
                    del accepted
                if self._limits.turns.waiting:
                    await self._limits.turns.pause(flow.caller.client)
                while flow.inflight >= self._share or flow.answers.qsize() >= PIPELINE:
                    flow.room.clear()
                    await flow.room.wait()
        except asyncio.CancelledError:
            if flow.broken is not None:
                return flow.broken
            if not self._limits.draining:
                raise
        except codec.Malformed as error:
            return error.with_traceback(None)
        finally:
            self._streams.pop(task, None)
            flow.reader = None
            del task
        return Draining("the server is stopping")

    def _accept(self, flow: Flow, data: Any) -> Awaitable[None] | None:
        """Reserve memory for one request, decode it, start it, and add its result to
        ``flow.answers``. If the server is busy, let it wait for its turn instead.

        data  the encoded request

        Returns None, or an awaitable: if the request is large, one that decodes and starts it; if
        it is refused, one that writes the error.
        """
        start = time.perf_counter()
        turns, client, size = self._limits.turns, flow.caller.client, flow.caller.size(data)
        try:
            reservation = self._limits.admit(size, client=client, budget=flow.caller.budget)
        except Exception as error:
            return self._refuse(flow, flow.caller.head(data).id, error.with_traceback(None))
        if client.blocked or not turns.free():
            return self._line_up(flow, data, size, start, reservation)
        try:
            read = self._exchanges.read_at_once(flow.caller.decode, data, size)
        except BaseException:
            reservation.release()
            raise
        if read is None:
            return self._accept_large(flow, data, start, reservation)
        done = self._begin(flow, read, start, reservation)
        turns.spent(time.perf_counter() - start)
        return None if done is None else self._write_now(flow, done, reservation)

    def _accept_now(self, flow: Flow, data: Any) -> Served | Literal[False] | None:
        """Do the same as ``_accept`` if that takes no time, while the task that reads waits for a
        message. ``Accept`` explains the result.

        data  the encoded request
        """
        start = time.perf_counter()
        limits, client, size = self._limits, flow.caller.client, flow.caller.size(data)
        turns = limits.turns
        if size > AT_ONCE or flow.waiting or flow.gone or client.blocked or not turns.free():
            return False
        try:
            reservation = limits.admit(size, client=client, budget=flow.caller.budget)
        except Exception as error:
            id = flow.caller.head(data).id
            flow.refusal = self._refuse(flow, id, error.with_traceback(None))
            return SERVED
        try:
            read = self._exchanges.read_at_once(flow.caller.decode, data, size)
        except BaseException:
            reservation.release()
            raise
        assert read is not None  # it is small
        sent, done = False, self._begin(flow, read, start, reservation)
        if done is not None:
            try:
                sent = flow.caller.send(done[0])
            except Exception:
                flow.gone = True
            reservation.release()
            self._exchanges.count(*done[1:], flow.caller.via)
        turns.spent(time.perf_counter() - start)
        return None if sent else SERVED

    async def _refuse(self, flow: Flow, id: int, error: Exception) -> None:
        """Write an error at once, before the replies to requests that arrived earlier.

        id  the request that is refused
        """
        data = self._error(flow, id, error)
        async with flow.writing:
            if not flow.gone:
                try:
                    await flow.caller.write(data)
                except Exception:
                    flow.gone = True

    def _error(self, flow: Flow, id: int, error: Exception) -> bytes:
        """Count an error of a request, and return the encoded reply."""
        self._handlers.count_error(flow.method, error)
        mirrored = pb.Status.FromString(status_of(error).SerializeToString())
        return flow.caller.encode(id, mirrored)

    def _line_up(
        self, flow: Flow, data: Any, size: int, start: float, reservation: Reservation
    ) -> Awaitable[None] | None:
        """Let a request wait for its turn. Returns an awaitable that writes the error, if it would
        have to wait for too long.

        data   the encoded request, of ``size`` bytes
        start  time of arrival, in seconds of ``time.perf_counter``
        """
        try:
            head = flow.caller.head(data)
            queued = Queued(self._exchanges, flow, data, size, start, reservation)
            queued.enter(self._limits.turns, head)
        except Overloaded as error:
            reservation.release()
            return self._refuse(flow, head.id, error.with_traceback(None))
        except BaseException:
            reservation.release()
            raise
        flow.waiting += 1
        flow.inflight += size
        flow.answers.put_nowait((head.id, queued.begun, reservation))
        return None

    async def _accept_large(
        self, flow: Flow, data: Any, start: float, reservation: Reservation
    ) -> None:
        """Decode an admitted request on a worker thread, start it, and add its result to
        ``flow.answers``.

        data   the encoded request
        start  time of arrival, in seconds of ``time.perf_counter``
        """
        try:
            read = await self._exchanges.read_on_thread(flow.caller.decode, data, reservation)
        except BaseException:
            reservation.release()
            raise
        del data
        if (done := self._begin(flow, read, start, reservation)) is not None:
            await self._write_now(flow, done, reservation)

    def _begin(self, flow: Flow, read: Read, start: float, reservation: Reservation) -> Done | None:
        """Start a decoded request and add its result to ``flow.answers``.

        start  time of arrival, in seconds of ``time.perf_counter``

        If the result is there at once and no other one waits, returns it instead, and the caller
        writes the reply. This saves a switch to the task that writes.
        """
        head, checked = read
        assert head is not None
        wait = head.timeout_ms / 1000 if head.timeout_ms else math.inf
        until = time.monotonic() + wait
        begun = self._exchanges.begin(checked, start, until, reservation, flow.lane)
        if isinstance(begun[2], asyncio.Future) and not begun[2].done():
            self._limits.turns.working(begun[2], reservation.size)
        if flow.caller.prompt and not flow.waiting:
            done = self._exchanges.finish_now(begun)
            if done is not None:
                return flow.caller.encode(head.id, done), begun, done
        flow.waiting += 1
        flow.inflight += reservation.size
        flow.answers.put_nowait((head.id, begun, reservation))
        return None

    async def _write_now(self, flow: Flow, done: Done, reservation: Reservation) -> None:
        """Write a reply on the task that reads, release its reservation, and count it."""
        try:
            await flow.caller.write(done[0])
        except Exception:
            flow.gone = True
        finally:
            reservation.release()
            self._exchanges.count(*done[1:], flow.caller.via)

    async def _write(self, flow: Flow) -> None:
        """Wait for each result in ``flow.answers`` and send it to the client, until None is queued.

        If sending fails, the client is gone: later results are discarded.
        """
        encode = flow.caller.encode
        while (answer := await flow.answers.get()) is not None:
            id, begun, reservation = answer
            data = b""
            try:
                if isinstance(begun, asyncio.Future):
                    begun = await begun
                if begun is not NOTHING:
                    done = await self._exchanges.finish(begun, flow.caller.via)
                    data = b"" if flow.gone else encode(id, done)
                    del done
            except Exception as error:
                data = self._error(flow, id, error)
            if data and not flow.gone:
                async with flow.writing:
                    try:
                        await flow.caller.write(data)
                    except Exception:  # gRPC raises several types; each means that the call ended
                        flow.gone = True
            flow.waiting -= 1
            flow.inflight -= reservation.size
            reservation.release()
            del answer, begun, data
            flow.room.set()
