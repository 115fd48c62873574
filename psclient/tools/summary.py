"""A table, summed up: the figures of an analysis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psclient.arrays import Rows
from psclient.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class RowColumns:
    """What an analysis saw of some rows of one tier."""

    keys: NDArray[np.uint64]  # [n]
    frequencies: NDArray[np.uint64]
    steps: NDArray[np.int64]  # of the last push
    versions: NDArray[np.uint64]  # of the last push
    norms: NDArray[np.float64]  # L2, of the embedding
    tier: str
    embeddings: Rows | None  # float32[n, dim]


Sink = Callable[[RowColumns], None]


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """How many values lie between edges; what is counted on either side of an edge is exact.

    counts[i] is of edges[i-1] <= value < edges[i]; of ages, of edges[i-1] < value <= edges[i].
    """

    edges: NDArray[np.float64]  # [k], ascending
    counts: NDArray[np.int64]  # [k + 1]

    def behind(self, edge: float) -> int:
        """How many values are behind an edge: from it on or, of ages, above it."""
        return int(self.counts[self.position(edge) + 1 :].sum())

    def before(self, edge: float) -> int:
        """All other values."""
        return int(self.counts[: self.position(edge) + 1].sum())

    def position(self, edge: float) -> int:
        """Of an edge; InvalidArgument for a number that is none."""
        at = int(np.searchsorted(self.edges, edge))
        if at == len(self.edges) or self.edges[at] != edge:
            raise InvalidArgument(f"{edge:g} is no edge of this histogram: name it to analyze()")
        return at


@dataclass(frozen=True, slots=True)
class Tier:
    """Rows of one tier, over all shards."""

    name: str
    rows: int
    bytes: int  # taken, unused room included


@dataclass(frozen=True, slots=True, eq=False)
class RowList:
    """Some rows, from the most extreme on."""

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
    asked: dict[str, tuple[float, ...]]  # thresholds: frequencies, ages, norms
    time: float  # seconds since 1970: of the analysis, or when the checkpoint was complete
    seconds: float  # that it took
    dim: int
    row_bytes: int  # embedding, state and metadata
    optimizer: str
    versions: tuple[int, ...]  # of the shards, when the analysis began
    step: int  # the largest that was pushed
    rows: int
    shard_rows: tuple[int, ...]
    occurrences: int  # pushed, of all rows
    norm_mean: float
    frequencies: Histogram
    occurrences_between: NDArray[np.int64]  # [k + 1], occurrences of the rows in each count of it
    ages: Histogram  # steps since the last push
    norms: Histogram
    idle_norms: Histogram  # of rows of an age of at least ``grace``
    grace: int
    tiers: tuple[Tier, ...]
    index_bytes: int
    waiting: int  # keys that are counted towards admission
    waiting_bytes: int
    most_frequent: RowList
    least_frequent: RowList
    largest: RowList
    smallest: RowList

    @property
    def bytes(self) -> int:
        """Taken by all of it."""
        return sum(tier.bytes for tier in self.tiers) + self.index_bytes + self.waiting_bytes

    def admitted(self, threshold: int) -> int:
        """Rows whose keys occurred at least so often: what that threshold would have admitted."""
        return self.frequencies.behind(threshold)

    def dropped(self, threshold: int) -> int:
        """Occurrences whose gradients that threshold would have dropped.

        All of the other rows, and of these all but the last of the first ``threshold``; fewer
        where several come in one push.
        """
        below = self.occurrences_between[: self.frequencies.position(threshold) + 1]
        return int(below.sum()) + self.admitted(threshold) * (threshold - 1)

    def idle(self, ttl: int) -> int:
        """Rows that a step TTL of so many steps evicts."""
        return self.ages.behind(ttl)

    def small(self, threshold: float) -> int:
        """Rows that the norm rule with this threshold evicts, under ``grace``."""
        return self.idle_norms.before(threshold)
