"""Metrics of tables: tiers, admission, eviction and damage. A scrape looks at each table once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from psserver.errors import Refused
from psserver.metrics.labels import Folded, Labels, TableLabels, fill, summed
from psserver.metrics.reading import read_at_once
from psserver.metrics.samples import counter, gauge
from psserver.shard import Shard
from storage.errors import UnknownTable
from storage.tiers.host import HostTier

TIER = ("table", "tier")
TABLE = ("table",)


class Family(NamedTuple):
    """A metric by table: its name, help text and labels."""

    name: str
    help: str
    labels: tuple[str, ...] = TABLE


GAUGES = (
    Family(
        "ps_table_rows",
        "Rows in a tier. Rows that are in memory and on disk count for memory.",
        TIER,
    ),
    Family(
        "ps_table_bytes",
        "Bytes that a table takes: GPU memory for the tier hbm; memory for the tier host, with"
        " index and counters; disk for the tier lmdb.",
        TIER,
    ),
    Family("ps_waiting_keys", "Keys that are counted but not admitted yet."),
    Family("ps_admission_bytes", "Memory of the counters of keys that are not admitted yet."),
    Family("ps_damaged_blocks", "Blocks on disk that are known to be damaged."),
    Family("ps_lost_rows", "Rows that cannot be read, because a block on disk is damaged."),
)
COUNTERS = (
    Family("ps_tier_hits", "Keys of pulls and pushes whose row was in this tier.", TIER),
    Family("ps_tier_misses", "Keys of pulls and pushes whose row was only in a slower tier.", TIER),
    Family("ps_promotions", "Rows copied from disk to memory, because they were pushed."),
    Family("ps_demotions", "Rows that left memory, because there was no room."),
    Family("ps_flushed_rows", "Changed rows written to disk."),
    Family(
        "ps_reflushed_blocks",
        "Blocks on disk that were written again, because few of their rows were current.",
    ),
    Family("ps_admitted_keys", "Keys that a push admitted."),
    Family("ps_refused_keys", "Keys that a push did not admit, counted once per push."),
    Family(
        "ps_dropped_gradients",
        "Occurrences of keys whose gradients were dropped because the key was not admitted.",
    ),
    Family(
        "ps_expired_counters",
        "Admission counters removed by age, for lack of room, or by an alteration.",
    ),
    Family("ps_evicted_rows", "Rows evicted, by rule.", ("table", "cause")),
)
GPU_COUNTERS = (
    Family("ps_gpu_promotions", "Rows moved to GPU memory, because they are used often."),
    Family("ps_gpu_demotions", "Rows that left GPU memory, because there was no room."),
)

# name of a metric -> (table, values of the other labels, value) of each sample
Values = dict[str, list[tuple[str, Labels, float]]]


class TableCollector(Collector):
    """Collects the rows, bytes, hits and moves of each tier of each table, the keys and rows that
    its rules admitted, refused and evicted, and its damage on disk.

    labels  chooses the tables that have series of their own
    """

    def __init__(self, shard: Shard, labels: TableLabels) -> None:
        self._shard = shard
        self._labels = labels
        self._folded = {family.name: Folded() for family in (*COUNTERS, *GPU_COUNTERS)}

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all tables."""
        yield from read_at_once(self._collect)

    def _collect(self) -> Iterator[Metric]:
        shard, names = self._shard, self._shard.tables()
        own, values = self._labels.choose(names), Values()
        for name in names:
            try:
                _read(shard, name, values)
            except (UnknownTable, Refused):  # dropped since
                continue
        yield gauge("ps_tables", "Tables of this shard.", len(names))
        for family in GAUGES:
            sizes = summed(values.get(family.name, ()), own)
            yield fill(gauge(family.name, family.help, labels=family.labels), sizes)
        for family in COUNTERS if shard.gpu is None else (*COUNTERS, *GPU_COUNTERS):
            counts = self._folded[family.name].fold(values.get(family.name, ()), own)
            yield fill(counter(family.name, family.help, labels=family.labels), counts)


def _read(shard: Shard, name: str, values: Values) -> None:
    """Append the numbers of one table to ``values``. Raises UnknownTable if it was dropped."""
    stats, moves = shard.describe(name)[1], shard.moves(name)
    tally, expired = shard.tally(name)
    found: list[tuple[str, Labels, float]] = [
        ("ps_waiting_keys", (), stats.waiting),
        ("ps_admission_bytes", (), stats.counter_bytes),
        ("ps_damaged_blocks", (), stats.damage[0]),
        ("ps_lost_rows", (), stats.damage[1]),
        ("ps_promotions", (), moves.promotions),
        ("ps_demotions", (), moves.demotions),
        ("ps_flushed_rows", (), moves.flushed),
        ("ps_reflushed_blocks", (), moves.reflushed),
        ("ps_gpu_promotions", (), moves.hbm_promotions),
        ("ps_gpu_demotions", (), moves.hbm_demotions),
        ("ps_admitted_keys", (), tally.admitted),
        ("ps_refused_keys", (), tally.refused),
        ("ps_dropped_gradients", (), tally.dropped),
        ("ps_expired_counters", (), expired),
    ]
    for tier in stats.tiers:
        of = (tier.tier,)
        size = stats.bytes if tier.tier == HostTier.name else tier.bytes
        found += [("ps_table_rows", of, tier.rows), ("ps_table_bytes", of, size)]
        found += [("ps_tier_hits", of, tier.hits), ("ps_tier_misses", of, tier.misses)]
    for cause, count in list(tally.evicted.items()):
        found.append(("ps_evicted_rows", (cause.name.lower(),), count))
    for metric, labels, value in found:
        values.setdefault(metric, []).append((name, labels, value))
