"""Sampled distances between pushes give the miss rates that a simulated LRU memory has."""

from __future__ import annotations

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
from storage.reuse import EDGES, POINTS, Reuse
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
    """Counts the misses of memories of several sizes."""

    def __init__(self, sizes: list[int]) -> None:
        self.caches: dict[int, OrderedDict[int, None]] = {size: OrderedDict() for size in sizes}
        self.misses = dict.fromkeys(sizes, 0)
        self.asked = 0

    def push(self, keys: list[int]) -> None:
        self.asked += len(keys)
        for size, cache in self.caches.items():
            self.misses[size] += sum(key not in cache for key in keys)
            for key in keys:
                cache[key] = None
                cache.move_to_end(key)
            while len(cache) > size:
                cache.popitem(last=False)


def analysis_of(reuse: Reuse, shards: int = 1) -> Any:
    return SimpleNamespace(
        reuses=Histogram(EDGES, reuse.counts), first_pushes=reuse.first, shard_rows=(0,) * shards
    )


@pytest.mark.parametrize("draw", [zipf, uniform, Loop()], ids=["zipf", "uniform", "loop"])
def test_the_curve_is_that_of_a_simulated_memory(
    draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.reuse.EVERY", 2)
    monkeypatch.setattr("storage.reuse.STRIDE", 4)
    schema = TableSchema(
        name="t",
        dim=2,
        optimizer=make_optimizer("sgd", None, {}),
        initializer=make_initializer("zeros", {}),
    )
    table, rng = Table(schema, Budget(1 << 30)), np.random.default_rng(0)
    sizes = [500, 1500, 4000, 6000, 10_000]
    simulated = Lru(sizes)
    for version in range(1, PUSHES + 1):
        keys = draw(rng).astype(np.uint64)
        simulated.push(keys.tolist())
        gradients = np.ones((len(keys), 2), np.float32)
        table.push(keys, gradients, np.ones(len(keys), np.uint32), version=version, step=version)
    curve = lru(analysis_of(table.reuse))
    assert curve is not None
    for size in sizes:
        assert curve.at(size) == pytest.approx(simulated.misses[size] / simulated.asked, abs=0.04)
    assert (np.diff(curve.rows) > 0).all()
    assert (np.diff(curve.misses) <= 0).all()
    two = lru(analysis_of(table.reuse, 2))  # each shard has half of the memory
    assert two is not None
    assert two.at(1000) == pytest.approx(curve.at(500))


def test_a_thousandth_of_the_keys_is_sampled_and_memory_is_bounded() -> None:
    reuse, sampled = Reuse(), 0
    for version in range(1, 200_001):
        if (some := reuse.pushed(version, 640)) is not None:
            sampled += len(range(640)[some])
    assert sampled == pytest.approx(200_000 * 640 / 1024, rel=0.05)
    assert len(reuse._versions) <= POINTS
    assert reuse._versions == sorted(reuse._versions)
    reuse.add(np.array([0, 100_000, 1], np.uint64))
    assert reuse.first == 1
    distances = EDGES[np.flatnonzero(reuse.counts)]
    assert distances == pytest.approx([640 * 100_000, 640 * 200_000], rel=0.3)


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
