"""Choose the rows with the lowest scores, scanning a slice of slots per call.

Each stage passes over all rows:

    range    find the smallest and the largest score
    select   count scores in 2^16 buckets; the bucket that contains the last victim becomes the new
             range; repeat until the range is a single score, or all rows in it are victims
    take     return the rows with lower scores, and as many with this score as must be evicted, in
             the order of their slots, then of their blocks

The bounds of a block on disk bound the scores of its rows. So the stage ``range`` reads no blocks,
``select`` only those whose rows may be in different buckets, and ``take`` those with victims.

The choice is exact for tables of any size: no row that stays has a lower score than a row that was
evicted. All scores are computed for the moment at which the stage ``range`` began, so a push during
the sweep can only raise the score of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from storage.eviction.contract import EMPTY, Bounds, Contents, Now, TableEviction, View
from storage.eviction.passes import Pass
from storage.kernels import Keys, Slots, jit
from storage.records import Cause

BUCKETS = 1 << 16  # buckets of the histogram


@jit
def _range(scores: Any) -> Any:
    """Return the smallest and the largest score; (EMPTY, -EMPTY) if all scores are EMPTY."""
    low, high = EMPTY, -EMPTY
    for i in range(scores.shape[0]):
        low = min(low, scores[i])
        if scores[i] != EMPTY:
            high = max(high, scores[i])
    return low, high


@jit
def _histogram(scores: Any, low: int, high: int, shift: int, counts: Any) -> None:
    """Count the scores in low..high by (score - low) >> shift.

    counts  int64[BUCKETS]  updated
    """
    for i in range(scores.shape[0]):
        if low <= scores[i] <= high:
            counts[np.uint64(scores[i] - low) >> np.uint64(shift)] += 1


@jit
def _lowest(scores: Any, bound: int, ties: int, places: Any) -> Any:
    """Find the scores below ``bound``, and the first ``ties`` scores equal to it, at most n in all.

    scores  int64[m]
    places  int64[n]  written: positions of the scores found, ascending

    Returns (number of scores found, number of ties not found yet, position to continue at).
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
    """Rows that must be evicted, each with its cause."""

    slots: Slots  # int64[n], distinct; in the view that the slice looked at
    keys: Keys  # uint64[n]
    causes: NDArray[np.uint8]  # [n]  values of Cause

    def __len__(self) -> int:
        return len(self.slots)

    def by_cause(self) -> dict[Cause, Keys]:
        """Return the keys of the rows, uint64[], by cause. Causes without a row are left out."""
        causes = np.unique(self.causes).tolist()
        return {Cause(cause): self.keys[self.causes == cause] for cause in causes}


def victims_of(view: View, slots: Slots, causes: NDArray[np.uint8]) -> Victims:
    """Return the rows in some slots of a view as victims. causes: uint8[n]."""
    return Victims(slots, view.entries[slots, 0], causes)


NOBODY = Victims(np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.uint8))


class Selection:
    """Selects the ``excess`` lowest-scoring rows of a table under one eviction rule.

    Each call of ``slice`` scans some rows. Call it until ``done``.
    """

    def __init__(self, rule: TableEviction, contents: Contents, excess: int, now: Now) -> None:
        self._rule, self._now = rule, now
        self._left = excess  # rows that must still be evicted
        self._stage: Literal["range", "select", "take", "done"] = "range"
        self._pass = Pass(contents, self._choose)
        self._low, self._high = EMPTY, -EMPTY  # range that contains the last victim's score
        self._need = excess  # victims in the range; all rows below the range are victims
        self._shift = 0  # a bucket spans 2^shift scores
        self._counts = np.zeros(BUCKETS, np.int64)

    @property
    def done(self) -> bool:
        """True when all victims were returned."""
        return self._stage == "done"

    @property
    def wanted(self) -> Callable[[], None] | None:
        """See ``Pass.wanted``."""
        return self._pass.wanted

    def slice(self, contents: Contents, limit: int, most: int) -> Victims:
        """Scan up to ``limit`` slots or one block, and return up to ``most`` victims.

        contents  rows of the table now

        Only the last stage, "take", returns victims.
        """
        victims = NOBODY
        portion = self._pass.next(contents, limit)
        if portion is not None:
            view, start, stop = portion
            scores = self._scores(view, start, stop)
            match self._stage:
                case "range":
                    low, high = _range(scores)
                    self._low, self._high = min(self._low, int(low)), max(self._high, int(high))
                case "select":
                    _histogram(scores, self._low, self._high, self._shift, self._counts)
                case "take":
                    self._left = min(self._left, self._rule.excess(contents.rows))
                    slots = np.empty(min(most, self._left), np.int64)
                    found, ties, looked = _lowest(scores, self._high, self._need, slots)
                    self._left -= found
                    self._need = ties
                    self._pass.resume(portion, start + int(looked))
                    causes = np.full(found, self._rule.cause, np.uint8)
                    victims = victims_of(view, slots[:found] + start, causes)
        if self._pass.done or not self._left:
            self._next(contents)
        return victims

    def _scores(self, view: View, start: int, stop: int) -> NDArray[np.int64]:
        scores = np.empty(stop - start, np.int64)
        self._rule.score(view, start, stop, self._now, scores)
        return scores

    def _choose(self, bounds: Bounds) -> NDArray[np.bool_]:
        """Return which blocks the present stage must read. Count the rows of others, if possible.

        See ``Pass`` for the parameter and the result.
        """
        low = self._scores(bounds.least, 0, len(bounds.rows))
        high = self._scores(bounds.greatest, 0, len(bounds.rows))
        match self._stage:
            case "range":
                self._low, self._high = (
                    min(self._low, int(low.min())),
                    max(self._high, int(high.max())),
                )
                return np.zeros(len(low), np.bool_)
            case "take":
                wanted: NDArray[np.bool_] = low <= self._high
                return wanted
        meets = (high >= self._low) & (low <= self._high)
        within = (low >= self._low) & (high <= self._high)
        buckets = (low - self._low) >> self._shift
        same = within & (buckets == (high - self._low) >> self._shift)
        np.add.at(self._counts, buckets[same], bounds.rows[same])
        wanted = meets & ~same
        return wanted

    def _next(self, contents: Contents) -> None:
        """Begin the next stage."""
        if self._stage == "take" or self._low > self._high:
            self._stage = "done"
            return
        self._stage = "take" if self._stage == "select" and self._narrow() else "select"
        self._pass = Pass(contents, self._choose)
        self._shift = max(0, (self._high - self._low).bit_length() - 16)
        self._counts[:] = 0

    def _narrow(self) -> bool:
        """Narrow the range of scores to the bucket that contains the last victim's score.

        Returns whether the stage "take" can begin. If so, the victims are all rows with scores
        below ``_high``, and ``_need`` rows with the score ``_high``.
        """
        sums = np.cumsum(self._counts)
        bucket = int(np.searchsorted(sums, self._need))
        if bucket == BUCKETS:  # rows were deleted or pushed after they were counted
            self._high, self._need = self._high + 1, 0
            return True
        self._need -= int(sums[bucket] - self._counts[bucket])
        self._low += bucket << self._shift
        self._high = min(self._high, self._low + (1 << self._shift) - 1)
        if self._need == self._counts[bucket]:
            self._high, self._need = self._high + 1, 0
            return True
        return self._low == self._high
