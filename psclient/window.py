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
SMOOTH = 0.1  # weight of the newest time between two answers

Item = TypeVar("Item")


class Window(Generic[Item]):
    """The requests of one stream in flight, by id, and those that wait until they may be sent.

    clock  returns monotonic seconds
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: deque[Item] = deque()
        self._sizes: dict[int, int] = {}  # bytes of the requests in flight, by id
        self._bytes = 0  # their sum
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
        self._sizes[id] = size
        self._bytes += size

    def answered(self, id: int) -> Iterator[Item]:
        """Note that the answer to a request was received. Yields the requests to send now.

        The caller must call ``sent`` for each, before it takes the next, unless it drops it.
        """
        self._bytes -= self._sizes.pop(id, 0)
        if self._waiting:
            now = self._clock()
            if self._last:
                self._between += SMOOTH * (now - self._last - self._between)
            self._last = now
        else:
            self._last = 0.0
        while self._waiting and self._has_room():
            yield self._waiting.popleft()

    def delay(self) -> float:
        """Return the seconds for which a new request would probably wait here."""
        return len(self._waiting) * self._between if self._waiting else 0.0

    def _has_room(self) -> bool:
        count = len(self._sizes)
        return count < LEAST_REQUESTS or (count < MOST_REQUESTS and self._bytes < MOST_BYTES)
