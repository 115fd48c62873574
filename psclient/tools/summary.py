"""The result of an analysis: the rows of a table, summed up over all shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psclient.arrays import Rows
from psclient.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class RowColumns:
    """Some rows of one tier, as an analysis read them."""

    keys: NDArray[np.uint64]  # [n]
    frequencies: NDArray[np.uint64]  # occurrences pushed
    steps: NDArray[np.int64]  # of the last push
    versions: NDArray[np.uint64]  # of the last push
    norms: NDArray[np.float64]  # L2 norm of the embedding
    tier: str
    embeddings: Rows | None  # float32[n, dim]


Sink = Callable[[RowColumns], None]


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Counts of values between edges. The counts on either side of an edge are exact.

    counts[i] counts the values in [edges[i-1], edges[i]); in a histogram of ages those in
    (edges[i-1], edges[i]].
    """

    edges: NDArray[np.float64]  # [k], ascending
    counts: NDArray[np.int64]  # [k + 1]

    def above(self, edge: float) -> int:
        """Return how many values are at least ``edge``; of ages, greater than it."""
        return int(self.counts[self.position(edge) + 1 :].sum())

    def below(self, edge: float) -> int:
        """Return how many values are less than ``edge``; of ages, at most it."""
        return int(self.counts[: self.position(edge) + 1].sum())

    def position(self, edge: float) -> int:
        """Return the index of an edge; InvalidArgument for a number that is not an edge."""
        at = int(np.searchsorted(self.edges, edge))
        if at == len(self.edges) or self.edges[at] != edge:
            raise InvalidArgument(
                f"{edge:g} is not an edge of this histogram: pass it to analyze() as a threshold"
            )
        return at


@dataclass(frozen=True, slots=True)
class Tier:
    """The rows of one tier, over all shards."""

    name: str
    rows: int
    bytes: int  # allocated, unused room included


@dataclass(frozen=True, slots=True, eq=False)
class RowList:
    """The most extreme rows by some measure, the most extreme first."""

    keys: NDArray[np.uint64]
    versions: NDArray[np.uint64]
    steps: NDArray[np.int64]
    frequencies: NDArray[np.uint64]
    norms: NDArray[np.float64]
    tiers: tuple[str, ...]
    shards: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Analysis:
    """A table, summed up over all shards."""

    table: str
    checkpoint: str | None
    asked: dict[str, tuple[float, ...]]  # thresholds that the caller gave: frequencies, ages, norms
    time: float  # seconds since 1970: of the analysis, or of the checkpoint
    seconds: float  # duration of the analysis
    dim: int
    row_bytes: int  # embedding, state and metadata of a row
    optimizer: str
    versions: tuple[int, ...]  # of the shards, when the analysis began
    step: int  # the largest that was pushed
    rows: int
    shard_rows: tuple[int, ...]
    occurrences: int  # pushed, sum over all rows
    norm_mean: float
    frequencies: Histogram
    occurrences_between: NDArray[np.int64]  # [k + 1], occurrences of the rows of each count of it
    ages: Histogram  # steps since the last push
    norms: Histogram
    idle_norms: Histogram  # norms of the rows whose age is at least ``grace``
    grace: int
    tiers: tuple[Tier, ...]
    index_bytes: int
    waiting: int  # keys that are counted for admission and have no row yet
    waiting_bytes: int  # of their counters
    most_frequent: RowList
    least_frequent: RowList
    largest: RowList
    smallest: RowList

    @property
    def bytes(self) -> int:
        """Memory of the table: rows, index and counters."""
        return sum(tier.bytes for tier in self.tiers) + self.index_bytes + self.waiting_bytes

    def admitted(self, threshold: int) -> int:
        """Return how many rows an admission threshold would have admitted."""
        return self.frequencies.above(threshold)

    def dropped(self, threshold: int) -> int:
        """Return how many occurrences an admission threshold would have dropped with gradients.

        A refused key loses all its occurrences, an admitted key the first ``threshold - 1``. An
        admitted key loses fewer if several of its occurrences come in one push.
        """
        below = self.occurrences_between[: self.frequencies.position(threshold) + 1]
        return int(below.sum()) + self.admitted(threshold) * (threshold - 1)

    def idle(self, ttl: int) -> int:
        """Return how many rows a step TTL of ``ttl`` steps evicts."""
        return self.ages.above(ttl)

    def small(self, threshold: float) -> int:
        """Return how many rows the norm rule evicts with this threshold and ``grace``."""
        return self.idle_norms.below(threshold)
