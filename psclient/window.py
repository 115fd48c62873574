"""Window: how many requests of one stream may be in flight, and the requests that wait for it.

Requests that wait here know their deadlines. In gRPC's buffers they would wait unseen: the server
could not tell that they are late, and would serve them in vain.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

MOST_REQUESTS = 64  # requests in flight on a stream
MOST_BYTES = 8 << 20  # their bytes; but LEAST_REQUESTS may be in flight, however large they are
LEAST_REQUESTS = 8
SLOW, QUICK = 0.25, 0.1  # seconds until an answer that make the window smaller, or larger
SHRINK = 0.7  # factor by which a slow answer makes it smaller
SMOOTH = 0.1  # weight of the newest time between two answers

Item = TypeVar("Item")


class Window(Generic[Item]):
    """The requests of one stream in flight, by id, and those that wait until they may be sent.

    The window is smaller while answers take long: more requests in flight would not be answered
    sooner, but wait in the buffers of gRPC.

    clock  returns monotonic seconds
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: deque[Item] = deque()
        self._sent: dict[int, tuple[int, float]] = {}  # by id: bytes, and time of sending
        self._bytes = 0  # their sum
        self._most = float(LEAST_REQUESTS)  # the window
        self._shrunk = 0.0  # when it was made smaller; answers to earlier requests do not count
        self._between = 0.0  # seconds between two answers while requests wait
        self._last = 0.0  # time of the last answer while requests waited; 0: none waited

    def enter(self, item: Item) -> bool:
        """Return whether a request may be sent now: then call ``sent``. Else it waits here."""
        if not self._waiting and self._has_room():
            return True
        self._waiting.append(item)
        return False

    def sent(self, id: int, size: int) -> None:
        """Note that a request of ``size`` bytes is in flight."""
        self._sent[id] = size, self._clock()
        self._bytes += size

    def answered(self, id: int) -> Iterator[Item]:
        """Note that the answer to a request was received. Yields the requests to send now.

        The caller must call ``sent`` for each, before it takes the next, unless it drops it.
        """
        size, sent = self._sent.pop(id, (0, 0.0))
        self._bytes -= size
        now = self._clock()
        if now - sent < QUICK:
            self._most = min(self._most + 1, MOST_REQUESTS)
        elif now - sent > SLOW and sent > self._shrunk:
            self._most, self._shrunk = max(self._most * SHRINK, LEAST_REQUESTS), now
        if self._waiting:
            if self._last:
                self._between += SMOOTH * (now - self._last - self._between)
            self._last = now
        else:
            self._last = 0.0
        while self._waiting and self._has_room():
            yield self._waiting.popleft()

    def delay(self) -> float:
        """Return the seconds until a new request would probably be answered, if it had to wait
        here; 0.0: it need not wait.
        """
        before = len(self._waiting) + len(self._sent)
        return before * self._between if self._waiting else 0.0

    def _has_room(self) -> bool:
        count = len(self._sent)
        return count < LEAST_REQUESTS or (count < self._most and self._bytes < MOST_BYTES)
