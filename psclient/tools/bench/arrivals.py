"""When the requests of an open loop start: a Poisson process.

The times between two arrivals are independent and exponentially distributed, as if many trainers
sent requests without knowing of each other. They do not depend on the answers: if the server
stalls, requests go on to arrive.
"""

from __future__ import annotations

import numpy as np

CHUNK = 1024  # arrivals that are drawn at once


class Arrivals:
    """Times of the arrivals of one process: seconds since the start of the run, ascending.

    rate     mean number of arrivals per second, of this process
    seconds  no arrival is later
    seed     equal seeds give equal times; different seeds give independent times
    """

    def __init__(self, rate: float, seconds: float, seed: tuple[int, ...]) -> None:
        self._rng = np.random.default_rng(seed)
        self._rate = rate
        self._seconds = seconds
        self._last = 0.0
        self._drawn: list[float] = []

    def next(self) -> float | None:
        """Return the time of the next arrival; None if there is none any more."""
        if not self._drawn:
            gaps = self._rng.exponential(1 / self._rate, CHUNK)
            times = self._last + np.cumsum(gaps)
            self._last = float(times[-1])
            self._drawn = times[::-1].tolist()
        time = self._drawn.pop()
        if time < self._seconds:
            return time
        self._drawn.append(time)
        return None
