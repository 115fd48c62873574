"""The subscription to one shard, and the queue in which the changes of all shards wait."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, Literal

import grpc

from psclient.changes import Change, read_change
from psclient.channel import Channel, options
from psclient.errors import LogDiverged, PsError, Unavailable, VersionCompacted, VersionInFuture
from psclient.retry import FIRST_PAUSE, LONGEST_PAUSE, RETRYABLE, rpc_error
from psclient.signals import Condition
from psproto import codec
from psproto import ps_pb2 as pb

WhenLost = Literal["raise", "snapshot"]

LOST = (VersionCompacted, LogDiverged, VersionInFuture)  # the token is of no more use
SUBSCRIBE = "/ps.v1.LogService/Subscribe"


class ChangeQueue:
    """Changes that wait for the application. Thread-safe.

    tokens  by shard: after the changes that were taken
    """

    def __init__(self, tokens: list[bytes], most: int) -> None:
        """Create an empty queue for at most ``most`` changes."""
        self.tokens = tokens
        self.closed = False
        self._most = most
        self._changed = Condition()
        self._ready: deque[Change | PsError] = deque()
        self._failure: PsError | None = None

    def put(self, change: Change | PsError) -> bool:
        """Append a change once there is room. Returns False if the queue was closed."""
        with self._changed:
            while len(self._ready) >= self._most and not self.closed:
                self._changed.wait()
            if not self.closed:
                self._ready.append(change)
                self._changed.notify_all()
            return not self.closed

    def take(self, timeout: float | None) -> Change | None:
        """Remove and return the next change.

        Returns None if there is none within ``timeout`` seconds (None: no limit), or if the queue
        is closed. Raises the PsError that ended a stream.
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
        """Wait, or return early if the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed, seconds)

    def close(self) -> None:
        """Discard what is queued. Whoever waits returns."""
        with self._changed:
            self.closed = True
            self._ready.clear()
            self._changed.notify_all()


class ShardStream:
    """A thread that reads the changes of one shard into a queue.

    After a failure it opens the stream again, after the last change that it queued.
    """

    def __init__(
        self,
        queue: ChangeQueue,
        shard: int,
        address: str,
        request: pb.SubscribeRequest,
        timeout: float,
        when_lost: WhenLost,
        *,
        proxy: bool = False,
    ) -> None:
        """Open the channel. ``open`` starts the thread.

        request    of the first stream, with its token
        timeout    seconds without reaching the shard, after which Unavailable is queued
        when_lost  whether to take a snapshot if the shard cannot continue from the token
        proxy      use the HTTP proxy that the environment names
        """
        self.where = f"shard {shard} at {address}"
        self._queue = queue
        self._shard = shard
        self._request = request
        self._timeout = timeout
        self._when_lost = when_lost
        self._channel = Channel(address, options(proxy=proxy))
        self._call: Any = None
        self._count = 0
        self._received = False  # anything, on the newest stream
        self._met = False  # the server, ever
        self._thread = threading.Thread(target=self._run, name=f"subscriber {shard}", daemon=True)

    def open(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the stream; the queue is closed. The thread ends soon after."""
        call = self._call
        if call is not None:
            self._channel.cancel(call)
        self._channel.close()

    def _run(self) -> None:
        failures, failing = 0, time.monotonic()
        while not self._queue.closed:
            try:
                self._read()
                return
            except PsError as error:
                failure = error
            except ValueError as error:  # the channel was closed
                failure = Unavailable(f"{self.where}: {error}")
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
        """Start with a snapshot if the token is of no more use and the application wants that."""
        lost = isinstance(failure, LOST) and bool(self._request.token)
        if not lost or self._when_lost != "snapshot":
            return False
        self._request.token = b""
        self._request.start = pb.START_SNAPSHOT
        return True

    def _pause(self, failure: PsError, failures: int) -> float | None:
        """Return the seconds until the next attempt; None: there is none."""
        # the limit of subscribers may be reached by this one's own broken stream
        crowded = self._met and failure.reason == "TOO_MANY_SUBSCRIBERS"
        if crowded or isinstance(failure, Unavailable):
            return float(min(FIRST_PAUSE * 2 ** min(failures, 8), LONGEST_PAUSE))
        seconds: float | None = failure.retry_after
        return seconds

    def _read(self) -> None:
        """Queue changes until the queue is closed. Raises a PsError when the stream breaks."""
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
            failure = rpc_error(error, self.where)
            if error.code() in RETRYABLE and not isinstance(failure, Unavailable):
                failure = Unavailable(f"{self.where}: {error.code().name}: {error.details()}")
            raise failure from error
        except codec.Malformed as error:
            self._channel.cancel(call)
            raise Unavailable(f"{self.where}: {error}") from error
        raise Unavailable(f"{self.where}: the stream ended")
