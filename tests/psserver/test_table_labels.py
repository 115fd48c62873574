"""Series by table: few, whatever tables there are, and counters that never fall."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from peers import Peer, with_server
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from psserver.metrics.labels import OTHER, Folded, FoldedHistogram, TableLabels, summed
from psserver.metrics.tables import TableCollector
from psserver.metrics.traffic import TrafficCollector
from psserver.stats import ServiceStats
from storage.errors import UnknownTable
from storage.histogram import Histogram

HOSTILE = ["a" * 128, "le", 'x"} 1\nps_ready{a="', "\\", "", "ü", OTHER, "table", "a\nb", "{}"]


class Numbers:
    """Tables by name, with the number of each."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self._next = itertools.count(1)

    def make(self, *names: str) -> None:
        for name in names:
            self.numbers[name] = next(self._next)

    def number(self, name: str) -> int:
        if name not in self.numbers:
            raise UnknownTable(name)
        return self.numbers[name]


def test_the_oldest_tables_have_series_and_keep_them() -> None:
    tables = Numbers()
    labels = TableLabels(2, tables.number)
    tables.make("z", "y", "a")
    assert labels.choose(sorted(tables.numbers)) == {"z", "y"}
    del tables.numbers["z"]
    tables.make("b")
    assert labels.choose(sorted(tables.numbers)) == {"y", "a"}
    del tables.numbers["y"]
    tables.make("y", "c")  # a new table of the same name is not the old one
    assert labels.choose(sorted(tables.numbers)) == {"a", "b"}
    assert labels.choose([*sorted(tables.numbers), "dropped meanwhile"]) == {"a", "b"}


def test_no_table_takes_the_name_of_the_rest() -> None:
    tables = Numbers()
    tables.make(OTHER, "a")
    assert TableLabels(5, tables.number).choose(list(tables.numbers)) == {"a"}


def test_the_sum_of_the_other_tables_never_falls() -> None:
    rng, folded = random.Random(1), Folded()
    counts: dict[str, float] = {}
    own: set[str] = set()
    last = total = 0.0
    for step in range(400):
        match rng.randrange(4):
            case 0:
                counts[f"t{step}"] = 0.0
            case 1 if counts:
                counts.pop(rng.choice(sorted(counts)))
            case 2 if counts:
                own.add(rng.choice(sorted(counts)))
        for name in counts:
            counts[name] += 1.0
            total += 1.0
        found = folded.fold(((name, (), n) for name, n in counts.items()), frozenset(own))
        assert found.get((OTHER,), 0.0) >= last
        assert {key[0] for key in found} <= {OTHER, *own}
        for name in own & set(counts):
            assert found[(name,)] == counts[name]
        last = found.get((OTHER,), 0.0)
    assert 0 < last <= total


def test_a_table_that_gets_its_own_series_leaves_its_counts_in_the_sum() -> None:
    folded, mine = Folded(), ("hit",)
    assert folded.fold([("a", mine, 5), ("b", mine, 7)], frozenset()) == {(OTHER, "hit"): 12}
    found = folded.fold([("a", mine, 6), ("b", mine, 8)], frozenset("a"))
    assert found == {("a", "hit"): 6, (OTHER, "hit"): 5 + 8}


def test_sizes_are_summed_as_they_are() -> None:
    assert summed([("a", (), 3), ("b", (), 4), ("c", (), 5)], frozenset("b")) == {
        (OTHER,): 8,
        ("b",): 4,
    }


def test_histograms_of_other_tables_are_added() -> None:
    one, two = Histogram((1.0, 2.0)), Histogram((1.0, 2.0))
    for value in (0.5, 1.5, 9.0):
        one.add(value)
        two.add(value + 1)
    metric = HistogramMetricFamily("ps_x_seconds", "Of the test.", labels=("table",))
    FoldedHistogram((1.0, 2.0)).fill(metric, [("a", one), ("b", two), ("c", two)], frozenset("a"))
    values = {
        (each.labels["table"], each.labels.get("le", each.name)): each.value
        for each in metric.samples
    }
    assert values["a", "1.0"] == 1
    assert values["a", "+Inf"] == 3
    assert values[OTHER, "2.0"] == 2  # of both: 1.5 is in the second bucket
    assert values[OTHER, "+Inf"] == 6
    assert values[OTHER, "ps_x_seconds_sum"] == 2 * two.sum


# ---- a shard with many tables


class Crowded:
    """Stands for a shard that has these tables, some of them with names that no client can give."""

    gpu = None

    def __init__(self, names: list[str], real: Any) -> None:
        self._numbers = {name: at for at, name in enumerate(names)}
        self._real = real

    def tables(self) -> list[str]:
        return sorted(self._numbers)

    def number_of(self, name: str) -> int:
        return self._numbers[name]

    def __getattr__(self, name: str) -> Any:
        return lambda table: getattr(self._real, name)("t")


def scraped(names: list[str], most: int) -> tuple[str, float]:
    """The page of a server that has these tables and served requests on all, and its seconds."""

    async def act(peer: Peer) -> tuple[str, float]:
        shard: Any = Crowded(names, peer.server._shard)
        stats = ServiceStats()
        for name in names:
            for method in ("Pull", "Push", "Delete"):
                stats.used(method, name, 1, 8)
            stats.waited(name, 0.1)
        registry = CollectorRegistry()
        labels = TableLabels(most, shard.number_of)
        registry.register(TableCollector(shard, labels))
        registry.register(TrafficCollector(shard, stats, labels))
        start = time.thread_time()
        return generate_latest(registry).decode(), time.thread_time() - start

    page: tuple[str, float] = with_server(act)
    return page


def samples(page: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for metric in text_string_to_metric_families(page):
        for sample in metric.samples:
            yield sample.name, sample.labels, sample.value


def test_4096_tables_have_no_more_series_than_100() -> None:
    names = [f"table{at}" for at in range(4096)]
    few, _ = scraped(names[:101], 100)
    page, seconds = scraped(names, 100)
    assert seconds < 5
    assert len(page.splitlines()) == len(few.splitlines())
    assert len(page.splitlines()) < 8000
    tables = {labels["table"] for _, labels, _ in samples(page) if "table" in labels}
    assert tables == {*names[:100], OTHER}
    requests = {
        (labels["table"], labels["method"]): value
        for name, labels, value in samples(page)
        if name == "ps_requests_total"
    }
    assert requests[OTHER, "Pull"] == 4096 - 100
    assert requests["table0", "Pull"] == 1
    assert sum(requests.values()) == 3 * 4096


@pytest.mark.parametrize("most", [0, 3, 100])
def test_hostile_names_are_label_values_and_nothing_else(most: int) -> None:
    page, _ = scraped(HOSTILE, most)
    found = list(samples(page))
    tables = {labels["table"] for _, labels, _ in found if "table" in labels}
    assert OTHER in tables
    assert tables <= {*HOSTILE}
    assert len(tables) == min(most, len(HOSTILE) - 1) + 1
    assert all(re.fullmatch(r"ps_[a-z_]+", name) for name, _, _ in found)
    keys = sum(value for name, _, value in found if name == "ps_keys_total")
    assert keys == 3 * len(HOSTILE)
    assert np.isfinite([value for _, _, value in found]).all()
