"""Unary calls to several shards at once, each repeated until it is answered or time is over.

No thread waits for a call: gRPC reports those that end to a queue, which the caller reads. A call
that takes an hour therefore keeps no other one waiting.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import grpc

from psclient.channel import Cancelled
from psclient.errors import DeadlineExceeded, PsError, Unavailable
from psclient.link import Link
from psclient.retry import pause_after, rpc_error

GRACE = 1.0  # seconds after the deadline within which gRPC must have ended a call


@dataclass(slots=True)
class Ask:
    """A unary call to one shard, and how it ended."""

    link: Link
    method: str  # "InfoService/GetServerInfo"
    message: bytes
    answer: bytes | None = None
    error: PsError | None = None
    attempts: int = 0
    due: float = 0.0  # monotonic seconds of the next attempt
    handle: Any = field(default=None, repr=False)  # of the running attempt

    @property
    def ended(self) -> bool:
        return self.answer is not None or self.error is not None


def ask_all(asks: Sequence[Ask], deadline: float) -> None:
    """Make the calls at once; when this returns, each has its answer or its error.

    deadline  monotonic seconds
    """
    ended: SimpleQueue[tuple[Ask, Any]] = SimpleQueue()
    try:
        while not all(ask.ended for ask in asks):
            now = time.monotonic()
            waiting = [ask for ask in asks if not ask.ended and ask.handle is None]
            for ask in waiting:
                if ask.due <= now:
                    _start(ask, deadline - now, ended)
            if all(ask.ended for ask in asks):  # the client was closed
                return
            until = min((ask.due for ask in waiting if ask.due > now), default=deadline + GRACE)
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


def _start(ask: Ask, left: float, ended: SimpleQueue[tuple[Ask, Any]]) -> None:
    ask.attempts += 1
    try:
        ask.handle = ask.link.channel.start(f"/ps.v1.{ask.method}", ask.message, max(left, 0.001))
    except Unavailable as error:  # the client was closed
        ask.error = error
    else:
        ask.handle.add_done_callback(lambda handle: ended.put((ask, handle)))


def _end(ask: Ask, deadline: float) -> None:
    """Take the result of an attempt, or plan the next one."""
    handle, ask.handle = ask.handle, None
    try:
        ask.answer = ask.link.channel.result(handle)
    except Cancelled:
        ask.due = 0.0
    except grpc.RpcError as error:
        failure = rpc_error(error, ask.link.where)
        pause = pause_after(failure, ask.attempts - 1)
        ask.due = time.monotonic() + (pause or 0.0)
        if pause is None or ask.due >= deadline:
            ask.error = failure


def _expire(asks: Sequence[Ask]) -> None:
    for ask in asks:
        if not ask.ended:
            ask.error = DeadlineExceeded(f"{ask.link.where}: no answer in time")
            if ask.handle is not None:
                ask.link.channel.cancel(ask.handle)
