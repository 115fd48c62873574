"""Convert the server's counts to metrics of prometheus_client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from psserver.stats import BOUNDS, Traffic


def gauges(values: Iterable[tuple[str, str, float]]) -> Iterator[Metric]:
    """Yield a gauge without labels for each (name, help text, value)."""
    for name, help, value in values:
        yield GaugeMetricFamily(name, help, value)


def buckets(traffic: Traffic) -> list[tuple[str, float]]:
    """Return the latencies of some requests as (upper bound in seconds, cumulative number)."""
    total, found = 0, []
    for bound, count in zip((*BOUNDS, float("inf")), traffic.buckets, strict=True):
        total += count
        found.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    return found
