"""Metrics of connections."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from psserver.connections import Connections
from psserver.metrics.samples import counter, gauge


class ConnectionCollector(Collector):
    """Collects the number of connections, the size of their incomplete messages, and the number
    of those that were closed because of them.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all gRPC connections."""
        yield gauge(
            "ps_connections",
            "Open gRPC connections, as of the last check.",
            self._connections.count,
        )
        yield gauge(
            "ps_unfinished_bytes",
            "Bytes of messages that have not arrived completely.",
            self._connections.unfinished,
        )
        yield counter(
            "ps_closed_connections",
            "Connections closed because their messages were not finished.",
            self._connections.closed,
        )
