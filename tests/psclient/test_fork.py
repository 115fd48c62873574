"""Data loaders fork: the same client object pulls in the parent and in its children."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from servers import eventually
from torch.utils.data import DataLoader, Dataset

from psclient import Client, PsError, Table

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),  # from Python 3.12 on
]
FORK = multiprocessing.get_context("fork")
JOIN = 20.0  # seconds
DIM = 4
ROWS = 200


@pytest.fixture(params=["stream", "unary", "lane"])
def client(request: pytest.FixtureRequest, connect: Any, cluster2: Any) -> Client:
    return connect(cluster2, transport=request.param)


def filled(client: Client, name: str) -> Table:
    """A table whose row k is [-k] * DIM."""
    table = client.create_table(name, DIM, optimizer="sgd", lr=1.0, initializer="zeros")
    keys = np.arange(ROWS)
    table.push(keys, np.repeat(keys, DIM).reshape(ROWS, DIM).astype(np.float32))
    return table


def expected(keys: np.ndarray) -> np.ndarray:
    return -np.repeat(keys, DIM).reshape(len(keys), DIM).astype(np.float32)


def check(table: Table, seed: int, pulls: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(pulls):
        keys = random.integers(0, ROWS, 50)
        assert_array_equal(table.pull(keys), expected(keys))


def run_all(children: list[Any], meanwhile: Callable[[], None] = lambda: None) -> None:
    """Start processes, do something, and see every one of them end well."""
    try:
        for child in children:
            child.start()
        meanwhile()
        for child in children:
            child.join(JOIN)
        assert [child.exitcode for child in children] == [0] * len(children)
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
            child.join()


@contextmanager
def busy(work: Callable[[], object], threads: int = 2) -> Iterator[list[int]]:
    """Threads that repeat ``work`` meanwhile; yields how often each has done it."""
    stop = threading.Event()
    done = [0] * threads
    failures: list[Exception] = []

    def loop(number: int) -> None:
        while not stop.is_set():
            try:
                work()
            except Exception as error:
                failures.append(error)
                return
            done[number] += 1

    running = [threading.Thread(target=loop, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield done
    finally:
        stop.set()
        for thread in running:
            thread.join(JOIN)
    assert failures == []
    assert not any(thread.is_alive() for thread in running)


def test_children_pull_while_the_parent_goes_on(client: Client, name: str) -> None:
    table = filled(client, name)
    children = [FORK.Process(target=check, args=(table, seed, 10)) for seed in range(3)]
    run_all(children, lambda: check(table, 9, 10))


@pytest.mark.slow
def test_forks_may_follow_each_other(client: Client, name: str) -> None:
    table = filled(client, name)
    for seed in range(8):
        run_all([FORK.Process(target=check, args=(table, seed, 2))], lambda: check(table, 9, 2))


@pytest.mark.slow
def test_a_fork_may_happen_while_other_threads_have_calls_in_flight(
    client: Client, name: str
) -> None:
    table = filled(client, name)
    keys = np.arange(ROWS)
    with busy(lambda: assert_array_equal(table.pull(keys), expected(keys))) as done:
        for seed in range(10):
            before = list(done)
            run_all([FORK.Process(target=check, args=(table, seed, 3)) for _ in range(2)])
            eventually(lambda before=before: done != before)  # nobody was left behind


def test_no_push_is_lost_or_doubled_by_a_fork(client: Client, name: str) -> None:
    table = client.create_table(name, DIM, optimizer="sgd", lr=1.0, initializer="zeros")
    keys, ones = np.arange(ROWS), np.ones((ROWS, DIM), np.float32)
    with busy(lambda: table.push(keys, ones)) as done:
        for _ in range(10):
            run_all([FORK.Process(target=table.push, args=(keys, ones))])
    assert_array_equal(table.pull(keys), np.full((ROWS, DIM), -(sum(done) + 10), np.float32))


def test_tables_are_made_while_the_process_forks(client: Client, name: str) -> None:
    table = filled(client, name)

    def describe() -> None:
        assert client.describe_table(name).rows == ROWS

    with busy(describe):
        for seed in range(5):
            run_all([FORK.Process(target=check, args=(table, seed, 2))])


def test_a_child_forks_too(client: Client, name: str) -> None:
    table = filled(client, name)

    def parent_and_child() -> None:
        check(table, 1, 2)
        run_all([FORK.Process(target=check, args=(table, 2, 2))], lambda: check(table, 3, 2))

    run_all([FORK.Process(target=parent_and_child)])


def test_a_client_that_never_connected_is_used_by_children(
    cluster2: Any, connect: Any, name: str
) -> None:
    filled(connect(cluster2), name)
    fresh = connect(cluster2)

    def pull() -> None:
        check(fresh.table(name), 1, 2)

    run_all([FORK.Process(target=pull) for _ in range(2)], pull)


def test_a_prefetch_outlives_a_fork_in_the_parent_and_is_refused_in_the_child(
    client: Client, name: str
) -> None:
    table = filled(client, name)
    keys = np.arange(ROWS)
    pending = table.start_pull(keys)

    def refused() -> None:
        with pytest.raises(PsError, match="started before a fork, in the parent process"):
            pending.result()

    run_all([FORK.Process(target=refused)])
    assert_array_equal(pending.result(), expected(keys))


class Pulled(Dataset[torch.Tensor]):
    """Sample i is the row of key i, pulled by whoever loads it."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, key: int) -> torch.Tensor:
        return torch.from_numpy(self.table.pull([key])[0])


def test_a_torch_data_loader_pulls_in_its_workers(client: Client, name: str) -> None:
    table = filled(client, name)
    for _ in range(2):  # epochs: workers are forked anew for each
        batches = []
        for batch in DataLoader(
            Pulled(table), batch_size=50, num_workers=2, multiprocessing_context="fork", timeout=30
        ):
            batches.append(batch.numpy())
            check(table, len(batches), 1)
        assert_array_equal(np.concatenate(batches), expected(np.arange(ROWS)))


def test_forked_children_push_under_identities_of_their_own(
    cluster2: Any, connect: Any, name: str
) -> None:
    client = connect(cluster2, client_id=4242)
    table = client.create_table(name, DIM, optimizer="sgd", lr=1.0, initializer="zeros")
    keys, ones = np.arange(8), np.ones((8, DIM), np.float32)

    def push() -> None:
        for _ in range(5):
            table.push(keys, ones)

    run_all([FORK.Process(target=push) for _ in range(3)], push)
    assert_array_equal(table.pull(keys), np.full((8, DIM), -20, np.float32))
