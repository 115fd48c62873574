"""One shard as a client sees it: a channel, a pipelined stream, retries.

    link.submit(call)   the request is on its way
    link.wait(call)     its answer, or what went wrong

There is no thread that reads replies and wakes their owners: whoever waits first reads for
everybody until its own reply is there, then the next one takes over. It saves a hand-over for each
call. A prefetch has nobody waiting, so a background thread, started with the first one, takes the
reader's place meanwhile.

When the stream breaks, the reader opens another and sends again all that is unanswered. Pushes
carry (client id, incarnation, sequence), so the server applies each once.
"""

from __future__ import annotations

import itertools
import threading
import time
from queue import SimpleQueue
from typing import Any

import grpc

from psclient.channel import OPTIONS, Channel
from psclient.errors import DeadlineExceeded, PsError, SessionExpired, Unavailable, error_of
from psclient.retry import FIRST_PAUSE, LONGEST_PAUSE, RETRYABLE
from psclient.session import Call, Session, pause_before, renumber
from psproto import codec
from psproto import ps_pb2 as pb


class Link:
    """One shard behind its stream. Thread-safe."""

    def __init__(self, where: str, address: str, session: Session) -> None:
        self.where = where  # for messages: "shard 1 at 127.0.0.1:7001"
        self.channel = Channel(address, OPTIONS)
        self.session = session
        self._ids = itertools.count(1)
        self.changing = threading.Condition()
        self._pending: dict[int, Call] = {}
        self._stream: Any = None
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._reader: Call | None = None  # the call whose owner reads now
        self._background: threading.Thread | None = None
        self._prefetches: dict[int, Call] = {}
        self._closed = False
        self._failures = 0  # of the stream since its last reply
        self._last_failure = ""

    def submit(self, call: Call, *, background: bool = False) -> None:
        """Send a request. ``background``: its reply is read even while nobody waits for it."""
        with self.changing:
            if self._closed:
                raise Unavailable(f"{self.where}: the client is closed")
            for push in call.exchange.pushes:
                self.session.number(push.header)
            call.encode(next(self._ids))
            self._send(call)
            if background:
                self._prefetches[call.id] = call
                if self._background is None:
                    self._background = threading.Thread(target=self._prefetch, daemon=True)
                    self._background.start()
                self.changing.notify_all()

    def wait(self, call: Call) -> codec.Exchanged:
        """The answer to a submitted call; raises a PsError."""
        with self.changing:
            self._prefetches.pop(call.id, None)
        while True:
            self._take_turns(call)
            if call.answer is not None:
                return call.answer
            assert call.error is not None
            if not self._again(call, call.error):
                raise call.error

    def watch(self, now: float) -> None:
        """Wake a reader whose deadline has passed; called now and then by a thread."""
        reader, stream = self._reader, self._stream
        if reader is not None and reader.deadline < now and stream is not None:
            self.channel.cancel(stream)

    def close(self) -> None:
        """End the stream; calls that wait fail."""
        with self.changing:
            self._closed = True
            stream = self._stream
            self._drop_stream()
            for call in list(self._pending.values()):
                self._settle(call, None, Unavailable(f"{self.where}: the client was closed"))
            self.changing.notify_all()
        if stream is not None:
            self.channel.cancel(stream)
        self.channel.close()

    # ---- reading in turns

    def _take_turns(self, call: Call) -> None:
        """Return once the call is done, reading for everybody when no one else does."""
        with self.changing:
            while not call.done and self._reader is not None:
                if not self.changing.wait(max(call.deadline - time.monotonic(), 0)):
                    self._expire(call)
            if call.done:
                return
            self._reader = call
        try:
            while not call.done:
                self._read_one(call)
        finally:
            with self.changing:
                self._reader = None
                self.changing.notify_all()

    def _read_one(self, reader: Call) -> None:
        """Take one reply from the stream and settle whose it is."""
        with self.changing:
            if reader.done:  # the client was closed
                return
            if time.monotonic() >= reader.deadline:
                self._expire(reader)
                return
            stream = self._stream or self._reopen()
        try:
            id, answer = codec.decode_stream_response(next(stream))
        except (grpc.RpcError, StopIteration, codec.Malformed) as error:
            self._broken(stream, error, reader)
            return
        self._failures = 0
        with self.changing:
            call = self._pending.get(id)
            if call is not None:
                if isinstance(answer, pb.Status):
                    self._settle(call, None, error_of(answer, self.where))
                else:
                    self._settle(call, answer, None)
                if call is not reader:
                    self.changing.notify_all()

    def _prefetch(self) -> None:
        """Read while there are prefetches that nobody waits for."""
        while True:
            with self.changing:
                while not self._closed and not any(
                    not call.done for call in self._prefetches.values()
                ):
                    self.changing.wait()
                if self._closed:
                    return
                call = next(call for call in self._prefetches.values() if not call.done)
            self._take_turns(call)
            with self.changing:
                self._prefetches.pop(call.id, None)

    # ---- the stream; the lock is held

    def _send(self, call: Call) -> None:
        self._pending[call.id] = call
        call.attempts += 1
        if self._stream is None:
            self._reopen()
        else:
            self._outbox.put(call.message)

    def _reopen(self) -> Any:
        """Open a stream and send all that is unanswered."""
        outbox = self._outbox = SimpleQueue()
        for call in self._pending.values():
            outbox.put(call.message)
        self._stream = self.channel.open_stream("/ps.v1.RowService/Stream", iter(outbox.get, None))
        return self._stream

    def _drop_stream(self) -> None:
        if self._stream is not None:
            self._outbox.put(None)
            self._stream = None

    def _settle(self, call: Call, answer: codec.Exchanged | None, error: PsError | None) -> None:
        self._pending.pop(call.id, None)
        call.answer, call.error, call.done = answer, error, True
        if error is None or pause_before(call, error) is None:
            for push in call.exchange.pushes:
                self.session.over(push.header, applied=error is None)

    def _expire(self, call: Call) -> None:
        why = f"; last failure: {self._last_failure}" if self._failures else ""
        kind = Unavailable if self._failures else DeadlineExceeded
        self._settle(call, None, kind(f"{self.where}: no answer in time{why}"))

    # ---- failures; the lock is not held

    def _broken(self, stream: Any, error: Exception, reader: Call) -> None:
        """Drop a broken stream; fail what is unanswered, or pause before another attempt."""
        code = error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.UNAVAILABLE
        text = error.details() if isinstance(error, grpc.RpcError) else str(error)
        with self.changing:
            if self._stream is stream:
                self._drop_stream()
            for call in self._pending.values():
                call.attempts += 1
            if time.monotonic() >= reader.deadline:
                self._expire(reader)
                return
            self._failures += 1
            self._last_failure = f"{code.name}: {text}"
            if code not in RETRYABLE:
                status = pb.Status(code=code.value[0], message=text or code.name)
                for call in list(self._pending.values()):
                    self._settle(call, None, error_of(status, self.where))
                self.changing.notify_all()
                return
        left = reader.deadline - time.monotonic()
        pause = min(FIRST_PAUSE * 2 ** min(self._failures - 1, 8), LONGEST_PAUSE, max(left, 0))
        if self._failures > 1:
            time.sleep(pause)

    def _again(self, call: Call, error: PsError) -> bool:
        """Send a refused call once more where that may help, and say whether."""
        pause = pause_before(call, error)
        if pause is None:
            return False
        time.sleep(pause)
        with self.changing:
            if self._closed:
                return False
            call.done, call.error = False, None
            if isinstance(error, SessionExpired):
                renumber(call, self.session)
                call.encode(next(self._ids))
            self._send(call)
        return True
