"""The result of an analysis: summary statistics of a table over all shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psclient.arrays import Rows
from psclient.errors import InvalidArgument

GPU = "hbm"  # name of the tier whose rows are in GPU memory


@dataclass(frozen=True, slots=True)
class RowColumns:
    """Some rows that an analysis read, as columns. All are from one tier (kind of storage)."""

    keys: NDArray[np.uint64]  # [n]
    frequencies: NDArray[np.uint64]  # [n] number of pushed occurrences of the key
    steps: NDArray[np.int64]  # [n] training step of the last push
    versions: NDArray[np.uint64]  # [n] version of the shard after the last push
    norms: NDArray[np.float64]  # [n] L2 norm of the embedding
    tier: str
    embeddings: Rows | None  # float32[n, dim]; None: the caller did not ask for embeddings


Sink = Callable[[RowColumns], None]  # receives the rows that an analysis reads


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Counts of values between edges, so that the counts below and above an edge are exact.

    counts[i] is the number of values in [edges[i-1], edges[i]). For ages the upper edge belongs to
    the range instead of the lower one: (edges[i-1], edges[i]].
    """

    edges: NDArray[np.float64]  # [k], ascending
    counts: NDArray[np.int64]  # [k + 1]; the first and the last range have one edge only

    def above(self, edge: float) -> int:
        """Return the number of values >= ``edge``; for ages, > ``edge``.

        Raises InvalidArgument if ``edge`` is not one of ``edges``.
        """
        return int(self.counts[self.position(edge) + 1 :].sum())

    def below(self, edge: float) -> int:
        """Return the number of values < ``edge``; for ages, <= ``edge``.

        Raises InvalidArgument if ``edge`` is not one of ``edges``.
        """
        return int(self.counts[: self.position(edge) + 1].sum())

    def position(self, edge: float) -> int:
        """Return the index of ``edge`` in ``edges``.

        Raises InvalidArgument if it is not one of them.
        """
        at = int(np.searchsorted(self.edges, edge))
        if at == len(self.edges) or self.edges[at] != edge:
            raise InvalidArgument(
                f"{edge:g} is not an edge of this histogram: pass it to analyze() as a threshold"
            )
        return at


@dataclass(frozen=True, slots=True)
class Tier:
    """Size of one tier, a kind of storage for rows, over all shards."""

    name: str
    rows: int
    bytes: int  # allocated, including unused space
    on_disk: bool = False  # the tier is on disk, so that ``bytes`` is no memory

    @property
    def in_memory(self) -> bool:
        """Whether ``bytes`` is memory of the server: not of its disk or its GPU."""
        return not self.on_disk and self.name != GPU


@dataclass(frozen=True, slots=True, eq=False)
class RowList:
    """The rows of a table with the largest or smallest frequencies or norms, in this order.

    All arrays have the shape [n]. RowColumns explains their meanings.
    """

    keys: NDArray[np.uint64]
    versions: NDArray[np.uint64]
    steps: NDArray[np.int64]
    frequencies: NDArray[np.uint64]
    norms: NDArray[np.float64]
    tiers: tuple[str, ...]
    shards: NDArray[np.int64]  # number of the shard that owns each row


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Analysis:
    """Summary statistics of a table over all shards, the result of ``analyze``."""

    table: str
    checkpoint: str | None  # name of the checkpoint; None: the live table
    asked: dict[str, tuple[float, ...]]  # the caller's thresholds: frequencies, ages, norms
    time: float  # of the analysis, or of the checkpoint, in seconds since 1970
    seconds: float  # duration of the analysis
    dim: int
    row_bytes: int  # size of a row in memory: embedding, optimizer state, metadata
    optimizer: str
    versions: tuple[int, ...]  # version of each shard when the analysis began
    step: int  # largest training step pushed
    rows: int
    shard_rows: tuple[int, ...]
    occurrences: int  # number of pushed occurrences of all keys with rows
    norm_mean: float
    frequencies: Histogram  # rows by the number of pushed occurrences of their key
    occurrences_between: NDArray[np.int64]  # [k + 1] occurrences by range of ``frequencies``
    ages: Histogram  # rows by the steps since their last push
    norms: Histogram  # rows by the L2 norm of their embedding
    idle_norms: Histogram  # the same, only for rows whose age is at least ``grace``
    grace: int  # grace period of the norm rule, in steps
    tiers: tuple[Tier, ...]
    index_bytes: int
    waiting: int  # keys that wait for admission: counted, but without a row
    waiting_bytes: int  # memory of the admission counters
    most_frequent: RowList
    least_frequent: RowList
    largest: RowList
    smallest: RowList
    reuses: (
        Histogram  # pushes of rows, by the keys pushed since the last push of the row, per shard
    )
    first_pushes: int  # pushes of keys without a row
    pull_reuses: Histogram  # pulls of rows, as ``reuses``

    @property
    def bytes(self) -> int:
        """Return the memory of the table in bytes: rows, index and admission counters."""
        tiers = sum(tier.bytes for tier in self.tiers if tier.in_memory)
        return tiers + self.index_bytes + self.waiting_bytes

    def admitted(self, threshold: int) -> int:
        """Return the number of rows that an admission threshold would have admitted."""
        return self.frequencies.above(threshold)

    def dropped(self, threshold: int) -> int:
        """Return for how many occurrences an admission threshold would have dropped the gradient.

        These are all occurrences of a refused key, and the first ``threshold - 1`` of an admitted
        key. The true number is lower if several occurrences of an admitted key came in one push.
        """
        below = self.occurrences_between[: self.frequencies.position(threshold) + 1]
        return int(below.sum()) + self.admitted(threshold) * (threshold - 1)

    def idle(self, ttl: int) -> int:
        """Return the number of rows that a step TTL of ``ttl`` steps would evict."""
        return self.ages.above(ttl)

    def small(self, threshold: float) -> int:
        """Return the number of rows that the norm rule would evict with ``threshold`` and
        ``grace``.
        """
        return self.idle_norms.below(threshold)
