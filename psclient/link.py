"""One shard as a client sees it: what streams and unary calls have in common.

    link.submit(call)   the request is sent
    link.wait(call)     returns its answer, or raises what went wrong
    link.abandon(call)  its caller was interrupted: never send it again

A call is open from ``submit`` until it is answered, refused for good or given up. Only then is its
push acknowledged to the shard, which remembers the answers to all pushes that may come again.
"""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod

from psclient.channel import OPTIONS, Channel, Options
from psclient.errors import Unavailable
from psclient.session import Call, Session
from psproto import codec

GRACE = 5.0  # seconds after its deadline at which a call that nobody waits for is given up


class Link(ABC):
    """One shard. Thread-safe."""

    def __init__(
        self, where: str, address: str, session: Session, options: Options = OPTIONS
    ) -> None:
        self.where = where  # for messages: "shard 1 at 127.0.0.1:7001"
        self.channel = Channel(address, options)
        self.session = session
        self.lock = threading.RLock()
        self._ids = itertools.count(1)
        self._open: dict[int, Call] = {}
        self._closed = False

    @abstractmethod
    def submit(self, call: Call, *, background: bool = False) -> None:
        """Send a request. ``background``: read its reply even while nobody waits for it."""

    @abstractmethod
    def wait(self, call: Call) -> codec.Exchanged:
        """Return the answer to a submitted call; raise a PsError."""

    @abstractmethod
    def abandon(self, call: Call) -> None:
        """Give up a call whose caller was interrupted. Idempotent."""

    def watch(self, now: float) -> None:
        """Give up calls that nobody waits for. A thread calls this several times per second."""
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
        """Register a call and number its pushes."""
        if self._closed:
            raise Unavailable(f"{self.where}: the client is closed")
        self._identify(call)
        for push in call.exchange.pushes:
            self.session.number(push.header)

    def _identify(self, call: Call) -> None:
        """Give a call its id, another one if it has one."""
        self._open.pop(call.id, None)
        call.id = next(self._ids)
        self._open[call.id] = call

    def _finish(self, call: Call, *, applied: bool) -> None:
        """Note that a call will not be sent again. Idempotent."""
        self._open.pop(call.id, None)
        for push in call.exchange.pushes:
            self.session.over(push.header, applied=applied)

    def _give_up(self, call: Call, why: str) -> None:
        if not call.done:
            call.error, call.done = Unavailable(f"{self.where}: {why}"), True
        self._finish(call, applied=False)
