"""Clients of a real cluster that know one DNS name, and calls that reach the wrong shard."""

from __future__ import annotations

import asyncio
import copy
import json
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from pods import no_such_name
from servers import Cluster
from tables import summing
from typer.testing import CliRunner

from psclient import Client, Follower, Subscriber, discovery
from psclient.aio import AsyncClient
from psclient.errors import InvalidArgument, Unavailable
from psclient.tools.ctl import app

NAME = "ps.test:7000"
KEYS = np.arange(100)  # they belong to all shards
ONES = -np.ones((100, 1), np.float32)  # gradients that add 1 to a row
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def name_leads_to(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """name_leads_to(addresses): what a look-up of NAME returns from now on."""

    def leads(addresses: list[str]) -> None:
        def look_up(name: str) -> list[str]:
            if name != NAME:
                raise no_such_name()
            return addresses

        monkeypatch.setattr(discovery, "look_up", look_up)

    return leads


@pytest.fixture
def named(cluster2: Cluster, name_leads_to: Callable[[list[str]], None]) -> str:
    """A name that leads to both shards, in another order."""
    name_leads_to(cluster2.addresses[::-1])
    return NAME


def pushes(client: Client, table: str) -> None:
    client.table(table).push(KEYS, ONES)


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
class TestOneName:
    def test_every_kind_of_client_finds_all_shards(self, named: str, name: str) -> None:
        with Client(named, timeout=60) as client:
            table = summing(client, name, 1)
            pushes(client, name)
            again = pickle.loads(pickle.dumps(client))  # noqa: S301
            with again:
                pushes(again, name)
            pushes(copy.copy(client), name)
            child = FORK.Process(target=pushes, args=(client, name))
            child.start()
            child.join(60)
            assert child.exitcode == 0

            async def awaits() -> None:
                async with AsyncClient(named, timeout=60) as other:
                    await other.push({name: (KEYS, ONES)})

            asyncio.run(awaits())
            assert_array_equal(table.pull(KEYS), -5 * ONES)
            for where in (named, client):
                with Follower(where, tables=[name]) as follower:
                    follower.wait_for(client.wait_durable(), timeout=60)
                    assert_array_equal(follower.pull(name, KEYS), -5 * ONES)
                with Subscriber(where, tables=[name]) as changes:
                    found = [changes.next(20) for _ in range(2)]
                    assert all(found)
                    assert len(changes.tokens()) == 2

    @pytest.mark.parametrize("wrong", ["ps", "ps:0", "http://ps:7000", "ps:7000/", "a:1,b:1"])
    def test_its_format_is_checked(self, wrong: str) -> None:
        with pytest.raises(InvalidArgument, match=r"^addresses: "):
            Client(wrong)

    def test_a_list_with_one_name_of_many_shards_says_what_to_write(
        self, cluster2: Cluster
    ) -> None:
        port = cluster2.port
        with Client([f"localhost:{port}"], timeout=60) as client:
            text = f"pass 'localhost:{port}', not in a list"
            with pytest.raises(InvalidArgument, match=text):
                client.list_tables()

    def test_a_fork_before_the_first_use(self, named: str, name: str) -> None:
        client = Client(named, timeout=60)
        summing(client, name, 1)
        client.close()
        child = FORK.Process(target=lambda: pushes(Client(named, timeout=60), name))
        child.start()
        child.join(60)
        assert child.exitcode == 0

    def test_a_name_without_shards(self, named: str) -> None:
        gone = "gone.test:7000"
        with Client(gone, timeout=0.5) as client:
            text = f"^{gone}: the host name cannot be resolved: Name or service not known$"
            calls: tuple[Callable[[], object], ...] = (
                client.list_tables,
                lambda: Subscriber(client),
                lambda: Follower(client),
            )
            for call in calls:
                with pytest.raises(Unavailable, match=text):
                    call()


def test_a_subscriber_with_addresses_in_another_order_receives_nothing(cluster2: Cluster) -> None:
    with (
        Subscriber(cluster2.addresses[::-1], timeout=1.0) as changes,
        pytest.raises(
            Unavailable, match=r"this server is shard (\d) of 2, but the client expected"
        ),
    ):
        changes.next(20)


class TestPsctl:
    @staticmethod
    def run(*words: str, exit: int) -> str:
        done = CliRunner().invoke(app, words, env={"PSCTL_SERVERS": NAME, "COLUMNS": "200"})
        assert done.exit_code == exit, done.output
        return done.output

    def test_one_name(self, named: str, name: str) -> None:
        self.run("create", name, "--dim", "4", exit=0)
        assert name in self.run("tables", exit=0)
        shown = json.loads(self.run("status", "--output", "json", exit=0))
        assert [(each["shard"], each["state"]) for each in shown] == [(0, "ready"), (1, "ready")]

    def test_status_shows_what_it_found(
        self, cluster2: Cluster, name_leads_to: Callable[[list[str]], None]
    ) -> None:
        second = cluster2.addresses[1]
        name_leads_to([second])
        shown = json.loads(self.run("status", "--output", "json", exit=3))
        assert [(each["address"], each["state"]) for each in shown] == [
            (NAME, "unreachable"),
            (second, "ready"),
        ]
        assert "found 1 of 2 shards; missing: shard 0" in shown[0]["problem"]
        assert "missing: shard 0" in self.run("tables", exit=3)

    def test_status_without_any_shard(
        self, name_leads_to: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(discovery, "look_up", lambda _: ["127.0.0.1:1"])
        (shown,) = json.loads(self.run("status", "--output", "json", exit=3))
        assert (shown["shard"], shown["state"]) == (0, "unreachable")
        assert shown["problem"].startswith(f"{NAME}: no shard was found; ")


@pytest.mark.parametrize("transport", ["stream", "unary"])
class TestWrongShard:
    """A shard's address leads to another shard for a while, as when pods swap addresses."""

    @pytest.mark.slow
    def test_no_call_takes_effect_there_and_none_fails(
        self, cluster2: Cluster, connect: Any, name: str, transport: Any
    ) -> None:
        client = connect(cluster2, transport=transport)
        table = summing(client, name, 1)
        routes = [link.channel.route for link in client._connect().links]
        right = [route.address for route in routes]
        for _ in range(2):
            for route, address in zip(routes, right[::-1], strict=True):
                route.address = address

            def repair() -> None:
                for route, address in zip(routes, right, strict=True):
                    route.address = address

            timer = threading.Timer(0.7, repair)
            timer.start()
            begun = time.monotonic()
            for call in (
                lambda: table.push(KEYS, ONES),
                lambda: table.pull(KEYS),
                client.list_tables,
                client.wait_durable,
            ):
                call()
            assert time.monotonic() - begun > 0.5
            timer.join()
        assert_array_equal(table.pull(KEYS), -2 * ONES)

    def test_the_error_names_both(
        self, cluster2: Cluster, connect: Any, name: str, transport: Any
    ) -> None:
        client = connect(cluster2, transport=transport)
        table = summing(client, name, 1)
        first, second = (link.channel.route for link in client._connect().links)
        first.address = second.address
        client._timeout = 1.0
        with pytest.raises(Unavailable) as caught:
            table.pull(KEYS)
        text = "this server is shard 1 of 2, but the client expected shard 0 of 2"
        assert text in str(caught.value)
