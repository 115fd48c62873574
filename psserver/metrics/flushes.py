"""Metrics of flushes, which write changed rows to disk, and of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from psserver.checkpoints import Checkpoints
from psserver.flusher import Flusher
from psserver.metrics.samples import counter, gauge, histogram


class FlushCollector(Collector):
    """Collects durations and failures of flushes, and the time of the last one."""

    def __init__(self, flusher: Flusher) -> None:
        self._flusher = flusher

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of flushes."""
        timings = self._flusher.timings
        yield histogram(
            "ps_flush_duration_seconds",
            "Duration of a flush: the write of changed rows to the data directory.",
            timings.durations,
        )
        yield counter("ps_flush_failures", "Flushes that failed.", timings.failures)
        yield gauge(
            "ps_flush_timestamp_seconds",
            "Unix time of the last flush; a restart replays the changes since then.",
            self._flusher.since,
        )


class CheckpointCollector(Collector):
    """Collects durations, failures and sizes of the parts of checkpoints that this shard wrote."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of checkpoints. Their last time is left out if there was none."""
        timings = self._checkpoints.timings
        yield histogram(
            "ps_checkpoint_duration_seconds",
            "Time that this shard took to write its part of a checkpoint.",
            timings.durations,
        )
        yield counter(
            "ps_checkpoint_failures",
            "Parts of checkpoints that this shard could not write.",
            timings.failures,
        )
        yield counter(
            "ps_checkpoint_written_bytes",
            "Bytes of checkpoints written by this shard.",
            self._checkpoints.written,
        )
        yield gauge(
            "ps_checkpoint_timestamp_seconds",
            "Unix time at which this shard last completed its part of a checkpoint.",
            timings.ended,
        )
