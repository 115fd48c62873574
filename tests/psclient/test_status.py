"""Client.status: the state and live figures of all shards, of those that are down too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fakes import fake_server, info
from servers import Cluster, eventually, free_ports

from psclient import Client, discovery
from psclient.aio import AsyncClient
from psclient.status import Watch, status
from psproto import RELEASE
from psproto import ps_pb2 as pb


@contextmanager
def shard(figures: pb.GetStatusResponse, **methods: Any) -> Iterator[str]:
    """Serve live figures; yields the address."""
    answers = {"InfoService/GetStatus": lambda _, __: figures.SerializeToString()}
    with fake_server(
        answers | {f"InfoService/{name}": each for name, each in methods.items()}
    ) as address:
        yield address


def refusing(code: grpc.StatusCode) -> Any:
    return lambda _, context: context.abort(code, "refused")


def test_the_live_figures_of_all_shards(cluster2: Cluster, connect: Any, name: str) -> None:
    client = connect(cluster2)
    table = client.create_table(name, 4)
    before = client.status()
    table.push(np.arange(50), np.ones((50, 4)))
    table.pull(np.arange(50))

    def counted() -> int:
        pushed = 0
        for old, new in zip(before, client.status(), strict=True):
            assert (new.state, new.release, new.live.start) == ("ready", RELEASE, old.live.start)
            assert new.live.uptime_seconds > old.live.uptime_seconds
            pushed += sum(each.pushed_keys for each in new.live.tables if each.name == name)
        return pushed

    eventually(lambda: counted() == 50)
    assert [each.shard for each in asyncio.run(status_of(cluster2))] == [0, 1]


async def status_of(cluster: Cluster) -> Any:
    async with AsyncClient(cluster.addresses) as client:
        return await client.status()


def test_a_shard_that_is_down_does_not_hide_the_others(cluster1: Cluster) -> None:
    gone = f"127.0.0.1:{free_ports(1)}"
    with Client([*cluster1.addresses, gone]) as client:
        found = client.status(timeout=2.0)
    assert [(each.state, each.live is None) for each in found] == [
        ("misplaced", False),  # it is shard 0 of 1, not of 2
        ("unreachable", True),
    ]


def test_figures_of_a_ready_shard() -> None:
    figures = pb.GetStatusResponse(phase=pb.PHASE_READY, shards=1, release="9", rows=7)
    figures.budgets.add(name="host_bytes", used=1, limit=2)
    figures.budgets.add(name="hbm_bytes", used=3, limit=4)
    figures.log.durable_version = 5
    figures.storage.flush_age_seconds = 6.0
    with shard(figures) as address:
        [found] = status([address])
    assert (found.state, found.problem, found.release, found.rows) == ("ready", None, "9", 7)
    assert (found.memory_bytes, found.memory_budget_bytes) == (1, 2)
    assert (found.gpu_bytes, found.gpu_budget_bytes, found.gpu_paused) == (3, 4, False)
    assert (found.durable_version, found.flush_age_seconds) == (5, 6.0)
    assert found.live == figures


def test_without_a_data_directory_and_a_gpu_their_figures_are_unknown() -> None:
    with shard(pb.GetStatusResponse(phase=pb.PHASE_READY, shards=1)) as address:
        [found] = status([address])
    assert (found.durable_version, found.log_bytes, found.flush_age_seconds) == (None,) * 3
    assert (found.gpu_bytes, found.gpu_budget_bytes, found.gpu_paused) == (None,) * 3


def test_a_shard_that_is_not_ready_says_why() -> None:
    figures = pb.GetStatusResponse(phase=pb.PHASE_RESTORING, shards=1)
    restore = pb.RestoreStatus(name="monday", phase=pb.RestoreStatus.PHASE_HELD)
    methods = {
        "InfoService/GetStatus": lambda _, __: figures.SerializeToString(),
        "InfoService/GetServerInfo": lambda _, __: info(),
        "CheckpointService/Restore": lambda _, __: restore.SerializeToString(),
    }
    with fake_server(methods) as address:
        [found] = status([address])
    assert (found.state, found.live) == ("restoring", figures)
    assert "'monday'" in str(found.problem)


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED]
)
def test_a_shard_that_refuses_the_client_is_forbidden(code: grpc.StatusCode) -> None:
    with fake_server({"InfoService/GetStatus": refusing(code)}) as address:
        [found] = status([address])
    assert (found.state, found.live) == ("forbidden", None)


def test_a_shard_that_hangs_delays_nobody_beyond_the_timeout() -> None:
    with (
        shard(pb.GetStatusResponse(), GetStatus=lambda _, __: time.sleep(3) or b"") as hangs,
        shard(pb.GetStatusResponse(phase=pb.PHASE_READY, shard=1, shards=2)) as ready,
    ):
        found = status([hangs, ready], timeout=0.5)
    assert [each.state for each in found] == ["unreachable", "ready"]


def test_a_watch_keeps_its_connections_and_finds_a_shard_that_comes_back() -> None:
    peers: list[str] = []

    def answer(_: bytes, context: Any) -> bytes:
        peers.append(context.peer())
        return pb.GetStatusResponse(phase=pb.PHASE_READY, shards=1).SerializeToString()

    port = free_ports(1)
    with closing(Watch([f"127.0.0.1:{port}"])) as watch:
        [down] = watch.status(timeout=0.5)
        assert down.state == "unreachable"
        with fake_server({"InfoService/GetStatus": answer}, port=port):
            eventually(lambda: watch.status(timeout=0.5)[0].ready)
            for _ in range(3):
                assert watch.status()[0].ready
    assert len(peers) >= 4
    assert len(set(peers)) == 1


def test_a_watch_closes_the_connection_to_an_address_that_its_shard_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    phases = [pb.PHASE_READY]  # of the server at the former address

    def answer(_: bytes, __: Any) -> bytes:
        return pb.GetStatusResponse(phase=phases[-1], shards=1).SerializeToString()

    with (
        shard(pb.GetStatusResponse(phase=pb.PHASE_READY, shards=1)) as new,
        fake_server({"InfoService/GetStatus": answer}) as former,
    ):
        where = [former]
        monkeypatch.setattr(discovery, "look_up", lambda _: where)
        with closing(Watch("ps:7000")) as watch:
            assert [each.address for each in watch.status()] == [former]
            assert connections_to(former) == 1
            where[:], phases[:] = [new], [pb.PHASE_DRAINING]
            assert [each.address for each in watch.status()] == [new]
            eventually(lambda: connections_to(former) == 0)
            assert connections_to(new) == 1
            where.clear()
            phases[:] = [pb.PHASE_READY]
            monkeypatch.setattr("psclient.status.KEPT_SECONDS", 0.0)
            assert [each.state for each in watch.status(timeout=0.1)] == ["unreachable"]
            eventually(lambda: connections_to(new) == 0)


def connections_to(address: str) -> int:
    """The number of open connections to an address on this machine."""
    remote = f"0100007F:{int(address.rpartition(':')[2]):04X}"
    sockets = [
        line.split()
        for version in ("tcp", "tcp6")  # gRPC uses sockets of version 6 for addresses of version 4
        for line in Path(f"/proc/net/{version}").read_text().splitlines()
    ]
    return sum(each[2].endswith(remote) and each[3] == "01" for each in sockets)
