"""Metrics of the scrubber, which searches for damage on disk."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from psserver.metrics.samples import counter
from psserver.scrubber import Scrubber


class ScrubCollector(Collector):
    """Collects how much on disk was verified."""

    def __init__(self, scrubber: Scrubber) -> None:
        self._scrubber = scrubber

    def collect(self) -> Iterator[Metric]:
        """Yield the work of the scrubber."""
        yield counter(
            "ps_scrubbed_bytes", "Bytes on disk verified in the background.", self._scrubber.bytes
        )
        yield counter(
            "ps_scrub_passes",
            "Passes over all rows on disk that have ended.",
            self._scrubber.passes,
        )
