"""Which keys a request has.

    Ranks   numbers in 0..count-1; 0 is the most frequent one
    Churn   numbers of keys, while new keys come and old ones are left
    key_of  a number as a 64-bit key

Equal seeds give equal keys.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Keys = NDArray[np.uint64]


class Ranks:
    """Draws numbers from a Zipf distribution: number r has a probability ~ (r + 1) ** -skew.

    count  numbers are in 0..count-1
    skew   exponent; 0: all numbers are equally frequent

    Exact and without a table of probabilities, so that ``count`` may be large: rejection-inversion
    (Hörmann and Derflinger, "Rejection-inversion to generate variates from monotone discrete
    distributions", 1996).
    """

    def __init__(self, count: int, skew: float) -> None:
        self._count = count
        self._skew = skew
        self._first = self._integral(np.float64(1.5)) - 1.0
        self._last = self._integral(np.float64(count + 0.5))

    def draw(self, rng: np.random.Generator, size: int) -> Numbers:
        """Return ``size`` independent numbers."""
        if self._skew == 0:
            return rng.integers(0, self._count, size)
        found = np.empty(size, np.int64)
        missing = np.arange(size)
        while len(missing):
            u = self._last + rng.random(len(missing)) * (self._first - self._last)
            k = np.clip(np.rint(self._inverse(u)), 1, self._count)
            taken = u >= self._integral(k + 0.5) - k**-self._skew
            found[missing[taken]] = k[taken].astype(np.int64) - 1
            missing = missing[~taken]
        return found

    def _integral(self, x: NDArray[np.float64] | np.float64) -> NDArray[np.float64]:
        """Return the integral of t ** -skew over t from 1 to ``x``."""
        power = 1.0 - self._skew
        log = np.log(x)
        return np.asarray(log if power == 0 else np.expm1(power * log) / power)

    def _inverse(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the x whose integral is ``y``."""
        power = 1.0 - self._skew
        return np.exp(y if power == 0 else np.log1p(np.maximum(power * y, -1.0)) / power)


class Churn:
    """Numbers of keys of one process, while new keys come; recent keys are read most.

    recent     only this many of the newest keys are read
    skew       exponent of the Zipf distribution of the age of the keys that are read
    process    number of this process; it creates the keys process, process + processes, ...
    processes  number of processes

    The keys 0..recent-1 are there at the start.
    """

    def __init__(self, recent: int, skew: float, process: int, processes: int) -> None:
        mine = max(-(-(recent - process) // processes), 1)
        self._ages = Ranks(mine, skew)
        self._process, self._processes = process, processes
        self._next = mine

    def read(self, rng: np.random.Generator, size: int) -> Numbers:
        """Return keys to read."""
        return self._numbered(self._next - 1 - self._ages.draw(rng, size))

    def new(self, size: int) -> Numbers:
        """Return keys that were never returned before."""
        made = np.arange(self._next, self._next + size)
        self._next += size
        return self._numbered(made)

    def _numbered(self, index: Numbers) -> Numbers:
        return self._process + self._processes * index


def key_of(numbers: Numbers) -> Keys:
    """Return a 64-bit key for each number; different numbers have different keys.

    The keys of neighbours are far apart, so that each shard gets its share of frequent keys. This
    is the finalizer of splitmix64 (Steele, Lea, Flood, 2014), which is a bijection.
    """
    x = numbers.astype(np.uint64)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
