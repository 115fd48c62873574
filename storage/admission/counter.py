"""Exact counters of the keys that wait for a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.admission.gates import Admitted, CountingGate, Occurrences, Versions
from storage.arena import Budget
from storage.index import SEGMENT, Index
from storage.kernels import Keys, jit

COUNT_BITS = 24  # of an exact counter; the 40 above hold its version
MOST = (1 << COUNT_BITS) - 1
TRIMMED = 2048  # counters dropped at a time beyond those that came
LAST_VERSION = (1 << 64 - COUNT_BITS) - 1  # later versions count as this one; 35 years at 1000/s


@jit
def _used(entries: Any, start: int, stop: int, keys: Any, counters: Any) -> Any:
    """Copy the entries in use of start..stop-1 to the front of two arrays; return how many."""
    used = np.uint64(0)
    for i in range(np.uint64(start), np.uint64(stop)):
        keys[used] = entries[i, 0]
        counters[used] = entries[i, 1]
        used += np.uint64(entries[i, 1] != 0)
    return used


class Counters(Index):
    """An index whose locations are counters: version << COUNT_BITS | count."""

    @property
    def segments(self) -> int:
        """Segments, of up to SEGMENT keys each; a split adds one at the end. None once closed."""
        return len(self._depths) if self.bytes else 0

    def segment(self, number: int) -> tuple[Keys, NDArray[np.uint64]]:
        """Keys and counters of one segment, as copies."""
        keys, counters = np.empty(SEGMENT, np.uint64), np.empty(SEGMENT, np.uint64)
        start = number * SEGMENT
        used = int(_used(self._entries.array, start, start + SEGMENT, keys, counters))
        return keys[:used], counters[:used]


class CounterGate(CountingGate):
    """Exact counters in a hash table.

    Above the cap the stalest go, by (version, count): the hash spreads keys evenly over the
    segments of the index, so the stalest sixteenth of one segment is a fair sample of the stalest
    sixteenth of all. Segments take turns; with only one, the choice is exact. A push that adds n
    counters makes about n go, and looks at one segment for every thousand or so of them.
    """

    def __init__(self, threshold: int, cap: int, budget: Budget) -> None:
        self.cap = cap
        self._threshold = threshold
        self._counters = Counters(budget)
        self._next_full = 0  # segment to take from when there are too many
        self._next_old = 0  # segment to look through for old ones

    @property
    def forgets(self) -> str:
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
        self._counters.insert(keys[added], counters[added])  # first: it is what may fail
        self._counters.assign(keys[known], counters[known])
        self._counters.remove(keys[admitted])
        self._trim(int(np.count_nonzero(added)))

    def waiting(self, keys: Keys) -> Occurrences:
        return _count_of(self._counters.find(keys)[0])

    def forget(self, keys: Keys) -> None:
        self._counters.remove(keys)

    def expire(self, before: int, limit: int = SEGMENT) -> None:
        for _ in range(min(max(1, limit // SEGMENT), self._counters.segments)):
            keys, counters = self._counters.segment(self._next_old)
            self._drop(keys[_version_of(counters) < before])
            self._next_old = (self._next_old + 1) % self._counters.segments

    def put(self, keys: Keys, totals: Occurrences, versions: Versions) -> None:
        counters = _pack(totals, versions)
        held, _ = self._counters.find(keys)
        added = (held == 0) & (totals > 0)
        newer = (held != 0) & (counters > held)
        self._counters.insert(keys[added], counters[added])
        self._counters.assign(keys[newer], counters[newer])
        self._trim(int(np.count_nonzero(added)))

    def changed(self, after: int) -> Iterator[tuple[Keys, Occurrences, Versions]]:
        number = 0
        while number < self._counters.segments:  # what a split takes out of reach comes later
            keys, counters = self._counters.segment(number)
            new = _version_of(counters) > min(after, LAST_VERSION - 1)
            yield keys[new], _count_of(counters[new]), _version_of(counters[new])
            number += 1

    def close(self) -> None:
        self._counters.close()

    def _trim(self, added: int) -> None:
        """Drop stale counters until no more than the cap are left, but not many more than came.

        More are left for the next calls only where an alteration made the cap smaller.
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
    """Counters of counts and versions."""
    stamps = np.minimum(versions, np.uint64(LAST_VERSION)) << np.uint64(COUNT_BITS)
    counters: NDArray[np.uint64] = stamps | np.minimum(totals, MOST).astype(np.uint64)
    return counters


def _count_of(counters: NDArray[np.uint64]) -> Occurrences:
    return (counters & np.uint64(MOST)).astype(np.uint32)


def _version_of(counters: NDArray[np.uint64]) -> Versions:
    return counters >> np.uint64(COUNT_BITS)
