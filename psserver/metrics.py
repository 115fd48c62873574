"""Collect the metrics of a shard for Prometheus.

At each scrape, Prometheus' request for /metrics, the collectors read the counts of the service and
the state of the shard. The labels are method, table, tier (kind of memory), code, reason and cause
of eviction. Keys are never labels, because there are too many of them.
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

from psserver.connections import Connections
from psserver.engine import Engine
from psserver.feed import Feed
from psserver.flusher import Flusher
from psserver.lane import Lanes
from psserver.scrubber import Scrubber
from psserver.shard import Shard
from psserver.stats import BOUNDS, ServiceStats, Traffic
from storage.errors import UnknownTable
from storage.gpu.gpu import PINNED_BYTES, Gpu
from storage.tiers.host import HostTier
from storage.versionlog import VersionLog

# (name, help text) of the metrics of admission, by table
RULE_GAUGES = (
    ("ps_waiting_keys", "Keys that are counted but not admitted yet."),
    ("ps_counter_bytes", "Memory of admission counters, in bytes."),
)
# (name, help text) of the metrics of tiers, by table and tier
TIER_GAUGES = (
    ("ps_table_rows", "Rows in a tier. Rows that are in memory and on disk count for memory."),
    (
        "ps_table_bytes",
        "Bytes that a table takes: GPU memory for the tier hbm; memory for the tier host, with"
        " index and counters; disk for the tier lmdb.",
    ),
)
TIER_COUNTERS = (
    ("ps_tier_hits", "Keys of pulls and pushes whose row was in this tier."),
    ("ps_tier_misses", "Keys of pulls and pushes whose row was only in a slower tier."),
)
# (name, help text) of the metrics of moves between memory and disk, by table
MOVE_COUNTERS = (
    ("ps_promotions", "Rows copied from disk to memory, because they were pushed."),
    ("ps_demotions", "Rows that left memory, because there was no room."),
    ("ps_flushed_rows", "Changed rows written to disk."),
    (
        "ps_reflushed_blocks",
        "Blocks on disk that were written again, because few of their rows were current.",
    ),
)
# (name, help text) of the metrics of moves between GPU memory and host memory, by table
GPU_COUNTERS = (
    ("ps_gpu_promotions", "Rows moved to GPU memory, because they are used often."),
    ("ps_gpu_demotions", "Rows that left GPU memory, because there was no room."),
)
RULE_COUNTERS = (
    ("ps_admitted_keys", "Keys that a push admitted."),
    ("ps_refused_keys", "Keys that a push did not admit, counted once per push."),
    (
        "ps_dropped_gradients",
        "Occurrences of keys whose gradients were dropped because the key was not admitted.",
    ),
    (
        "ps_expired_counters",
        "Admission counters removed by age, for lack of room, or by an alteration.",
    ),
)

DAMAGE_GAUGES = (
    ("ps_damaged_blocks", "Blocks on disk that are known to be damaged."),
    ("ps_lost_rows", "Rows that cannot be read, because a block on disk is damaged."),
)


class ShardCollector(Collector):
    """Collects metrics of traffic, tables, memory and log versions at each scrape.

    log  None: the shard has no log, and its metrics are left out
    """

    def __init__(
        self, shard: Shard, engine: Engine, stats: ServiceStats, log: VersionLog | None = None
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._stats = stats
        self._log = log

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics of the shard."""
        yield from self._traffic()
        yield from self._tables()
        if self._log is not None:
            yield from self._positions(self._log)
        shard, service = self._shard, self._stats
        for name, help, value in (
            ("ps_version", "Version of the shard: number of changes applied.", shard.version),
            (
                "ps_sessions",
                "Client sessions: records of pushes already applied.",
                len(shard.sessions),
            ),
            ("ps_memory_bytes", "Memory used by tables, in bytes.", shard.budget.held),
            ("ps_memory_budget_bytes", "Memory limit for tables, in bytes.", shard.budget.limit),
            (
                "ps_inflight_bytes",
                "Bytes of requests and replies in flight.",
                service.inflight_bytes,
            ),
            (
                "ps_buffer_bytes",
                "Size of the buffers for copies of pushed rows on their way to the log, in bytes,"
                " unused ones included.",
                shard.buffer_bytes,
            ),
            ("ps_streams", "Open client streams.", service.streams),
            ("ps_engine_waiting", "Calls that wait for the engine thread.", self._engine.waiting),
        ):
            yield GaugeMetricFamily(name, help, value)
        yield CounterMetricFamily(
            "ps_engine_failures",
            "Failures of work between requests: moves of rows, and reads ahead of requests.",
            self._engine.failures,
        )
        if shard.gpu is not None:
            yield from _gpu(shard.gpu)

    def _positions(self, log: VersionLog) -> Iterator[Metric]:
        """Yield the metrics of the version log: its versions, and the bytes of its backlog and of
        the incomplete records that the last start removed.
        """
        for name, help, value in (
            ("ps_log_written_version", "Newest version written to the log file.", log.written),
            ("ps_log_durable_version", "Newest version synced to disk.", log.durable),
            ("ps_log_first_version", "Oldest version in the log.", log.first),
            (
                "ps_log_backlog_bytes",
                "Bytes of log records not yet written to the file.",
                log.backlog,
            ),
            (
                "ps_log_torn_bytes",
                "Bytes of incomplete records that the last start removed from the log's end.",
                log.torn_bytes,
            ),
        ):
            yield GaugeMetricFamily(name, help, value)

    def _traffic(self) -> Iterator[Metric]:
        """Yield requests, keys, bytes and latency by method and table, and errors by method, code
        and reason.
        """
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
            latency.add_metric(where, _buckets(traffic), traffic.seconds)
        yield from (requests, keys, size, latency, self._errors())

    def _errors(self) -> Metric:
        """Return the number of failed requests by method, code and reason."""
        errors = CounterMetricFamily(
            "ps_errors", "Requests that failed.", labels=["method", "code", "reason"]
        )
        for what, count in list(self._stats.errors.items()):
            errors.add_metric(what, count)
        return errors

    def _tables(self) -> Iterator[Metric]:
        """Yield the number of rows and the memory of each table, then the metrics of ``_rules``."""
        labels = ["table", "tier"]
        rows, size = (GaugeMetricFamily(*each, labels=labels) for each in TIER_GAUGES)
        hits, misses = (CounterMetricFamily(*each, labels=labels) for each in TIER_COUNTERS)
        counters = MOVE_COUNTERS if self._shard.gpu is None else MOVE_COUNTERS + GPU_COUNTERS
        moved = [CounterMetricFamily(name, help, labels=["table"]) for name, help in counters]
        for name in self._shard.tables():
            try:
                stats, moves = self._shard.describe(name)[1], self._shard.moves(name)
            except UnknownTable:  # dropped since
                continue
            for tier in stats.tiers:
                where = [name, tier.tier]
                rows.add_metric(where, tier.rows)
                size.add_metric(where, stats.bytes if tier.tier == HostTier.name else tier.bytes)
                hits.add_metric(where, tier.hits)
                misses.add_metric(where, tier.misses)
            counts = [moves.promotions, moves.demotions, moves.flushed, moves.reflushed]
            counts += [moves.hbm_promotions, moves.hbm_demotions]
            for metric, count in zip(moved, counts, strict=False):
                metric.add_metric([name], count)
        yield from (rows, size, hits, misses, *moved, self._waits())
        yield from self._rules()

    def _waits(self) -> Metric:
        """Return the histogram of the times that requests waited for rows on disk, by table."""
        waits = HistogramMetricFamily(
            "ps_warm_read_seconds",
            "Time that requests waited until rows were read from disk.",
            labels=["table"],
        )
        for table, traffic in list(self._stats.waits.items()):
            waits.add_metric([table], _buckets(traffic), traffic.seconds)
        return waits

    def _rules(self) -> Iterator[Metric]:
        """Yield, for each table, counts of the keys and rows that its rules admitted, refused and
        evicted, and the memory of its admission counters.
        """
        waiting, counters = (GaugeMetricFamily(*each, labels=["table"]) for each in RULE_GAUGES)
        admitted, refused, dropped, expired = (
            CounterMetricFamily(*each, labels=["table"]) for each in RULE_COUNTERS
        )
        evicted = CounterMetricFamily(
            "ps_evicted_rows", "Rows evicted, by rule.", labels=["table", "cause"]
        )
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


