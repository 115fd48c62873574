"""Write rules.yaml, the alerts for Prometheus, from the list ALERTS.

    python -m deploy.components.monitoring.alerts > deploy/components/monitoring/rules.yaml
    python -m deploy.components.monitoring.alerts --plain > rules.yaml

The first command writes an object for the Prometheus operator, the second one a rule file for a
Prometheus without Kubernetes. A test compares the first file with the output of ``text``. The
numbers are in thresholds.py.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import yaml

from deploy.components.monitoring import thresholds as at

SHARD = "sum by (namespace, shard)"
HEADER = "# Written by alerts.py, whose first lines have the command.\n"


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert.

    hold        how long the expression must have a result before the alert fires, for example "5m"
    critical    somebody must act now; otherwise a warning
    expression  PromQL; each series of its result is one alert
    summary     what has happened; may contain labels and the value, in Prometheus' template syntax
    section     section of docs/runbook.md that says what to do
    """

    name: str
    hold: str
    critical: bool
    expression: str
    summary: str
    section: str

    def rule(self) -> dict[str, Any]:
        """Return the alert in the form of a rule file of Prometheus."""
        held = {"for": self.hold} if self.hold else {}
        return {
            "alert": self.name,
            "expr": self.expression,
            **held,
            "labels": {"severity": "critical" if self.critical else "warning"},
            "annotations": {
                "summary": self.summary,
                "action": f"docs/runbook.md, {self.section}",
            },
        }


# Methods that change rows. Others fail for lack of memory or disk space too, such as the creation
# of a table that is too large, but then pushes may go on.
CHANGES = "Push|Exchange|Delete|Stream|Lane"


def _refused(reason: str) -> str:
    """Return the expression for shards that refused changes for a reason in the last minutes."""
    matchers = f'{{reason="{reason}",method=~"{CHANGES}"}}'
    return f"{SHARD} (\nincrease(ps_errors_total{matchers}[5m])\n) > 0"


def _p99(histogram: str, window: str = "5m") -> str:
    """Return the expression for the 99th percentile of a histogram, by shard."""
    buckets = f"sum by (namespace, shard, le) (rate({histogram}_bucket[{window}]))"
    return f"histogram_quantile(0.99,\n{buckets})"


# The claim for checkpoints. The chart replaces both names.
CHECKPOINTS = '{namespace="ps", persistentvolumeclaim="ps-checkpoints"}'


def _late(window: str) -> str:
    """Return the name of the recording rule for the part of the changes in a window of time that
    reached their subscribers too late.
    """
    return f"ps:late_changes:ratio_rate{window}"


def _burns(burn: tuple[float, str, str]) -> str:
    """Return the expression for shards that use up their error budget too fast. Those with few
    changes are left out: a single late change is a large part of them.

    burn  (burn rate, long window, short window), as in thresholds.py
    """
    rate, *windows = burn
    permitted = f"{rate} * (1 - {at.FRESH_PART})"
    late = [f"{_late(window)} > {permitted}" for window in windows]
    changes = f"sum by (namespace, job, shard) (increase(ps_freshness_seconds_count[{windows[0]}]))"
    return "\nand ".join([*late, f"{changes} > {at.FRESH_CHANGES}"])


LATE = {  # name -> expression of the recording rules
    _late(window): "1 - sum by (namespace, job, shard)"
    f' (rate(ps_freshness_seconds_bucket{{le="{at.FRESH_SECONDS}"}}[{window}]))\n'
    f"/ sum by (namespace, job, shard) (rate(ps_freshness_seconds_count[{window}]))"
    for window in (*at.FAST_BURN[1:], *at.SLOW_BURN[1:])
}
TOO_LATE = (
    f"{{{{ $value | humanizePercentage }}}} of the changes of shard {{{{ $labels.shard }}}} reach"
    f" their subscribers later than {at.FRESH_SECONDS:g} s"
)
LATENCY = _p99("ps_request_duration_seconds")

