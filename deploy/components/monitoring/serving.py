"""Rows of the dashboard about requests: how many, how fast, and what they wait for."""

from __future__ import annotations

from collections.abc import Mapping

from deploy.components.monitoring.panel import SHARD, Kind, Panel, of, quantile, rate

IN_PHASE = f"{of('ps_phase_seconds')} * on (job, shard) group_left (phase) ({of('ps_phase')} == 1)"

SERVING: Mapping[str, tuple[Panel, ...]] = {
    "Overview": (
        Panel(
            "Shards that serve",
            "short",
            "Shards that serve requests, and shards that Prometheus reaches. All others start,"
            " recover, or cannot be reached.",
            {
                "reached": f"count({of('ps_ready')})",
                "serve": f"sum({of('ps_ready')})",
            },
        ),
        Panel(
            "Time in the present phase",
            "s",
            "What each shard is doing, for example recovery or ready, and for how long.",
            {f"{SHARD} {{{{phase}}}}": IN_PHASE},
        ),
        Panel(
            "Failed requests",
            "reqps",
            "Requests per second that the shards refused or could not serve, by reason. Clients"
            " retry OVERLOADED and STARTING. DISK_FULL and OUT_OF_MEMORY need an operator.",
            {"{{reason}}": rate("ps_errors_total", "reason")},
        ),
    ),
    "Traffic": (
        Panel(
            "Requests",
            "reqps",
            "Requests served per second, by method.",
            {"{{method}}": rate("ps_requests_total", "method")},
            Kind.STACKED,
        ),
        Panel(
            "Requests by shard",
            "reqps",
            "Requests served per second. A shard with a line far above the others has a key that"
            " is far more frequent than all others.",
            {SHARD: rate("ps_requests_total", "shard")},
        ),
        Panel(
            "Keys",
            "cps",
            "Keys per second in served requests, by table.",
            {"{{table}}": rate("ps_keys_total", "table")},
            Kind.STACKED,
        ),
        Panel(
            "Bytes of requests",
            "binBps",
            "Bytes per second of keys, rows and gradients in served requests, by method.",
            {"{{method}}": rate("ps_array_bytes_total", "method")},
            Kind.STACKED,
        ),
        Panel(
            "Size of requests and replies, 99th percentile",
            "bytes",
            "Size of the arrays of keys, rows and gradients in a message.",
            {
                "{{method}} request": quantile(0.99, "ps_request_size_bytes", "method"),
                "{{method}} reply": quantile(0.99, "ps_response_size_bytes", "method"),
            },
        ),
        Panel(
            "Requests by lane",
            "reqps",
            "Messages per second, by the way that they take: unary and stream are gRPC, shm is"
            " shared memory on the same host, cuda is GPU memory.",
            {"{{lane}}": rate("ps_request_duration_seconds_count", "lane")},
            Kind.STACKED,
        ),
        Panel(
            "Clients",
            "short",
            "Open gRPC connections, and clients that use the same-host lane (shared memory).",
            {
                f"gRPC, {SHARD}": of("ps_connections"),
                f"lane, {SHARD}": of("ps_lane_clients"),
            },
        ),
    ),
    "Latency": (
        Panel(
            "Latency by method",
            "s",
            "Time that a request takes on the shard, without the network: median and 99th"
            " percentile.",
            {
                "{{method}} p50": quantile(0.5, "ps_request_duration_seconds", "method"),
                "{{method}} p99": quantile(0.99, "ps_request_duration_seconds", "method"),
            },
        ),
        Panel(
            "Latency by shard, 99th percentile",
            "s",
            "A line far above the others is a slow shard, for which every training step waits.",
            {SHARD: quantile(0.99, "ps_request_duration_seconds", "shard")},
        ),
        Panel(
            "Latency by lane, 99th percentile",
            "s",
            "Time that a request takes on the shard, by the way that its message takes.",
            {"{{lane}}": quantile(0.99, "ps_request_duration_seconds", "lane")},
        ),
        Panel(
            "Latency by number of clients, mean",
            "s",
            "Time that a request takes on the shard while that many clients are connected to it.",
            {
                "{{clients}} clients": rate("ps_clients_request_seconds_total", "clients")
                + " / "
                + rate("ps_clients_requests_total", "clients")
            },
        ),
        Panel(
            "Distribution of latency",
            "s",
            "How many requests per second took how long. Two separate bands are two kinds of"
            " requests, for example those that waited for the disk.",
            {"{{le}}": rate("ps_request_duration_seconds_bucket", "le")},
            Kind.HEATMAP,
        ),
    ),
    "Engine": (
        Panel(
            "Busy share of the engine",
            "percentunit",
            "Part of the time in which the engine works. The engine is the thread that reads and"
            " writes all rows of a shard. Close to 100 %, the shard is at its limit.",
            {SHARD: rate("ps_engine_busy_seconds_total", "shard")},
        ),
        Panel(
            "Wait for the engine",
            "s",
            "Time that calls wait until the engine begins with them: median and 99th percentile.",
            {
                f"{SHARD} p50": quantile(0.5, "ps_engine_queue_wait_seconds", "shard"),
                f"{SHARD} p99": quantile(0.99, "ps_engine_queue_wait_seconds", "shard"),
            },
        ),
        Panel(
            "Calls that wait for the engine",
            "short",
            "Number of calls that wait for the engine.",
            {SHARD: of("ps_engine_waiting")},
        ),
        Panel(
            "Failures between requests",
            "cps",
            "Failures per second of moves of rows, and of reads ahead of requests. The log of the"
            " shard says why.",
            {SHARD: rate("ps_engine_failures_total", "shard")},
        ),
    ),
    "Admission and eviction": (
        Panel(
            "Admitted and refused keys",
            "cps",
            "New keys per second that pushes brought: admitted keys get a row, refused ones do"
            " not yet.",
            {
                "{{table}} admitted": rate("ps_admitted_keys_total", "table"),
                "{{table}} refused": rate("ps_refused_keys_total", "table"),
            },
        ),
        Panel(
            "Dropped gradients",
            "cps",
            "Gradients per second that had no effect, because their key has no row yet.",
            {"{{table}}": rate("ps_dropped_gradients_total", "table")},
        ),
        Panel(
            "Keys that are counted",
            "short",
            "Keys that are counted, but have no row yet.",
            {"{{table}}": f"sum by (table) ({of('ps_waiting_keys')})"},
        ),
        Panel(
            "Memory of admission counters",
            "bytes",
            "Memory of the counters of keys that have no row yet.",
            {"{{table}}": f"sum by (table) ({of('ps_admission_bytes')})"},
        ),
        Panel(
            "Evicted rows",
            "cps",
            "Rows per second that the eviction rules deleted, by rule.",
            {"{{table}} {{cause}}": rate("ps_evicted_rows_total", "table, cause")},
        ),
    ),
}
