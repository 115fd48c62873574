"""Make unary calls to several shards at once; retry each until it is answered or the deadline.

gRPC puts calls that have ended into a queue, and the caller's thread reads that queue. So no extra
thread is needed, and a call that takes an hour does not delay other calls.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import grpc

from psclient.channel import Cancelled
from psclient.errors import DeadlineExceeded, PsError
from psclient.link import Link
from psclient.retry import pause_after, rpc_error

GRACE = 1.0  # seconds after the deadline at which calls that gRPC has not ended are cancelled


@dataclass(slots=True)
class Ask:
    """A unary call to one shard. When it has ended, ``answer`` or ``error`` is set."""

    link: Link  # connection to the shard
    method: str  # service and name of the method: "InfoService/GetServerInfo"
    message: bytes  # encoded request
    answer: bytes | None = None  # encoded reply
    error: PsError | None = None
    attempts: int = 0  # number of attempts that were started
    due: float = 0.0  # when to make the next attempt, in monotonic seconds
    handle: Any = field(default=None, repr=False)  # gRPC's object of the running attempt, or None

    @property
    def ended(self) -> bool:
        """Return whether the call has ended, with an answer or an error."""
        return self.answer is not None or self.error is not None


def ask_all(asks: Sequence[Ask], deadline: float) -> None:
    """Make all calls at once and wait until each has an answer or an error.

    asks      the calls; their outcomes are stored in them
    deadline  monotonic seconds; a call without an answer then gets the error DeadlineExceeded

    Errors of calls are not raised. If a signal handler raises an exception, cancels all calls.
    """
    ended: SimpleQueue[tuple[Ask, Any]] = SimpleQueue()
    try:
        while not all(ask.ended for ask in asks):
            now = time.monotonic()
            until = _start_due(asks, now, deadline, ended)
            if all(ask.ended for ask in asks):  # the client was closed
                return
            try:
                ask, handle = ended.get(timeout=max(until - now, 0.0))
            except Empty:
                if until > deadline:
                    _expire(asks)
            else:
                if handle is ask.handle:
                    _end(ask, deadline)
    except BaseException:
        for ask in asks:
            if ask.handle is not None:
                ask.link.channel.cancel(ask.handle)
        raise


def _start_due(
    asks: Sequence[Ask], now: float, deadline: float, ended: SimpleQueue[tuple[Ask, Any]]
) -> float:
    """Start the attempts that are due; return the time until which to wait for one to end.

    now, deadline  monotonic seconds, as is the result
    ended          see ``_start``
    """
    waiting = [ask for ask in asks if not ask.ended and ask.handle is None]
    for ask in waiting:
        if ask.due <= now:
            _start(ask, deadline - now, ended)
    return min((ask.due for ask in waiting if ask.due > now), default=deadline + GRACE)


def _start(ask: Ask, left: float, ended: SimpleQueue[tuple[Ask, Any]]) -> None:
    """Start an attempt of a call.

    left   seconds until the deadline
    ended  queue into which gRPC puts (ask, gRPC's call object) when the attempt has ended
    """
    ask.attempts += 1
    try:
        ask.handle = ask.link.channel.start(f"/ps.v1.{ask.method}", ask.message, max(left, 0.001))
    except PsError as error:  # the client was closed, or its files for TLS cannot be used
        ask.error = error
    else:
        ask.handle.add_done_callback(lambda handle: ended.put((ask, handle)))


def _end(ask: Ask, deadline: float) -> None:
    """Store the outcome of an attempt that has ended, or set the time of the next attempt.

    deadline  monotonic seconds; no attempt starts later
    """
    handle, ask.handle = ask.handle, None
    try:
        ask.answer = ask.link.channel.result(handle)
    except Cancelled:
        ask.due = 0.0
    except grpc.RpcError as error:
        failure = rpc_error(error, ask.link.channel, ask.link.where)
        pause = pause_after(failure, ask.attempts - 1)
        ask.due = time.monotonic() + (pause or 0.0)
        if pause is None or ask.due >= deadline:
            ask.error = failure


def _expire(asks: Sequence[Ask]) -> None:
    """Cancel all calls that have not ended and give them the error DeadlineExceeded."""
    for ask in asks:
        if not ask.ended:
            ask.error = DeadlineExceeded(f"{ask.link.where}: no answer in time")
            if ask.handle is not None:
                ask.link.channel.cancel(ask.handle)
