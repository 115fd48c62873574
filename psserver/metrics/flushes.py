"""Metrics of flushes, which write changed rows to disk."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from psserver.flusher import Flusher


class FlushCollector(Collector):
    """Collects the age of the last flush."""

    def __init__(self, flusher: Flusher) -> None:
        self._flusher = flusher

    def collect(self) -> Iterator[Metric]:
        """Yield the seconds since the last flush."""
        yield GaugeMetricFamily(
            "ps_flush_age_seconds",
            "Seconds since the last flush to the data directory.",
            time.monotonic() - self._flusher.flushed,
        )
