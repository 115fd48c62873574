"""Measure how long acknowledged pushes take to become visible to subscribers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from storage.histogram import Histogram

BOUNDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0),
)  # fmt: skip
RECENT = 1 << 16  # pushes whose acknowledgement is remembered


class Freshness:
    """Counts, for each push and each subscriber, the time from the acknowledgement of the push
    until its change was written to the subscriber. Must be used on the event loop.

    A push that is written before it is acknowledged counts as 0 seconds. If more than ``recent``
    newer pushes were acknowledged before a push is written, its time is not known exactly: then the
    time since the oldest acknowledgement that is remembered counts, which is shorter.

    seconds  these times
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, recent: int = RECENT) -> None:
        self.seconds = Histogram(BOUNDS)
        self._clock = clock
        self._recent = recent
        self._acknowledged: dict[int, float] = {}  # version of a push -> time, oldest first
        # version of a push that is written but not acknowledged -> number of subscribers that
        # have it, oldest first
        self._early: dict[int, int] = {}

    def acknowledged(self, version: int) -> None:
        """Note that the push with this version is acknowledged now."""
        for _ in range(self._early.pop(version, 0)):
            self.seconds.add(0.0)
        self._acknowledged[version] = self._clock()
        if len(self._acknowledged) > self._recent:
            del self._acknowledged[next(iter(self._acknowledged))]

    def written(self, versions: Sequence[int]) -> None:
        """Note that the pushes with these versions are written to one subscriber now."""
        now, times = self._clock(), self._acknowledged
        for version in versions:
            since = times.get(version)
            if since is None:
                since = self._forgotten(version)
            if since is not None:
                self.seconds.add(now - since)
                continue
            self._early[version] = self._early.get(version, 0) + 1
            if len(self._early) > self._recent:
                del self._early[next(iter(self._early))]

    def _forgotten(self, version: int) -> float | None:
        """Return the oldest time that is remembered, if the push was acknowledged before it; None
        if the push is not acknowledged yet.
        """
        if len(self._acknowledged) < self._recent:
            return None
        oldest = next(iter(self._acknowledged))
        return self._acknowledged[oldest] if version < oldest else None
