"""Clients of the same-host lane: when they use it, and what they do when it breaks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lanes import mapped
from numpy.testing import assert_array_equal
from servers import Cluster, Labels, alive, eventually, free_ports, serve
from tables import DIM, integers, summing

from psclient import Client
from psclient.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NoLane,
    SchemaMismatch,
)
from psclient.lanepipe import LanePipe
from psclient.pipe import GrpcPipe
from psproto import routing

FORK = multiprocessing.get_context("fork")
KEYS = np.arange(50)
ONES = np.ones((50, DIM), np.float32)


def pipes(client: Client) -> set[type]:
    return {type(link._pipe) for link in client._connect().links}  # type: ignore[attr-defined]


def lane_clients(cluster: Cluster, shard: int = 0) -> float:
    return cluster.metrics(shard)["ps_lane_clients", Labels()]


def test_requests_are_counted_by_lane(cluster1: Cluster, connect: Any, name: str) -> None:
    def counted() -> dict[str, float]:
        page = cluster1.metrics(0)
        found = {}
        for lane in ("shm", "stream", "unary"):
            labels = Labels(method="Exchange", lane=lane)
            found[lane] = page.get(("ps_request_duration_seconds_count", labels), 0.0)
        return found

    table = summing(connect(cluster1, lane="require"), name)
    others = connect(cluster1, lane="never"), connect(cluster1, lane="never", transport="unary")
    before = counted()
    table.exchange(KEYS, (KEYS, ONES))
    assert counted() == before | {"shm": before["shm"] + 1}
    for client in others:
        client.table(name).exchange(KEYS, (KEYS, ONES))
    assert counted() == {lane: count + 1 for lane, count in before.items()}


def test_a_client_takes_the_lane_by_itself_unless_it_must_not(
    cluster2: Cluster, connect: Any, name: str
) -> None:
    before = lane_clients(cluster2)
    auto, never = connect(cluster2, lane="auto"), connect(cluster2, lane="never")
    table = summing(auto, name)
    table.push(KEYS, ONES)
    assert pipes(auto) == {LanePipe}
    assert lane_clients(cluster2) == before + 1
    assert_array_equal(never.table(name).pull(KEYS), -ONES)
    assert pipes(never) == {GrpcPipe}
    assert lane_clients(cluster2) == before + 1
    auto.close()
    eventually(lambda: lane_clients(cluster2) == before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lane": "always"}, "lane must be 'auto', 'never' or 'require', got 'always'"),
        ({"lane": "require", "transport": "unary"}, "lane='require' needs transport='stream'"),
    ],
)
def test_an_impossible_choice_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        Client(["127.0.0.1:1"], **options)


def refused(cluster: Cluster) -> str:
    """Return why a client that requires the lane is refused; one that need not works on."""
    with Client(cluster.addresses, lane="require") as client, pytest.raises(NoLane) as caught:
        client.list_tables()
    with Client(cluster.addresses) as client:
        table = summing(client, "fallback")
        table.push(KEYS, ONES)
        table.pull(KEYS)
        assert pipes(client) == {GrpcPipe}
    return str(caught.value)


@pytest.mark.slow
def test_the_reason_is_told_where_the_lane_is_required(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(1)
    socket = cluster.directory / "data" / "shard-0" / "lane.sock"
    moved = socket.with_name("moved")
    socket.rename(moved)  # as if the server were on another host, or in a container
    why = refused(cluster)
    assert why.startswith(f"shard 0 at {cluster.addresses[0]}: lane='require', but the lane cannot")
    assert f"cannot connect to {socket}: No such file or directory; the server is on a" in why
    other = subprocess.Popen(  # the socket of a different server
        [sys.executable, "-c", OTHER, str(socket)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    try:
        assert "did not answer" in refused(cluster)
    finally:
        other.kill()
        other.communicate()
    socket.unlink()
    moved.rename(socket)
    with Client(cluster.addresses, lane="require") as client:
        client.list_tables()


OTHER = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("ready", flush=True)
while True:
    listener.accept()[0].close()
"""


