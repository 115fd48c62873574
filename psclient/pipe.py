"""Pipes: connections that carry requests to one shard, and its replies back, many at once.

A pipe breaks, and is then replaced by a new one (stream.py). GrpcPipe is a call of the gRPC method
Stream; LanePipe (lanepipe.py) uses shared memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from queue import SimpleQueue
from typing import Any, Protocol

import grpc

from psclient.channel import Channel
from psclient.session import Call
from psclient.window import Window
from psproto import codec
from psproto import ps_pb2 as pb

METHOD = "/ps.v1.RowService/Stream"


class PipeLost(Exception):
    """A pipe broke that does not use gRPC. Not an OSError, which a signal handler may raise."""


BROKEN = (grpc.RpcError, StopIteration, codec.Malformed, PipeLost)  # what ``receive`` may raise


class Pipe(Protocol):
    """A connection to one shard that carries many requests at once."""

    def send(self, call: Call) -> None:
        """Send a request without waiting, in the order of the calls of this method.

        The caller may change the arrays of the request afterwards.
        """
        ...

    def receive(self) -> tuple[int, codec.Exchanged | pb.Status]:
        """Wait for the next reply; return (id of the call, its answer or its error).

        Raises one of BROKEN if the pipe broke.
        """
        ...

    def answered(self, id: int) -> None:
        """Note that the reply to a call was received. The caller holds the lock of the link."""
        ...

    def delay(self) -> float:
        """Return the seconds until a new request would probably be answered, if it had to wait
        before it is sent; 0.0: it need not wait. The caller holds the lock of the link.
        """
        ...

    def end(self) -> None:
        """Send nothing any more. Does not block, and does not end ``receive``."""
        ...

    def cancel(self) -> None:
        """End the pipe: a thread in ``receive`` gets an error."""
        ...


class GrpcPipe:
    """Pipe through a call of the gRPC method Stream.

    channel  connection to the shard
    calls    requests to send first

    The caller of ``send`` and ``answered`` holds the lock of the link.
    """

    def __init__(self, channel: Channel, calls: Iterable[Call]) -> None:
        self._channel = channel
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._window: Window[Call] = Window()
        for call in calls:
            self.send(call)
        try:
            requests = iter(self._outbox.get, None)
            self._stream: Any = channel.open_stream(METHOD, requests)
        except BaseException:
            self._outbox.put(None)  # ends the stream, if it was opened before the exception
            raise

    def send(self, call: Call) -> None:
        fresh = not call.message
        if fresh:
            call.encode()
        if self._window.enter(call):
            self._put(call.id, call.message if fresh else call.restamped())

    def answered(self, id: int) -> None:
        for call in self._window.answered(id):
            if not call.done:  # else its deadline has passed
                self._put(call.id, call.restamped())

    def delay(self) -> float:
        return self._window.delay()

    def _put(self, id: int, message: bytes) -> None:
        """Send an encoded request."""
        self._window.sent(id, len(message))
        self._outbox.put(message)

    def receive(self) -> tuple[int, codec.Exchanged | pb.Status]:
        return codec.decode_stream_response(self._channel.read(self._stream))

    def end(self) -> None:
        self._outbox.put(None)

    def cancel(self) -> None:
        self._channel.cancel(self._stream)
