"""Base class of a client's connection to one shard: StreamLink and UnaryLink extend it.

    link.submit(call)   send the request
    link.wait(call)     return its answer, or raise its error
    link.abandon(call)  give up a call whose caller was interrupted; it is never sent again

A call is open from ``submit`` until it succeeds, fails for good or is given up. Until then the
shard remembers the answers to the pushes in the call, in case the client sends them again.
"""

from __future__ import annotations

import itertools
import threading
import time
from abc import ABC, abstractmethod

from psclient.access import PLAIN, Access
from psclient.channel import Channel
from psclient.errors import PsError, Unavailable
from psclient.patience import Patience
from psclient.routes import Route
from psclient.session import Call, Session, pause_before
from psproto import codec

GRACE = 5.0  # seconds after its deadline at which ``watch`` gives up an open call


class Link(ABC):
    """Connection to one shard, over which requests are sent and answered. Thread-safe.

    where    name of the shard in error messages: "shard 1 at 127.0.0.1:7001"
    route    address of the shard
    session  numbers the pushes, so that the shard applies each once
    access   how to connect
    ordered  whether requests take effect in the order of ``submit``, unless one is sent again
    """

    ordered = False

    def __init__(self, where: str, route: Route, session: Session, access: Access = PLAIN) -> None:
        self.where = where
        self.channel = Channel(route, access)
        self.session = session
        self.lock = threading.RLock()
        self.patience = Patience()
        self._ids = itertools.count(1)
        self._open: dict[int, Call] = {}
        self._closed = False

    @abstractmethod
    def submit(self, call: Call, *, background: bool = False) -> None:
        """Send a request and return at once. ``wait`` returns the answer.

        call        the request
        background  whether a background thread reads the reply, even if nobody calls ``wait``
                    (streams only)
        """

    @abstractmethod
    def wait(self, call: Call) -> codec.Exchanged:
        """Wait for the answer to a call that was submitted; return the answer.

        Sends the request again after errors that permit it. Raises a PsError if the call failed.
        """

    @abstractmethod
    def abandon(self, call: Call) -> None:
        """Give up a call whose caller was interrupted, so that it is not sent again. Idempotent."""

    def watch(self, now: float) -> None:
        """Give up calls that have been past their deadline for more than GRACE seconds.

        now  monotonic seconds

        A background thread calls this method several times per second.
        """
        with self.lock:
            for call in [each for each in self._open.values() if each.deadline + GRACE < now]:
                self._give_up(call, "no answer in time")

    def close(self) -> None:
        """Close the connection; calls that are still open fail."""
        with self.lock:
            self._closed = True
            for call in list(self._open.values()):
                self._give_up(call, "the client was closed")
        self.channel.close()

    def _pause_before(self, call: Call, error: PsError) -> float | None:
        """Return the seconds to pause before a failed call is sent again; None: it is not."""
        return pause_before(call, error, renews=self.session.renews, repeats=self.session.repeats)

    def _pause(self, call: Call, error: PsError, seconds: float) -> bool:
        """Pause before a failed call is sent again, for longer if the retry budget is spent.

        error    the error with which it failed
        seconds  shortest pause

        Returns False if the call's deadline would pass meanwhile. Do not hold the lock.
        """
        asked = error.retry_after is not None
        while True:
            left = call.deadline - time.monotonic()
            if seconds and seconds >= left:
                return False
            time.sleep(min(self.patience.pause(seconds), max(left, 0)) if asked else seconds)
            if not asked:
                return True
            with self.lock:
                if self.patience.may_repeat():
                    return True

    # ---- the lock is held

    def _begin(self, call: Call) -> None:
        """Register a call as open, give it an id, and number its pushes.

        Raises Unavailable if the connection is closed.
        """
        if self._closed:
            raise Unavailable(f"{self.where}: the client is closed")
        call.id = next(self._ids)
        self._open[call.id] = call
        for push in call.exchange.pushes:
            self.session.number(push.header)

    def _identify(self, call: Call) -> None:
        """Give a call a new id, and register it as open under this id instead of its old id."""
        self._open.pop(call.id, None)
        call.id = next(self._ids)
        self._open[call.id] = call

    def _finish(self, call: Call, *, applied: bool) -> None:
        """Unregister a call: it is not open any more and will not be sent again. Idempotent.

        applied  whether the shard answered that it applied the pushes in the call
        """
        self._open.pop(call.id, None)
        for push in call.exchange.pushes:
            self.session.over(push.header, applied=applied)

    def _give_up(self, call: Call, why: str) -> None:
        """Complete a call with the error Unavailable, unless it is done.

        why  text of the error
        """
        if not call.done:
            call.error, call.done = Unavailable(f"{self.where}: {why}"), True
        self._finish(call, applied=False)