def _gpu(gpu: Gpu) -> Iterator[Metric]:
    """Yield the metrics of the GPU: its memory, and whether promotion is paused."""
    budget = gpu.budget
    for name, help, value in (
        ("ps_gpu_bytes", "GPU memory used by tables, in bytes.", budget.held),
        ("ps_gpu_budget_bytes", "Limit of GPU memory for tables, in bytes.", budget.limit),
        (
            "ps_gpu_pinned_bytes",
            "Page-locked host memory for batches of rows in GPU memory, in bytes.",
            PINNED_BYTES,
        ),
        (
            "ps_gpu_paused",
            "1 while no rows are moved to the GPU because it has no memory, 0 otherwise.",
            int(gpu.paused),
        ),
    ):
        yield GaugeMetricFamily(name, help, value)


def _buckets(traffic: Traffic) -> list[tuple[str, float]]:
    """Return the latencies of some requests as (upper bound in seconds, cumulative number)."""
    total, buckets = 0, []
    for bound, count in zip((*BOUNDS, float("inf")), traffic.buckets, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    return buckets


class ConnectionCollector(Collector):
    """Collects, at each scrape, the size of incomplete messages and the number of connections that
    were closed because of them.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        """Yield ps_unfinished_bytes and ps_closed_connections."""
        yield GaugeMetricFamily(
            "ps_unfinished_bytes",
            "Bytes of messages that have not arrived completely.",
            self._connections.unfinished,
        )
        yield CounterMetricFamily(
            "ps_closed_connections",
            "Connections closed because their messages were not finished.",
            self._connections.closed,
        )


class LaneCollector(Collector):
    """Collects, at each scrape, the number of clients of the same-host lane, and their memory."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes

    def collect(self) -> Iterator[Metric]:
        """Yield ps_lane_clients and ps_lane_bytes."""
        yield GaugeMetricFamily(
            "ps_lane_clients", "Clients connected to the same-host lane.", self._lanes.clients
        )
        yield GaugeMetricFamily(
            "ps_lane_bytes",
            "Shared memory that clients of the same-host lane have registered, in bytes.",
            self._lanes.regions.bytes,
        )


class FeedCollector(Collector):
    """Collects number, lag and traffic of subscribers at each scrape."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all subscriptions of the shard."""
        feed, lag = self._feed, self._feed.lag
        for name, help, value in (
            ("ps_subscribers", "Open subscriptions.", feed.subscribers),
            (
                "ps_subscriber_lag_versions",
                "Number of versions that the slowest subscriber has not received yet.",
                lag.versions,
            ),
            (
                "ps_subscriber_lag_seconds",
                "Age of the oldest change that is being sent to a subscriber, in seconds.",
                lag.seconds,
            ),
        ):
            yield GaugeMetricFamily(name, help, value)
        yield CounterMetricFamily("ps_subscriber_bytes", "Bytes sent to subscribers.", feed.bytes)
        yield CounterMetricFamily(
            "ps_subscriber_messages", "Messages sent to subscribers.", feed.messages
        )


class FlushCollector(Collector):
    """Collects, at each scrape, the age of the last flush: the write of changed rows to disk."""

    def __init__(self, flusher: Flusher) -> None:
        self._flusher = flusher

    def collect(self) -> Iterator[Metric]:
        """Yield the seconds since the last flush."""
        yield GaugeMetricFamily(
            "ps_flush_age_seconds",
            "Seconds since the last flush to the data directory.",
            time.monotonic() - self._flusher.flushed,
        )


class ScrubCollector(Collector):
    """Collects, at each scrape, how many blocks on disk are damaged, and how many were verified."""

    def __init__(self, shard: Shard, scrubber: Scrubber) -> None:
        self._shard, self._scrubber = shard, scrubber

    def collect(self) -> Iterator[Metric]:
        """Yield damaged blocks and lost rows by table, then the work of the scrubber."""
        blocks, lost = (GaugeMetricFamily(*each, labels=["table"]) for each in DAMAGE_GAUGES)
        for name in self._shard.tables():
            damaged, rows = self._shard.checks.counts(name)
            blocks.add_metric([name], damaged)
            lost.add_metric([name], rows)
        yield from (blocks, lost)
        yield CounterMetricFamily(
            "ps_scrubbed_bytes", "Bytes on disk verified in the background.", self._scrubber.bytes
        )
        yield CounterMetricFamily(
            "ps_scrub_passes",
            "Passes over all rows on disk that have ended.",
            self._scrubber.passes,
        )
