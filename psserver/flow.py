"""One stream of requests: the client's end of it, and its requests in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Literal, Protocol

from psproto import codec
from psproto import ps_pb2 as pb
from psserver.coldruns import Lane
from psserver.errors import Draining
from psserver.exchange import Begun
from psserver.limits import Reservation
from psserver.security.budgets import Budget
from psserver.turns import Client


class Head(Protocol):
    """Header of a request: its id, and the milliseconds in which it must begin; 0: no limit."""

    id: int
    timeout_ms: int


class Served:
    """What ``Caller.read`` returns instead of a message if ``Caller.accept`` has taken it."""


SERVED = Served()
FEW = 8  # pushes and pulls of a message that ``Caller.accept`` takes

# Takes a message of at most FEW parts while ``Caller.read`` waits, if it can be begun at once.
# Returns None if it was answered; SERVED if it was begun, or refused, and ``read`` must return
# SERVED; False if nothing was done with it. Raises the errors of ``Caller.decode``
Accept = Callable[[Any], "Served | Literal[False] | None"]


class Caller(Protocol):
    """The client's end of a stream: reads its requests, and writes the replies.

    prompt  whether ``send`` seldom keeps anything, so that whoever reads may also write
    accept  set by the stream if ``prompt``: may be called with a message while ``read`` waits
    via     how its requests arrive, for the statistics: "stream" or "shm"
    client  the connection, to which requests are counted
    budget  budget of the client's principal, by the present policy; None: it has no limits
    """

    prompt: bool
    accept: Accept | None
    via: str
    client: Client

    @property
    def budget(self) -> Budget | None: ...

    async def read(self) -> Any:
        """Wait for the next message and return it; None: the client ended the stream; SERVED."""
        ...

    async def write(self, data: bytes) -> None:
        """Send an encoded reply. Raises any exception if the client is gone."""
        ...

    def send(self, data: bytes) -> bool:
        """Send an encoded reply, if ``prompt``, now or as soon as possible. Returns whether all of
        it was sent. Raises any exception if the client is gone.
        """
        ...

    def size(self, message: Any) -> int:
        """Return the bytes of a message and its arrays."""
        ...

    def head(self, message: Any) -> Head:
        """Return the header of a request without decoding its arrays. Raises codec.Malformed."""
        ...

    def decode(self, message: Any, budget: int) -> tuple[Any, codec.Exchange | Exception]:
        """Return (header, exchange, or the error with which to answer it) of a message.

        budget  maximum number of its fields

        Raises codec.Malformed and codec.TooManyFields.
        """
        ...

    def encode(self, id: int, answer: codec.Exchanged | pb.Status) -> bytes:
        """Encode the reply to the request ``id``; a Status reports an error."""
        ...


# id of a request; its result, or the future of it; its reservation
Answer = tuple[int, "Begun | asyncio.Future[Begun]", Reservation]


NOTHING: Begun = (0.0, None, Draining("the stream has ended"))  # nobody will read its result


class Flow:
    """The requests of one stream that are in flight: received, but not yet answered.

    answers   queue of (request id, result to wait for, memory reservation), in the order of the
              requests; None tells the writer to end. The result of a request that waits for its
              turn is a future
    broken    error with which to end the stream, of a request that had to wait for its turn
    reader    the task that reads requests
    writing   held while a reply is written
    inflight  bytes of memory reserved for these requests and their replies
    refusal   what the task that reads must await after SERVED; None: nothing
    room      event that the writer sets after each reply; the reader waits for it while too many
              requests are in flight
    waiting   number of results in ``answers``, or taken from it and not yet written
    lane      keeps the requests in order while some wait for the disk
    gone      True once the client no longer reads replies
    method    name of the method that failed requests count for
    """

    __slots__ = (
        "answers", "broken", "caller", "gone", "inflight", "lane", "method", "reader",
        "refusal", "room", "waiting", "writing",
    )  # fmt: skip

    def __init__(self, caller: Caller, method: str) -> None:
        self.caller = caller
        self.method = method
        self.answers: asyncio.Queue[Answer | None] = asyncio.Queue()
        self.broken: Exception | None = None
        self.reader: asyncio.Task[Any] | None = None
        self.writing = asyncio.Lock()
        self.inflight = 0
        self.refusal: Coroutine[Any, Any, None] | None = None
        self.waiting = 0
        self.lane = Lane()
        self.room = asyncio.Event()
        self.gone = False

    def end(self, error: Exception) -> None:
        """End the stream because one of its requests, which had to wait, cannot be decoded."""
        if self.broken is None:
            self.broken = error
            if self.reader is not None:
                self.reader.cancel()
