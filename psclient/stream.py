"""Connection to one shard through a stream, which carries many requests at once.

The stream is a pipe (pipe.py): a call of a gRPC method, or a same-host lane (lanelink.py).

No dedicated thread reads replies. Of the callers that wait, one is the reader: it reads everybody's
replies until its own arrives, then another waiting caller becomes the reader. This saves a switch
between threads for each call. The caller of a prefetch (``start_pull``, ``start_exchange``) does
not wait. A background thread, started at the first prefetch, waits for the reply in its place.

When the stream breaks, the reader opens a new one and sends every unanswered request again. Each
push carries (client id, incarnation, sequence), so the server applies it once. If a signal handler
raises in a caller, that caller cancels the stream. Its own request is not sent again. The requests
of other callers are sent again on a new stream.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import grpc

from psclient.access import PLAIN, Access
from psclient.errors import (
    DeadlineExceeded,
    PsError,
    ResourceExhausted,
    SessionExpired,
    Unavailable,
    error_of,
)
from psclient.link import Link
from psclient.patience import OVERLOADED
from psclient.pipe import BROKEN, GrpcPipe, Pipe
from psclient.retry import RETRYABLE, backoff
from psclient.routes import Route
from psclient.session import Call, Session, renumber
from psclient.signals import Shield
from psproto import codec
from psproto import ps_pb2 as pb

LOST = 2.0  # seconds after the reader's deadline at which another caller replaces the reader


class StreamLink(Link):
    """Connection to one shard through a stream. Thread-safe. Link explains the methods."""

    ordered = True

    def __init__(self, where: str, route: Route, session: Session, access: Access = PLAIN) -> None:
        super().__init__(where, route, session, access)
        self._pipe: Pipe | None = None
        self._reader: Call | None = None  # the call of the reader; None: nobody reads
        self._reader_thread = 0  # identity of the thread that reads
        self._sleeping: dict[Any, Call] = {}  # waiting calls, by the lock that wakes each
        self._prefetches: SimpleQueue[Call | None] = SimpleQueue()
        self._background: threading.Thread | None = None
        self._failures = 0  # number of broken streams since the last reply
        self._last_failure = ""

    def submit(self, call: Call, *, background: bool = False) -> None:
        with self.lock:
            try:
                self._begin(call)
                if (refusal := self._refusal(call)) is not None:
                    call.held = True
                    call.keep()
                    self._settle(call, None, refusal)
                else:
                    self._send(call)
            except PsError:
                self._finish(call, applied=False)
                raise
            if background:
                if self._background is None or not self._background.is_alive():
                    self._background = threading.Thread(target=self._prefetch, daemon=True)
                    with Shield():
                        self._background.start()
                self._prefetches.put(call)

    def wait(self, call: Call) -> codec.Exchanged:
        while True:
            while not call.done:
                self._take_turns(call)
            if call.answer is not None:
                return call.answer
            assert call.error is not None
            if not self._again(call, call.error):
                raise call.error

    def abandon(self, call: Call) -> None:
        with self.lock:
            unfinished = not call.done or self._reads(call)
            self._give_up(call, "the call was interrupted")
            if self._reads(call):
                self._reader = None
            pipe = self._drop_pipe() if unfinished else None
            self._pass_on()
        if pipe is not None:
            pipe.cancel()

    def watch(self, now: float) -> None:
        super().watch(now)
        reader, pipe = self._reader, self._pipe
        if reader is not None and reader.deadline < now and pipe is not None:
            pipe.cancel()
        with self.lock:
            if self._reader is not None and self._reader.deadline + LOST < now:
                self._reader = None
            self._pass_on()

    def close(self) -> None:
        with self.lock:
            self._closed = True
            pipe = self._drop_pipe()
            for call in list(self._open.values()):
                self._give_up(call, "the client was closed")
            self._prefetches.put(None)
        if pipe is not None:
            pipe.cancel()
        super().close()

    # ---- one caller reads for all

    def _take_turns(self, call: Call) -> None:
        """Wait until ``call`` is done; read replies on this thread while no other thread does."""
        try:
            while (turn := self._turn(call)) is not None:
                if not turn.acquire(timeout=max(call.deadline - time.monotonic(), 0)):
                    with self.lock:
                        self._sleeping.pop(turn, None)
                        if not call.done:
                            self._expire(call)
            while not call.done and self._reads(call):
                self._read_one(call)
        finally:
            with self.lock:
                if self._reads(call):
                    self._reader = None
                self._pass_on()

    def _turn(self, call: Call) -> Any:
        """Make this thread the reader, which reads the replies to all calls, and return None.

        If another thread is the reader, return a locked lock instead. It is released when ``call``
        is done, or when this thread should try again. If ``call`` is done, return None and change
        nothing.
        """
        with self.lock:
            if call.done:
                return None
            mine = self._reader_thread == threading.get_ident()
            if self._reader is None or mine:
                if self._reader is not None:  # a signal handler calls this inside its own read
                    pipe = self._drop_pipe()
                    if pipe is not None:
                        pipe.cancel()
                self._reader, self._reader_thread = call, threading.get_ident()
                return None
            turn = threading.Lock()
            turn.acquire()
            self._sleeping[turn] = call
            return turn

    def _reads(self, call: Call) -> bool:
        """Return whether this thread reads the replies to all calls, on behalf of ``call``."""
        return self._reader is call and self._reader_thread == threading.get_ident()

    def _read_one(self, reader: Call) -> None:
        """Read one reply from the stream and complete the call that it answers.

        reader  call on whose behalf this thread reads. If its deadline has passed, it is completed
                with an error, and nothing is read
        """
        with self.lock:
            if reader.done:  # because the client was closed
                return
            if time.monotonic() >= reader.deadline:
                self._expire(reader)
                return
            try:
                pipe = self._pipe or self._reopen()
            except PsError as error:  # the files for TLS cannot be used
                self._fail(error)
                return
        try:
            id, answer = pipe.receive()
        except BROKEN as error:
            self._broken(pipe, error, reader)
            return
        if self._failures:
            self._failures = 0
            self._recovered()
        with self.lock:
            pipe.answered(id)
            call = self._open.get(id)
            if call is not None and not call.done:
                if isinstance(answer, pb.Status):
                    refusal = error_of(answer, self.where)
                    self.patience.refused(refusal)
                    self._settle(call, None, refusal)
                else:
                    self.patience.answered()
                    self._settle(call, answer, None)

    def _prefetch(self) -> None:
        """Wait for the reply to each queued prefetch, until None is queued.

        The background thread runs this method.
        """
        while (call := self._prefetches.get()) is not None:
            self._take_turns(call)

    # ---- the caller of these methods holds the lock

    def _pass_on(self) -> None:
        """If no thread reads the stream, wake one waiting caller, which becomes the reader."""
        if self._reader is None and self._sleeping:
            turn = next(iter(self._sleeping))
            del self._sleeping[turn]
            turn.release()

    def _wake(self, call: Call) -> None:
        """Wake all threads that wait for ``call``."""
        for turn in [turn for turn, each in self._sleeping.items() if each is call]:
            del self._sleeping[turn]
            turn.release()

    def _refusal(self, call: Call) -> PsError | None:
        """Return the error with which a new call must wait, because the shard is overloaded; None:
        it may be sent.
        """
        if self.session.repeats and (held := self.patience.holds()) is not None:
            return held
        delay = 0.0 if self._pipe is None else self._pipe.delay()
        if not delay or 2 * delay < call.deadline - time.monotonic():
            return None
        refusal = ResourceExhausted(
            f"{self.where}: a request would be answered after {delay:.2g} s, since others wait to"
            " be sent on this connection"
        )
        refusal.reason, refusal.retry_after = OVERLOADED, delay
        return refusal

    def _send(self, call: Call) -> None:
        """Queue a call's message on the stream; open a stream if there is none."""
        call.attempts += 1
        if self._pipe is None:
            self._reopen()
        else:
            self._pipe.send(call)

    def _reopen(self) -> Pipe:
        """Open a pipe, send all unanswered calls on it, and return it."""
        self._drop_pipe()
        self._pipe = self._new_pipe([call for call in self._open.values() if not call.done])
        return self._pipe

    def _new_pipe(self, calls: Sequence[Call]) -> Pipe:
        """Open a pipe, and send ``calls`` on it. Does not wait for the shard."""
        return GrpcPipe(self.channel, calls)

    def _drop_pipe(self) -> Pipe | None:
        """Stop using the current pipe and return it; None if there is none.

        The caller cancels the pipe after it has released the lock.
        """
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            pipe.end()
            for call in self._open.values():
                call.attempts += not call.done  # it is sent again, on the next pipe
        return pipe

    def _settle(self, call: Call, answer: codec.Exchanged | None, error: PsError | None) -> None:
        """Complete a call with its answer or its error, and wake the threads that wait for it."""
        call.answer, call.error, call.done = answer, error, True
        if error is None or self._pause_before(call, error) is None:
            self._finish(call, applied=error is None)
        if self._sleeping:
            self._wake(call)

    def _fail(self, error: PsError) -> None:
        """Complete all unanswered calls with an error."""
        for call in [each for each in self._open.values() if not each.done]:
            self._settle(call, None, error)

    def _give_up(self, call: Call, why: str) -> None:
        super()._give_up(call, why)
        self._wake(call)

    def _expire(self, call: Call) -> None:
        """Complete a call whose deadline has passed with an error.

        The error is Unavailable if the stream broke since the last reply, else DeadlineExceeded.
        """
        why = f"; last failure: {self._last_failure}" if self._failures else ""
        kind = Unavailable if self._failures else DeadlineExceeded
        self._settle(call, None, kind(f"{self.where}: no answer in time{why}"))

    # ---- failures; the caller of these methods does not hold the lock

    def _broken(self, pipe: Pipe, error: Exception, reader: Call) -> None:
        """Stop using a pipe that failed; then fail the unanswered calls, or pause.

        pipe    the pipe that failed
        error   exception that reading it raised. If its gRPC status code is in RETRYABLE, this
                method pauses. Otherwise, and if TLS is the reason, all unanswered calls fail with
                this error
        reader  call on whose behalf this thread read. The pause ends at its deadline. If the
                deadline has passed, this call fails and there is no pause
        """
        if isinstance(error, grpc.RpcError) and (found := self.channel.explain(error)) is not None:
            with self.lock:
                if self._pipe is pipe:
                    self._drop_pipe()
                self._fail(found.error(self.where))
            return
        code = error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.UNAVAILABLE
        text = error.details() if isinstance(error, grpc.RpcError) else str(error)
        with self.lock:
            if self._pipe is pipe:
                self._drop_pipe()
            if time.monotonic() >= reader.deadline:
                self._expire(reader)
                return
            self._failures += 1
            self._last_failure = f"{code.name}: {text}"
            if code not in RETRYABLE:
                status = pb.Status(code=code.value[0], message=text or code.name)
                self._fail(error_of(status, self.where))
                return
        self._lost(pipe, reader.deadline)
        left = reader.deadline - time.monotonic()
        pause = min(backoff(self._failures - 1), max(left, 0))
        if self._failures > 1:
            time.sleep(pause)

    def _lost(self, pipe: Pipe, deadline: float) -> None:
        """Prepare for the next pipe, after ``pipe`` broke.

        deadline  monotonic seconds; the preparation must end before
        """

    def _recovered(self) -> None:
        """Note that a reply arrived, the first one after a pipe broke."""

    def _again(self, call: Call, error: PsError) -> bool:
        """Send a failed call again, after a pause, if its error permits another attempt.

        Returns whether the call was sent.
        """
        pause = self._pause_before(call, error)
        again = pause is not None and self._pause(call, error, pause)
        with self.lock:
            if not again or self._closed or self._open.get(call.id) is not call:
                self._finish(call, applied=False)
                return False
            call.done, call.error = False, None
            if isinstance(error, SessionExpired):
                renumber(call, self.session)
                self._identify(call)  # a new id: a reply to the refused message may still arrive
                call.message = b""
            self._send(call)
        return True
