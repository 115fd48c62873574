"""Metrics of the same-host lane."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from psserver.lane import Lanes
from psserver.metrics.samples import gauge


class LaneCollector(Collector):
    """Collects the number of clients of the same-host lane, and their memory."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes

    def collect(self) -> Iterator[Metric]:
        """Yield ps_lane_clients and ps_lane_bytes."""
        yield gauge(
            "ps_lane_clients", "Clients connected to the same-host lane.", self._lanes.clients
        )
        yield gauge(
            "ps_lane_bytes",
            "Shared memory that clients of the same-host lane have registered.",
            self._lanes.regions.bytes,
        )
