"""Sampled distances since the last push give the miss rates of a simulated LRU memory."""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from psclient.tools.misses import as_json, curves, lru
from psclient.tools.summary import Histogram
from storage.arena import Budget
from storage.initializers import make_initializer
from storage.optimizers import make_optimizer
from storage.reuse import EDGES, MOST, Reuse
from storage.schema import TableSchema
from storage.table import Table

KEYS, BATCH, PUSHES = 8000, 200, 1500


def zipf(rng: Any) -> Any:
    return np.unique((rng.zipf(1.2, 2 * BATCH) - 1) % KEYS)[:BATCH]


def uniform(rng: Any) -> Any:
    return np.unique(rng.integers(0, KEYS, BATCH))


class Loop:
    def __init__(self) -> None:
        self.at = 0

    def __call__(self, rng: Any) -> Any:
        self.at = (self.at + BATCH) % KEYS
        return np.arange(self.at, self.at + BATCH) % KEYS


class Lru:
    """Counts the misses of memories of several sizes, which keep the rows that were pushed last."""

    def __init__(self, sizes: list[int]) -> None:
        self.caches: dict[int, OrderedDict[int, None]] = {size: OrderedDict() for size in sizes}
        self.misses = dict.fromkeys(sizes, 0)
        self.asked = 0
        self.rows: set[int] = set()

    def use(self, keys: list[int], push: bool) -> None:
        """Pull or push keys. Keys without a row neither hit nor miss."""
        there = [key for key in keys if key in self.rows]
        self.asked += len(there)
        for size, cache in self.caches.items():
            self.misses[size] += sum(key not in cache for key in there)
            for key in keys if push else ():
                cache[key] = None
                cache.move_to_end(key)
            while len(cache) > size:
                cache.popitem(last=False)
        if push:
            self.rows.update(keys)


def analysis_of(reuse: Reuse, rows: int = KEYS, shards: int = 1) -> Any:
    pushes, pulls = reuse.counts
    return SimpleNamespace(
        reuses=Histogram(EDGES, pushes),
        pull_reuses=Histogram(EDGES, pulls),
        first_pushes=reuse.first,
        rows=rows,
        shard_rows=(0,) * shards,
    )


def table_of() -> Table:
    schema = TableSchema(
        name="t",
        dim=2,
        optimizer=make_optimizer("sgd", None, {}),
        initializer=make_initializer("zeros", {}),
    )
    return Table(schema, Budget(1 << 30))


def push(table: Table, keys: Any, version: int) -> None:
    gradients = np.ones((len(keys), 2), np.float32)
    table.push(keys, gradients, np.ones(len(keys), np.uint32), version=version, step=version)


def streams() -> list[Any]:
    """Every combination of draw, pulls and share; those that are not listed here are slow."""
    quick = {("zipf", 3, 16), ("uniform", 0, 1), ("loop", 3, 1)}
    draws = {"zipf": zipf, "uniform": uniform, "loop": Loop()}
    found = []
    for name, pulls, share in itertools.product(draws, [0, 3], [1, 16]):
        marks = () if (name, pulls, share) in quick else pytest.mark.slow
        found.append(
            pytest.param(draws[name], pulls, share, marks=marks, id=f"{name}-{pulls}-{share}")
        )
    return found


