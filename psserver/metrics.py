"""What a shard tells Prometheus.

The service counts in plain objects as it works; a collector reads them and the shard when the
page is asked for. Labels are table, tier, method and code, never a key.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from psserver.engine import Engine
from psserver.feed import Feed
from psserver.flusher import Flusher
from psserver.shard import Shard
from psserver.stats import BOUNDS, ServiceStats
from storage.errors import UnknownTable
from storage.versionlog import VersionLog


class ShardCollector(Collector):
    """Reads the counts and the shard whenever the page is asked for."""

    def __init__(
        self, shard: Shard, engine: Engine, stats: ServiceStats, log: VersionLog | None = None
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._stats = stats
        self._log = log

    def collect(self) -> Iterator[Metric]:
        yield from self._traffic()
        yield from self._tables()
        if self._log is not None:
            yield from self._positions(self._log)
        shard, service = self._shard, self._stats
        for name, help, value in (
            ("ps_version", "Version of the shard: changes applied.", shard.version),
            ("ps_sessions", "Client sessions remembered.", len(shard.sessions)),
            ("ps_memory_bytes", "Memory taken by tables.", shard.budget.held),
            ("ps_memory_budget_bytes", "Memory that tables may take.", shard.budget.limit),
            ("ps_inflight_bytes", "Requests, and replies not yet sent.", service.inflight_bytes),
            ("ps_streams", "Open client streams.", service.streams),
            ("ps_engine_waiting", "Calls waiting for the engine.", self._engine.waiting),
        ):
            yield GaugeMetricFamily(name, help, value)

    def _positions(self, log: VersionLog) -> Iterator[Metric]:
        for name, help, value in (
            ("ps_log_written_version", "Newest version handed to the OS.", log.written),
            ("ps_log_durable_version", "Newest version on disk.", log.durable),
            ("ps_log_first_version", "Oldest version that the log still has.", log.first),
            ("ps_log_backlog_bytes", "Appended and not yet written.", log.backlog),
            ("ps_log_torn_bytes", "Of a torn tail that the start erased.", log.torn_bytes),
        ):
            yield GaugeMetricFamily(name, help, value)

    def _traffic(self) -> Iterator[Metric]:
        labels = ["method", "table"]
        requests = CounterMetricFamily(
            "ps_requests", "Pulls, pushes, deletes served.", labels=labels
        )
        keys = CounterMetricFamily("ps_keys", "Keys in them.", labels=labels)
        size = CounterMetricFamily("ps_array_bytes", "Bytes of arrays in them.", labels=labels)
        latency = HistogramMetricFamily(
            "ps_request_seconds", "From decoding to result, on the server.", labels=labels
        )
        tables = set(self._shard.tables())
        for where, traffic in list(self._stats.traffic.items()):
            if where[1] not in tables:  # dropped, and counted since by an answer that was late
                continue
            requests.add_metric(where, traffic.requests)
            keys.add_metric(where, traffic.keys)
            size.add_metric(where, traffic.bytes)
            total, buckets = 0, []
            for bound, count in zip((*BOUNDS, float("inf")), traffic.buckets, strict=True):
                total += count
                buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
            latency.add_metric(where, buckets, traffic.seconds)
        errors = CounterMetricFamily(
            "ps_errors", "Requests refused.", labels=["method", "code", "reason"]
        )
        for what, count in list(self._stats.errors.items()):
            errors.add_metric(what, count)
        yield from (requests, keys, size, latency, errors)

    def _tables(self) -> Iterator[Metric]:
        rows = GaugeMetricFamily("ps_table_rows", "Rows held.", labels=["table", "tier"])
        size = GaugeMetricFamily("ps_table_bytes", "Memory taken.", labels=["table", "tier"])
        for name in self._shard.tables():
            try:
                stats = self._shard.describe(name)[1]
            except UnknownTable:  # dropped since
                continue
            rows.add_metric([name, "host"], stats.rows)
            size.add_metric([name, "host"], stats.bytes)
        yield from (rows, size)
        yield from self._rules()

    def _rules(self) -> Iterator[Metric]:
        """What admission and eviction did, by table."""
        of = ["table"]
        waiting = GaugeMetricFamily("ps_waiting_keys", "Counted, without a row.", labels=of)
        counters = GaugeMetricFamily("ps_counter_bytes", "Memory of their counters.", labels=of)
        admitted = CounterMetricFamily("ps_admitted_keys", "Got a row by a push.", labels=of)
        refused = CounterMetricFamily("ps_refused_keys", "Of pushes, got no row yet.", labels=of)
        dropped = CounterMetricFamily(
            "ps_dropped_gradients", "Occurrences of refused keys.", labels=of
        )
        expired = CounterMetricFamily(
            "ps_expired_counters", "Counters that went for age or for room.", labels=of
        )
        evicted = CounterMetricFamily("ps_evicted_rows", "Left by a rule.", labels=[*of, "cause"])
        for name in self._shard.tables():
            try:
                stats, (tally, old) = self._shard.describe(name)[1], self._shard.tally(name)
            except UnknownTable:  # dropped since
                continue
            waiting.add_metric([name], stats.waiting)
            counters.add_metric([name], stats.counter_bytes)
            admitted.add_metric([name], tally.admitted)
            refused.add_metric([name], tally.refused)
            dropped.add_metric([name], tally.dropped)
            expired.add_metric([name], old)
            for cause, count in list(tally.evicted.items()):
                evicted.add_metric([name, cause.name.lower()], count)
        yield from (waiting, counters, admitted, refused, dropped, expired, evicted)


class FeedCollector(Collector):
    """Reads how the subscribers fare whenever the page is asked for."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def collect(self) -> Iterator[Metric]:
        feed, lag = self._feed, self._feed.lag
        for name, help, value in (
            ("ps_subscribers", "Subscribers.", feed.subscribers),
            ("ps_subscriber_lag_versions", "Versions the slowest is behind.", lag.versions),
            ("ps_subscriber_lag_seconds", "Age of what the slowest is being sent.", lag.seconds),
        ):
            yield GaugeMetricFamily(name, help, value)
        yield CounterMetricFamily("ps_subscriber_bytes", "Sent to subscribers.", feed.bytes)
        yield CounterMetricFamily("ps_subscriber_messages", "Of them.", feed.messages)


class FlushCollector(Collector):
    """Reads the age of the last flush whenever the page is asked for."""

    def __init__(self, flusher: Flusher) -> None:
        self._flusher = flusher

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "ps_flush_age_seconds",
            "Seconds since the last flush to the data directory.",
            time.monotonic() - self._flusher.flushed,
        )
