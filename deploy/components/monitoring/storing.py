"""Rows of the dashboard about stored rows: tiers, log, subscribers, checkpoints and limits."""

from __future__ import annotations

from collections.abc import Mapping

from deploy.components.monitoring import thresholds
from deploy.components.monitoring.panel import SHARD, Kind, Panel, of, quantile, rate

HITS = rate("ps_tier_hits_total", "table", 'tier="host"')
MISSES = rate("ps_tier_misses_total", "table", 'tier="host"')

STORING: Mapping[str, tuple[Panel, ...]] = {
    "Tiers": (
        Panel(
            "Rows",
            "short",
            "Rows by table and tier (kind of memory): hbm is GPU memory, host is memory, lmdb is"
            " disk only.",
            {"{{table}} {{tier}}": f"sum by (table, tier) ({of('ps_table_rows')})"},
            Kind.STACKED,
        ),
        Panel(
            "Bytes of tables",
            "bytes",
            "Memory and disk that tables take, by table and tier.",
            {"{{table}} {{tier}}": f"sum by (table, tier) ({of('ps_table_bytes')})"},
            Kind.STACKED,
        ),
        Panel(
            "Keys found in memory",
            "percentunit",
            "Part of the keys of pulls and pushes whose row was in memory.",
            {"{{table}}": f"{HITS} / ({HITS} + {MISSES})"},
        ),
        Panel(
            "Wait for rows on disk",
            "s",
            "Time that requests waited until their rows were read from disk: median and 99th"
            " percentile.",
            {
                "{{table}} p50": quantile(0.5, "ps_warm_read_seconds", "table"),
                "{{table}} p99": quantile(0.99, "ps_warm_read_seconds", "table"),
            },
        ),
        Panel(
            "Moves of rows",
            "short",
            "Rows per second that were copied from disk to memory (promoted), that left memory"
            " (demoted), and that were written to disk (flushed).",
            {
                "promoted": rate("ps_promotions_total", "job"),
                "demoted": rate("ps_demotions_total", "job"),
                "flushed": rate("ps_flushed_rows_total", "job"),
            },
        ),
        Panel(
            "Lost rows",
            "short",
            "Rows that cannot be read, because a block on disk is damaged.",
            {"{{table}}": f"sum by (table) ({of('ps_lost_rows')})"},
        ),
    ),
    "Log and freshness": (
        Panel(
            "Log records that wait for the disk",
            "bytes",
            "Bytes of the version log that are not written to the file yet.",
            {SHARD: of("ps_log_backlog_bytes")},
        ),
        Panel(
            "Changes that are not durable",
            "short",
            "Versions (changes of a shard) that are not synced to disk yet.",
            {SHARD: f"{of('ps_version')} - {of('ps_log_durable_version')}"},
        ),
        Panel(
            "Lag of the slowest subscriber",
            "s",
            "Age of the oldest change that is being sent to a subscriber. The red line is the"
            " threshold of an alert.",
            {SHARD: of("ps_subscriber_lag_seconds")},
            limit=thresholds.SUBSCRIBER_LAG_SECONDS,
        ),
        Panel(
            "Bytes to subscribers",
            "Bps",
            "Bytes per second sent to subscribers.",
            {SHARD: rate("ps_subscriber_bytes_total", "shard")},
        ),
        Panel(
            "Subscribers",
            "short",
            "Open subscriptions.",
            {SHARD: of("ps_subscribers")},
        ),
    ),
    "Checkpoints": (
        Panel(
            "Age of the last flush",
            "s",
            "A restart replays all changes since the last flush. The red line is the threshold of"
            " an alert.",
            {SHARD: of("ps_flush_age_seconds")},
            limit=thresholds.FLUSH_SECONDS,
        ),
        Panel(
            "Verified bytes",
            "Bps",
            "Bytes per second on disk that were read and verified in the background.",
            {SHARD: rate("ps_scrubbed_bytes_total", "shard")},
        ),
    ),
    "Saturation": (
        Panel(
            "Memory of tables",
            "percentunit",
            "Part of the memory for tables that is used. At 100 %, rows that are used rarely are"
            " on disk only.",
            {SHARD: f"{of('ps_memory_bytes')} / {of('ps_memory_budget_bytes')}"},
        ),
        Panel(
            "Memory of the process",
            "bytes",
            "Resident memory of the server.",
            {SHARD: of("process_resident_memory_bytes")},
        ),
        Panel(
            "CPU",
            "short",
            "Processor cores that a server keeps busy.",
            {SHARD: rate("process_cpu_seconds_total", "shard")},
        ),
        Panel(
            "Requests in flight",
            "bytes",
            "Bytes of requests and replies in the memory of a shard.",
            {SHARD: of("ps_inflight_bytes")},
        ),
        Panel(
            "Open files",
            "percentunit",
            "Part of the permitted open files and connections that are in use.",
            {SHARD: f"{of('process_open_fds')} / {of('process_max_fds')}"},
        ),
    ),
}