@pytest.mark.quick(1)
@pytest.mark.parametrize(("draw", "pulls", "share"), streams())
def test_the_curve_is_that_of_a_simulated_memory(
    draw: Any, pulls: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two pushes are ``pulls`` pulls, which are not distributed like the pushes."""
    monkeypatch.setattr("storage.reuse.SHARE", share)
    monkeypatch.setattr("storage.reuse.EVERY", 2)
    table, rng = table_of(), np.random.default_rng(0)
    sizes = [500, 1500, 4000, 6000, 10_000]
    simulated = Lru(sizes)
    for version in range(1, PUSHES + 1):
        keys = draw(rng).astype(np.uint64)
        simulated.use(keys.tolist(), push=True)
        push(table, keys, version)
        for _ in range(pulls):
            some = uniform(rng)[:: 2 - version % 2].astype(np.uint64)
            simulated.use(some.tolist(), push=False)
            table.pull(some, "serve", np.empty((len(some), 2), np.float32))
    curve = lru(analysis_of(table.reuse, len(table)))
    assert curve is not None
    near = 0.04 if share == 1 else 0.06  # a sample of 500 keys
    for size in sizes:
        assert curve.at(size) == pytest.approx(simulated.misses[size] / simulated.asked, abs=near)
    assert (np.diff(curve.rows) > 0).all()
    assert (np.diff(curve.misses) <= 0).all()
    assert curve.at(len(table)) == 0
    two = lru(analysis_of(table.reuse, 2 * len(table), 2))  # each shard has half of the memory
    assert two is not None
    assert two.at(1000) == pytest.approx(curve.at(500))


def test_distances_are_counted_in_keys_not_in_pushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 keys are pushed twice and pulled: a memory of n rows misses all but the last n."""
    monkeypatch.setattr("storage.reuse.SHARE", 1)
    monkeypatch.setattr("storage.reuse.EVERY", 1)
    table, keys = table_of(), np.arange(1000, dtype=np.uint64)
    for version in (1, 2):
        push(table, keys, version)
    table.pull(keys, "serve", np.empty((1000, 2), np.float32))
    expected = np.histogram(keys, np.concatenate([[0], EDGES]))[0]
    for counts in table.reuse.counts:
        assert counts[:-1].tolist() == expected.tolist()


def test_pulls_that_are_not_counted_are_no_uses() -> None:
    table, keys = table_of(), np.arange(1000, dtype=np.uint64)
    push(table, keys, 1)
    for _ in range(100):
        table.pull(keys, "serve", np.empty((1000, 2), np.float32), count=False)
    assert table.reuse.counts[1].sum() == 0
    table.pull(np.arange(500, 2000, dtype=np.uint64), "serve", np.empty((1500, 2), np.float32))
    assert table.reuse.counts[1].sum() == 500, "keys without a row are not counted"


def test_the_sample_is_bounded_and_stands_for_all_keys() -> None:
    table = table_of()
    for version in range(1, 101):
        push(table, np.arange(version * 10_000, (version + 1) * 10_000, dtype=np.uint64), version)
    reuse = table.reuse
    assert len(reuse._sampled) == MOST
    used = np.count_nonzero(reuse._sampled[:, 1])
    assert MOST / 4 < used <= 3 * MOST / 4
    assert reuse._room == 3 * MOST / 4 - used
    assert reuse.first == pytest.approx(1_000_000, rel=0.05)
    again = np.arange(500_000, 520_000, dtype=np.uint64)
    push(table, again, 101)
    pushes, _ = reuse.counts
    assert pushes.sum() == pytest.approx(1_020_000 - reuse.first, abs=1)
    seen = np.flatnonzero(reuse.pushes)
    assert EDGES[seen] == pytest.approx(520_000, rel=0.3)
    assert reuse.pushes.sum() == pytest.approx(20_000, rel=0.3)


def test_no_count_is_negative_whatever_the_sample_says() -> None:
    for keys in range(1, 40):
        table = table_of()
        for version in (1, 2, 3):
            push(table, np.arange(keys, dtype=np.uint64), version)
        pushes, _ = table.reuse.counts
        assert pushes.min() >= 0
        assert pushes.sum() == max(0, 3 * keys - table.reuse.first)


def test_rows_whose_last_push_was_before_the_start_are_known_to_be_unknown() -> None:
    table, keys = table_of(), np.arange(10_000, dtype=np.uint64)
    push(table, keys, 1)
    table.reuse = Reuse()
    table.pull(keys, "serve", np.empty((len(keys), 2), np.float32))
    push(table, keys, 2)
    pushes, pulls = table.reuse.counts
    assert pushes[-1] == pytest.approx(10_000, rel=0.2)
    assert pulls[-1] == 10_000
    assert table.reuse.first == 0
    curve = lru(analysis_of(table.reuse, 10_000))
    assert curve is not None
    assert curve.at(9000) > 0.5
    assert curve.at(10_000) == 0


def test_lfu_is_exact_where_a_range_of_frequencies_ends() -> None:
    """10 rows pushed once, 5 twice, 2 ten times."""
    edges = np.array([1.0, 2, 4, 8, 16])
    found: Any = SimpleNamespace(
        table="t",
        checkpoint=None,
        time=1.0,
        rows=17,
        row_bytes=40,
        index_bytes=0,
        tiers=(),
        occurrences=40,
        frequencies=Histogram(edges, np.array([0, 10, 5, 0, 2, 0])),
        occurrences_between=np.array([0, 10, 10, 0, 20, 0]),
        reuses=Histogram(np.empty(0), np.empty(0, np.int64)),
        pull_reuses=Histogram(np.empty(0), np.empty(0, np.int64)),
        first_pushes=0,
        shard_rows=(17,),
    )
    [(policy, curve)] = curves(found).items()
    assert policy == "lfu"
    assert curve.rows.tolist() == [0, 2, 7, 17]
    assert curve.misses.tolist() == [1, 0.5, 0.25, 0]
    assert json.loads(json.dumps(as_json(found)))["misses"] == {
        "lfu": [[0, 1], [2, 0.5], [7, 0.25], [17, 0]]
    }
