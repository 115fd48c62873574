"""Subscribers and followers of real servers: restarts, broken connections, slow readers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from fault.proxy import Proxy
from servers import Cluster, eventually, free_ports, serve

from psclient import Change, Client, Follower, PsError, Subscriber, shardstream
from psclient.errors import (
    InvalidArgument,
    LogDiverged,
    NoLog,
    ResourceExhausted,
    Unavailable,
    VersionCompacted,
)

DIM = 4


def table_of(client: Client, name: str, dim: int = DIM) -> Any:
    """A table whose rows are the sums of what was pushed."""
    return client.create_table(name, dim, optimizer="sgd", lr=1.0, initializer="zeros")


def give(table: Any, keys: Any, value: float = 1.0) -> None:
    table.push(keys, np.full((len(keys), table.dim), -value, np.float32))


def up_to(changes: Subscriber, versions: tuple[int, ...]) -> list[Change]:
    """Changes until every shard is at its version."""
    found: list[Change] = []
    at = [-1] * len(versions)
    while any(mine < theirs for mine, theirs in zip(at, versions, strict=True)):
        change = changes.next(20)
        assert change is not None, f"at {at}, not at {versions}"
        found.append(change)
        if not change.more:
            at[change.shard] = change.version
    return found


def rows_of(changes: list[Change]) -> dict[int, tuple[float, ...]]:
    """What is left of rows and deletes, newer over older."""
    held: dict[int, tuple[int, tuple[float, ...]]] = {}
    for change in changes:
        for i, key in enumerate(change.keys.tolist()):
            version = int(change.versions[i])
            if key in held and held[key][0] > version:
                continue
            if change.kind == "deletes":
                held.pop(key, None)
            else:
                assert change.rows is not None
                held[key] = version, tuple(change.rows[i].tolist())
    return {key: row for key, (_, row) in held.items()}


def pulled(table: Any, keys: Any) -> dict[int, tuple[float, ...]]:
    got = table.pull_rows(np.asarray(keys))
    return {
        int(np.uint64(key)): tuple(row.tolist())
        for key, row, found in zip(keys, got.embeddings, got.found, strict=True)
        if found
    }


# ---- changes of all shards


def test_all_shards_are_followed_each_in_its_order(
    cluster3: Cluster, connect: Callable[..., Client], name: str
) -> None:
    client = connect(cluster3)
    table = table_of(client, name)
    keys = np.arange(1000)
    give(table, keys)
    with Subscriber(cluster3.addresses, tables=[name]) as changes:
        found = up_to(changes, client.wait_durable())
        assert rows_of(found) == pulled(table, keys)
        for i in range(5):
            give(table, keys[: 100 + i])
        table.delete(keys[50:60])
        found += up_to(changes, client.barrier("end"))
        assert rows_of(found) == pulled(table, keys)
        assert [c.barrier for c in found if c.kind == "barrier"][-3:] == ["end"] * 3
        for shard in range(3):
            versions = [c.version for c in found if c.shard == shard and not c.more]
            assert versions == sorted(versions)
        assert all(changes.tokens())
        first = next(c for c in found if c.kind == "created")
        assert first.schema is not None
        assert (first.schema.name, first.dim) == (name, DIM)


@pytest.mark.parametrize("start", ["snapshot", "earliest"])
def test_content_and_state(cluster1: Cluster, connect: Any, name: str, start: Any) -> None:
    client = connect(cluster1)
    table = client.create_table(name, DIM, optimizer="adagrad")
    give(table, np.arange(10))
    versions = client.wait_durable()
    options = {"tables": [name], "start": start}
    with Subscriber(client, content="keys", **options) as changes:
        rows = [c for c in up_to(changes, versions) if c.kind == "rows"]
        assert sorted(np.concatenate([c.keys for c in rows]).tolist()) == list(range(10))
        assert all(c.rows is None and c.steps is None for c in rows)
    with Subscriber(client, content="values_and_state", **options) as changes:
        rows = [c for c in up_to(changes, versions) if c.kind == "rows"]
        assert [c.rows.shape for c in rows] == [(10, 2 * DIM)]  # type: ignore[union-attr]
        assert rows[0].frequencies.tolist() == [1] * 10  # type: ignore[union-attr]
        assert rows[0].steps.tolist() == [0] * 10  # type: ignore[union-attr]
    with Subscriber(client, wire="bfloat16", **options) as changes:
        rows = [c for c in up_to(changes, versions) if c.kind == "rows"]
        order = np.argsort(rows[0].keys)
        exact = table.pull(np.arange(10))
        assert np.allclose(rows[0].rows[order], exact, rtol=0.01)  # type: ignore[index]


def test_tokens_go_on_where_another_subscriber_was(
    cluster2: Cluster, connect: Any, name: str
) -> None:
    client = connect(cluster2)
    table = table_of(client, name)
    keys = np.arange(200)
    give(table, keys)
    found: list[Change] = []
    tokens = None
    for i in range(5):
        with Subscriber(cluster2.addresses, tables=[name], tokens=tokens) as changes:
            found += up_to(changes, client.wait_durable())
            tokens = changes.tokens()
        give(table, keys[i * 10 : i * 10 + 50])
    with Subscriber(cluster2.addresses, tables=[name], tokens=tokens) as changes:
        found += up_to(changes, client.wait_durable())
    assert rows_of(found) == pulled(table, keys)
    assert [c.kind for c in found].count("snapshot") == 2


def test_a_closed_subscriber_ends_and_who_waits_is_told(cluster1: Cluster, name: str) -> None:
    changes = Subscriber(cluster1.addresses, tables=[name], start="latest")
    ended = threading.Event()

    def wait() -> None:
        for _ in changes:
            pass
        ended.set()

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    changes.close()
    assert ended.wait(5)
    thread.join()
    assert changes.next(0.1) is None
    changes.close()


def test_coalescing_ends_with_the_same_rows(cluster1: Cluster, connect: Any, name: str) -> None:
    client = connect(cluster1)
    table = table_of(client, name)
    rng = np.random.default_rng(0)
    keys = np.arange(300)
    with (
        Subscriber(client, tables=[name], start="snapshot") as plain,
        Subscriber(client, tables=[name], coalesce_ms=30, coalesce_rows=500) as coalesced,
    ):
        versions = client.wait_durable()
        every, few = up_to(plain, versions), up_to(coalesced, versions)
        for i in range(60):
            some = rng.choice(keys, 50, replace=False)
            if i % 4:
                give(table, some, float(i))
            else:
                table.delete(some)
        versions = client.wait_durable()
        every, few = every + up_to(plain, versions), few + up_to(coalesced, versions)
        assert rows_of(every) == rows_of(few) == pulled(table, keys)
        assert sum(len(c.keys) for c in few) < sum(len(c.keys) for c in every)


# ---- what can go wrong


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"start": "now"}, "start must be one of"),
        ({"content": "all"}, "content must be one of"),
        ({"wire": "int8"}, "wire must be one of"),
        ({"tokens": [b"", b""]}, "each of 1 shards, got 2"),
        ({"when_lost": "ignore"}, "when_lost must be"),
        ({"tables": "user"}, "tables must be a list"),
        ({"tables": []}, "tables must name at least one table"),
        ({"coalesce_ms": -1}, r"coalesce_ms must be an integer in 0..2\^32-1, got -1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_sent(options: Any, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        Subscriber(["127.0.0.1:1"], **options)


def test_bad_tokens_are_raised(cluster1: Cluster, cluster2: Cluster, name: str) -> None:
    with Subscriber(cluster1.addresses, tables=[name], start="latest") as changes:
        changes.next(20)
        (token,) = changes.tokens()
    flipped = token[:-1] + bytes([token[-1] ^ 1])
    with (
        Subscriber(cluster1.addresses, tables=[name], tokens=[flipped]) as changes,
        pytest.raises(InvalidArgument, match=r"token .* is malformed"),
    ):
        changes.next(20)
    with (
        Subscriber(cluster2.addresses, tables=[name], tokens=[token, b""]) as changes,
        pytest.raises(LogDiverged),
    ):
        list(changes)
    with Subscriber(
        cluster2.addresses, tables=[name], tokens=[token, token], when_lost="snapshot"
    ) as changes:
        kinds = [changes.next(20).kind for _ in range(4)]  # type: ignore[union-attr]
        assert kinds.count("snapshot") == 2


def test_no_server_is_unavailable() -> None:
    with (
        Subscriber([f"127.0.0.1:{free_ports(1)}"], timeout=0.5) as changes,
        pytest.raises(Unavailable),
    ):
        changes.next(20)


@pytest.mark.slow
def test_a_shard_without_a_directory_has_no_log() -> None:
    port = free_ports(1)
    process = serve("--port", str(port), "--metrics-port", "0")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with Subscriber([f"127.0.0.1:{port}"]) as changes, pytest.raises(NoLog):
            changes.next(20)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def proxied(start_cluster: Any) -> Iterator[tuple[Cluster, Proxy]]:
    cluster = start_cluster(1)
    proxy = Proxy(cluster.addresses[0], 1)
    try:
        yield cluster, proxy
    finally:
        proxy.close()


@pytest.mark.slow
def test_broken_connections_lose_nothing(
    proxied: tuple[Cluster, Proxy], connect: Any, name: str
) -> None:
    cluster, proxy = proxied
    client = connect(cluster)
    table = table_of(client, name)
    keys = np.arange(2000)
    give(table, keys)
    proxy.cut(60_000)
    with (
        Subscriber([proxy.address], chunk_bytes=4096) as changes,
        Follower([proxy.address]) as follower,
    ):
        found = []
        rng = np.random.default_rng(1)
        for i in range(40):
            some = rng.choice(keys, 200, replace=False)
            give(table, some, float(i)) if i % 5 else table.delete(some)
            if i % 10 == 9:
                found += up_to(changes, client.wait_durable())
        versions = client.wait_durable()
        found += up_to(changes, versions)
        follower.wait_for(versions, 20)
        assert np.array_equal(follower.pull(name, keys), table.pull(keys, mode="serve"))
    assert proxy.cuts > 3
    assert len({c.stream for c in found}) > 2
    assert rows_of(found) == pulled(table, keys)


def kill(cluster: Cluster, shard: int, how: int = signal.SIGKILL) -> None:
    """End a shard's process, and wait until another has taken its place."""
    before = cluster.pids(shard)
    os.kill(before[-1], how)
    eventually(lambda: len(cluster.pids(shard)) > len(before), 60)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_restart_of_the_server_is_not_noticed(
    start_cluster: Any, connect: Any, name: str, how: int
) -> None:
    cluster = start_cluster(2)
    client = connect(cluster, timeout=60.0)
    table = table_of(client, name)
    keys = np.arange(3000)
    give(table, keys)
    client.wait_durable()
    with (
        Subscriber(client, chunk_bytes=2048) as changes,
        Follower(client) as follower,
        Subscriber(client, chunk_bytes=2048) as stopped,
    ):
        found = [changes.next(20) for _ in range(6)]  # in the middle of its snapshot
        stopped.next(20)
        follower.wait_for((0, 0), 20)
        kill(cluster, 0, how)
        for i in range(5):
            give(table, keys[i * 100 : i * 100 + 500], float(i))
        table.delete(keys[:50])
        kill(cluster, 1, how)
        give(table, keys[20:70])
        versions = client.wait_durable()
        found += up_to(changes, versions)  # type: ignore[operator]
        follower.wait_for(versions, 30)
        assert np.array_equal(follower.pull(name, keys), table.pull(keys, mode="serve"))
        assert len(follower) == len(pulled(table, keys))
        up_to(stopped, versions)
    snapshot = max(i for i, c in enumerate(found) if c is not None and c.kind == "snapshot")
    assert snapshot >= 0
    last: dict[int, int] = {c.shard: i for i, c in enumerate(found) if c.kind == "snapshot"}  # type: ignore[union-attr]
    whole = [c for i, c in enumerate(found) if i >= last[c.shard]]  # type: ignore[union-attr]
    assert rows_of(whole) == pulled(table, keys)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_subscriber_that_stops_reading_holds_up_nobody(
    start_cluster: Any, connect: Any, name: str
) -> None:
    cluster = start_cluster(1, metrics=True)
    client = connect(cluster)
    table = table_of(client, name, 64)
    keys = np.arange(4000)
    with Subscriber(client, tables=[name]) as stopped, Follower(client) as follower:
        assert stopped.next(20) is not None
        rows = np.ones((4000, 64), np.float32)
        for _ in range(150):  # 150 MB
            table.push(keys, rows)
        versions = client.wait_durable()
        follower.wait_for(versions, 30)
        assert len(stopped._queue._ready) <= 4
        metrics = {key[0]: value for key, value in cluster.metrics(0).items()}
        assert metrics["ps_subscribers"] == 2
        assert metrics["ps_subscriber_lag_versions"] > 20
        assert metrics["ps_subscriber_lag_seconds"] > 0
        assert metrics["ps_subscriber_bytes_total"] > 150 * rows.nbytes
        found = up_to(stopped, versions)
        assert found[-1].version == versions[0]
        eventually(
            lambda: (
                {k[0]: v for k, v in cluster.metrics(0).items()}["ps_subscriber_lag_versions"] == 0
            )
        )
        # and one that does not read does not keep the server from stopping
        for _ in range(150):
            table.push(keys, rows)
        began = time.monotonic()
        assert cluster.stop() == 0
        assert time.monotonic() - began < 6


