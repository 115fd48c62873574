"""Metrics of requests: their number, keys, bytes, latency and errors."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from psserver.metrics.labels import Folded, FoldedHistogram, TableLabels, fill
from psserver.metrics.reading import read_at_once
from psserver.metrics.samples import add, counter, gauge, histogram
from psserver.shard import Shard
from psserver.stats import CROWDS, ServiceStats
from storage.histogram import SHORT

BY_TABLE = ("table", "method")
BY_LANE = ("method", "lane")
# Errors that alerts look for: they are exposed from the start, because Prometheus sees no increase
# in a series that begins with its first error.
ALERTED = {
    (method, "RESOURCE_EXHAUSTED", reason): 0
    for method in ("Pull", "Push", "Exchange", "Delete", "Stream", "Lane")
    for reason in ("DISK_FULL", "OUT_OF_MEMORY", "OVERLOADED", "BUDGET_EXCEEDED")
}


class TrafficCollector(Collector):
    """Collects requests by method and lane, by table, and by number of clients; and errors.

    labels  chooses the tables that have series of their own
    """

    def __init__(self, shard: Shard, stats: ServiceStats, labels: TableLabels) -> None:
        self._shard = shard
        self._stats = stats
        self._labels = labels
        self._requests, self._keys, self._bytes = Folded(), Folded(), Folded()
        self._waits = FoldedHistogram(SHORT)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of requests, then the number of open streams."""
        yield from self._by_lane()
        yield from read_at_once(self._by_table)
        yield from self._by_clients()
        errors = counter("ps_errors", "Requests that failed.", labels=("method", "code", "reason"))
        for what, count in (ALERTED | self._stats.errors).items():
            errors.add_metric(what, count)
        yield errors
        yield gauge("ps_streams", "Open client streams.", self._stats.streams)
        yield gauge(
            "ps_requests_waiting", "Requests that wait for their turn.", self._stats.waiting()
        )
        yield histogram(
            "ps_request_queue_seconds",
            "Time that requests waited for their turn, of those that had to wait.",
            self._stats.queued,
        )

    def _by_lane(self) -> Iterator[Metric]:
        """Yield latency and sizes of requests by method and lane."""
        latency = histogram(
            "ps_request_duration_seconds",
            "Latency of a request on the server, from its arrival to its result.",
            labels=BY_LANE,
        )
        received = histogram(
            "ps_request_size_bytes", "Size of the arrays in a request.", labels=BY_LANE
        )
        sent = histogram("ps_response_size_bytes", "Size of the arrays in a reply.", labels=BY_LANE)
        for where, requests in list(self._stats.requests.items()):
            add(latency, where, requests.seconds)
            add(received, where, requests.received)
            add(sent, where, requests.sent)
        yield from (latency, received, sent)

    def _by_table(self) -> Iterator[Metric]:
        """Yield pulls, pushes and deletes by table and method, and waits for rows on disk."""
        names = self._shard.tables()
        tables, own = set(names), self._labels.choose(names)
        # a table that was dropped can be counted again by a late reply
        served = [each for each in list(self._stats.traffic.items()) if each[0][1] in tables]
        requests = [(table, (method,), each.requests) for (method, table), each in served]
        keys = [(table, (method,), each.keys) for (method, table), each in served]
        size = [(table, (method,), each.bytes) for (method, table), each in served]
        for name, help, folded, counts in (
            (
                "ps_requests",
                "Pulls, pushes and deletes served. Each pull and push of an exchange counts.",
                self._requests,
                requests,
            ),
            ("ps_keys", "Keys in served pulls, pushes and deletes.", self._keys, keys),
            (
                "ps_array_bytes",
                "Bytes of keys, rows and gradients in served pulls, pushes and deletes.",
                self._bytes,
                size,
            ),
        ):
            yield fill(counter(name, help, labels=BY_TABLE), folded.fold(counts, own))
        waits = histogram(
            "ps_warm_read_seconds",
            "Time that requests waited until rows were read from disk.",
            labels=("table",),
        )
        waited = [each for each in list(self._stats.waits.items()) if each[0] in tables]
        yield self._waits.fill(waits, waited, own)

    def _by_clients(self) -> Iterator[Metric]:
        """Yield requests, and their latency, by the number of clients at the time."""
        requests = counter(
            "ps_clients_requests",
            "Requests served while the number of connected clients was in a range.",
            labels=("clients",),
        )
        seconds = counter(
            "ps_clients_request_seconds",
            "Latency of these requests, summed.",
            labels=("clients",),
        )
        for label, crowd in zip(CROWD_LABELS, self._stats.crowds, strict=True):
            requests.add_metric((label,), crowd.requests)
            seconds.add_metric((label,), crowd.seconds)
        yield from (requests, seconds)


def _ranges() -> Iterator[str]:
    """Yield the label value of each range of numbers of clients: "1", "2-4", ..., "257+"."""
    first = 1
    for last in CROWDS:
        yield str(last) if first == last else f"{first}-{last}"
        first = last + 1
    yield f"{first}+"


CROWD_LABELS = tuple(_ranges())
