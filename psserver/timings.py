"""Record how long an operation takes, whether it fails, and when it last succeeded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from storage.histogram import LONG, Histogram


class Timings:
    """Durations and failures of one operation that runs now and then, since the server started.

    Any thread may read. Only one run at a time may be recorded.

    durations  seconds that each successful run took
    failures   number of runs that raised an error
    ended      time at which the last successful run ended, in seconds since 1970; None: none has
    """

    def __init__(self) -> None:
        self.durations = Histogram(LONG)
        self.failures = 0
        self.ended: float | None = None

    @contextmanager
    def run(self, abandoned: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Record the block as one run.

        abandoned  errors that do not count as failures: the server stops, or nobody waits any more
        """
        start = time.monotonic()
        try:
            yield
        except abandoned:
            raise
        except Exception:
            self.failures += 1
            raise
        self.durations.add(time.monotonic() - start)
        self.ended = time.time()
