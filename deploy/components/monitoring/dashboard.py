"""Write dashboard.json, the Grafana dashboard, from the list PANELS.

    python deploy/components/monitoring/dashboard.py > deploy/components/monitoring/dashboard.json

A test compares the file with the output of ``text``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

HERE = '{job=~"$job",shard=~"$shard"}'  # the series that the two selection fields of the page allow
WIDTH, HEIGHT = 12, 8  # size of a panel, in units of Grafana's grid, which is 24 wide
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One diagram with lines over time.

    row     heading under which the panel is shown
    unit    Grafana's name of the unit, for example "s", "bytes" or "reqps"
    help    explanation that Grafana shows next to the title
    lines   legend -> PromQL expression; a legend may contain labels, for example {{shard}}
    """

    row: str
    title: str
    unit: str
    help: str
    lines: dict[str, str]


def rate(metric: str, by: str) -> str:
    """Return the PromQL expression for the increase of a counter per second, summed by labels."""
    return f"sum by ({by}) (rate({metric}{HERE}[$__rate_interval]))"


def quantile(fraction: float, metric: str, by: str) -> str:
    """Return the PromQL expression for a quantile of a histogram, by labels."""
    return f"histogram_quantile({fraction}, {rate(metric + '_bucket', f'le, {by}')})"


PANELS = (
    Panel(
        row="Health",
        title="Shards that serve",
        unit="short",
        help="1: the shard serves. 0: it starts or recovers. No line: it cannot be scraped.",
        lines={"shard {{shard}}": f"ps_ready{HERE}"},
    ),
    Panel(
        row="Health",
        title="Failed requests",
        unit="reqps",
        help="Requests per second that a shard refused or could not serve, by reason. Clients"
        " retry OVERLOADED and STARTING. DISK_FULL and OUT_OF_MEMORY need an operator.",
        lines={"{{reason}}": rate("ps_errors_total", "reason")},
    ),
    Panel(
        row="Traffic",
        title="Requests",
        unit="reqps",
        help="Pulls, pushes and deletes per second.",
        lines={"{{method}}": rate("ps_requests_total", "method")},
    ),
    Panel(
        row="Traffic",
        title="Keys per second",
        unit="short",
        help="Keys in pulls, pushes and deletes.",
        lines={"{{method}}": rate("ps_keys_total", "method")},
    ),
    Panel(
        row="Traffic",
        title="Latency, 99th percentile",
        unit="s",
        help="Time that a request takes on the shard, without the network. A line far above the"
        " others is a slow shard.",
        lines={"shard {{shard}}": quantile(0.99, "ps_request_seconds", "shard")},
    ),
    Panel(
        row="Traffic",
        title="Requests in flight",
        unit="bytes",
        help="Bytes of requests and replies in the memory of a shard.",
        lines={"shard {{shard}}": f"ps_inflight_bytes{HERE}"},
    ),
    Panel(
        row="Memory and disk",
        title="Memory of tables",
        unit="percentunit",
        help="Part of the memory for tables that is used. At 1, rows that are used rarely are on"
        " disk only.",
        lines={"shard {{shard}}": f"ps_memory_bytes{HERE} / ps_memory_budget_bytes{HERE}"},
    ),
    Panel(
        row="Memory and disk",
        title="Rows",
        unit="short",
        help="Rows by table and tier: host is memory, lmdb is disk.",
        lines={"{{table}} {{tier}}": f"sum by (table, tier) (ps_table_rows{HERE})"},
    ),
    Panel(
        row="Memory and disk",
        title="Wait for rows on disk, 99th percentile",
        unit="s",
        help="Time that requests waited until their rows were read from disk.",
        lines={"shard {{shard}}": quantile(0.99, "ps_warm_read_seconds", "shard")},
    ),
    Panel(
        row="Memory and disk",
        title="Lost rows",
        unit="short",
        help="Rows that cannot be read, because a block on disk is damaged.",
        lines={"{{table}}": f"sum by (table) (ps_lost_rows{HERE})"},
    ),
    Panel(
        row="Durability",
        title="Age of the last flush",
        unit="s",
        help="A restart replays all changes since the last flush.",
        lines={"shard {{shard}}": f"ps_flush_age_seconds{HERE}"},
    ),
    Panel(
        row="Durability",
        title="Log records that wait for the disk",
        unit="bytes",
        help="Bytes of the version log that are not written to the file yet.",
        lines={"shard {{shard}}": f"ps_log_backlog_bytes{HERE}"},
    ),
    Panel(
        row="Subscribers",
        title="Lag of the slowest subscriber",
        unit="s",
        help="Age of the oldest change that is being sent to a subscriber.",
        lines={"shard {{shard}}": f"ps_subscriber_lag_seconds{HERE}"},
    ),
    Panel(
        row="Subscribers",
        title="Subscribers",
        unit="short",
        help="Open subscriptions.",
        lines={"shard {{shard}}": f"ps_subscribers{HERE}"},
    ),
)


def dashboard() -> dict[str, Any]:
    """Return the dashboard in Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    top, left, heading = 0, 0, ""
    for panel in PANELS:
        if panel.row != heading:
            top, left, heading = top + (HEIGHT if left else 0), 0, panel.row
            panels.append(_box(len(panels), heading, "row", 0, top, 2 * WIDTH, 1))
            top += 1
        box = _box(len(panels), panel.title, "timeseries", left, top, WIDTH, HEIGHT)
        panels.append(box | _content(panel))
        top, left = (top, WIDTH) if left == 0 else (top + HEIGHT, 0)
    return {
        "uid": "embedding-ps",
        "title": "embedding-ps",
        "tags": ["embedding-ps"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _choice("job", ""), _choice("shard", '{job=~"$job"}')]},
        "panels": panels,
    }


def text() -> str:
    """Return the contents of dashboard.json."""
    return json.dumps(dashboard(), indent=1, sort_keys=True) + "\n"


def _box(number: int, title: str, kind: str, x: int, y: int, w: int, h: int) -> dict[str, Any]:
    """Return the fields that all kinds of panels have: number, title, kind, position and size."""
    grid = {"x": x, "y": y, "w": w, "h": h}
    return {"id": number + 1, "title": title, "type": kind, "gridPos": grid}


def _content(panel: Panel) -> dict[str, Any]:
    """Return the fields of a panel with lines: its explanation, unit and queries."""
    return {
        "description": panel.help,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + at), "expr": query, "legendFormat": legend}
            for at, (legend, query) in enumerate(panel.lines.items())
        ],
    }


def _source() -> dict[str, Any]:
    """Return the field in which a reader of the page selects the Prometheus server."""
    return {"name": "datasource", "type": "datasource", "query": "prometheus"}


def _choice(label: str, among: str) -> dict[str, Any]:
    """Return the field in which a reader selects values of ``label``; default: all.

    among  PromQL selector of the series whose values are offered
    """
    return {
        "name": label,
        "type": "query",
        "datasource": SOURCE,
        "query": f"label_values(ps_version{among}, {label})",
        "refresh": 2,  # whenever the time range changes
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }


if __name__ == "__main__":
    print(text(), end="")