ALERTS = (
    Alert(
        "PsShardDown",
        at.DOWN,
        True,
        "group by (namespace, shard) (last_over_time(ps_ready[7d]))\n"
        "unless group by (namespace, shard) (ps_ready)",
        "Shard {{ $labels.shard }} cannot be scraped, although it could be in the last 7 days.",
        "lost node",
    ),
    Alert(
        "PsShardNotReady",
        "15m",
        False,
        "ps_ready == 0",
        "Shard {{ $labels.shard }} has not been ready for 15 minutes.",
        "broken revision",
    ),
    Alert(
        "PsDiskFull",
        "",
        True,
        _refused("DISK_FULL"),
        "Shard {{ $labels.shard }} refuses changes, because its disk is full.",
        "full disk",
    ),
    Alert(
        "PsDiskLow",
        "5m",
        False,
        f"ps_disk_free_bytes / ps_disk_size_bytes < {at.DISK_FREE}",
        "Shard {{ $labels.shard }} has only {{ $value | humanizePercentage }} of its disk free.",
        "growing a claim",
    ),
    Alert(
        "PsCheckpointDiskLow",
        "5m",
        False,
        f"kubelet_volume_stats_available_bytes{CHECKPOINTS}\n"
        f"/ kubelet_volume_stats_capacity_bytes{CHECKPOINTS}\n"
        f"< {at.DISK_FREE}",
        "The claim {{ $labels.persistentvolumeclaim }}, for checkpoints, has only"
        " {{ $value | humanizePercentage }} free.",
        "full disk",
    ),
    Alert(
        "PsFsyncSlow",
        "10m",
        False,
        f"{_p99('ps_log_fsync_duration_seconds')} > {at.FSYNC_SECONDS}",
        "One of 100 syncs of the version log of shard {{ $labels.shard }} takes longer than"
        " {{ $value | humanizeDuration }}.",
        "slow disk",
    ),
    Alert(
        "PsLogStalled",
        "2m",
        True,
        "ps_version > ps_log_durable_version\nand changes(ps_log_durable_version[5m]) == 0",
        "For 5 minutes, no change of shard {{ $labels.shard }} has reached its disk, although some"
        " wait for it. A power loss would lose them.",
        "slow disk",
    ),
    Alert(
        "PsOutOfMemory",
        "",
        True,
        _refused("OUT_OF_MEMORY"),
        "Shard {{ $labels.shard }} refuses changes, because its tables have no memory left.",
        "little memory",
    ),
    Alert(
        "PsLittleMemory",
        "5m",
        False,
        'ps_budget_headroom_bytes{budget="process"} / ps_budget_limit_bytes{budget="process"}'
        f" < {at.MEMORY_HEADROOM}",
        "Shard {{ $labels.shard }} has only {{ $value | humanizePercentage }} of its memory limit"
        " free.",
        "little memory",
    ),
    Alert(
        "PsOverloaded",
        "10m",
        False,
        f'{SHARD} (rate(ps_errors_total{{reason="OVERLOADED"}}[5m])) > {at.OVERLOADED_PER_SECOND}',
        "Shard {{ $labels.shard }} refuses {{ $value | humanize }} requests per second as"
        " overloaded.",
        "overload",
    ),
    Alert(
        "PsSlowShard",
        "10m",
        False,
        f"{LATENCY}\n"
        f"> on (namespace) group_left () {at.SLOW_FACTOR} * quantile by (namespace) (0.5,\n"
        f"{LATENCY})\n"
        f"> {at.SLOW_SECONDS}",
        f"Requests take {at.SLOW_FACTOR} times as long on shard {{{{ $labels.shard }}}} as on most"
        " shards.",
        "slow shard",
    ),
    Alert(
        "PsDamagedRows",
        "",
        True,
        "sum by (namespace, shard, table) (ps_lost_rows) > 0",
        "Table {{ $labels.table }} has {{ $value }} rows on shard {{ $labels.shard }} that cannot"
        " be read.",
        "damaged block",
    ),
    Alert(
        "PsDamagedBlocks",
        "",
        False,
        "sum by (namespace, shard, table) (ps_damaged_blocks) > 0\n"
        "unless sum by (namespace, shard, table) (ps_lost_rows) > 0",
        "Table {{ $labels.table }} has damaged blocks on the disk of shard {{ $labels.shard }}. All"
        " rows can still be read.",
        "damaged block",
    ),
    Alert(
        "PsFlushFails",
        "",
        False,
        f"{SHARD} (increase(ps_flush_failures_total[15m])) > 0",
        "Shard {{ $labels.shard }} cannot flush its changed rows, so its log grows.",
        "overdue flush",
    ),
    Alert(
        "PsFlushOverdue",
        "5m",
        False,
        f"time() - ps_flush_timestamp_seconds > {at.FLUSH_SECONDS}",
        "The last flush of shard {{ $labels.shard }} was {{ $value | humanizeDuration }} ago, so a"
        " restart takes longer.",
        "overdue flush",
    ),
    Alert(
        "PsCheckpointFails",
        "",
        False,
        f"{SHARD} (increase(ps_checkpoint_failures_total[1h])) > 0",
        "Shard {{ $labels.shard }} could not write its part of a checkpoint.",
        "failed checkpoint",
    ),
    Alert(
        "PsCheckpointOverdue",
        "15m",
        False,
        f"time() - ps_checkpoint_timestamp_seconds > {at.CHECKPOINT_SECONDS}\n"
        "and changes(ps_version[1h]) > 0",
        "The last checkpoint of shard {{ $labels.shard }} was {{ $value | humanizeDuration }} ago,"
        " and its rows have changed since.",
        "failed checkpoint",
    ),
    Alert(
        "PsSubscriberLags",
        "5m",
        False,
        f"ps_subscriber_lag_seconds > {at.SUBSCRIBER_LAG_SECONDS}",
        "A subscriber of shard {{ $labels.shard }} is {{ $value | humanizeDuration }} late.",
        "late subscriber",
    ),
    Alert(
        "PsFreshnessBurnsFast",
        "2m",
        True,
        _burns(at.FAST_BURN),
        f"{TOO_LATE}, in the last {at.FAST_BURN[1]} and in the last {at.FAST_BURN[2]}.",
        "late changes",
    ),
    Alert(
        "PsFreshnessBurnsSlowly",
        "15m",
        False,
        _burns(at.SLOW_BURN),
        f"{TOO_LATE}, in the last {at.SLOW_BURN[1]} and in the last {at.SLOW_BURN[2]}.",
        "late changes",
    ),
    Alert(
        "PsCertificateExpires",
        "15m",
        False,
        f"ps_certificate_expiry_timestamp_seconds - time() < {at.CERTIFICATE_DAYS} * 86400",
        "The certificate '{{ $labels.certificate }}' of shard {{ $labels.shard }} expires in"
        " {{ $value | humanizeDuration }}.",
        "expiring certificate",
    ),
    Alert(
        "PsPolicyInvalid",
        "5m",
        True,
        "ps_policy_valid == 0",
        "Shard {{ $labels.shard }} cannot read its policy file. It uses an older policy, so rights"
        " that were revoked since then still hold.",
        "invalid policy",
    ),
    Alert(
        "PsAuditFails",
        "",
        True,
        f"{SHARD} (increase(ps_audit_failures_total[15m])) > 0",
        "Shard {{ $labels.shard }} cannot write its audit log.",
        "audit log",
    ),
    Alert(
        "PsGpuPaused",
        "15m",
        False,
        "ps_gpu_paused == 1",
        "Shard {{ $labels.shard }} moves no rows to its GPU, because the GPU has no memory left.",
        "paused GPU",
    ),
)


