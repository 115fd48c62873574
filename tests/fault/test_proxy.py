"""Push through a network that drops, delays and cuts: each push takes effect exactly once.

The oracle: SGD with learning rate 1 on rows that start at 0. Push i has the gradient -4^(i % 8) for
key i // 8. Each base-4 digit of a row then shows how often its push was applied.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from fault.proxy import Proxy, Repeater
from numpy.testing import assert_array_equal
from servers import Cluster

from psclient import Client, PsError
from psclient.errors import DeadlineExceeded, Unavailable

pytestmark = pytest.mark.slow

DIGITS = 8
PUSHES = 320
CLIENTS = 4
ONCE = float(sum(4**digit for digit in range(DIGITS)))  # every digit is 1


@pytest.fixture
def proxies(cluster2: Cluster) -> Iterator[list[Proxy]]:
    made = [Proxy(address, seed) for seed, address in enumerate(cluster2.addresses)]
    yield made
    for proxy in made:
        proxy.close()


def through(proxies: list[Proxy], **options: float) -> Client:
    addresses = [proxy.address for proxy in proxies]
    return Client(addresses, lane="never", **options)  # type: ignore[arg-type]


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run work(0..count - 1) concurrently. Raise the first exception of any."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive(), "a client hangs"
    if errors:
        raise errors[0]


def push_all(cluster: Cluster, addresses: list[str], name: str, transport: Any) -> None:
    """Let several clients push to keys of their own, then check that each push took effect once."""
    with Client(cluster.addresses) as direct:
        table = direct.create_table(name, 2, optimizer="sgd", lr=1.0, initializer="zeros")
        keys_of = [np.arange(PUSHES // DIGITS) + 1000 * number for number in range(CLIENTS)]

        def push(number: int) -> None:
            with Client(addresses, lane="never", transport=transport, timeout=60.0) as client:
                mine = client.table(name)
                for i in range(PUSHES):
                    gradient = np.full((1, 2), -(4.0 ** (i % DIGITS)), np.float32)
                    keys = keys_of[number][i // DIGITS : i // DIGITS + 1]
                    level: Any = (None, "applied", "log", "fsync")[i % 4]
                    mine.push(keys, gradient, step=i, durability=level)

        in_threads(CLIENTS, push)
        for keys in keys_of:
            assert_array_equal(table.pull(keys), np.full((len(keys), 2), ONCE))


@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_every_push_through_cut_connections_is_applied_once(
    cluster2: Cluster, proxies: list[Proxy], name: str, transport: str
) -> None:
    for proxy in proxies:
        proxy.cut(24_000)
        proxy.delay(0.002)
    push_all(cluster2, [proxy.address for proxy in proxies], name, transport)
    assert sum(proxy.cuts for proxy in proxies) >= 10, "the proxy cut hardly anything"


def test_a_push_that_arrives_twice_is_applied_once(cluster2: Cluster, name: str) -> None:
    repeaters = [Repeater(address, seed) for seed, address in enumerate(cluster2.addresses)]
    push_all(cluster2, [repeater.address for repeater in repeaters], name, "unary")
    assert sum(repeater.repeated for repeater in repeaters) >= CLIENTS * PUSHES
    for repeater in repeaters:
        repeater.close()


def test_a_network_that_holds_everything_ends_in_an_error_at_the_deadline(
    proxies: list[Proxy], name: str
) -> None:
    with through(proxies, timeout=60.0) as client:
        client.create_table(name, 2)
    with through(proxies, timeout=1.5) as client:
        table = client.table(name)
        table.pull(np.arange(100))
        for proxy in proxies[:1]:
            with proxy.hold():
                started = time.monotonic()
                with pytest.raises((DeadlineExceeded, Unavailable)) as raised:
                    table.pull(np.arange(100))
                waited = time.monotonic() - started
        assert "shard 0 at" in str(raised.value)
        assert 1.4 <= waited <= 4.0
        assert table.pull(np.arange(100)).shape == (100, 2), "and works again afterwards"


def test_waiting_calls_go_on_when_the_network_does(proxies: list[Proxy], name: str) -> None:
    with through(proxies, timeout=30.0) as client:
        table = client.create_table(name, 2, optimizer="sgd", lr=1.0, initializer="zeros")
        held = [proxy.hold() for proxy in proxies]
        for hold in held:
            hold.__enter__()
        timer = threading.Timer(1.0, lambda: [hold.__exit__(None, None, None) for hold in held])
        timer.start()
        in_threads(4, lambda number: table.push(np.arange(50), np.full((50, 2), -1.0, np.float32)))
        timer.join()
        assert_array_equal(table.pull(np.arange(50)), np.full((50, 2), 4.0))


def test_a_server_that_was_never_there_is_named(name: str) -> None:
    with Client(["127.0.0.1:1"], timeout=1.0) as client, pytest.raises(PsError, match="shard 0 at"):
        client.table(name)
