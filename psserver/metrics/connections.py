"""Metrics of connections."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from psserver.connections import Connections


class ConnectionCollector(Collector):
    """Collects the size of incomplete messages, and the number of connections that were closed
    because of them.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        """Yield ps_unfinished_bytes and ps_closed_connections."""
        yield GaugeMetricFamily(
            "ps_unfinished_bytes",
            "Bytes of messages that have not arrived completely.",
            self._connections.unfinished,
        )
        yield CounterMetricFamily(
            "ps_closed_connections",
            "Connections closed because their messages were not finished.",
            self._connections.closed,
        )
