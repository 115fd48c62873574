"""Patience: how a connection waits while its shard is overloaded.

A shard that is overloaded refuses a request and says when to try again. Then

* the request is sent again after that time, and a random part of it more, so that clients that were
  refused together do not come back together
* new requests wait as well until that time has passed: the shard would refuse them too
* requests are sent again only as often as the retry budget allows: BURST at once, PER_SECOND in the
  long run, and EARNED more for each request that the shard answers

A request whose deadline comes first fails with the refusal.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from psclient.errors import PsError, ResourceExhausted

JITTER = 0.25  # largest random part of a pause, as a share of the pause
BURST = 16.0  # requests that may be sent again at once
PER_SECOND = 8.0  # requests that may be sent again per second
EARNED = 0.25  # requests that may be sent again for each one that was answered
OVERLOADED = "OVERLOADED"  # reason of the refusals for which new requests wait, too


class Patience:
    """How one connection waits while its shard is overloaded. The caller holds the link's lock.

    clock  returns monotonic seconds
    draw   returns random numbers in [0, 1)
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._clock, self._draw = clock, draw
        self._until = 0.0  # time until which new requests wait
        self._why: PsError | None = None  # the refusal for which they wait
        self._budget, self._filled = BURST, clock()

    def refused(self, error: PsError) -> None:
        """Note an error that the shard answered."""
        if error.reason == OVERLOADED and error.retry_after:
            self._until = max(self._until, self._clock() + error.retry_after)
            self._why = error

    def answered(self) -> None:
        """Note that the shard answered a request without an error."""
        if self._budget < BURST:
            self._budget = min(self._budget + EARNED, BURST)

    def holds(self) -> PsError | None:
        """Return the error with which a new request must wait; None: it may be sent."""
        left = self._until - self._clock()
        if left <= 0 or self._why is None:
            self._why = None
            return None
        error = ResourceExhausted(str(self._why))
        error.reason, error.retry_after = self._why.reason, left
        return error

    def pause(self, seconds: float) -> float:
        """Return the seconds to wait before a request is sent again.

        seconds  time that the shard asked for
        """
        return seconds * (1 + JITTER * self._draw())

    def may_repeat(self) -> bool:
        """Return whether the budget allows to send a request again now, and charge it."""
        now = self._clock()
        self._budget = min(self._budget + (now - self._filled) * PER_SECOND, BURST)
        self._filled = now
        if self._budget < 1:
            return False
        self._budget -= 1
        return True
