"""Gates: they decide which keys get a row, and count the occurrences of keys without one.

A key that waits for admission has a counter. The counter is discarded when the key is admitted or
deleted. A key whose row was evicted or deleted starts again from zero at its next push.

A push is atomic, so a gate decides and counts in two calls. ``weigh`` decides and changes nothing.
The table then creates rows for the admitted keys, which may fail for lack of memory. ``settle``
counts.

Log records contain the new values of counters (for ``put``), not increments, so replay is
idempotent. Replay may bring back a counter that was dropped later for age or for room. That is
harmless, because its count is correct. For keys that got rows, replay calls ``discard``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from storage.index import SEGMENT
from storage.kernels import Keys, jit, mix64, readonly

LARGEST = (1 << 32) - 1  # totals saturate there, as frequencies do
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd

Admitted = NDArray[np.bool_]
Occurrences = NDArray[np.uint32]
Versions = NDArray[np.uint64]


class Gate(ABC):
    """Decides which keys of one table on one shard get a row. Use it on the engine thread only.

    All methods take keys that have no row, uint64[n], distinct within a call.

    counting  whether keys without a row have counters
    cap       maximum number of counters; 0 without counters
    dropped   number of counters dropped so far, for age, for room or by an alteration
    edits     number that grows with every change of ``cells``
    """

    counting: ClassVar[bool] = False
    cap: int = 0
    dropped: int = 0
    edits: int = 0

    @property
    def loss_reason(self) -> str:
        """Reason why a key without row and counter may nevertheless have been pushed before.

        Empty if every pushed key has a row or a counter.
        """
        return ""

    @abstractmethod
    def weigh(self, keys: Keys, counts: Occurrences, version: int) -> tuple[Admitted, Occurrences]:
        """Decide which keys of a push get a row. Changes nothing.

        counts   uint32[n]  occurrences of each key in the push
        version  log version of the push

        Returns (admitted bool[n], True for keys that get a row; totals uint32[n], occurrences of
        each key so far, including this push). The total becomes the frequency of an admitted key's
        row, or the new value of another key's counter.
        """

    def settle(
        self, keys: Keys, counts: Occurrences, admitted: Admitted, totals: Occurrences, version: int
    ) -> None:
        """Record a push: update the counters of refused keys, and discard those of admitted keys.

        keys, counts, version  the arguments of ``weigh``
        admitted, totals       the results of ``weigh``

        Raises OutOfMemory, and changes nothing then. No other call may change the gate between
        ``weigh`` and ``settle``.
        """
        return  # unless a gate counts

    def admit(self, keys: Keys, counts: Occurrences, version: int) -> tuple[Admitted, Occurrences]:
        """Call ``weigh``, then ``settle``, and return the results of ``weigh``."""
        admitted, totals = self.weigh(keys, counts, version)
        self.settle(keys, counts, admitted, totals, version)
        return admitted, totals

    def waiting(self, keys: Keys) -> Occurrences:
        """Return the occurrences of each key so far, uint32[n]; 0 without a counter."""
        return np.zeros(len(keys), np.uint32)

    def discard(self, keys: Keys) -> None:
        """Discard the counters of keys. Ignores keys without a counter."""
        return  # unless a gate counts

    def expire(self, before: int, limit: int = SEGMENT) -> None:
        """Drop counters that were last changed before version ``before``.

        Scans about ``limit`` entries and continues there at the next call, so that repeated calls
        scan all counters.
        """
        return  # unless a gate counts

    def put(self, keys: Keys, totals: Occurrences, versions: Versions) -> None:
        """Write counters from a log record or a block. Never overwrites newer counters.

        totals    uint32[n]  occurrences of each key
        versions  uint64[n]  log version of each counter's last change

        Raises OutOfMemory, and changes nothing then.
        """
        return  # unless a gate counts

    def changed(self, after: int) -> Iterator[tuple[Keys, Occurrences, Versions]]:
        """Yield (keys, totals, versions) of the counters changed after version ``after``.

        keys      uint64[k]
        totals    uint32[k]  occurrences of each key
        versions  uint64[k]  log version of each counter's last change

        Each iteration examines a bounded number of counters, and may yield empty arrays. Pushes may
        continue between iterations; a counter that exists all the time is yielded at least once. A
        sketch yields nothing; use ``cells``.
        """
        return iter(())

    def cells(self) -> NDArray[Any]:
        """Return a read-only view of the counters (cells) of a sketch; empty for other gates.

        Pushes change the view. A copy that is made in parts while pushes continue becomes correct
        when the counters in the log records of these pushes are ``put`` into it.
        """
        return np.empty(0, np.uint8)

    def load_cells(self, start: int, data: NDArray[np.uint8]) -> None:
        """Load some bytes of ``cells``, copied from a gate with the same rule.

        start  index of the first of these bytes in ``cells``
        data   the bytes: a whole number of cells

        Raises ValueError if they lie outside of this sketch.
        """
        size = self.cells().nbytes
        if start < 0 or start + len(data) > size:
            raise ValueError(
                f"cannot load bytes {start}..{start + len(data) - 1} into a sketch of {size} bytes"
            )

    def begin(self, version: int) -> None:
        """End loading; pushes begin.

        version  newest version of the shard; all later pushes are newer

        Raises ValueError if only a part of a sketch was loaded.
        """
        return  # unless a gate ages

    @property
    def entries(self) -> int:
        """Number of keys that wait for admission; an estimate for a sketch."""
        return 0

    @property
    def bytes(self) -> int:
        """Bytes taken from the budget."""
        return 0

    def alter(self, threshold: int, cap: int) -> None:
        """Change the threshold and ``cap``, the maximum number of counters. Keeps the counters."""
        return  # unless a gate counts

    def close(self) -> None:
        """Return the memory to the budget."""
        return  # unless a gate has any


def _sum(before: Occurrences, counts: Occurrences) -> Occurrences:
    """Return ``before + counts``, uint32[n], where sums beyond 2^32 - 1 become 2^32 - 1."""
    return np.minimum(np.add(before, counts, dtype=np.uint64), LARGEST).astype(np.uint32)


class AlwaysGate(Gate):
    """Admits every key; has no counters."""

    def weigh(self, keys: Keys, counts: Occurrences, version: int) -> tuple[Admitted, Occurrences]:
        return np.ones(len(keys), np.bool_), counts.astype(np.uint32)


class CountingGate(Gate):
    """Admits a key when its occurrences reach a threshold."""

    counting: ClassVar[bool] = True
    _threshold: int

    def weigh(self, keys: Keys, counts: Occurrences, version: int) -> tuple[Admitted, Occurrences]:
        totals = _sum(self.waiting(keys), counts)
        return totals >= self._threshold, totals

    def alter(self, threshold: int, cap: int) -> None:
        self._threshold, self.cap = threshold, cap


@jit
def _draw(keys: Any, counts: Any, seed: Any, version: Any, p: float, out: Any) -> None:
    """Set out[i] to True with probability 1 - (1 - p)^counts[i].

    keys     uint64[n]
    counts   uint32[n]  occurrences of each key in the push
    seed     seed of the table
    version  log version of the push
    out      bool[n]    written

    Uses one random number per key: number ``version`` of the random sequence of that key and seed.
    So the result does not depend on other keys in the batch.
    """
    start = mix64(seed + np.uint64(GOLDEN))
    position = (version + np.uint64(1)) * np.uint64(GOLDEN)
    failure = np.log1p(-p)  # -inf for p = 1
    for i in range(keys.shape[0]):
        bits = mix64(mix64(keys[i] ^ start) + position)
        chance = -np.expm1(np.float64(counts[i]) * failure)
        out[i] = counts[i] > 0 and np.float64(bits >> np.uint64(11)) * 2.0**-53 < chance


class ProbabilityGate(Gate):
    """Admits a key with probability ``p`` at each occurrence; has no counters."""

    def __init__(self, p: float, seed: int) -> None:
        self._p = p
        self._seed = np.uint64(seed)

    @property
    def loss_reason(self) -> str:
        return "the probability rule does not record keys that it did not admit"

    def weigh(self, keys: Keys, counts: Occurrences, version: int) -> tuple[Admitted, Occurrences]:
        admitted = np.empty(len(keys), np.bool_)
        arrays = readonly(keys), readonly(counts)
        _draw(*arrays, self._seed, np.uint64(version), self._p, admitted)
        return admitted, counts.astype(np.uint32)