@pytest.mark.slow
def test_a_server_without_a_lane_and_one_with_a_limit(tmp_path: Path) -> None:
    def start(*flags: str) -> Any:
        port = free_ports(1)
        server = serve("--port", str(port), "--metrics-port", "0", *flags)
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        return server, f"127.0.0.1:{port}"

    (off, there), (small, here) = start(), start("--lane", str(tmp_path), "--lane-bytes", "1048576")
    try:
        with Client([there], lane="require") as client, pytest.raises(NoLane, match="lane=on"):
            client.list_tables()
        with Client([here]) as client:
            table = summing(client, "fallback")
            assert pipes(client) == {LanePipe}
            table.push(KEYS, ONES)  # the server refuses the memory, and the client uses gRPC
            assert_array_equal(table.pull(KEYS), -ONES)
            assert pipes(client) == {GrpcPipe}
            assert "lane_bytes=1048576" in client._connect().links[0].why  # type: ignore[attr-defined]
    finally:
        for server in (off, small):
            server.terminate()
            server.communicate()
    assert not list(tmp_path.iterdir())


def test_arrays_may_change_once_a_request_is_sent(
    cluster2: Cluster, connect: Any, name: str
) -> None:
    client = connect(cluster2, lane="require")
    table = summing(client, name)
    gradients = ONES.copy()
    pending = client.start_exchange({name: (KEYS, gradients)}, {name: KEYS})
    gradients[:] = 1000
    for link in client._connect().links:  # the requests are sent again
        link._pipe.cancel()
    assert_array_equal(pending.result()[name], -ONES)
    assert_array_equal(table.pull(KEYS), -ONES)


def test_requests_of_all_sizes_share_the_memory(cluster2: Cluster, connect: Any, name: str) -> None:
    client = connect(cluster2, lane="require")
    table = summing(client, name, 64)
    pending, expected = [], np.zeros((20_000, 64), np.float32)
    for i in range(40):
        n = [1, 30, 400, 20_000][i % 4]
        gradients = integers(i, n, 64)
        expected[:n] -= gradients
        keys = np.arange(n)
        pending.append((client.start_exchange({name: (keys, gradients)}, {name: keys}), n))
        if i % 4 == 3:
            each, n = pending.pop(i % len(pending))
            assert each.result()[name].shape == (n, 64)
    assert_array_equal(table.pull(np.arange(20_000)), expected)
    for each, _ in pending:
        each.result()
    for link in client._connect().links:
        assert not link._pipe._waiting


def test_a_table_that_was_created_anew_is_noticed(
    cluster2: Cluster, connect: Any, name: str
) -> None:
    client, other = connect(cluster2, lane="require"), connect(cluster2)
    table = summing(client, name)
    table.push(KEYS, ONES)
    other.drop_table(name)
    summing(other, name, DIM + 1)
    with pytest.raises(SchemaMismatch, match="created anew"):
        table.pull(KEYS)
    assert client.table(name).pull(KEYS).shape == (50, DIM + 1)


def test_a_forked_child_opens_a_lane_of_its_own(cluster2: Cluster, connect: Any, name: str) -> None:
    client = connect(cluster2, lane="require")
    table = summing(client, name)
    table.push(KEYS, ONES)
    mine = [link._pipe for link in client._connect().links]
    results = FORK.SimpleQueue()

    def child() -> None:
        results.put(all(pipe._socket.fileno() == -1 for pipe in mine))
        table.push(KEYS, ONES)
        results.put(pipes(client) == {LanePipe})

    process = FORK.Process(target=child)
    process.start()
    process.join(60)
    assert (results.get(), results.get()) == (True, True)
    assert [link._pipe for link in client._connect().links] == mine
    assert_array_equal(table.pull(KEYS), -2 * ONES)


