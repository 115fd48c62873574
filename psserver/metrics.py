"""What a shard tells Prometheus.

The service counts in plain objects as it works; a collector reads them and the shard when the
page is asked for. Labels are table, tier, method and code, never a key.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from psserver.checkpointer import Checkpointer
from psserver.engine import Engine
from psserver.feed import Feed
from psserver.shard import Shard
from storage.errors import UnknownTable
from storage.versionlog import VersionLog

BOUNDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


@dataclass(slots=True)
class Traffic:
    """Of one method on one table."""

    requests: int = 0
    keys: int = 0
    bytes: int = 0  # of arrays, in and out
    seconds: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))

    def add(self, keys: int, size: int, seconds: float) -> None:
        """Count one request, from its decoding to its result."""
        self.requests += 1
        self.keys += keys
        self.bytes += size
        self.seconds += seconds
        self.buckets[bisect_left(BOUNDS, seconds)] += 1


class Counts:
    """What the service counts; written by the event loop alone."""

    def __init__(self) -> None:
        self.traffic: dict[tuple[str, str], Traffic] = {}  # by method and table
        self.errors: dict[tuple[str, str, str], int] = {}  # by method, code and reason
        self.inflight_bytes = 0
        self.streams = 0

    def served(self, method: str, table: str, keys: int, size: int, seconds: float) -> None:
        """Count one pull, push or delete that succeeded."""
        traffic = self.traffic.get((method, table))
        if traffic is None:
            traffic = self.traffic[method, table] = Traffic()
        traffic.add(keys, size, seconds)

    def forget(self, table: str) -> None:
        """Drop the series of a table that is gone."""
        for where in [each for each in self.traffic if each[1] == table]:
            del self.traffic[where]

    def failed(self, method: str, code: str, reason: str) -> None:
        """Count one request that was refused."""
        self.errors[method, code, reason] = self.errors.get((method, code, reason), 0) + 1


class ShardCollector(Collector):
    """Reads the counts and the shard whenever the page is asked for."""

    def __init__(
        self, shard: Shard, engine: Engine, counts: Counts, log: VersionLog | None = None
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._counts = counts
        self._log = log

    def collect(self) -> Iterator[Metric]:
        yield from self._traffic()
        yield from self._tables()
        if self._log is not None:
            yield from self._positions(self._log)
        shard, counts = self._shard, self._counts
        for name, help, value in (
            ("ps_version", "Version of the shard: changes applied.", shard.version),
            ("ps_sessions", "Client sessions remembered.", len(shard.sessions)),
            ("ps_memory_bytes", "Memory taken by tables.", shard.budget.held),
            ("ps_memory_budget_bytes", "Memory that tables may take.", shard.budget.limit),
            ("ps_inflight_bytes", "Requests, and replies not yet sent.", counts.inflight_bytes),
            ("ps_streams", "Open client streams.", counts.streams),
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
        for where, traffic in list(self._counts.traffic.items()):
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
        for what, count in list(self._counts.errors.items()):
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


class CheckpointCollector(Collector):
    """Reads how old the last checkpoint is whenever the page is asked for."""

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "ps_checkpoint_age_seconds",
            "Since the data directory's base had all changes.",
            time.monotonic() - self._checkpointer.made,
        )
