"""Metrics of memory in use and of its limits."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from psserver.metrics.samples import gauges
from psserver.shard import Shard
from psserver.stats import ServiceStats
from storage.gpu.gpu import PINNED_BYTES, Gpu


class BudgetCollector(Collector):
    """Collects the memory of tables, requests and sessions, and the limits that it has."""

    def __init__(self, shard: Shard, stats: ServiceStats) -> None:
        self._shard = shard
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of host memory, then those of GPU memory if there is a GPU."""
        shard = self._shard
        yield from gauges(
            (
                ("ps_version", "Version of the shard: number of changes applied.", shard.version),
                (
                    "ps_sessions",
                    "Client sessions: records of pushes already applied.",
                    len(shard.sessions),
                ),
                ("ps_memory_bytes", "Memory used by tables, in bytes.", shard.budget.held),
                (
                    "ps_memory_budget_bytes",
                    "Memory limit for tables, in bytes.",
                    shard.budget.limit,
                ),
                (
                    "ps_inflight_bytes",
                    "Bytes of requests and replies in flight.",
                    self._stats.inflight_bytes,
                ),
                (
                    "ps_buffer_bytes",
                    "Size of the buffers for copies of pushed rows on their way to the log, in"
                    " bytes, unused ones included.",
                    shard.buffer_bytes,
                ),
            )
        )
        if shard.gpu is not None:
            yield from _gpu(shard.gpu)


def _gpu(gpu: Gpu) -> Iterator[Metric]:
    """Yield the metrics of the GPU: its memory, and whether promotion is paused."""
    budget = gpu.budget
    yield from gauges(
        (
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
        )
    )