VICTIM = """
import os, sys
import numpy as np
from psclient import Client
addresses, name, fork = sys.argv[1].split(","), sys.argv[2], sys.argv[3] == "fork"
client = Client(addresses, lane="require")
table = client.table(name)
keys, ones = np.arange(20_000), np.ones((20_000, 4), np.float32)
table.pull(keys)
if fork and not os.fork():
    print("forked", os.getpid(), flush=True)
    import time
    time.sleep(1000)
for i in range(100_000):
    table.exchange(keys, (keys, ones))
    print(i + 1, flush=True)
"""


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_client_that_is_killed_leaves_exact_sums_and_no_memory(
    cluster2: Cluster, connect: Any, name: str, how: str
) -> None:
    """Even if a forked child of it lives on."""
    client = connect(cluster2)
    table = summing(client, name)
    (pid,) = cluster2.pids(0)
    before, registered = mapped(pid), cluster2.metrics(0)["ps_lane_bytes", Labels()]
    command = [sys.executable, "-c", VICTIM, ",".join(cluster2.addresses), name, how]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    lines, child = [], 0
    while len(lines) < 5:
        words = victim.stdout.readline().split()
        if words[0] == "forked":
            child = int(words[1])
        else:
            lines.append(int(words[0]))
    assert mapped(pid) > before
    time.sleep(0.0007)
    victim.kill()
    victim.wait()
    try:
        eventually(lambda: mapped(pid) == before)
        eventually(lambda: cluster2.metrics(0)["ps_lane_bytes", Labels()] == registered)
        assert not child or alive(child)
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
    with victim.stdout:
        told = [int(line) for line in victim.stdout.read().split() if line.isdigit()]
    acknowledged = max([*lines, *told])
    keys = np.arange(20_000)
    rows = -table.pull(keys)
    for shard in range(2):  # a push is atomic on each shard
        of = rows[np.flatnonzero(owners(client, keys) == shard)]
        assert len(np.unique(of)) == 1
        assert of[0, 0] in (acknowledged, acknowledged + 1)


def owners(client: Client, keys: np.ndarray) -> np.ndarray:
    return routing.owners(keys.view(np.uint64), client._connect().shard_map)


@pytest.mark.slow
def test_a_client_returns_to_the_lane_of_a_server_that_was_killed(
    start_cluster: Callable[..., Cluster], connect: Any, name: str
) -> None:
    cluster = start_cluster(2)
    client = connect(cluster, lane="auto")
    strict = connect(cluster, lane="require")
    table = summing(client, name)
    pushes = 0
    for round_ in range(3):
        for _ in range(5):
            table.push(KEYS, ONES)
            strict.table(name).push(KEYS, ONES)
            pushes += 2
        pid = cluster.pids(0)[-1]
        os.kill(pid, signal.SIGKILL)
        table.push(KEYS, ONES)
        strict.table(name).push(KEYS, ONES)
        pushes += 2
        eventually(lambda n=round_: len(cluster.pids(0)) == n + 2)
        assert_array_equal(table.pull(KEYS), -pushes * ONES)
        assert_array_equal(strict.table(name).pull(KEYS), -pushes * ONES)
        table.pull(KEYS)
        assert pipes(client) == pipes(strict) == {LanePipe}


@pytest.mark.slow
def test_a_server_that_hangs_is_noticed_at_the_deadline(
    start_cluster: Callable[..., Cluster], connect: Any, name: str
) -> None:
    cluster = start_cluster(1)
    client = connect(cluster, lane="require")
    table = summing(client, name)
    table.push(KEYS, ONES)
    (pid,) = cluster.pids(0)
    os.kill(pid, signal.SIGSTOP)
    client._timeout = 1.0
    try:
        with pytest.raises(DeadlineExceeded):
            table.pull(KEYS)
    finally:
        os.kill(pid, signal.SIGCONT)
    client._timeout = 60.0
    table.push(KEYS, ONES)
    assert_array_equal(table.pull(KEYS), -2 * ONES)
