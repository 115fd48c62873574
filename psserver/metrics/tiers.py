"""Metrics of tiers (kinds of memory that rows are in), by table and tier."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from psserver.metrics.samples import buckets
from psserver.shard import Shard
from psserver.stats import ServiceStats
from storage.errors import UnknownTable
from storage.tiers.host import HostTier

# (name, help text) of the metrics of tiers, by table and tier
TIER_GAUGES = (
    ("ps_table_rows", "Rows in a tier. Rows that are in memory and on disk count for memory."),
    (
        "ps_table_bytes",
        "Bytes that a table takes: GPU memory for the tier hbm; memory for the tier host, with"
        " index and counters; disk for the tier lmdb.",
    ),
)
TIER_COUNTERS = (
    ("ps_tier_hits", "Keys of pulls and pushes whose row was in this tier."),
    ("ps_tier_misses", "Keys of pulls and pushes whose row was only in a slower tier."),
)
# (name, help text) of the metrics of moves between memory and disk, by table
MOVE_COUNTERS = (
    ("ps_promotions", "Rows copied from disk to memory, because they were pushed."),
    ("ps_demotions", "Rows that left memory, because there was no room."),
    ("ps_flushed_rows", "Changed rows written to disk."),
    (
        "ps_reflushed_blocks",
        "Blocks on disk that were written again, because few of their rows were current.",
    ),
)
# (name, help text) of the metrics of moves between GPU memory and host memory, by table
GPU_COUNTERS = (
    ("ps_gpu_promotions", "Rows moved to GPU memory, because they are used often."),
    ("ps_gpu_demotions", "Rows that left GPU memory, because there was no room."),
)


class TierCollector(Collector):
    """Collects rows, bytes, hits and moves of each tier, and the waits for rows on disk."""

    def __init__(self, shard: Shard, stats: ServiceStats) -> None:
        self._shard = shard
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of each table."""
        labels = ["table", "tier"]
        rows, size = (GaugeMetricFamily(*each, labels=labels) for each in TIER_GAUGES)
        hits, misses = (CounterMetricFamily(*each, labels=labels) for each in TIER_COUNTERS)
        counters = MOVE_COUNTERS if self._shard.gpu is None else MOVE_COUNTERS + GPU_COUNTERS
        moved = [CounterMetricFamily(name, help, labels=["table"]) for name, help in counters]
        for name in self._shard.tables():
            try:
                stats, moves = self._shard.describe(name)[1], self._shard.moves(name)
            except UnknownTable:  # dropped since
                continue
            for tier in stats.tiers:
                where = [name, tier.tier]
                rows.add_metric(where, tier.rows)
                size.add_metric(where, stats.bytes if tier.tier == HostTier.name else tier.bytes)
                hits.add_metric(where, tier.hits)
                misses.add_metric(where, tier.misses)
            counts = [moves.promotions, moves.demotions, moves.flushed, moves.reflushed]
            counts += [moves.hbm_promotions, moves.hbm_demotions]
            for metric, count in zip(moved, counts, strict=False):
                metric.add_metric([name], count)
        yield from (rows, size, hits, misses, *moved, self._waits())

    def _waits(self) -> Metric:
        """Return the histogram of the times that requests waited for rows on disk, by table."""
        waits = HistogramMetricFamily(
            "ps_warm_read_seconds",
            "Time that requests waited until rows were read from disk.",
            labels=["table"],
        )
        for table, traffic in list(self._stats.waits.items()):
            waits.add_metric([table], buckets(traffic), traffic.seconds)
        return waits