@pytest.mark.slow
def test_a_server_has_room_for_so_many_subscribers(start_cluster: Any) -> None:
    cluster = start_cluster(1, "--max-subscribers", "2")
    with (
        Subscriber(cluster.addresses, start="latest") as one,
        Subscriber(cluster.addresses, start="latest") as two,
    ):
        one.next(20)
        two.next(20)
        with (
            Subscriber(cluster.addresses, start="latest") as three,
            pytest.raises(ResourceExhausted, match="already has 2 subscribers, its limit"),
        ):
            three.next(20)


@pytest.mark.slow
def test_a_token_behind_the_horizons_needs_a_snapshot(
    start_cluster: Any, connect: Any, name: str
) -> None:
    flags = ("--log-keep-bytes", "0", "--flush-seconds", "0.2", "--max-tombstones", "10")
    cluster = start_cluster(1, *flags)
    client = connect(cluster)
    table = table_of(client, name, 256)
    keys = np.arange(1000)
    give(table, keys)
    with Subscriber(client) as changes:
        up_to(changes, client.wait_durable())
        tokens = changes.tokens()
    for _ in range(40):  # of a MB each, in segments of 16 MB
        give(table, keys[:900])
    table.delete(keys[:600])

    def compacted() -> bool:
        with Subscriber(client, tokens=tokens) as changes, suppress(VersionCompacted):
            changes.next(20)
            return False
        return True

    eventually(compacted, 30)
    with Subscriber(client, tokens=tokens, when_lost="snapshot") as changes:
        found = up_to(changes, client.wait_durable())
    assert found[0].kind == "snapshot"
    assert rows_of(found) == pulled(table, keys)


# ---- the command


def psctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from psclient.tools.ctl import main; main()", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.slow
def test_psctl_tail_shows_changes(cluster1: Cluster, connect: Any, name: str) -> None:
    client = connect(cluster1)
    table = table_of(client, name, 2)
    give(table, [7])
    client.wait_durable()
    where = ("--servers", cluster1.addresses[0], "--table", name, "--start", "snapshot")
    shown = psctl("tail", *where, "--json", "--limit", "4")
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [line["kind"] for line in lines] == ["snapshot", "created", "rows", "snapshot_end"]
    assert (lines[2]["keys"], lines[2]["rows"]) == ([7], [[1.0, 1.0]])
    shown = psctl("tail", *where, "--limit", "4")
    assert f"rows      {name}  1 keys: 7" in shown.stdout
    shown = psctl("tail", "--servers", cluster1.addresses[0], "--start", "never")
    assert shown.returncode == 1
    assert shown.stderr.startswith("psctl: start must be one of")


def test_an_unforeseen_error_of_its_thread_reaches_the_application(
    cluster1: Cluster, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(shardstream, "read_change", fail)
    with Subscriber(cluster1.addresses) as changes, pytest.raises(PsError, match="unforeseen"):
        changes.next(20)
