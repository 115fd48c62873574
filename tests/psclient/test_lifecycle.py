"""Threads, addresses, servers that come late and die."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from servers import Cluster, free_ports
from tables import DIM, summing

from psclient import Client
from psclient.errors import (
    DeadlineExceeded,
    InvalidArgument,
    Unavailable,
)


class TestThreads:
    def test_pushes_of_eight_threads_add_up(self, any_client: Client, name: str) -> None:
        table = summing(any_client, name)
        keys = [np.random.default_rng(n).integers(0, 100, 200) for n in range(8)]
        failures: list[BaseException] = []

        def push(number: int) -> None:
            try:
                for _ in range(20):
                    table.push(keys[number], np.ones((200, DIM), np.float32))
                    table.pull(keys[number])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=push, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        counts = 20.0 * np.bincount(np.concatenate(keys), minlength=100)
        assert_array_equal(table.pull(np.arange(100)), -counts[:, None].repeat(DIM, 1))

    def test_closing_fails_what_waits_and_what_comes(
        self, cluster: Cluster, connect: Any, name: str
    ) -> None:
        client = connect(cluster)
        table = summing(client, name)
        client.close()
        client.close()
        for call in (lambda: table.pull([1]), client.list_tables, lambda: client.batch([1])):
            with pytest.raises(InvalidArgument, match="the client is closed"):
                call()


class TestAddresses:
    @pytest.mark.parametrize("addresses", [[], "127.0.0.1:7000", "", [7000]])
    def test_must_be_a_list(self, addresses: Any) -> None:
        with pytest.raises(
            InvalidArgument, match="addresses must be a non-empty list of 'host:port'"
        ):
            Client(addresses)

    @pytest.mark.parametrize(
        "options",
        [
            {"transport": "udp"},
            {"wire": "int8"},
            {"wire": None},
            *({"timeout": value} for value in (0, float("nan"), float("inf"), "1")),
            *({"client_id": value} for value in (-1, 2**64, 1.5)),
            *({"incarnation": value} for value in (-1, 2**63, "1")),
        ],
        ids=repr,
    )
    def test_options_are_checked_at_birth(self, options: dict[str, Any]) -> None:
        with pytest.raises(InvalidArgument, match=next(iter(options))):
            Client(["127.0.0.1:1"], **options)

    def test_in_another_order_are_refused(self, cluster2: Cluster) -> None:
        first, second = cluster2.addresses
        with (
            Client([second, first], timeout=60) as client,
            pytest.raises(InvalidArgument) as caught,
        ):
            client.list_tables()
        assert str(caught.value) == (
            f"addresses: shard 0 at {second} is shard 1; list the addresses in the order of the"
            " shards"
        )

    def test_too_few_or_too_many_are_refused(self, cluster2: Cluster) -> None:
        first, second = cluster2.addresses
        for given in ([first], [first, second, second]):
            with (
                Client(given, timeout=60) as client,
                pytest.raises(InvalidArgument) as caught,
            ):
                client.list_tables()
            assert str(caught.value) == (
                f"addresses: shard 0 at {first} belongs to a cluster of 2 shards,"
                f" but {len(given)} addresses were given"
            )

    @pytest.mark.parametrize("transport", ["stream", "unary"])
    def test_where_nothing_listens_are_named(self, transport: Any) -> None:
        address = f"127.0.0.1:{free_ports(1)}"
        started = time.monotonic()
        with (
            Client([address], timeout=0.5, transport=transport) as client,
            pytest.raises(Unavailable) as caught,
        ):
            client.list_tables()
        assert time.monotonic() - started < 10
        assert str(caught.value).startswith(f"shard 0 at {address}: failed to connect")


@pytest.mark.slow
class TestLife:
    @pytest.mark.parametrize("transport", ["stream", "unary"])
    def test_a_client_waits_for_servers_that_start_later(
        self, connect: Any, name: str, transport: str
    ) -> None:
        cluster = Cluster(2)
        client = connect(cluster, transport=transport, timeout=60.0)
        cluster.launch()
        try:
            table = summing(client, name)
            table.push([1], np.ones((1, DIM), np.float32))
            assert_array_equal(table.pull([1]), -np.ones((1, DIM), np.float32))
        finally:
            assert cluster.stop() == 0

    def test_a_server_that_stalls_or_dies_is_named_in_time(
        self, start_cluster: Any, connect: Any, name: str
    ) -> None:
        cluster = start_cluster(1)
        clients = [connect(cluster, transport=kind, timeout=1.0) for kind in ("stream", "unary")]
        tables = [summing(client, name) for client in clients]
        expected = np.zeros((1, DIM), np.float32)
        for table in tables:
            assert_array_equal(table.pull([1]), expected)
        (pid,) = cluster.pids(0)
        os.kill(pid, signal.SIGSTOP)
        try:
            for table in tables:
                started = time.monotonic()
                with pytest.raises(DeadlineExceeded, match=f"shard 0 at {cluster.addresses[0]}: "):
                    table.pull([1])
                assert 0.9 < time.monotonic() - started < 3
        finally:
            os.kill(pid, signal.SIGCONT)
        for table in tables:
            assert_array_equal(table.pull([1]), expected)
        assert cluster.stop() == 0
        for table in tables:
            with pytest.raises(Unavailable, match=f"shard 0 at {cluster.addresses[0]}: "):
                table.pull([1])
