"""Compute histograms, extremes and sums over the rows of a table, one slice of rows per call.

A histogram has edges instead of buckets of equal width. To learn exactly what a threshold would do,
make it an edge: the counts on either side of the edge are the rows that a rule with this threshold
would admit or evict.

    frequencies   at or above an edge n: rows that a threshold of n occurrences would have admitted
    ages          above an edge t: rows that a step TTL of t evicts; see StepTtl
    idle_norms    below an edge x: rows that the norm rule with threshold x evicts; see Norm
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.kernels import Keys, inline, jit

FREQUENCIES = tuple(2.0**i for i in range(32))
AGES = (0.0, *(2.0**i for i in range(33)))  # steps
NORMS = tuple(float(f"{digit}e{power}") for power in range(-6, 5) for digit in (1, 2, 5))

Edges = NDArray[np.float64]
BucketCounts = NDArray[np.uint64]


class RowColumns(NamedTuple):
    """Metadata and norms of some rows of one tier."""

    keys: Keys  # uint64[n]
    versions: NDArray[np.uint64]  # [n]
    steps: NDArray[np.int64]  # [n]
    frequencies: NDArray[np.uint64]  # [n]
    norms: NDArray[np.float64]  # [n]  L2, of the embedding
    tier: str

    def take(self, chosen: Any) -> RowColumns:
        """Return the rows that ``chosen`` selects, a mask bool[n] or indices int64[k]."""
        return RowColumns._make([*(column[chosen] for column in self[:-1]), self.tier])


def edges_of(usual: tuple[float, ...], asked: Any) -> Edges:
    """Return the edges in ``usual`` and ``asked`` together, ascending and distinct, float64[]."""
    return np.union1d(np.asarray(usual, np.float64), np.asarray(asked, np.float64))


@inline
def _place(edges: Any, value: Any) -> Any:
    """Return how many of the ascending ``edges`` are <= ``value``; all of them for NaN."""
    low, left = 0, edges.shape[0]
    while left > 0:  # without a branch, which would be mispredicted
        half = (left + 1) >> 1
        low += 0 if value < edges[low + half - 1] else half
        left -= half
    return low


@inline
def _enters(value: Any, key: Any, sign: float, last: Any, last_key: Any) -> Any:
    """Return whether a row belongs into a full list of extremes.

    value, key      value and key of the row
    sign            1.0 for a list of the smallest values, -1.0 for the largest
    last, last_key  rank (sign * value) and key of the last row of the list
    """
    rank = np.inf if np.isnan(value) else sign * value
    return rank < last or (rank == last and key < last_key)


@jit
def _look(
    keys: Any,
    steps: Any,
    frequencies: Any,
    norms: Any,
    step: int,
    grace: int,
    of_frequencies: Any,
    of_ages: Any,
    of_norms: Any,
    of_idle_norms: Any,
    lasts: Any,
    last_keys: Any,
    enter: Any,
) -> Any:
    """Count rows in histograms, and find out which lists of extremes must be updated.

    keys, steps, frequencies, norms  [n]; see RowColumns
    step       the age of a row is this step minus the row's step
    grace      the histogram of_idle_norms counts only rows of at least this age
    of_*       histograms (edges float64[k], counts uint64[k + 1], sums uint64[k + 1] or empty);
               counts and sums are updated
    lasts      float64[4]  rank of the last row in each list; the lists are the most frequent, the
               least frequent, the largest and the smallest rows
    last_keys  uint64[4]   keys of these last rows
    enter      bool[4]     set to True for each list that some row belongs to

    Returns (sum of the frequencies, sum of the norms). Runs without the interpreter lock, so that
    pulls are not delayed.
    """
    occurrences, norm_sum = np.uint64(0), 0.0
    for i in range(keys.shape[0]):
        key, count, norm = keys[i], frequencies[i], norms[i]
        age = max(step - steps[i], 0)
        occurrences += count
        norm_sum += norm
        frequency = np.float64(count)
        at = _place(of_frequencies[0], frequency)
        of_frequencies[1][at] += np.uint64(1)
        of_frequencies[2][at] += count
        of_ages[1][_place(of_ages[0], np.float64(age))] += np.uint64(1)
        at = _place(of_norms[0], norm)
        of_norms[1][at] += np.uint64(1)
        if grace > 0 and age >= grace:
            of_idle_norms[1][at] += np.uint64(1)  # of the same edges
        enter[0] |= _enters(frequency, key, -1.0, lasts[0], last_keys[0])
        enter[1] |= _enters(frequency, key, 1.0, lasts[1], last_keys[1])
        enter[2] |= _enters(norm, key, -1.0, lasts[2], last_keys[2])
        enter[3] |= _enters(norm, key, 1.0, lasts[3], last_keys[3])
    return occurrences, norm_sum


class Histogram:
    """Histogram: counts the values between each two neighboring edges.

    edges     float64[k], ascending
    upper     whether a value equal to an edge counts as below the edge; otherwise as above it
    weighted  whether values have weights, which are summed per bucket
    """

    def __init__(self, edges: Edges, *, upper: bool = False, weighted: bool = False) -> None:
        self.edges = edges
        self.counts = np.zeros(len(edges) + 1, np.uint64)
        self.sums = np.zeros(len(self.counts) if weighted else 0, np.uint64)
        self._bounds = np.nextafter(edges, np.inf) if upper else edges

    @property
    def parts(self) -> tuple[Edges, BucketCounts, BucketCounts]:
        """(bounds to compare values with, counts, sums) for the kernel, which updates the latter
        two in place.
        """
        return self._bounds, self.counts, self.sums


class Extremes:
    """List of the k rows with the smallest or the largest values.

    largest  True: the largest values
    rows     the rows of the list; of rows with equal values, those with the smallest keys
    """

    def __init__(self, k: int, *, largest: bool) -> None:
        self._k = k
        self._sign = -1.0 if largest else 1.0
        self._ranks = np.empty(0, np.float64)  # ascending
        self.rows = RowColumns(
            np.empty(0, np.uint64),
            np.empty(0, np.uint64),
            np.empty(0, np.int64),
            np.empty(0, np.uint64),
            np.empty(0, np.float64),
            "",
        )
        self.tiers = np.empty(0, np.str_)  # of the rows

    @property
    def room(self) -> bool:
        """True if the list has fewer than k rows."""
        return len(self._ranks) < self._k

    @property
    def last(self) -> tuple[float, int]:
        """(rank, key) of the last row; (-inf, 0) if there is none.

        The rank is the row's value, negated in a list of the largest values.
        """
        if not len(self._ranks):
            return -np.inf, 0
        return float(self._ranks[-1]), int(self.rows.keys[-1])

    def add(self, rows: RowColumns, values: NDArray[Any]) -> None:
        """Update the list with n rows: it keeps those that are among its k extremes.

        values  float64[n]  value of each row; NaN ranks last
        """
        ranks = np.where(np.isnan(values), np.inf, self._sign * values)
        if not self.room:
            rank, key = self.last
            better = (ranks < rank) | ((ranks == rank) & (rows.keys < np.uint64(key)))
            rows, ranks = rows.take(better), ranks[better]
        ranks = np.concatenate([self._ranks, ranks])
        keys = np.concatenate([self.rows.keys, rows.keys])
        order = np.lexsort((keys, ranks))[: self._k]
        pairs = zip(self.rows[:-1], rows[:-1], strict=True)
        self.rows = RowColumns._make([*(np.concatenate(pair)[order] for pair in pairs), ""])
        self.tiers = np.concatenate([self.tiers, np.full(len(rows.keys), rows.tier)])[order]
        self._ranks = ranks[order]


class Summary:
    """Histograms, extremes and sums over all rows that were passed to ``add``.

    frequencies, ages, norms  edges of the histograms, in addition to the built-in ones
    grace                     ``idle_norms`` counts rows of at least this age
    top                       length of the lists of extremes
    """

    def __init__(
        self,
        frequencies: Any = (),
        ages: Any = (),
        norms: Any = (),
        *,
        grace: int = 0,
        top: int = 0,
    ) -> None:
        self.grace = grace
        self.rows = 0
        self.occurrences = 0  # sum of frequencies
        self.norm_sum = 0.0
        self.frequencies = Histogram(edges_of(FREQUENCIES, frequencies), weighted=True)
        self.ages = Histogram(edges_of(AGES, ages), upper=True)
        self.norms = Histogram(edges_of(NORMS, norms))
        self.idle_norms = Histogram(self.norms.edges) if grace > 0 else self.norms
        self.most_frequent = Extremes(top, largest=True)
        self.least_frequent = Extremes(top, largest=False)
        self.largest = Extremes(top, largest=True)
        self.smallest = Extremes(top, largest=False)
        self.tiers: dict[str, int] = {}  # rows by tier

    def add(self, rows: RowColumns, step: int) -> None:
        """Include more rows in the histograms, extremes and sums.

        step  the table's step; a row's age is this step minus the row's step, at least 0
        """
        if not (count := len(rows.keys)):
            return
        self.rows += count
        self.tiers[rows.tier] = self.tiers.get(rows.tier, 0) + count
        values = (rows.frequencies, rows.frequencies, rows.norms, rows.norms)
        lists = (self.most_frequent, self.least_frequent, self.largest, self.smallest)
        lasts, last_keys = zip(*(each.last for each in lists), strict=True)
        enter = np.array([each.room for each in lists])
        occurrences, norm_sum = _look(
            *(rows.keys, rows.steps, rows.frequencies, rows.norms, step, self.grace),
            *(self.frequencies.parts, self.ages.parts, self.norms.parts, self.idle_norms.parts),
            *(np.array(lasts), np.array(last_keys, np.uint64), enter),
        )
        self.occurrences += int(occurrences)
        self.norm_sum += norm_sum
        for each, ranked, enters in zip(lists, values, enter.tolist(), strict=True):
            if enters:
                each.add(rows, ranked.astype(np.float64))
