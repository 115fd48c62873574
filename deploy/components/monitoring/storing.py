"""Rows of the dashboard about stored rows: tiers, log, subscribers, checkpoints and limits."""

from __future__ import annotations

from collections.abc import Mapping

from deploy.components.monitoring import thresholds
from deploy.components.monitoring.panel import SHARD, Kind, Panel, mean, of, quantile, rate

HITS = rate("ps_tier_hits_total", "table", 'tier="host"')
PROCESS = 'budget="process"'
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
            "cps",
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
            "Bytes written to the log",
            "binBps",
            "Bytes of changes per second that are appended to the version log.",
            {SHARD: rate("ps_log_written_bytes_total", "shard")},
        ),
        Panel(
            "Writes to the log, 99th percentile",
            "s",
            "Duration of a write of waiting changes to the log's file, without the sync to disk.",
            {SHARD: quantile(0.99, "ps_log_write_duration_seconds", "shard")},
        ),
        Panel(
            "Syncs of the log to disk, 99th percentile",
            "s",
            "Duration of a sync (fsync). Pushes with durability fsync wait for it. The red line is"
            " the threshold of an alert.",
            {SHARD: quantile(0.99, "ps_log_fsync_duration_seconds", "shard")},
            limit=thresholds.FSYNC_SECONDS,
        ),
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
            {SHARD: f"clamp_min({of('ps_version')} - {of('ps_log_durable_version')}, 0)"},
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
            "Freshness",
            "s",
            "Time from the reply to a push until its change was written to a subscriber: median"
            " and 99th percentile. The red line is the objective for the 99th percentile.",
            {
                f"{SHARD} p50": quantile(0.5, "ps_freshness_seconds", "shard"),
                f"{SHARD} p99": quantile(0.99, "ps_freshness_seconds", "shard"),
            },
            limit=thresholds.FRESH_SECONDS,
        ),
        Panel(
            "Distribution of freshness",
            "s",
            "How many changes per second reached a subscriber after how long.",
            {"{{le}}": rate("ps_freshness_seconds_bucket", "le")},
            Kind.HEATMAP,
        ),
        Panel(
            "Burn rate of freshness",
            "short",
            "How fast the permitted part of late changes is used up, in the last hour and in the"
            " last six hours. At 1, what is permitted in 30 days lasts for 30 days. The red line"
            " is the threshold of the fast alert.",
            {
                f"{SHARD} {window}": f"{of(f'ps:late_changes:ratio_rate{window}')}"
                f" / (1 - {thresholds.FRESH_PART})"
                for window in (thresholds.FAST_BURN[1], thresholds.SLOW_BURN[1])
            },
            limit=thresholds.FAST_BURN[0],
        ),
        Panel(
            "Bytes to subscribers",
            "binBps",
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
            {SHARD: f"time() - {of('ps_flush_timestamp_seconds')}"},
            limit=thresholds.FLUSH_SECONDS,
        ),
        Panel(
            "Duration of flushes",
            "s",
            "Mean time for writing the changed rows to the data directory, over ten minutes.",
            {SHARD: mean("ps_flush_duration_seconds", "shard", "10m")},
        ),
        Panel(
            "Size of rows and log on disk",
            "bytes",
            "The rows as of the last flush (base), and the version log.",
            {f"base, {SHARD}": of("ps_base_size_bytes"), f"log, {SHARD}": of("ps_log_size_bytes")},
        ),
        Panel(
            "Age of the last checkpoint",
            "s",
            "Time since a shard completed its part of a checkpoint. No line: it has written none"
            " since its start.",
            {SHARD: f"time() - {of('ps_checkpoint_timestamp_seconds')}"},
        ),
        Panel(
            "Duration of checkpoints",
            "s",
            "Mean time that a shard took to write its part of a checkpoint, over the last day.",
            {SHARD: mean("ps_checkpoint_duration_seconds", "shard", "1d")},
        ),
        Panel(
            "Failed flushes and checkpoints",
            "short",
            "Flushes and parts of checkpoints that failed, in the last hour. The log of the shard"
            " says why.",
            {
                f"flushes, {SHARD}": f"increase({of('ps_flush_failures_total')}[1h])",
                f"checkpoints, {SHARD}": f"increase({of('ps_checkpoint_failures_total')}[1h])",
            },
        ),
        Panel(
            "Verified bytes",
            "binBps",
            "Bytes per second on disk that were read and verified in the background.",
            {SHARD: rate("ps_scrubbed_bytes_total", "shard")},
        ),
    ),
    "Saturation": (
        Panel(
            "Used part of each budget",
            "percentunit",
            "The fullest shard of each budget (limit of memory or disk space): process is the"
            " memory of the server, host_bytes that of tables. Tables may use all of host_bytes:"
            " rows that are used rarely are then on disk only.",
            {
                "{{budget}}": f"max by (budget) (1 - {of('ps_budget_headroom_bytes')}"
                f" / {of('ps_budget_limit_bytes')})"
            },
        ),
        Panel(
            "Free memory of the server",
            "percentunit",
            "Free part of the memory limit. The red line is the threshold of an alert.",
            {
                SHARD: of("ps_budget_headroom_bytes", PROCESS)
                + " / "
                + of("ps_budget_limit_bytes", PROCESS)
            },
            limit=thresholds.MEMORY_HEADROOM,
        ),
        Panel(
            "Free disk space",
            "percentunit",
            "Free part of the file system of the data directory. The red line is the threshold of"
            " an alert.",
            {SHARD: f"{of('ps_disk_free_bytes')} / {of('ps_disk_size_bytes')}"},
            limit=thresholds.DISK_FREE,
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
            "Requests that wait for their turn",
            "short",
            "Number of requests for rows that wait, because more arrive than the shard can serve.",
            {SHARD: of("ps_requests_waiting")},
        ),
        Panel(
            "Time spent waiting for a turn",
            "short",
            "Seconds per second, all requests together: the mean number of requests that wait.",
            {SHARD: rate("ps_request_queue_seconds_sum", "shard")},
        ),
        Panel(
            "Open files",
            "percentunit",
            "Part of the permitted open files and connections that are in use.",
            {SHARD: f"{of('process_open_fds')} / {of('process_max_fds')}"},
        ),
    ),
    "Security": (
        Panel(
            "Refused calls",
            "reqps",
            "Calls per second that the policy refused: the caller is unknown, has no right, or"
            " sends more than its budget. The audit log names it.",
            {"{{reason}}": rate("ps_refused_calls_total", "reason")},
        ),
        Panel(
            "Time until the first certificate expires",
            "s",
            "Time until the certificate of a shard expires, or that of the authority that it"
            " trusts, whichever is first. The red line is the threshold of an alert. No line"
            " without TLS.",
            {SHARD: f"min by (shard) ({of('ps_certificate_expiry_timestamp_seconds')}) - time()"},
            limit=thresholds.CERTIFICATE_DAYS * 86400,
        ),
        Panel(
            "Policy file in force",
            "short",
            "1: the shard uses its policy file. 0: the file is not valid, so an older policy is in"
            " force. No line without a policy.",
            {SHARD: of("ps_policy_valid")},
        ),
        Panel(
            "Records of the audit log",
            "cps",
            "Records per second that were written, and those that could not be written. No line"
            " without an audit log.",
            {
                f"written, {SHARD}": rate("ps_audit_records_total", "shard"),
                f"failed, {SHARD}": rate("ps_audit_failures_total", "shard"),
            },
        ),
    ),
    "GPU": (
        Panel(
            "GPU memory of tables",
            "percentunit",
            "Part of the GPU memory for tables (hbm_bytes) that is used. No line without a GPU.",
            {SHARD: f"{of('ps_gpu_bytes')} / {of('ps_gpu_budget_bytes')}"},
        ),
        Panel(
            "Moves between GPU memory and host memory",
            "cps",
            "Rows per second that were moved to the GPU, and that left it. No line without a GPU.",
            {
                "to the GPU": rate("ps_gpu_promotions_total", "job"),
                "to host memory": rate("ps_gpu_demotions_total", "job"),
            },
        ),
        Panel(
            "GPU is not used for more rows",
            "short",
            "1 while a shard moves no rows to its GPU, because the GPU has no memory left. No line"
            " without a GPU.",
            {SHARD: of("ps_gpu_paused")},
        ),
    ),
}
