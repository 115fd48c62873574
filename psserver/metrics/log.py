"""Metrics of the version log."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from psserver.metrics.samples import counter, gauge, histogram
from storage.versionlog import VersionLog


class LogCollector(Collector):
    """Collects the versions of the log, its size, and the durations of its writes and syncs."""

    def __init__(self, log: VersionLog) -> None:
        self._log = log

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the log."""
        log = self._log
        yield gauge(
            "ps_log_written_version", "Newest version written to the log file.", log.written
        )
        yield gauge("ps_log_durable_version", "Newest version synced to disk.", log.durable)
        yield gauge("ps_log_first_version", "Oldest version in the log.", log.first)
        yield gauge(
            "ps_log_backlog_bytes", "Bytes of log records not yet written to the file.", log.backlog
        )
        yield gauge(
            "ps_log_torn_bytes",
            "Bytes of incomplete records that the last start removed from the log's end.",
            log.torn_bytes,
        )
        yield gauge(
            "ps_log_size_bytes",
            "Size of the log's files on disk.",
            sum(segment.size for segment in log.files.segments),
        )
        yield counter(
            "ps_log_written_bytes", "Bytes of records written to the log.", log.written_bytes
        )
        yield histogram(
            "ps_log_write_duration_seconds",
            "Duration of a write of waiting records to the log file.",
            log.writes,
        )
        yield histogram(
            "ps_log_fsync_duration_seconds",
            "Duration of a sync of the log file to disk.",
            log.syncs,
        )
