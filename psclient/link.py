"""Base class of a client's connection to one shard, for streams and unary calls.

    link.submit(call)   send the request
    link.wait(call)     return its answer, or raise its error
    link.abandon(call)  give up a call whose caller was interrupted; it is never sent again

A call is open from ``submit`` until it succeeds, fails for good or is given up. The shard remembers
the answers to its pushes until then, in case they are sent again.
"""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod

from psclient.channel import OPTIONS, Channel, Options
from psclient.errors import Unavailable
from psclient.session import Call, Session
from psproto import codec

GRACE = 5.0  # seconds after its deadline at which ``watch`` gives up an open call


class Link(ABC):
    """Connection to one shard. Thread-safe.

    where    name of the shard in error messages: "shard 1 at 127.0.0.1:7001"
    address  "host:port"
    session  numbers the pushes, so that the shard applies each once
    options  of the gRPC channel
    """

    def __init__(
        self, where: str, address: str, session: Session, options: Options = OPTIONS
    ) -> None:
        self.where = where
        self.channel = Channel(address, options)
        self.session = session
        self.lock = threading.RLock()
        self._ids = itertools.count(1)
        self._open: dict[int, Call] = {}
        self._closed = False

    @abstractmethod
    def submit(self, call: Call, *, background: bool = False) -> None:
        """Send a request.

        background  read the reply on a background thread, before anyone calls ``wait`` (streams
                    only)
        """

    @abstractmethod
    def wait(self, call: Call) -> codec.Exchanged:
        """Return the answer to a submitted call. Raises a PsError."""

    @abstractmethod
    def abandon(self, call: Call) -> None:
        """Give up a call whose caller was interrupted. Idempotent."""

    def watch(self, now: float) -> None:
        """Give up calls whose deadline is more than GRACE seconds before ``now`` (monotonic
        seconds).

        A thread calls this several times per second.
        """
        with self.lock:
            for call in [each for each in self._open.values() if each.deadline + GRACE < now]:
                self._give_up(call, "no answer in time")

    def close(self) -> None:
        """End the connection; waiting calls fail."""
        with self.lock:
            self._closed = True
            for call in list(self._open.values()):
                self._give_up(call, "the client was closed")
        self.channel.close()

    # ---- the lock is held

    def _begin(self, call: Call) -> None:
        """Register a call, give it an id and number its pushes."""
        if self._closed:
            raise Unavailable(f"{self.where}: the client is closed")
        self._identify(call)
        for push in call.exchange.pushes:
            self.session.number(push.header)

    def _identify(self, call: Call) -> None:
        """Give a call a new id and register it under it, instead of under its old id if it has
        one.
        """
        self._open.pop(call.id, None)
        call.id = next(self._ids)
        self._open[call.id] = call

    def _finish(self, call: Call, *, applied: bool) -> None:
        """Unregister a call, which will not be sent again. Idempotent.

        applied  whether its pushes took effect; False if that is unknown
        """
        self._open.pop(call.id, None)
        for push in call.exchange.pushes:
            self.session.over(push.header, applied=applied)

    def _give_up(self, call: Call, why: str) -> None:
        """End a call with Unavailable, unless it has ended; ``why`` becomes the error's text."""
        if not call.done:
            call.error, call.done = Unavailable(f"{self.where}: {why}"), True
        self._finish(call, applied=False)
