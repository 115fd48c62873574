"""Receive the changes of one shard, and queue the changes of all shards for the application."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, Literal

import grpc

from psclient.access import Access
from psclient.changes import Change, read_change
from psclient.channel import Channel
from psclient.errors import (
    LogDiverged,
    PsError,
    TlsError,
    Unavailable,
    VersionCompacted,
    VersionInFuture,
)
from psclient.retry import RETRYABLE, asked_pause, backoff, rpc_error
from psclient.routes import Route
from psclient.signals import Condition
from psproto import codec
from psproto import ps_pb2 as pb

WhenLost = Literal["raise", "snapshot"]

LOST = (VersionCompacted, LogDiverged, VersionInFuture)  # the shard cannot continue from the token
SUBSCRIBE = "/ps.v1.LogService/Subscribe"


class ChangeQueue:
    """Queue of the changes of all shards that the application has not taken yet. Thread-safe.

    tokens  token of each shard, from which a subscription continues after the last change taken
    """

    def __init__(self, tokens: list[bytes], most: int) -> None:
        """Create an empty queue.

        tokens  token of each shard from which its subscription starts; b"": none
        most    maximum number of changes in the queue; ``put`` waits while it is full
        """
        self.tokens = tokens
        self.closed = False
        self._most = most
        self._changed = Condition()
        self._ready: deque[Change | PsError] = deque()
        self._failure: PsError | None = None

    def put(self, change: Change | PsError) -> bool:
        """Append a change, or the PsError that ended a stream; wait while the queue is full.

        Returns False, without appending, if the queue is closed.
        """
        with self._changed:
            while len(self._ready) >= self._most and not self.closed:
                self._changed.wait()
            if not self.closed:
                self._ready.append(change)
                self._changed.notify_all()
            return not self.closed

    def take(self, timeout: float | None) -> Change | None:
        """Remove and return the next change; wait up to ``timeout`` seconds (None: no limit).

        Returns None if no change arrived in time or the queue is closed. If the next entry is the
        PsError that ended a stream, raises it. Later calls return the changes that are still
        queued, and then raise the same error.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._ready and not self.closed and self._failure is None:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)
            if self.closed:
                return None
            if not self._ready:
                assert self._failure is not None
                raise self._failure
            change = self._ready.popleft()
            self._changed.notify_all()
            if isinstance(change, PsError):
                self._failure = change
                raise change
            if change.token:
                self.tokens[change.shard] = change.token
            return change

    def pause(self, seconds: float) -> None:
        """Wait for ``seconds``; return early if the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed, seconds)

    def close(self) -> None:
        """Close the queue and discard its changes; threads that wait in its methods return."""
        with self._changed:
            self.closed = True
            self._ready.clear()
            self._changed.notify_all()


class ShardStream:
    """Thread that receives the changes of one shard and puts them into a queue.

    queue      receives the changes, and a PsError if the subscription cannot continue
    shard      number of the shard
    where      name of the shard in error messages: "shard 1 at 127.0.0.1:7001"
    route      address of the shard
    request    request to send, with the token to continue from; its token is kept up to date
    timeout    if the shard cannot be reached for this many seconds, Unavailable is queued
    when_lost  what to do if the shard cannot continue from the token: "raise" queues the error,
               "snapshot" starts again with a snapshot of all rows
    access     how to connect

    After a failure it opens a new stream, which continues after the last change in the queue.
    """

    def __init__(
        self,
        queue: ChangeQueue,
        shard: int,
        where: str,
        route: Route,
        request: pb.SubscribeRequest,
        timeout: float,
        when_lost: WhenLost,
        *,
        access: Access,
    ) -> None:
        self.where = where
        self._queue = queue
        self._shard = shard
        self._request = request
        self._timeout = timeout
        self._when_lost = when_lost
        self._channel = Channel(route, access)
        self._call: Any = None
        self._count = 0
        self._received = False  # whether the newest stream has delivered a message
        self._met = False  # whether any stream has delivered a message
        self._thread = threading.Thread(target=self._run, name=f"subscriber {shard}", daemon=True)

    def open(self) -> None:
        """Start the thread, which connects."""
        self._thread.start()

    def close(self) -> None:
        """Cancel the stream, so that the thread ends. Close the queue before calling this."""
        call = self._call
        if call is not None:
            self._channel.cancel(call)
        self._channel.close()

    def _run(self) -> None:
        """Open and read one stream after another, until the queue is closed or a failure is final.

        The thread runs this method. A final failure is put into the queue.
        """
        failures, failing = 0, time.monotonic()
        while not self._queue.closed:
            try:
                self._read()
                return
            except PsError as error:
                failure = error
            except ValueError as error:  # the channel was closed
                failure = Unavailable(f"{self.where}: {error}")
            except BaseException as error:  # whoever waits for a change must get to know
                failure = PsError(f"{self.where}: {error!r}")
                failure.__cause__ = error
            if self._received:
                failures, failing = 0, time.monotonic()
            failures += 1
            self._count += 1
            if self._restarts(failure):
                continue
            pause = self._pause(failure, failures)
            if pause is None or time.monotonic() + pause - failing > self._timeout:
                self._queue.put(failure)
                return
            self._queue.pause(pause)

    def _restarts(self, failure: PsError) -> bool:
        """Make the next request ask for a snapshot, if a failure requires one.

        It does if the shard cannot continue from the token and ``when_lost`` is "snapshot". Returns
        whether the request was changed.
        """
        lost = isinstance(failure, LOST) and bool(self._request.token)
        if not lost or self._when_lost != "snapshot":
            return False
        self._request.token = b""
        self._request.start = pb.START_SNAPSHOT
        return True

    def _pause(self, failure: PsError, failures: int) -> float | None:
        """Return the seconds to wait before the next stream, or None if ``failure`` is final.

        failures  number of consecutive failures
        """
        # the server may still count this subscriber's own broken stream
        crowded = self._met and failure.reason == "TOO_MANY_SUBSCRIBERS"
        if crowded or isinstance(failure, Unavailable):
            return backoff(failures)
        return asked_pause(failure)

    def _read(self) -> None:
        """Open a stream and put its changes into the queue, until the queue is closed.

        Raises a PsError when the stream ends or fails.
        """
        self._received = False
        request = self._request.SerializeToString()
        state = self._request.content == pb.CONTENT_VALUES_AND_STATE
        call = self._call = self._channel.open_stream(SUBSCRIBE, iter((request,)))
        try:
            for data in call:
                delta = codec.decode_delta(data)
                change = read_change(delta, self._shard, self._count, state=state)
                self._received = self._met = True
                if not self._queue.put(change):
                    self._channel.cancel(call)
                    return
                if change.token:
                    self._request.token = change.token
        except grpc.RpcError as error:
            failure = rpc_error(error, self._channel, self.where)
            final = isinstance(failure, Unavailable | TlsError)
            if error.code() in RETRYABLE and not final:
                failure = Unavailable(f"{self.where}: {error.code().name}: {error.details()}")
            raise failure from error
        except codec.Malformed as error:
            self._channel.cancel(call)
            raise Unavailable(f"{self.where}: {error}") from error
        raise Unavailable(f"{self.where}: the stream ended")
