"""Metrics of memory and disk: what is in use, every limit, and the room that is left below it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from psserver.budgets import uses
from psserver.config import ServerConfig
from psserver.connections import Connections
from psserver.metrics.samples import gauge
from psserver.parts import Parts
from psserver.shard import Shard
from psserver.stats import ServiceStats
from storage.gpu.gpu import PINNED_BYTES, Gpu


class BudgetCollector(Collector):
    """Collects all memory and disk space that has a limit. Before ``attach``, only what a server
    without a shard has: its process, and messages that arrive.
    """

    def __init__(self, config: ServerConfig, stats: ServiceStats, connections: Connections) -> None:
        self._config = config
        self._stats = stats
        self._connections = connections
        self._parts: Parts | None = None

    def attach(self, parts: Parts) -> None:
        """Collect the memory of a recovered shard from now on."""
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        """Yield limits and headroom by budget, then sizes of the shard, then those of the disk."""
        limits = gauge(
            "ps_budget_limit_bytes",
            "Limit of each budget: of a setting, or of a part of the memory limit.",
            labels=("budget",),
        )
        headroom = gauge(
            "ps_budget_headroom_bytes",
            "Bytes of each budget that are free; negative if it is exceeded.",
            labels=("budget",),
        )
        for use in uses(self._config, self._stats, self._connections, self._parts):
            limits.add_metric((use.budget,), use.limit)
            headroom.add_metric((use.budget,), use.limit - use.used)
        yield from (limits, headroom)
        if self._parts is not None:
            shard = self._parts.shard
            yield from self._sizes(shard)
            if shard.gpu is not None:
                yield from _gpu(shard.gpu)
        if self._config.data_dir is not None:
            yield from _disk(self._config.data_dir)

    def _sizes(self, shard: Shard) -> Iterator[Metric]:
        """Yield version, sessions, and sizes in memory and on disk of the shard."""
        yield gauge("ps_version", "Version of the shard: number of changes applied.", shard.version)
        yield gauge(
            "ps_sessions",
            "Client sessions: records of pushes already applied.",
            len(shard.sessions),
        )
        yield gauge("ps_memory_bytes", "Memory used by tables.", shard.budget.held)
        yield gauge("ps_memory_budget_bytes", "Memory limit for tables.", shard.budget.limit)
        yield gauge(
            "ps_inflight_bytes",
            "Bytes of requests and replies in flight.",
            self._stats.inflight_bytes,
        )
        yield gauge(
            "ps_buffer_bytes",
            "Size of the buffers for copies of pushed rows on their way to the log, unused ones"
            " included.",
            shard.buffer_bytes,
        )
        with suppress(OSError):  # the base is closed
            yield gauge(
                "ps_base_size_bytes",
                "Size on disk of the base, the copy of all rows as of the last flush.",
                shard.base_bytes,
            )


def _disk(directory: Path) -> Iterator[Metric]:
    """Yield size and free space of the file system of the data directory, if it can be read."""
    with suppress(OSError):
        found = os.statvfs(directory)
        yield gauge(
            "ps_disk_size_bytes",
            "Size of the file system of the data directory.",
            found.f_blocks * found.f_frsize,
        )
        yield gauge(
            "ps_disk_free_bytes",
            "Free space that the server can use on the file system of the data directory.",
            found.f_bavail * found.f_frsize,
        )


def _gpu(gpu: Gpu) -> Iterator[Metric]:
    """Yield the metrics of the GPU: its memory, and whether promotion is paused."""
    yield gauge("ps_gpu_bytes", "GPU memory used by tables.", gpu.budget.held)
    yield gauge("ps_gpu_budget_bytes", "Limit of GPU memory for tables.", gpu.budget.limit)
    yield gauge(
        "ps_gpu_pinned_bytes",
        "Page-locked host memory for batches of rows in GPU memory.",
        PINNED_BYTES,
    )
    yield gauge(
        "ps_gpu_paused",
        "1 while no rows are moved to the GPU because it has no memory, 0 otherwise.",
        int(gpu.paused),
    )
