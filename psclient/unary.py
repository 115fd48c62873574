"""Connection to one shard through unary calls: one gRPC call per request.

A stream (stream.py) is faster. Clients in other languages may find unary calls easier to use.
"""

from __future__ import annotations

import time

import grpc

from psclient.channel import Cancelled
from psclient.errors import PsError, SessionExpired, Unavailable
from psclient.link import Link
from psclient.retry import backoff, rpc_error
from psclient.session import Call, renumber
from psproto import codec


class UnaryLink(Link):
    """Connection to one shard through unary calls. Thread-safe. Link explains the methods."""

    def submit(self, call: Call, *, background: bool = False) -> None:
        with self.lock:
            self._begin(call)
        call.message = codec.encode_exchange(call.exchange)
        try:
            self._send(call)
        except PsError:
            self._end(call, applied=False)
            raise

    def wait(self, call: Call) -> codec.Exchanged:
        while call.answer is None:
            if call.error is not None:
                raise call.error
            try:
                call.answer = codec.decode_exchanged(self.channel.result(call.handle))
                self._end(call, applied=True)
            except Cancelled:
                self._send(call)
            except grpc.RpcError as failure:
                self._again(call, rpc_error(failure, self.channel, self.where))
            except codec.Malformed as failure:
                text = f"{self.where}: its answer is not a valid message: {failure}"
                self._again(call, Unavailable(text))
        return call.answer

    def abandon(self, call: Call) -> None:
        unfinished = not call.done
        with self.lock:
            self._give_up(call, "the call was interrupted")
        if unfinished and call.handle is not None:
            self.channel.cancel(call.handle)

    def _send(self, call: Call) -> None:
        """Start an attempt of a call: send its message and store gRPC's call object in it."""
        call.attempts += 1
        left = max(call.deadline - time.monotonic(), 0.001)
        call.handle = self.channel.start("/ps.v1.RowService/Exchange", call.message, left)

    def _end(self, call: Call, *, applied: bool) -> None:
        """Mark a call as done, so that it is not sent again.

        applied  whether the shard answered that it applied the pushes in the call
        """
        with self.lock:
            call.done = True
            self._finish(call, applied=applied)

    def _again(self, call: Call, error: PsError) -> None:
        """Send a failed call again after a pause, if ``error`` permits it; else raise ``error``."""
        pause = self._pause_before(call, error)
        repeats = self.session.repeats or error.retry_after is None
        if pause is None and repeats and isinstance(error, Unavailable):
            pause = backoff(call.attempts)
        if self._closed:
            error = Unavailable(f"{self.where}: the client was closed")
            pause = None
        if pause is None or time.monotonic() + pause >= call.deadline:
            call.error = error
            self._end(call, applied=False)
            raise error
        if not self._pause(call, error, pause):
            call.error = error
            self._end(call, applied=False)
            raise error
        if isinstance(error, SessionExpired):
            with self.lock:
                renumber(call, self.session)
            call.message = codec.encode_exchange(call.exchange)
        self._send(call)
