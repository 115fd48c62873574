"""Collect the live figures of a shard that GetStatus, the status page and `psctl top` show.

They are read every second, from any thread and during the start. So they are counters and sizes
that other threads keep: nothing here waits for the engine, or looks at rows.
"""

from __future__ import annotations

import heapq
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TypeVar

from psproto import RELEASE
from psproto import ps_pb2 as pb
from psserver.budgets import uses
from psserver.config import ServerConfig
from psserver.connections import Connections
from psserver.engine import Engine
from psserver.errors import Refused
from psserver.feed import Feed
from psserver.flusher import Flusher
from psserver.parts import Parts
from psserver.phase import Phases
from psserver.shard import Shard
from psserver.stats import Requests, ServiceStats
from storage.errors import UnknownTable
from storage.histogram import Histogram
from storage.versionlog import VersionLog

MOST_TABLES = 256  # maximum number of tables in a status
TEXT = 256  # maximum length of a text, in characters
DESCRIBED = 16  # tables that are described without a pause for other threads
COUNTED = 128  # tables whose rows, or damaged blocks, are counted without a pause


_Item = TypeVar("_Item")


class LiveStatus:
    """Reads the figures of one server, from the start of its process on. Thread-safe.

    phases       what the server is doing
    connections  client connections of gRPC
    expiries     returns use of a certificate -> when it expires, in seconds since 1970
    start        random number of this start of the process
    """

    def __init__(
        self,
        config: ServerConfig,
        phases: Phases,
        stats: ServiceStats,
        engine: Engine,
        connections: Connections,
        expiries: Callable[[], Mapping[str, float]],
    ) -> None:
        self.phases = phases
        self.start = 1 + secrets.randbits(63)
        self._started = time.monotonic()
        self._config = config
        self._stats = stats
        self._engine = engine
        self._connections = connections
        self._expiries = expiries
        self._parts: Parts | None = None

    @property
    def uptime(self) -> float:
        """Seconds since the process started."""
        return time.monotonic() - self._started

    def attach(self, parts: Parts) -> None:
        """Show the figures of a recovered shard from now on."""
        self._parts = parts

    def read(self, most_tables: int = MOST_TABLES) -> pb.GetStatusResponse:
        """Return the figures.

        most_tables  maximum number of tables in the result
        """
        config, parts = self._config, self._parts
        phase, seconds = self.phases.now()
        status = pb.GetStatusResponse(
            release=RELEASE,
            shard=config.shard,
            shards=config.shards,
            cluster=config.cluster,
            advertise=config.advertise,
            start=self.start,
            time=time.time(),
            uptime_seconds=self.uptime,
            phase=phase,
            phase_seconds=seconds,
            cpu_seconds=time.process_time(),
            certificate_expires=self._expiries().get("server", 0.0),
        )
        if parts is not None:
            self._read_tables(parts.shard, most_tables, status)
            self._read_traffic(status)
            self._read_parts(parts, status)
        status.budgets.extend(self._budgets(parts))
        return status

    def _read_tables(self, shard: Shard, most: int, status: pb.GetStatusResponse) -> None:
        """Fill in the version, the totals, and the ``most`` tables with the most rows."""
        names = shard.tables()
        sizes = [(shard.rows(name), name) for name in _with_pauses(names, COUNTED)]
        status.version, status.table_count = shard.version, len(names)
        status.rows = sum(rows for rows, _ in sizes)
        status.damaged_blocks = sum(
            shard.checks.counts(name)[0] for name in _with_pauses(names, COUNTED)
        )
        traffic = self._by_table()
        for _, name in _with_pauses(heapq.nlargest(most, sizes), DESCRIBED):
            try:
                stats = shard.describe(name)[1]
            except (UnknownTable, Refused):  # dropped, or replaced by one that is being filled
                continue
            requests, pulled, pushed = traffic.get(name, (0, 0, 0))
            status.tables.add(
                name=name,
                rows=stats.rows,
                bytes=stats.bytes,
                tiers=[pb.TierStats(**asdict(tier)) for tier in stats.tiers],
                requests=requests,
                pulled_keys=pulled,
                pushed_keys=pushed,
                damaged_blocks=stats.damage[0],
                lost_rows=stats.damage[1],
            )

    def _by_table(self) -> dict[str, tuple[int, int, int]]:
        """Return table -> (requests, keys pulled, keys pushed)."""
        found: dict[str, tuple[int, int, int]] = {}
        for (method, table), traffic in list(self._stats.traffic.items()):
            requests, pulled, pushed = found.get(table, (0, 0, 0))
            pulled += traffic.keys if method == "Pull" else 0
            pushed += traffic.keys if method == "Push" else 0
            found[table] = requests + traffic.requests, pulled, pushed
        return found

    def _read_traffic(self, status: pb.GetStatusResponse) -> None:
        """Fill in requests, errors and the engine's figures."""
        methods: dict[str, list[Requests]] = {}
        for (method, _), requests in list(self._stats.requests.items()):
            methods.setdefault(method, []).append(requests)
        for method, each in sorted(methods.items()):
            status.methods.add(
                method=method,
                requests=sum(requests.seconds.total for requests in each),
                keys=sum(requests.keys for requests in each),
                bytes=int(sum(requests.received.sum + requests.sent.sum for requests in each)),
                latency=_timing([requests.seconds for requests in each]),
            )
        for (method, code, reason), count in list(self._stats.errors.items()):
            status.errors.add(method=method, code=code, reason=reason, count=count)
        status.recent_errors.extend(self._stats.recent.newest())
        status.streams = self._stats.streams
        status.requests_waiting = self._stats.waiting()
        status.request_queue.MergeFrom(_timing([self._stats.queued]))
        status.engine.waiting = self._engine.waiting
        status.engine.failures = self._engine.failures
        status.engine.busy_seconds = self._engine.busy_seconds
        status.engine.queue_wait.MergeFrom(_timing([self._engine.queue_wait]))

    def _read_parts(self, parts: Parts, status: pb.GetStatusResponse) -> None:
        """Fill in the figures of log, subscriptions, flushes, checkpoints, lane and GPU."""
        if parts.log is not None:
            status.log.MergeFrom(_log_status(parts.log))
        if parts.feed is not None:
            status.subscribers.MergeFrom(_feed_status(parts.feed))
        if parts.flusher is not None:
            status.storage.MergeFrom(_storage_status(parts, parts.flusher))
        if (lanes := parts.lanes) is not None:
            status.lanes.clients, status.lanes.bytes = lanes.clients, lanes.regions.bytes
        if parts.shard.gpu is not None:
            status.gpu_paused = parts.shard.gpu.paused

    def _budgets(self, parts: Parts | None) -> Iterator[pb.Budget]:
        """Yield the limited resources of the server. May block while the disk hangs."""
        config = self._config
        for use in uses(config, self._stats, self._connections, parts):
            yield pb.Budget(name=use.budget, used=use.used, limit=use.limit)
        if config.data_dir is not None:
            with suppress(OSError):
                disk = os.statvfs(config.data_dir)
                used, free = disk.f_blocks - disk.f_bfree, disk.f_bavail
                yield pb.Budget(
                    name="disk", used=used * disk.f_frsize, limit=(used + free) * disk.f_frsize
                )
        numbers = [("max_connections", self._connections.count, config.max_connections)]
        if parts is not None:
            numbers.append(("max_tables", len(parts.shard.tables()), config.max_tables))
            numbers.append(("max_sessions", len(parts.shard.sessions), config.max_sessions))
        if parts is not None and parts.feed is not None:
            numbers.append(("max_subscribers", parts.feed.subscribers, config.max_subscribers))
        for name, used, limit in numbers:
            yield pb.Budget(name=name, used=used, limit=limit)


