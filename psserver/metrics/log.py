"""Metrics of the version log."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from psserver.metrics.samples import gauges
from storage.versionlog import VersionLog


class LogCollector(Collector):
    """Collects the versions of the log, the bytes of its backlog, and those of the incomplete
    records that the last start removed.
    """

    def __init__(self, log: VersionLog) -> None:
        self._log = log

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the log."""
        log = self._log
        yield from gauges(
            (
                (
                    "ps_log_written_version",
                    "Newest version written to the log file.",
                    log.written,
                ),
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
            )
        )
