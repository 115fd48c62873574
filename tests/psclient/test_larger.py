"""Training on tables that are larger than the memory of their shards, beside an unlimited twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from servers import Cluster

from psclient import Client, Table

DIM = 64
KEYS = 8000
BATCH = 400
NAMES = ("user", "item", "query")
SMALL = ("--host-bytes", str(12 << 20))


def tables(client: Client, name: str) -> list[Table]:
    options: dict[str, Any] = {"optimizer": "adagrad", "lr": 0.1, "seed": 7}
    return [client.create_table(f"{name}.{each}", DIM, **options) for each in NAMES]


def keys_of(step: int) -> list[np.ndarray]:
    """Keys of a step for each table: some that are new, and some that are used again and again."""
    drawn = np.random.default_rng(step)
    new = np.arange(step * BATCH // 4, (step + 1) * BATCH // 4)
    return [np.concatenate([new, drawn.zipf(1.1, BATCH) % KEYS]) for _ in NAMES]


def train(client: Client, name: str, steps: int, *, prefetch: bool) -> None:
    """Run steps whose gradients depend on the rows, each in one round trip."""
    made = tables(client, name)
    keys = keys_of(0)
    rows = client.pull({t.name: k for t, k in zip(made, keys, strict=True)})
    for step in range(1, steps + 1):
        following = keys_of(step)
        if prefetch:
            client.prefetch({t.name: k for t, k in zip(made, keys_of(step + 1), strict=True)})
        push = {
            t.name: (k, np.tanh(rows[t.name]) + 0.1 * step) for t, k in zip(made, keys, strict=True)
        }
        pull = {t.name: k for t, k in zip(made, following, strict=True)}
        rows, keys = client.exchange(push, pull, step=step), following


@pytest.mark.parametrize("shards", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_beyond_memory_gives_the_rows_of_a_twin_with_room_for_all(
    start_cluster: Callable[..., Cluster], connect: Any, cluster3: Cluster, name: str, shards: int
) -> None:
    small, twin = connect(start_cluster(shards, *SMALL), timeout=60.0), connect(cluster3)
    train(small, name, 60, prefetch=True)
    train(twin, name, 60, prefetch=False)
    everything = np.arange(KEYS)
    disk = 0
    for mine, other in zip(tables(small, name), tables(twin, name), strict=True):
        ours, theirs = mine.pull_rows(everything), other.pull_rows(everything)
        assert_array_equal(ours.embeddings.view(np.uint32), theirs.embeddings.view(np.uint32))
        assert_array_equal(ours.steps, theirs.steps)
        assert_array_equal(ours.frequencies, theirs.frequencies)
        info = mine.describe()
        disk += info.tiers["lmdb"].rows
        assert sum(tier.rows for tier in info.tiers.values()) == info.rows == ours.found.sum()
    if shards == 1:
        assert disk > 0
        assert info.cache.promotions > 0
        assert info.cache.demotions > 0