def _with_pauses(items: Sequence[_Item], together: int) -> Iterator[_Item]:
    """Yield the items; after every ``together`` of them, let a thread that serves requests run."""
    for at, item in enumerate(items, 1):
        yield item
        if at % together == 0:
            time.sleep(0)


def _log_status(log: VersionLog) -> pb.LogStatus:
    return pb.LogStatus(
        written_version=log.written,
        durable_version=log.durable,
        first_version=log.first,
        bytes=sum(each.size for each in list(log.files.segments)),
        backlog_bytes=log.backlog,
        write=_timing([log.writes]),
        fsync=_timing([log.syncs]),
    )


def _feed_status(feed: Feed) -> pb.FeedStatus:
    versions, seconds = feed.lag
    return pb.FeedStatus(
        subscribers=feed.subscribers,
        lag_versions=versions,
        lag_seconds=seconds,
        bytes=feed.bytes,
        messages=feed.messages,
        freshness=_timing([feed.freshness]),
    )


def _storage_status(parts: Parts, flusher: Flusher) -> pb.StorageStatus:
    """Return the figures of flushes, checkpoints and restores."""
    timings, restore = parts.checkpoints.timings, parts.restores.running
    status = pb.StorageStatus(
        flush_age_seconds=time.monotonic() - flusher.flushed,
        flushes=flusher.rounds,
        flush_failure=flusher.failure[:TEXT],
        flush=_timing([flusher.timings.durations]),
        checkpoint_write=_timing([timings.durations]),
        checkpoint_failures=timings.failures,
        work=parts.checkpoints.work.running[:TEXT],
    )
    if timings.ended is not None:
        status.checkpoint_age_seconds = max(time.time() - timings.ended, 0.0)
    if restore is not None:
        status.restore, status.restore_phase = restore
    return status


def _timing(some: Sequence[Histogram]) -> pb.Timing:
    """Return measurements of the same bounds, of which there is at least one, as one message."""
    return pb.Timing(
        count=sum(each.total for each in some),
        seconds=sum(each.sum for each in some),
        bounds=some[0].bounds,
        buckets=[sum(counts) for counts in zip(*(each.counts for each in some), strict=True)],
    )
