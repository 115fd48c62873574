"""The pipeline: what the rows of each batch contain, its bounds, and what it does after errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from psclient import Client, Pipeline, Table
from psclient.errors import InvalidArgument
from psclient.ticket import Ticket

EVERY = np.arange(60)  # the keys of ``batches``
STEPS = 40  # of the runs with a digit for each step


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


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_without_staleness_training_equals_the_blocking_loop(
    client: Client, name: str, lookahead: int
) -> None:
    data = batches(1, 200, 20, 10, 7, 30)
    tables = make(client, name)
    seen = blocking(client, tables, data)
    wanted = [table.pull_rows(np.arange(60)) for table in tables.values()]
    for table in tables.values():
        client.drop_table(table.name)
    tables = make(client, name)  # the same names, so the same initial rows
    features = {feature: tables[short] for feature, short in FEATURES.items()}
    with Pipeline(client, features, lookahead=lookahead) as pipe:
        for ticket in pipe.over(keys_of, data):
            for table, rows in ticket.rows.items():
                assert_array_equal(rows, seen[ticket.step][table])
            for feature, keys in keys_of(ticket.batch).items():
                distinct = ticket.keys[features[feature].name].keys
                assert_array_equal(distinct[ticket.places[feature]].view(np.int64), keys)
            pipe.push(ticket, {n: gradient(rows, ticket.step) for n, rows in ticket.rows.items()})
    assert (pipe.stats.batches, pipe.stats.pushes, pipe.stats.stale_rows) == (200, 200, 0)
    for table, theirs in zip(tables.values(), wanted, strict=True):
        rows = table.pull_rows(np.arange(60))
        for field in ("embeddings", "steps", "frequencies"):
            assert_array_equal(getattr(rows, field), getattr(theirs, field))


@pytest.mark.parametrize("lookahead", [0, 1, 2, 5])
@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_rows_lack_no_more_pushes_than_allowed(
    client2: Client, name: str, staleness: int, lookahead: int
) -> None:
    digits = Digits(client2, name)
    pipe = Pipeline(client2, {"f": digits.table}, lookahead=lookahead, staleness=staleness)
    lacking = 0
    with pipe:
        for ticket in pipe.over(first, batches(2, STEPS, 25)):
            lacking += digits.check(ticket, staleness)
            pipe.push(ticket, {digits.table.name: digits.gradients(ticket)})
    assert_array_equal(digits.table.pull(EVERY), digits.expected(EVERY, STEPS))
    assert pipe.stats.stale_rows == lacking
    assert bool(lacking) == bool(staleness and lookahead)


class TestTurn:
    def test_a_batch_must_be_pushed_or_skipped_before_the_next(
        self, client: Client, name: str
    ) -> None:
        digits = Digits(client, name)
        pipe = Pipeline(client, {"f": digits.table})
        turns = pipe.over(first, batches(3, 5, 10))
        ticket = next(turns)
        with pytest.raises(InvalidArgument, match=r"the batch of step 0 was neither pushed nor"):
            next(turns)
        pipe.push(ticket, {name: digits.gradients(ticket)})
        with pytest.raises(InvalidArgument, match=r"ticket of step 0: .* no batch is at hand"):
            pipe.push(ticket, {name: digits.gradients(ticket)})

    def test_a_skipped_batch_pushes_nothing(self, client: Client, name: str) -> None:
        digits = Digits(client, name)
        with Pipeline(client, {"f": digits.table}) as pipe:
            for ticket in pipe.over(first, batches(4, STEPS, 25)):
                digits.check(ticket, 0)
                if ticket.step % 3:
                    pipe.skip(ticket)
                else:
                    pipe.push(ticket, {name: digits.gradients(ticket)})
        assert_array_equal(digits.table.pull(EVERY), digits.expected(EVERY, STEPS))
        assert (pipe.stats.pushes, pipe.stats.skipped) == (14, 26)

    @pytest.mark.parametrize("staleness", [0, 1, 3])
    def test_gradients_of_several_batches_go_with_the_last(
        self, client: Client, name: str, staleness: int
    ) -> None:
        digits = Digits(client, name)
        pipe = Pipeline(client, {"f": digits.table}, lookahead=3, staleness=staleness)
        some: list[Ticket] = []
        with pipe:
            for ticket in pipe.over(first, batches(5, STEPS, 25)):
                digits.check(ticket, staleness)
                some.append(ticket)
                if len(some) < 4:
                    pipe.skip(ticket)
                    continue
                batch = client.batch(np.concatenate([each.keys[name].keys for each in some]))
                gradients = np.zeros((len(batch.keys), STEPS), np.float32)
                gradients[:, ticket.step] = -1
                digits.pushed[ticket.step] = set(batch.keys.tolist())
                pipe.push(ticket, {name: (batch, gradients)})
                some.clear()
        assert_array_equal(digits.table.pull(EVERY), digits.expected(EVERY, STEPS))
