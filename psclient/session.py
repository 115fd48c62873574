"""One request to one shard, and the numbers that make its pushes take effect exactly once."""

from __future__ import annotations

import time
from typing import Any

from psclient.errors import PsError, SessionExpired
from psproto import codec
from psproto import ps_pb2 as pb


class Session:
    """Numbers the pushes of one client to one shard. See PushHeader in ps.proto."""

    def __init__(self, client: int, incarnation: int) -> None:
        self.client = client
        self.incarnation = incarnation
        self._next = 1
        self._open: dict[int, None] = {}  # sequences that may be sent again, ascending
        self._answered = False  # the shard has answered a push of this incarnation

    def number(self, header: pb.PushHeader) -> None:
        """Give a push its number."""
        header.client_id = self.client
        header.incarnation = self.incarnation
        header.sequence = self._next
        self._open[self._next] = None
        self._next += 1
        header.acknowledged = next(iter(self._open)) - 1 if self._answered else 0

    def over(self, header: pb.PushHeader, *, applied: bool) -> None:
        """Note that a push will not be sent again. Idempotent.

        applied  its answer has arrived
        """
        if header.incarnation == self.incarnation:
            self._open.pop(header.sequence, None)
            self._answered |= applied

    def renew(self) -> None:
        """Start the next incarnation."""
        self.incarnation += 1
        self._next = 1
        self._open.clear()
        self._answered = False


class Call:
    """One request to one shard. ``answer`` or ``error`` is set once ``done``."""

    __slots__ = (
        "answer",
        "attempts",
        "deadline",
        "done",
        "error",
        "exchange",
        "handle",
        "id",
        "message",
        "renewed",
    )

    def __init__(self, exchange: codec.Exchange, deadline: float) -> None:
        self.exchange = exchange
        self.deadline = deadline  # monotonic seconds
        self.attempts = 0
        self.renewed = False  # numbered anew, after its session had expired
        self.done = False
        self.answer: codec.Exchanged | None = None
        self.error: PsError | None = None
        self.id = 0
        self.message = b""
        self.handle: Any = None  # of a unary call

    def encode(self, id: int) -> None:
        """Build the message of a stream."""
        self.id = id
        left = max(self.deadline - time.monotonic(), 0.001)
        header = pb.StreamRequestHeader(id=id, timeout_ms=min(int(left * 1000) + 1, 2**32 - 1))
        self.message = codec.encode_stream_request(header, self.exchange)


def pause_before(call: Call, error: PsError) -> float | None:
    """Return the seconds to wait before sending a refused call again; None: do not send it."""
    if isinstance(error, SessionExpired):  # refused at its first attempt, so never applied
        first = call.attempts == 1 and not call.renewed
        return 0.0 if first and call.exchange.pushes else None
    if error.retry_after is None or time.monotonic() + error.retry_after >= call.deadline:
        return None
    return error.retry_after


def renumber(call: Call, session: Session) -> None:
    """Move the pushes of a call into the client's next incarnation; the session's lock is held.

    This helps once: if the shard refuses it too, another user of the client id is ahead.
    """
    headers = [push.header for push in call.exchange.pushes]
    if any(header.incarnation == session.incarnation for header in headers):
        session.renew()
    for header in headers:
        session.number(header)
    call.attempts, call.renewed = 0, True
