"""Metrics of the policy, of refused callers and of the audit log."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from psserver.metrics.samples import counter, gauge
from psserver.security.guard import Guard


class AccessCollector(Collector):
    """Collects the figures of the guard of a server."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; those of the policy and the audit log have no samples without one."""
        guard, file, audit = self._guard, self._guard.file, self._guard.audit
        refused = counter(
            "ps_refused_calls",
            "Calls and requests that the policy refused.",
            labels=("reason",),
        )
        for reason, count in guard.refused.items():
            refused.add_metric((reason,), count)
        yield refused
        yield counter(
            "ps_policy_loads",
            "Versions of the policy file that were taken.",
            None if file is None else file.loaded,
        )
        yield counter(
            "ps_policy_failures",
            "Changes of the policy file that were not taken, because it was not a valid policy.",
            None if file is None else file.failed,
        )
        yield gauge(
            "ps_policy_valid",
            "1 if the policy file is the policy in force, 0 if an older one is.",
            None if file is None else int(file.valid),
        )
        yield counter(
            "ps_audit_records",
            "Records written to the audit log.",
            None if audit is None else audit.lines,
        )
        yield counter(
            "ps_audit_failures",
            "Records of the audit log that could not be written.",
            None if audit is None else audit.failed,
        )
