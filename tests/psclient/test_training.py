"""Fifty random steps of every optimizer from push to pull, over one shard and over three.

An embedding may differ from the reference's by 1e-5 of itself and FLOOR: what came back to near 0
still has the rounding of the larger numbers that it was on the way, of up to 4e-9 a step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from references import REFERENCES
from servers import Cluster

from psclient import Client, PulledRows
from storage.optimizers import OPTIMIZERS, make_optimizer

DIMS = (1, 8, 33, 64)
STEPS = 50
KEYS = np.arange(12) << 58 | 5  # of every shard
FLOOR = 1e-7
TABLES = {f"trained.{name}.{dim}": (name, dim) for name in OPTIMIZERS for dim in DIMS}


@pytest.fixture(scope="module")
def pushes() -> list[Any]:
    """Slots of KEYS, gradients by dim, learning rate and global step of each push."""
    random, made, step = np.random.default_rng(0), [], 0
    for _ in range(STEPS):
        step += int(random.integers(1, 6))
        slots = random.permutation(len(KEYS))[: random.integers(1, len(KEYS) + 1)]
        gradients = {
            dim: random.normal(scale=0.1, size=(len(slots), dim)).astype(np.float32) for dim in DIMS
        }
        made.append((slots, gradients, float(np.float32(random.uniform(0.01, 0.1))), step))
    return made


def train(cluster: Cluster, pushes: list[Any]) -> dict[str, tuple[np.ndarray, PulledRows]]:
    """By table: embeddings before, and rows after all pushes, each to all tables at once."""
    with Client(cluster.addresses, timeout=60.0) as client:
        tables = [
            client.create_table(
                name, dim, optimizer=optimizer, initializer="normal", initializer_args={"std": 0.1}
            )
            for name, (optimizer, dim) in TABLES.items()
        ]
        before = {table.name: table.pull(KEYS) for table in tables}
        for slots, gradients, lr, step in pushes:
            push = {table.name: (KEYS[slots], gradients[table.dim]) for table in tables}
            client.push(push, lr=lr, step=step)
        return {table.name: (before[table.name], table.pull_rows(KEYS)) for table in tables}


@pytest.fixture(scope="module")
def one(cluster1: Cluster, pushes: list[Any]) -> dict[str, tuple[np.ndarray, PulledRows]]:
    return train(cluster1, pushes)


@pytest.fixture(scope="module")
def three(cluster3: Cluster, pushes: list[Any]) -> dict[str, tuple[np.ndarray, PulledRows]]:
    return train(cluster3, pushes)


@pytest.mark.parametrize("table", TABLES)
def test_fifty_steps_agree_with_the_reference_over_one_shard_and_three(
    one: Any, three: Any, pushes: list[Any], table: str
) -> None:
    optimizer, dim = TABLES[table]
    before, rows = one[table]
    reference = REFERENCES[optimizer](
        make_optimizer(optimizer, None, {}), before.astype(np.float64)
    )
    for slots, gradients, lr, step in pushes:
        reference.step(slots.tolist(), gradients[dim].astype(np.float64), lr, step)
    expected = reference.rows()[:, :dim]
    assert (abs(expected - before) > 1e-3).mean() > 0.9  # it has learnt something
    assert_allclose(rows.embeddings, expected, rtol=1e-5, atol=FLOOR)
    also_before, also = three[table]
    assert_array_equal(also_before, before)
    assert_array_equal(also.embeddings, rows.embeddings)
    assert_array_equal(also.frequencies, rows.frequencies)
    assert_array_equal(also.steps, rows.steps)
