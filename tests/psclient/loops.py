"""Training loops for tests of the pipeline: their batches, tables and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from psclient import Client, Table
from psclient.ticket import Ticket

EVERY = np.arange(60)  # the keys of ``batches``
STEPS = 40  # of the runs with a digit for each step
WRONG = 5  # a batch with wrong keys


class Digits:
    """A table whose row of a key has a 1 in column v if the push of step v is in it."""

    def __init__(self, client: Client, name: str, steps: int = STEPS) -> None:
        self.table = client.create_table(name, steps, optimizer="sgd", lr=1.0, initializer="zeros")
        self.pushed: dict[int, set[int]] = {}  # by step: the keys

    def gradients(self, ticket: Ticket) -> np.ndarray[Any, Any]:
        keys = ticket.keys[self.table.name].keys
        self.pushed[ticket.step] = set(keys.tolist())
        gradients = np.zeros((len(keys), self.table.dim), np.float32)
        gradients[:, ticket.step] = -1
        return gradients

    def expected(self, keys: Any, last: int) -> np.ndarray[Any, Any]:
        """The rows of ``keys`` with the pushes up to that of step ``last``."""
        rows = np.zeros((len(keys), self.table.dim), np.float32)
        for step, some in self.pushed.items():
            if step <= last:
                rows[[key in some for key in keys.tolist()], step] = 1
        return rows

    def check(self, ticket: Ticket, staleness: int) -> int:
        """Check the rows of a batch; return how many of them lack a push that was made."""
        keys, rows = ticket.keys[self.table.name].keys, ticket.rows[self.table.name]
        due = max(ticket.step - staleness, 0)  # number of pushes that must be in the rows
        assert_array_equal(rows[:, :due], self.expected(keys, due - 1)[:, :due])
        every = self.expected(keys, ticket.step - 1)
        assert (rows <= every).all()  # nothing that was not pushed
        return int((rows < every).any(1).sum())


def batches(seed: int, count: int, *sizes: int, among: int = 60) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [[rng.integers(0, among, size) for size in sizes] for _ in range(count)]


def first(batch: Any) -> dict[str, Any]:
    return {"f": batch[0]}


@pytest.fixture(params=["stream", "unary"])
def client2(request: pytest.FixtureRequest, cluster2: Any, connect: Any) -> Client:
    return connect(cluster2, transport=request.param)


@pytest.fixture
def client(cluster2: Any, connect: Any) -> Client:
    return connect(cluster2)


TABLES = {"a": ("adagrad", 5, {}), "b": ("adam", 3, {}), "c": ("ftrl", 8, {})}
FEATURES = {"x": "a", "y": "b", "z": "a", "w": "c"}


def make(client: Client, name: str) -> dict[str, Table]:
    return {
        table: client.create_table(
            f"{name}.{table}",
            dim,
            optimizer=optimizer,
            lr=0.05,
            optimizer_args=arguments,
            initializer="normal",
            seed=3,
        )
        for table, (optimizer, dim, arguments) in TABLES.items()
    }


def keys_of(batch: Any) -> dict[str, Any]:
    x, y, z, w = batch
    return {"x": x.reshape(-1, 2), "y": y, "z": z, "w": w}


def gradient(rows: np.ndarray[Any, Any], step: int) -> np.ndarray[Any, Any]:
    return np.sin(rows * (step + 1)).astype(np.float32)


def blocking(client: Client, tables: dict[str, Table], data: list[Any]) -> list[Any]:
    """Train without a pipeline; return the rows of each step."""
    seen = []
    for step, batch in enumerate(data):
        keys = keys_of(batch)
        given: dict[str, list[Any]] = {table.name: [] for table in tables.values()}
        for feature, short in FEATURES.items():
            given[tables[short].name].append(keys[feature].reshape(-1))
        distinct = {name: client.batch(np.concatenate(each)) for name, each in given.items()}
        rows = client.pull_distinct(distinct)
        seen.append(rows)
        client.push_distinct(
            {name: (distinct[name], gradient(each, step)) for name, each in rows.items()},
            step=step,
        )
    return seen
