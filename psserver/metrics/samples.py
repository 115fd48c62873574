"""Make metrics of prometheus_client from the server's counts.

The unit of a metric is the last word of its name: bytes or seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

from storage.histogram import Histogram

UNITS = ("bytes", "seconds")


def gauge(
    name: str, help: str, value: float | None = None, labels: Sequence[str] = ()
) -> GaugeMetricFamily:
    """Return a gauge: one sample with ``value``, or none yet.

    labels  names of its labels, if samples are added later
    """
    return GaugeMetricFamily(name, help, value, labels or None, unit=_unit(name))


def counter(
    name: str, help: str, value: float | None = None, labels: Sequence[str] = ()
) -> CounterMetricFamily:
    """Return a counter, which is exposed as ``name`` + "_total".

    value   value of its only sample; None: there is no sample yet
    labels  names of its labels, if samples are added later
    """
    return CounterMetricFamily(name, help, value, labels or None, unit=_unit(name))


def histogram(
    name: str, help: str, counts: Histogram | None = None, labels: Sequence[str] = ()
) -> HistogramMetricFamily:
    """Return a histogram.

    counts  measurements of its only sample; None: there is no sample yet
    labels  names of its labels, if samples are added later with ``add``
    """
    metric = HistogramMetricFamily(name, help, labels=labels or None, unit=_unit(name))
    if counts is not None:
        add(metric, (), counts)
    return metric


def add(metric: HistogramMetricFamily, labels: Sequence[str], counts: Histogram) -> None:
    """Add the measurements ``counts`` to a histogram, under label values ``labels``."""
    metric.add_metric(labels, cumulative(counts.bounds, counts.counts), counts.sum)


def cumulative(bounds: Sequence[float], counts: Sequence[float]) -> list[tuple[str, float]]:
    """Return (upper bound as text, number of measurements up to it) of each bucket.

    counts  number of measurements in each bucket, and of those above the last bound
    """
    total, found = 0.0, []
    for bound, count in zip((*map(str, bounds), "+Inf"), counts, strict=True):
        total += count
        found.append((bound, total))
    return found


def _unit(name: str) -> str:
    """Return the unit at the end of a metric's name; "" if it has none."""
    last = name.rpartition("_")[2]
    return last if last in UNITS else ""
