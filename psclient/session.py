"""Call: one request to one shard. Session: the numbers by which a shard applies each push once."""

from __future__ import annotations

import time
from typing import Any

from psclient.errors import PsError, SessionExpired
from psclient.retry import asked_pause
from psproto import codec
from psproto import ps_pb2 as pb

HEADER = b"\x0a"  # tag of the field StreamRequest.header


class Session:
    """Numbers the pushes of one client to one shard, so that the shard applies each once.

    client       id of the client
    incarnation  number that grows each time the client begins to number its pushes from 1 again
    renews       whether the client goes on with the next incarnation after SessionExpired
    repeats      whether a request that the shard refuses for now is sent again, after the pause
                 that the shard asks for
    held         the shard is asked to remember all pushes with larger numbers, although they were
                 answered, because a trainer that comes back may send them again (see ``go_back``).
                 None: it need not

    PushHeader in ps.proto defines the numbers. Callers of the methods hold the link's lock.
    """

    def __init__(
        self, client: int, incarnation: int, *, renews: bool = True, repeats: bool = True
    ) -> None:
        self.client = client
        self.incarnation = incarnation
        self.renews = renews
        self.repeats = repeats
        self.held: int | None = None
        self._next = 1
        self._open: dict[int, None] = {}  # sequence numbers that may be sent again, ascending
        self._answered = False  # whether the shard has answered a push of this incarnation

    def go_back(self, client: int, incarnation: int, last: int) -> None:
        """Continue a session of an earlier process: the next push has the number ``last`` + 1.

        client, incarnation  those of the earlier session
        last                 number of its last push that will not be sent again

        The shard answers ``duplicate`` to pushes that it has applied. No push may be in progress.
        """
        self.client, self.incarnation = client, incarnation
        self._next, self.held = last + 1, last
        self._open.clear()
        self._answered = last > 0

    def number(self, header: pb.PushHeader) -> None:
        """Write the client id, the incarnation and the next sequence number into a push header."""
        header.client_id = self.client
        header.incarnation = self.incarnation
        header.sequence = self._next
        self._open[self._next] = None
        self._next += 1
        done = next(iter(self._open)) - 1 if self._answered else 0
        header.acknowledged = done if self.held is None else min(done, self.held)

    def over(self, header: pb.PushHeader, *, applied: bool) -> None:
        """Record that a push will not be sent again, so the shard need not remember its answer.

        header   header of the push
        applied  whether the shard answered that it applied the push

        Idempotent.
        """
        if header.incarnation == self.incarnation:
            self._open.pop(header.sequence, None)
            self._answered |= applied

    def state(self) -> dict[str, int]:
        """Return the numbers of the last push; ``sequence`` is 0 if there was none."""
        return {
            "client_id": self.client,
            "incarnation": self.incarnation,
            "sequence": self._next - 1,
        }

    def renew(self) -> None:
        """Start the next incarnation: add 1 to it, and number the next push 1."""
        self.incarnation += 1
        self._next = 1
        self.held = None if self.held is None else 0
        self._open.clear()
        self._answered = False


class Call:
    """One request to one shard, and its outcome.

    exchange  pushes and pulls to send
    deadline  monotonic seconds
    done      whether the call has ended; then ``answer`` or ``error`` is set
    attempts  how often the request was sent
    renewed   whether the pushes were numbered again after SessionExpired; see ``renumber``
    held      whether the request was not sent at once, because the shard was overloaded
    id        number of the request on the stream
    message   encoded request; b"": not encoded yet, or not sent through gRPC
    handle    unary calls: gRPC's call object of the attempt in progress; lanes: the memory of the
              request, which also has the arrays of the answer
    """

    __slots__ = (
        "answer",
        "attempts",
        "deadline",
        "done",
        "error",
        "exchange",
        "handle",
        "held",
        "id",
        "message",
        "renewed",
    )

    def __init__(self, exchange: codec.Exchange, deadline: float) -> None:
        self.exchange = exchange
        self.deadline = deadline
        self.attempts = 0
        self.renewed = self.held = False
        self.done = False
        self.answer: codec.Exchanged | None = None
        self.error: PsError | None = None
        self.id = 0
        self.message = b""
        self.handle: Any = None

    def encode(self) -> None:
        """Set ``message`` to the request encoded for a stream."""
        self.message = codec.encode_stream_request(self.stream_header(), self.exchange)

    def restamped(self) -> bytes:
        """Return ``message`` with the time that is left now.

        protobuf merges the header at the end into the one at the start.
        """
        header = self.stream_header().SerializeToString()
        return b"".join((self.message, HEADER, bytes((len(header),)), header))

    def keep(self) -> None:
        """Copy the arrays that the caller may change before the call is sent."""
        for push in self.exchange.pushes:
            push.gradients = push.gradients.copy()

    def stream_header(self) -> pb.StreamRequestHeader:
        """Return the header of the request on a stream: its id, and the time left for it."""
        left = max(self.deadline - time.monotonic(), 0.001)
        return pb.StreamRequestHeader(id=self.id, timeout_ms=min(int(left * 1000) + 1, 2**32 - 1))


def pause_before(
    call: Call, error: PsError, *, renews: bool = True, repeats: bool = True
) -> float | None:
    """Return the seconds to pause before a failed call is sent again; None: its error is final.

    call     the call
    error    the error with which it failed
    renews   whether its pushes may be numbered again after SessionExpired
    repeats  whether it may be sent again after a refusal in which the shard asks for a pause
    """
    if isinstance(error, SessionExpired):  # at the first attempt: the pushes were never applied
        first = renews and call.attempts == 1 and not call.renewed
        return 0.0 if first and call.exchange.pushes else None
    pause = asked_pause(error) if repeats else None
    return None if pause is None or time.monotonic() + pause >= call.deadline else pause


def renumber(call: Call, session: Session) -> None:
    """Number the pushes of a call again after SessionExpired: from 1 on, in the next incarnation.

    If the shard refuses that incarnation too, another client with the same client id uses a
    larger one; ``pause_before`` then treats the error as final. The caller holds the link's lock.
    """
    headers = [push.header for push in call.exchange.pushes]
    if any(header.incarnation == session.incarnation for header in headers):
        session.renew()
    for header in headers:
        session.number(header)
    call.attempts, call.renewed = 0, True
