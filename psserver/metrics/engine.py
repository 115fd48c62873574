"""Metrics of the engine, the thread that owns the shard."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from psserver.engine import Engine


class EngineCollector(Collector):
    """Collects the calls that wait for the engine, and its failures."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield ps_engine_waiting and ps_engine_failures."""
        yield GaugeMetricFamily(
            "ps_engine_waiting", "Calls that wait for the engine thread.", self._engine.waiting
        )
        yield CounterMetricFamily(
            "ps_engine_failures",
            "Failures of work between requests: moves of rows, and reads ahead of requests.",
            self._engine.failures,
        )
