"""Durable pushes, deletes and barriers as a trainer sees them, over one shard and three."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from servers import Cluster, alive, eventually, free_ports, serve

from psclient import Client
from psclient.errors import InvalidArgument, NoLog, TableNotFound

DIM = 2
LEVELS = ("applied", "log", "fsync")
KEYS = np.array([-1, 0, 1, 2, -(2**63), 2**63 - 1, 77, 1 << 40])


@pytest.fixture(params=[1, 3], ids=["1 shard", "3 shards"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    return request.getfixturevalue(f"cluster{request.param}")


@pytest.fixture(params=["stream", "unary"])
def client(request: pytest.FixtureRequest, cluster: Cluster, connect: Any) -> Client:
    return connect(cluster, transport=request.param)


def plain(client: Client, name: str, **options: Any) -> Any:
    """A table whose rows are minus the sum of their gradients."""
    return client.create_table(name, DIM, optimizer="sgd", lr=1.0, initializer="zeros", **options)


def ones(count: int) -> np.ndarray:
    return np.full((count, DIM), -1.0, np.float32)


@pytest.fixture
def forgetful() -> Iterator[Client]:
    """A client of a server without a data directory."""
    port = free_ports(1)
    with serve("--port", str(port), "--metrics-port", "0") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with Client([f"127.0.0.1:{port}"], timeout=60.0) as client:
            yield client
        process.terminate()
        process.communicate(timeout=60)


# ---- durability


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("table", LEVELS)
def test_every_level_pushes_and_pulls_alike(
    client: Client, name: str, table: Any, level: Any
) -> None:
    rows = plain(client, f"{name}.{table}.{level}", durability=table)
    assert rows.describe().durability == table
    rows.push(KEYS, ones(len(KEYS)), durability=level)
    rows.push(KEYS, ones(len(KEYS)))
    rows.exchange(KEYS, (KEYS, ones(len(KEYS))), durability=level)
    client.push({rows.name: (KEYS, ones(len(KEYS)))}, durability=level)
    pending = client.start_exchange(
        {rows.name: (KEYS, ones(len(KEYS)))}, {rows.name: KEYS}, durability=level
    )
    assert_array_equal(pending.result()[rows.name], np.full((len(KEYS), DIM), 5.0))


@pytest.mark.parametrize("level", ["", "disk", "LOG", "unspecified"])
def test_an_unknown_level_is_refused_before_anything_leaves(
    client: Client, name: str, level: Any
) -> None:
    message = f"durability must be one of applied, log, fsync, got {level!r}"
    with pytest.raises(InvalidArgument, match=message):
        plain(client, name, durability=level)
    with pytest.raises(TableNotFound):
        client.table(name)
    rows = plain(client, name)
    for call in (
        lambda: rows.push(KEYS, ones(len(KEYS)), durability=level),
        lambda: rows.exchange(KEYS, (KEYS, ones(len(KEYS))), durability=level),
        lambda: rows.delete(KEYS, durability=level),
    ):
        with pytest.raises(InvalidArgument, match=message):
            call()
    assert rows.describe().rows == 0


def test_wait_durable_returns_once_what_was_answered_is_on_disk(client: Client, name: str) -> None:
    rows = plain(client, name)
    for _ in range(5):
        rows.push(np.arange(100), ones(100), durability="applied")
        versions = rows.describe().versions
        on_disk = client.wait_durable()
        assert len(on_disk) == len(versions)
        assert all(disk >= asked for disk, asked in zip(on_disk, versions, strict=True))


def test_pushes_of_many_threads_share_their_way_to_the_disk(client: Client, name: str) -> None:
    rows = plain(client, name, durability="fsync")

    def push_all(number: int) -> None:
        for _ in range(20):
            rows.push(np.arange(50) + number, ones(50))

    threads = [threading.Thread(target=push_all, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rows.pull(np.arange(57)).sum() == 8 * 20 * 50 * DIM


# ---- barriers


def test_a_barrier_stands_behind_what_was_answered_before(client: Client, name: str) -> None:
    rows = plain(client, name)
    rows.push(np.arange(100), ones(100))
    before = rows.describe().versions
    versions = client.barrier("epoch-1")
    assert len(versions) == len(before)
    assert all(at > old for at, old in zip(versions, before, strict=True))
    later = client.barrier("epoch-1")
    assert all(at > old for at, old in zip(later, versions, strict=True))


def test_a_barrier_of_a_bad_name_is_refused(client: Client) -> None:
    with pytest.raises(InvalidArgument, match="barrier name must be"):
        client.barrier("no spaces")


# ---- deletes


def test_deleted_rows_are_gone_and_start_anew(client: Client, name: str) -> None:
    rows = plain(client, name)
    rows.push(KEYS, ones(len(KEYS)), step=3)
    assert rows.delete(KEYS[:3]) == 3
    got = rows.pull_rows(KEYS)
    assert_array_equal(got.found, [False] * 3 + [True] * (len(KEYS) - 3))
    assert_array_equal(got.frequencies[:3], [0, 0, 0])
    assert rows.describe().rows == len(KEYS) - 3
    rows.push(KEYS, ones(len(KEYS)))
    assert_array_equal(rows.pull(KEYS)[:, 0], [1.0] * 3 + [2.0] * (len(KEYS) - 3))
    assert_array_equal(rows.pull_rows(KEYS[:3]).frequencies, [1, 1, 1])


def test_delete_takes_keys_of_any_shape_and_repeated_ones(client: Client, name: str) -> None:
    rows = plain(client, name)
    rows.push(np.arange(10), ones(10))
    assert rows.delete(np.array([[1, 1, 2], [99, 2, 1]])) == 2
    assert rows.delete(np.empty(0, np.int64)) == 0
    assert rows.delete([5]) == 1
    assert rows.delete([5]) == 0
    assert rows.describe().rows == 7


@pytest.mark.parametrize("level", [None, *LEVELS])
def test_deletes_of_every_level(client: Client, name: str, level: Any) -> None:
    rows = plain(client, name)
    rows.push(KEYS, ones(len(KEYS)))
    assert rows.delete(KEYS, durability=level) == len(KEYS)
    assert rows.describe().rows == 0


def test_a_delete_from_an_unknown_table_is_refused(client: Client, name: str) -> None:
    rows = plain(client, name)
    client.drop_table(name)
    with pytest.raises(TableNotFound):
        rows.delete(KEYS)


@pytest.mark.slow
def test_a_delete_larger_than_a_message_is_sent_in_parts(start_cluster: Any, name: str) -> None:
    cluster = start_cluster(2, "--max-message-bytes", "65536", "--max-keys", "5000")
    keys = np.arange(40_000)
    with Client(cluster.addresses, timeout=60.0) as client:
        rows = plain(client, name)
        rows.push(keys, ones(len(keys)))
        assert rows.delete(keys[:-1]) == len(keys) - 1
        assert rows.describe().rows == 1


def test_pushes_and_deletes_of_threads_keep_their_numbers_apart(client: Client, name: str) -> None:
    rows = plain(client, name)

    def work(number: int) -> None:
        for i in range(30):
            keys = np.arange(20) + 1000 * number
            rows.push(keys, ones(20))
            assert_array_equal(rows.pull(keys), np.full((20, DIM), 1.0))
            assert rows.delete(keys) == 20, i

    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert rows.describe().rows == 0


# ---- without a log


def test_a_server_without_a_log_refuses_what_needs_one(forgetful: Client, name: str) -> None:
    with pytest.raises(NoLog) as caught:
        plain(forgetful, name, durability="fsync")
    assert caught.value.reason == "NO_LOG"
    rows = plain(forgetful, name)
    for call in (
        forgetful.wait_durable,
        lambda: forgetful.barrier("b"),
        lambda: rows.push(KEYS, ones(len(KEYS)), durability="fsync"),
        lambda: rows.delete(KEYS, durability="fsync"),
    ):
        with pytest.raises(NoLog):
            call()
    for level in (None, "applied", "log"):
        rows.push(KEYS, ones(len(KEYS)), durability=level)  # type: ignore[arg-type]
    assert rows.delete(KEYS, durability="log") == len(KEYS)


# ---- deaths


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_a_client_outlives_its_servers_and_so_do_its_rows(
    start_cluster: Callable[..., Cluster], name: str, transport: Any
) -> None:
    cluster = start_cluster(2)
    keys = np.arange(500)
    with Client(cluster.addresses, timeout=60.0, transport=transport) as client:
        rows = plain(client, name)
        rows.push(keys, ones(500))
        rows.delete(keys[:7])
        for shard in range(2):
            old = cluster.pids(shard)[-1]
            os.kill(old, signal.SIGKILL)
            eventually(lambda old=old: not alive(old))
            rows.push(keys, ones(500))
            assert rows.delete(keys[7:8]) == 1
        want = np.full((500, DIM), 3.0)
        want[:7] = 2.0
        want[7] = 0.0
        assert_array_equal(rows.pull(keys), want)
        assert client.barrier("after")


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_a_delete_goes_on_where_a_server_has_forgotten_the_client(
    name: str, transport: Any
) -> None:
    """As a push does: what is refused at its first attempt was never applied."""
    port = free_ports(1)
    with Client([f"127.0.0.1:{port}"], timeout=30.0, transport=transport) as client:
        for _ in range(2):
            process = serve("--port", str(port), "--metrics-port", "0")
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                rows = plain(client, name)
                for _ in range(3):
                    rows.delete(KEYS)
                    rows.push(KEYS, ones(len(KEYS)))
                assert rows.delete(KEYS) == len(KEYS)
            finally:
                process.kill()
                process.communicate()
