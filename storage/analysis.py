"""What a table holds, summed up a slice of rows at a time: histograms, extremes, sums.

A histogram has edges instead of equal buckets. Whoever wants to know what a threshold would do
makes it an edge, so the answer is exact: what is counted on either side of it is what a rule of
that threshold would admit or evict.

    frequencies   from an edge n on: what a threshold of n occurrences would have admitted
    ages          behind an edge t: what a step TTL of t evicts; see StepTtl
    idle_norms    below an edge x: what the norm rule with threshold x evicts; see Norm
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.kernels import Keys, jit

FREQUENCIES = tuple(2.0**i for i in range(32))
AGES = (0.0, *(2.0**i for i in range(33)))  # steps
NORMS = tuple(float(f"{digit}e{power}") for power in range(-6, 5) for digit in (1, 2, 5))

Edges = NDArray[np.float64]
Counts = NDArray[np.uint64]
_UNWEIGHTED = np.empty(0, np.uint64)


class RowColumns(NamedTuple):
    """What is known of some rows beside their numbers; all of one tier."""

    keys: Keys  # uint64[n]
    versions: NDArray[np.uint64]  # [n]
    steps: NDArray[np.int64]  # [n]
    frequencies: NDArray[np.uint64]  # [n]
    norms: NDArray[np.float64]  # [n]  L2, of the embedding
    tier: str

    def take(self, chosen: Any) -> RowColumns:
        """Some of the rows, by a mask or by positions."""
        return RowColumns._make([*(column[chosen] for column in self[:-1]), self.tier])


def edges_of(usual: tuple[float, ...], asked: Any) -> Edges:
    """Ascending edges, float64[]: the usual ones and those that were asked for."""
    return np.union1d(np.asarray(usual, np.float64), np.asarray(asked, np.float64))


@jit
def _count(values: Any, edges: Any, weights: Any, counts: Any, sums: Any) -> None:
    """Count values by the number of edges that are not above them.

    values   float64[n]  NaN has no edge above it: it is not below a threshold
    edges    float64[k]  ascending
    weights  uint64[n]   added to sums; or empty, and so are they
    counts   uint64[k + 1], sums uint64[k + 1]  updated
    """
    for i in range(values.shape[0]):
        value = values[i]
        low, left = 0, edges.shape[0]
        while left > 0:  # without a branch: which half it is cannot be foreseen
            half = (left + 1) >> 1
            low += 0 if value < edges[low + half - 1] else half
            left -= half
        counts[low] += np.uint64(1)
        if weights.shape[0]:
            sums[low] += weights[i]


class Histogram:
    """How many values lie between edges.

    edges     float64[k], ascending
    upper     whether a value that is equal to an edge counts as below it, not as from it on
    weighted  whether values have weights, which are summed
    """

    def __init__(self, edges: Edges, *, upper: bool = False, weighted: bool = False) -> None:
        self.edges = edges
        self.counts = np.zeros(len(edges) + 1, np.uint64)
        self.sums = np.zeros(len(self.counts) if weighted else 0, np.uint64)
        self._bounds = np.nextafter(edges, np.inf) if upper else edges

    def add(self, values: NDArray[Any], weights: Counts = _UNWEIGHTED) -> None:
        """Count values [n] with weights uint64[n]."""
        numbers, weights = values.astype(np.float64), np.array(weights)
        _count(numbers, self._bounds, weights, self.counts, self.sums)


class Extremes:
    """The k rows of the least or the largest values; of equal ones, those of the least keys."""

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

    def add(self, rows: RowColumns, values: NDArray[Any]) -> None:
        """Look at rows with values float64[n]; NaN is neither small nor large."""
        if not self._k:
            return
        ranks = np.where(np.isnan(values), np.inf, self._sign * values)
        if len(self._ranks) == self._k:
            rank, key = self._ranks[-1], self.rows.keys[-1]
            better = (ranks < rank) | ((ranks == rank) & (rows.keys < key))
            if not better.any():
                return
            rows, ranks = rows.take(better), ranks[better]
        ranks = np.concatenate([self._ranks, ranks])
        keys = np.concatenate([self.rows.keys, rows.keys])
        order = np.lexsort((keys, ranks))[: self._k]
        pairs = zip(self.rows[:-1], rows[:-1], strict=True)
        self.rows = RowColumns._make([*(np.concatenate(pair)[order] for pair in pairs), ""])
        self.tiers = np.concatenate([self.tiers, np.full(len(rows.keys), rows.tier)])[order]
        self._ranks = ranks[order]


class Summary:
    """What a table's rows have in common; rows are added, and never taken out.

    frequencies, ages, norms  edges that the histograms have beside the usual ones
    grace                     rows of at least this age count in ``idle_norms``
    top                       rows in each list of extremes
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
        """Count rows.

        step  from which their ages are counted back; a row of a later one has age 0
        """
        if not (count := len(rows.keys)):
            return
        self.rows += count
        self.tiers[rows.tier] = self.tiers.get(rows.tier, 0) + count
        self.occurrences += int(rows.frequencies.sum(dtype=np.uint64))
        self.norm_sum += float(rows.norms.sum())
        self.frequencies.add(rows.frequencies, rows.frequencies)
        ages = np.maximum(step - rows.steps, 0)
        self.ages.add(ages)
        self.norms.add(rows.norms)
        if self.grace > 0:
            self.idle_norms.add(rows.norms[ages >= self.grace])
        frequencies = rows.frequencies.astype(np.float64)
        self.most_frequent.add(rows, frequencies)
        self.least_frequent.add(rows, frequencies)
        self.largest.add(rows, rows.norms)
        self.smallest.add(rows, rows.norms)
