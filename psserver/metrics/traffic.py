"""Metrics of requests: their number, keys, bytes, latency and errors."""

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


class TrafficCollector(Collector):
    """Collects requests, keys, bytes and latency by method and table, and errors by method, code
    and reason.
    """

    def __init__(self, shard: Shard, stats: ServiceStats) -> None:
        self._shard = shard
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of requests, then the number of open streams."""
        labels = ["method", "table"]
        requests = CounterMetricFamily(
            "ps_requests", "Pulls, pushes and deletes served.", labels=labels
        )
        keys = CounterMetricFamily("ps_keys", "Keys in served requests.", labels=labels)
        size = CounterMetricFamily(
            "ps_array_bytes", "Bytes of keys, rows and gradients in served requests.", labels=labels
        )
        latency = HistogramMetricFamily(
            "ps_request_seconds", "Latency on the server, from decoding to result.", labels=labels
        )
        tables = set(self._shard.tables())
        for where, traffic in list(self._stats.traffic.items()):
            if where[1] not in tables:  # dropped, then counted again by a late reply
                continue
            requests.add_metric(where, traffic.requests)
            keys.add_metric(where, traffic.keys)
            size.add_metric(where, traffic.bytes)
            latency.add_metric(where, buckets(traffic), traffic.seconds)
        yield from (requests, keys, size, latency, self._errors())
        yield GaugeMetricFamily("ps_streams", "Open client streams.", self._stats.streams)

    def _errors(self) -> Metric:
        """Return the number of failed requests by method, code and reason."""
        errors = CounterMetricFamily(
            "ps_errors", "Requests that failed.", labels=["method", "code", "reason"]
        )
        for what, count in list(self._stats.errors.items()):
            errors.add_metric(what, count)
        return errors
