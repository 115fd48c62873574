"""Metrics of damage on disk, and of the scrubber, which searches for it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from psserver.scrubber import Scrubber
from psserver.shard import Shard

DAMAGE_GAUGES = (
    ("ps_damaged_blocks", "Blocks on disk that are known to be damaged."),
    ("ps_lost_rows", "Rows that cannot be read, because a block on disk is damaged."),
)


class ScrubCollector(Collector):
    """Collects how many blocks on disk are damaged, and how many were verified."""

    def __init__(self, shard: Shard, scrubber: Scrubber) -> None:
        self._shard, self._scrubber = shard, scrubber

    def collect(self) -> Iterator[Metric]:
        """Yield damaged blocks and lost rows by table, then the work of the scrubber."""
        blocks, lost = (GaugeMetricFamily(*each, labels=["table"]) for each in DAMAGE_GAUGES)
        for name in self._shard.tables():
            damaged, rows = self._shard.checks.counts(name)
            blocks.add_metric([name], damaged)
            lost.add_metric([name], rows)
        yield from (blocks, lost)
        yield CounterMetricFamily(
            "ps_scrubbed_bytes", "Bytes on disk verified in the background.", self._scrubber.bytes
        )
        yield CounterMetricFamily(
            "ps_scrub_passes",
            "Passes over all rows on disk that have ended.",
            self._scrubber.passes,
        )
