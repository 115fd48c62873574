"""Collect all metrics of one server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector

from psserver.config import ServerConfig
from psserver.connections import Connections
from psserver.engine import Engine
from psserver.metrics.access import AccessCollector
from psserver.metrics.budgets import BudgetCollector
from psserver.metrics.certificates import CertificateCollector, Expiries
from psserver.metrics.connections import ConnectionCollector
from psserver.metrics.engine import EngineCollector
from psserver.metrics.flushes import CheckpointCollector, FlushCollector
from psserver.metrics.labels import TableLabels
from psserver.metrics.lanes import LaneCollector
from psserver.metrics.log import LogCollector
from psserver.metrics.scrub import ScrubCollector
from psserver.metrics.start import StartCollector
from psserver.metrics.subscribers import FeedCollector
from psserver.metrics.tables import TableCollector
from psserver.metrics.traffic import TrafficCollector
from psserver.parts import Parts
from psserver.phase import Phases
from psserver.scrubber import Scrubber
from psserver.security.guard import Guard
from psserver.stats import ServiceStats


class Metrics:
    """The metrics of one server. At first they are those of a server that starts; ``add`` adds
    those of the recovered shard.

    registry  all metrics, for the page /metrics
    """

    def __init__(
        self,
        config: ServerConfig,
        phases: Phases,
        stats: ServiceStats,
        connections: Connections,
        guard: Guard,
        expiries: Expiries = dict,
    ) -> None:
        """Create the metrics that a server has from its start.

        guard     refuses what the policy does not allow
        expiries  returns use of a certificate -> Unix time at which it expires
        """
        self.registry = CollectorRegistry()
        self._stats = stats
        self._most_tables = config.metrics_tables
        self._budgets = BudgetCollector(config, stats, connections)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        for collector in (
            StartCollector(phases),
            self._budgets,
            ConnectionCollector(connections),
            CertificateCollector(expiries),
            AccessCollector(guard),
        ):
            self.registry.register(collector)

    def add(self, parts: Parts, engine: Engine, scrubber: Scrubber | None) -> None:
        """Add the metrics of a recovered shard.

        parts     the components of the shard
        engine    the thread that owns it
        scrubber  verifies its rows on disk; None: the shard has no data directory
        """
        register, shard = self.registry.register, parts.shard
        labels = TableLabels(self._most_tables, shard.number_of)
        register(TrafficCollector(shard, self._stats, labels))
        register(TableCollector(shard, labels))
        register(EngineCollector(engine))
        register(CheckpointCollector(parts.checkpoints))
        if parts.lanes is not None:
            register(LaneCollector(parts.lanes))
        if parts.log is not None:
            register(LogCollector(parts.log))
        if parts.flusher is not None:
            register(FlushCollector(parts.flusher))
        if parts.feed is not None:
            register(FeedCollector(parts.feed))
        if scrubber is not None:
            register(ScrubCollector(scrubber))
        self._budgets.attach(parts)
