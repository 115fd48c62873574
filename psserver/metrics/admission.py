"""Metrics of admission and eviction, by table."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from psserver.shard import Shard
from storage.errors import UnknownTable

# (name, help text) of the metrics of admission, by table
RULE_GAUGES = (
    ("ps_waiting_keys", "Keys that are counted but not admitted yet."),
    ("ps_counter_bytes", "Memory of admission counters, in bytes."),
)
RULE_COUNTERS = (
    ("ps_admitted_keys", "Keys that a push admitted."),
    ("ps_refused_keys", "Keys that a push did not admit, counted once per push."),
    (
        "ps_dropped_gradients",
        "Occurrences of keys whose gradients were dropped because the key was not admitted.",
    ),
    (
        "ps_expired_counters",
        "Admission counters removed by age, for lack of room, or by an alteration.",
    ),
)


class AdmissionCollector(Collector):
    """Collects, for each table, counts of the keys and rows that its rules admitted, refused and
    evicted, and the memory of its admission counters.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of each table."""
        waiting, counters = (GaugeMetricFamily(*each, labels=["table"]) for each in RULE_GAUGES)
        admitted, refused, dropped, expired = (
            CounterMetricFamily(*each, labels=["table"]) for each in RULE_COUNTERS
        )
        evicted = CounterMetricFamily(
            "ps_evicted_rows", "Rows evicted, by rule.", labels=["table", "cause"]
        )
        for name in self._shard.tables():
            try:
                stats, (tally, old) = self._shard.describe(name)[1], self._shard.tally(name)
            except UnknownTable:  # dropped since
                continue
            waiting.add_metric([name], stats.waiting)
            counters.add_metric([name], stats.counter_bytes)
            admitted.add_metric([name], tally.admitted)
            refused.add_metric([name], tally.refused)
            dropped.add_metric([name], tally.dropped)
            expired.add_metric([name], old)
            for cause, count in list(tally.evicted.items()):
                evicted.add_metric([name, cause.name.lower()], count)
        yield from (waiting, counters, admitted, refused, dropped, expired, evicted)
