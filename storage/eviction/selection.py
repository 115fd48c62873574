"""The rows of the lowest scores, found a slice at a time.

    rows     = every rule for rows, over all slots; the first rule that holds names the cause
    table    = range select+ take         for a rule for tables, if its table is too large
    range    = the least and the largest score
    select   = histogram of scores in 2^16 buckets; the one in which the last victim is becomes the
               range, until that is a single score or nothing more need be told apart
    take     = the rows below, and as many of that score as it takes, the first slots first

So the choice is exact, for tables of any size: no row that stays has a lower score than one that
left. Scores are taken as of the moment when ``range`` began, so that rows which are pushed during
the sweep only rise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from storage.eviction.contract import EMPTY, Now, TableEviction, View
from storage.kernels import Keys, Slots, jit
from storage.records import Cause

BUCKETS = 1 << 16  # of a histogram


@jit
def _range(scores: Any) -> Any:
    """Least and largest of the scores that are not EMPTY; (EMPTY, -EMPTY) if all are."""
    low, high = EMPTY, -EMPTY
    for i in range(scores.shape[0]):
        low = min(low, scores[i])
        if scores[i] != EMPTY:
            high = max(high, scores[i])
    return low, high


@jit
def _histogram(scores: Any, low: int, high: int, shift: int, counts: Any) -> None:
    """Count scores of low..high by (score - low) >> shift.

    counts  int64[BUCKETS]  updated
    """
    for i in range(scores.shape[0]):
        if low <= scores[i] <= high:
            counts[np.uint64(scores[i] - low) >> np.uint64(shift)] += 1


@jit
def _lowest(scores: Any, bound: int, ties: int, places: Any) -> Any:
    """Find scores below ``bound``, and ``ties`` that are equal to it, as many as there is room for.

    places  int64[n]  filled with their positions, ascending

    Returns how many were found, the ties left, and the position behind the last one looked at.
    """
    found = 0
    for i in range(scores.shape[0]):
        if scores[i] > bound or (scores[i] == bound and ties == 0):
            continue
        if found == places.shape[0]:
            return found, ties, i
        ties -= scores[i] == bound
        places[found] = i
        found += 1
    return found, ties, scores.shape[0]


@dataclass(frozen=True, slots=True)
class Victims:
    """Rows that are to leave."""

    slots: Slots  # int64[n], distinct
    causes: NDArray[np.uint8]  # [n]  values of Cause

    def __len__(self) -> int:
        return len(self.slots)

    def keys(self, view: View) -> dict[Cause, Keys]:
        """Their keys, uint64[], by cause; causes without one are left out."""
        return {
            Cause(cause): view.meta[self.slots[self.causes == cause], 0]
            for cause in np.unique(self.causes).tolist()
        }


NOBODY = Victims(np.empty(0, np.int64), np.empty(0, np.uint8))


class Selection:
    """The choice of the rows that leave for one rule for tables, a slice at a time."""

    def __init__(self, rule: TableEviction, view: View, excess: int, now: Now) -> None:
        self._rule, self._end, self._now = rule, view.used, now
        self._left = excess  # rows that are still to leave
        self._stage: Literal["range", "select", "take", "done"] = "range"
        self._at = 0  # the next slot of this stage
        self._low, self._high = EMPTY, -EMPTY  # scores of which the last victim's is one
        self._need = excess  # victims with such scores; all rows of lower ones are victims
        self._shift = 0  # a bucket is 2^shift scores
        self._counts = np.zeros(BUCKETS, np.int64)

    @property
    def done(self) -> bool:
        """Whether there is no slice left."""
        return self._stage == "done"

    def slice(self, view: View, limit: int, most: int) -> Victims:
        """Look at up to ``limit`` slots; return up to ``most`` victims, in the last stage."""
        start, stop = self._at, min(self._at + limit, self._end)
        scores = np.empty(stop - start, np.int64)
        self._rule.score(view, start, stop, self._now, scores)
        self._at = stop
        victims = NOBODY
        match self._stage:
            case "range":
                low, high = _range(scores)
                self._low, self._high = min(self._low, int(low)), max(self._high, int(high))
            case "select":
                _histogram(scores, self._low, self._high, self._shift, self._counts)
            case "take":
                self._left = min(self._left, self._rule.excess(view.rows))
                slots = np.empty(min(most, self._left), np.int64)
                found, ties, looked = _lowest(scores, self._high, self._need, slots)
                self._left -= found
                self._need = ties
                self._at = start + looked
                victims = Victims(slots[:found] + start, np.full(found, self._rule.cause, np.uint8))
        if self._at == self._end or not self._left:
            self._next()
        return victims

    def _next(self) -> None:
        """Go on to the next stage."""
        self._at = 0
        if self._stage == "take" or self._low > self._high:
            self._stage = "done"
            return
        self._stage = "take" if self._stage == "select" and self._narrow() else "select"
        self._shift = max(0, (self._high - self._low).bit_length() - 16)
        self._counts[:] = 0

    def _narrow(self) -> bool:
        """Make the bucket of the last victim the range; whether nothing more need be told apart.

        Then all rows below ``high`` are victims, and ``need`` of those with this very score.
        """
        sums = np.cumsum(self._counts)
        bucket = int(np.searchsorted(sums, self._need))
        if bucket == BUCKETS:  # rows left, or have risen, since they were counted
            self._high, self._need = self._high + 1, 0
            return True
        self._need -= int(sums[bucket] - self._counts[bucket])
        self._low += bucket << self._shift
        self._high = min(self._high, self._low + (1 << self._shift) - 1)
        if self._need == self._counts[bucket]:
            self._high, self._need = self._high + 1, 0
            return True
        return self._low == self._high
