"""Collect all metrics of one server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge, GCCollector, ProcessCollector

from psserver.connections import Connections
from psserver.engine import Engine
from psserver.feed import Feed
from psserver.flusher import Flusher
from psserver.lane import Lanes
from psserver.metrics.admission import AdmissionCollector
from psserver.metrics.budgets import BudgetCollector
from psserver.metrics.connections import ConnectionCollector
from psserver.metrics.engine import EngineCollector
from psserver.metrics.flushes import FlushCollector
from psserver.metrics.lanes import LaneCollector
from psserver.metrics.log import LogCollector
from psserver.metrics.scrub import ScrubCollector
from psserver.metrics.subscribers import FeedCollector
from psserver.metrics.tiers import TierCollector
from psserver.metrics.traffic import TrafficCollector
from psserver.scrubber import Scrubber
from psserver.shard import Shard
from psserver.stats import ServiceStats
from storage.versionlog import VersionLog


class Metrics:
    """The metrics of one server. From its creation they tell whether the server is ready; ``add``
    adds those of a part of the server that exists only later.

    registry  all metrics, for the page /metrics
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._ready = Gauge(
            "ps_ready", "1 while the shard serves, 0 before.", registry=self.registry
        )

    def ready(self, ready: bool) -> None:
        """Set whether the shard serves."""
        self._ready.set(int(ready))

    def add_shard(
        self,
        shard: Shard,
        engine: Engine,
        stats: ServiceStats,
        connections: Connections,
        lanes: Lanes | None,
    ) -> None:
        """Add the metrics of a recovered shard, its engine and its clients.

        lanes  the same-host lane; None: the server offers none
        """
        register = self.registry.register
        register(TrafficCollector(shard, stats))
        register(TierCollector(shard, stats))
        register(AdmissionCollector(shard))
        register(BudgetCollector(shard, stats))
        register(EngineCollector(engine))
        register(ConnectionCollector(connections))
        if lanes is not None:
            register(LaneCollector(lanes))

    def add_disk(
        self, shard: Shard, log: VersionLog, flusher: Flusher, feed: Feed, scrubber: Scrubber
    ) -> None:
        """Add the metrics of a shard with a data directory: log, flushes, subscribers, damage."""
        register = self.registry.register
        register(LogCollector(log))
        register(FlushCollector(flusher))
        register(FeedCollector(feed))
        register(ScrubCollector(shard, scrubber))
