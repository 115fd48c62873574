"""Sample how many keys are pushed to a table between two pushes of the same key.

From these distances follows how often a key would be missing in a memory that keeps the most
recently pushed rows (LRU), for every size of the memory. Rows contain the version of their last
push, so a sample costs no memory per key: about 1/1024 of the pushed keys are looked at.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

EVERY = 16  # about 1/EVERY of the pushes are sampled,
STRIDE = 64  # and 1/STRIDE of their keys
POINTS = 4096  # maximum number of versions whose count of pushed keys is remembered
EDGES = 2.0 ** (np.arange(4 * 44 + 1) / 4)  # distances that divide the counts; 4 per power of two


class Reuse:
    """Histogram of the distances between pushes of the same key, since the shard was started.

    counts  int64[len(EDGES) + 1]  sampled keys by distance: the keys pushed since the last push of
            the key
    first   sampled keys that had no row
    """

    def __init__(self) -> None:
        self.counts = np.zeros(len(EDGES) + 1, np.int64)
        self.first = 0
        self._pushed = 0  # keys pushed so far
        self._random = 1  # state of a generator of random numbers
        self._left = 1  # pushes until the next sample
        self._versions, self._totals = [0], [0]  # keys pushed up to a version; ascending

    def pushed(self, version: int, keys: int) -> slice | None:
        """Count a push. Returns which of its keys to pass to ``add``; None: none of them.

        version  log version of the push
        keys     number of distinct keys of the push
        """
        self._pushed += keys
        self._left -= 1
        if self._left:
            return None
        self._random = self._random * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        self._left = 1 + (self._random >> 40) % (2 * EVERY - 1)
        if len(self._versions) == POINTS:  # keep every other point of the older half
            self._versions[: POINTS // 2] = self._versions[: POINTS // 2 : 2]
            self._totals[: POINTS // 2] = self._totals[: POINTS // 2 : 2]
        self._versions.append(version)
        self._totals.append(self._pushed)
        return slice((self._random >> 20) % STRIDE, None, STRIDE)

    def add(self, versions: NDArray[np.uint64]) -> None:
        """Count sampled keys.

        versions  uint64[n]  version of the last push of each key; 0 for new rows
        """
        known = versions[versions > 0].astype(np.float64)
        self.first += len(versions) - len(known)
        before = np.interp(known, self._versions, self._totals)
        places = np.searchsorted(EDGES, self._totals[-1] - before, "right")
        self.counts += np.bincount(places, minlength=len(self.counts))
