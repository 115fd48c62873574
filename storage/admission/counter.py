"""Exact counters of the keys that wait for admission."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.admission.gates import Admitted, CountingGate, Occurrences, Versions
from storage.arena import Budget
from storage.index import SEGMENT, Index
from storage.kernels import Keys, jit

COUNT_BITS = 24  # low bits of a counter that contain its count; the other 40 have its version
MOST = (1 << COUNT_BITS) - 1  # largest count
LAST_VERSION = (1 << 64 - COUNT_BITS) - 1  # versions saturate there: 35 years at 1000/s
TRIMMED = 2048  # a call drops at most this many counters more than it added


@jit
def _used(entries: Any, start: int, stop: int, keys: Any, counters: Any) -> Any:
    """Copy the keys and counters of the used entries in start..stop-1; return their number.

    entries         uint64[capacity, 2]      key, counter; counter 0: unused
    keys, counters  uint64[>= stop - start]  written from index 0 on
    """
    used = np.uint64(0)
    for i in range(np.uint64(start), np.uint64(stop)):
        keys[used] = entries[i, 0]
        counters[used] = entries[i, 1]
        used += np.uint64(entries[i, 1] != 0)
    return used


class Counters(Index):
    """An index that maps each key to a counter, ``version << 24 | count``, not to a location."""

    @property
    def segments(self) -> int:
        """Number of segments, of up to SEGMENT keys each; a split appends one. 0 once closed."""
        return self._segments if self.bytes else 0

    def segment(self, number: int) -> tuple[Keys, NDArray[np.uint64]]:
        """Return copies of the keys and counters of one segment."""
        keys, counters = np.empty(SEGMENT, np.uint64), np.empty(SEGMENT, np.uint64)
        start = number * SEGMENT
        used = int(_used(self._entries.array, start, start + SEGMENT, keys, counters))
        return keys[:used], counters[:used]


class CounterGate(CountingGate):
    """Admits a key when its exact counter, in a hash table, reaches a threshold.

    If there are more than ``cap`` counters, the stalest ones by (version, count) are dropped. The
    hash spreads keys evenly over the segments of the index, so the stalest sixteenth of one segment
    is a fair sample of the stalest sixteenth of all. Segments take turns. With one segment the
    choice is exact. A push that adds n counters drops about n, and scans one segment per thousand
    of them.
    """

    def __init__(self, threshold: int, cap: int, budget: Budget) -> None:
        self.cap = cap
        self._threshold = threshold
        self._counters = Counters(budget)
        self._next_full = 0  # segment to drop from next, above the cap
        self._next_old = 0  # segment to search next for expired counters

    @property
    def loss_reason(self) -> str:
        return f"{self.dropped} counters were dropped for age or room" if self.dropped else ""

    @property
    def entries(self) -> int:
        return len(self._counters)

    @property
    def bytes(self) -> int:
        return self._counters.bytes

    def settle(
        self, keys: Keys, counts: Occurrences, admitted: Admitted, totals: Occurrences, version: int
    ) -> None:
        added = ~admitted & (totals == counts) & (totals > 0)
        known = ~admitted & (totals > counts)
        counters = _pack(totals, np.uint64(version))
        self._counters.insert(keys[added], counters[added])  # first, since it may fail
        self._counters.assign(keys[known], counters[known])
        self._counters.remove(keys[admitted])
        self._trim(int(np.count_nonzero(added)))

    def waiting(self, keys: Keys) -> Occurrences:
        return _count_of(self._counters.find(keys)[0])

    def discard(self, keys: Keys) -> None:
        self._counters.remove(keys)

    def expire(self, before: int, limit: int = SEGMENT) -> None:
        for _ in range(min(max(1, limit // SEGMENT), self._counters.segments)):
            keys, counters = self._counters.segment(self._next_old)
            self._drop(keys[_version_of(counters) < before])
            self._next_old = (self._next_old + 1) % self._counters.segments

    def put(self, keys: Keys, totals: Occurrences, versions: Versions) -> None:
        counters = _pack(totals, versions)
        present, _ = self._counters.find(keys)
        added = (present == 0) & (totals > 0)
        newer = (present != 0) & (counters > present)
        self._counters.insert(keys[added], counters[added])
        self._counters.assign(keys[newer], counters[newer])
        self._trim(int(np.count_nonzero(added)))

    def changed(self, after: int) -> Iterator[tuple[Keys, Occurrences, Versions]]:
        number = 0
        while number < self._counters.segments:  # a split moves keys to a later segment
            keys, counters = self._counters.segment(number)
            new = _version_of(counters) > min(after, LAST_VERSION - 1)
            yield keys[new], _count_of(counters[new]), _version_of(counters[new])
            number += 1

    def close(self) -> None:
        self._counters.close()

    def _trim(self, added: int) -> None:
        """Drop stale counters until only ``cap`` are left, or ``added + 2048`` were dropped.

        added  number of counters that the caller has just added

        So one call never takes long, not even after an alteration has lowered ``cap``.
        """
        left = added + TRIMMED
        while left > 0 and (excess := len(self._counters) - self.cap) > 0:
            segments = self._counters.segments
            keys, counters = self._counters.segment(self._next_full)
            self._next_full = (self._next_full + 1) % segments
            count = min(len(keys), left, max(1, len(keys) // 16, excess // segments))
            left -= max(count, 1)
            if count:
                self._drop(keys[np.argpartition(counters, count - 1)[:count]])

    def _drop(self, keys: Keys) -> None:
        self.dropped += self._counters.remove(keys)


def _pack(totals: Occurrences, versions: Any) -> NDArray[np.uint64]:
    """Return the counters, uint64[n], for totals uint32[n] and versions, uint64[n] or a scalar."""
    stamps = np.minimum(versions, np.uint64(LAST_VERSION)) << np.uint64(COUNT_BITS)
    counters: NDArray[np.uint64] = stamps | np.minimum(totals, MOST).astype(np.uint64)
    return counters


def _count_of(counters: NDArray[np.uint64]) -> Occurrences:
    return (counters & np.uint64(MOST)).astype(np.uint32)


def _version_of(counters: NDArray[np.uint64]) -> Versions:
    return counters >> np.uint64(COUNT_BITS)