_Dumper = type("_Dumper", (yaml.SafeDumper,), {})  # writes strings of several lines as blocks


def _scalar(dumper: Any, value: str) -> Any:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


yaml.add_representer(str, _scalar, Dumper=_Dumper)


def groups() -> list[dict[str, Any]]:
    """Return the groups of rules, in the form of a rule file of Prometheus."""
    recorded = [{"record": name, "expr": expression} for name, expression in LATE.items()]
    return [
        {"name": "embedding-ps-freshness", "rules": recorded},
        {"name": "embedding-ps", "rules": [alert.rule() for alert in ALERTS]},
    ]


def text(plain: bool = False) -> str:
    """Return the contents of rules.yaml.

    plain  a rule file, without the object for the Prometheus operator around it
    """
    rules = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": "ps",
            "namespace": "ps",
            "labels": {"app.kubernetes.io/part-of": "embedding-ps"},
        },
        "spec": {"groups": groups()},
    }
    dumped: str = yaml.dump(
        rules["spec"] if plain else rules, Dumper=_Dumper, sort_keys=False, width=100
    )
    return HEADER + dumped


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the alerts for Prometheus.")
    parser.add_argument("--plain", action="store_true", help="a rule file, without Kubernetes")
    print(text(parser.parse_args().plain), end="")
