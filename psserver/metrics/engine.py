"""Metrics of the engine, the thread that owns the shard."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from psserver.engine import Engine
from psserver.metrics.samples import counter, gauge, histogram


class EngineCollector(Collector):
    """Collects how busy the engine is, the calls that wait for it, and its failures."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the engine."""
        engine = self._engine
        yield counter(
            "ps_engine_busy_seconds",
            "Seconds for which calls have run on the engine. Its rate is the busy share, 0 to 1.",
            engine.busy_seconds,
        )
        yield histogram(
            "ps_engine_queue_wait_seconds",
            "Time from the submission of a call to its start on the engine.",
            engine.queue_wait,
        )
        yield gauge("ps_engine_waiting", "Calls that wait for the engine.", engine.waiting)
        yield counter(
            "ps_engine_failures",
            "Failures of work between requests: moves of rows, and reads ahead of requests.",
            engine.failures,
        )
