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
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import Cluster, eventually, free_ports, serve

from psclient import Change, Client, Follower, Subscriber
from psclient.errors import (
    DeadlineExceeded,
    InvalidArgument,
    LogDiverged,
    NoLog,
    ResourceExhausted,
    TableNotFound,
    Unavailable,
    VersionCompacted,
)
from psclient.follower import _Copy, _Shard
from psclient.subscriber import Kind
from psproto import ps_pb2 as pb

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
        ({"tokens": [b"", b""]}, "2 tokens for 1 shards"),
        ({"when_lost": "ignore"}, "when_lost must be"),
        ({"tables": "user"}, "tables must be a list"),
        ({"tables": []}, "tables must name one at least"),
        ({"coalesce_ms": -1}, "subscription: "),
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
        assert len(stopped._ready) <= 4
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
            pytest.raises(ResourceExhausted, match="2 subscribers are here, the limit"),
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


# ---- followers


def test_a_follower_holds_what_the_servers_hold(cluster3: Cluster, connect: Any, name: str) -> None:
    client = connect(cluster3)
    table = client.create_table(
        name, DIM, optimizer="sgd", initializer="zeros", serving_default=0.5
    )
    rng = np.random.default_rng(0)
    keys = rng.integers(-(2**63), 2**63, 4000)
    keys[:4] = -1, 0, -(2**63), 2**63 - 1
    with Follower(client, tables=[name]) as follower:
        for i in range(60):
            some = rng.choice(keys, 300)
            if i % 3:
                table.push(some, rng.standard_normal((300, DIM)).astype(np.float32))
            else:
                table.delete(some)
            if i % 20 == 19:
                follower.wait_for(client.wait_durable(), 20)
                asked = rng.choice(keys, (50, 20))
                ours = follower.pull(name, asked)
                assert ours.shape == (50, 20, DIM)
                assert np.array_equal(ours, table.pull(asked, mode="serve"))
                there = table.pull_rows(keys)
                assert np.array_equal(follower.row_versions(name, keys), there.versions)
                assert sorted(follower.keys(name).tolist()) == sorted(
                    keys[there.found].view(np.uint64).tolist()
                )
                assert len(follower) == len(np.unique(keys[there.found]))
        assert follower.tables() == [name]
        assert follower.lag == (0, 0, 0)


def test_a_follower_follows_tables_that_come_and_go(
    cluster2: Cluster, connect: Any, name: str
) -> None:
    client = connect(cluster2)
    with Follower(client, tables=[name]) as follower:
        follower.wait_for((0, 0), 20)
        with pytest.raises(TableNotFound):
            follower.pull(name, [1])
        table = table_of(client, name)
        give(table, np.arange(100))
        follower.wait_for(client.wait_durable(), 20)
        assert len(follower) == 100
        client.drop_table(name)
        follower.wait_for(client.wait_durable(), 20)
        assert len(follower) == 0
        assert follower.tables() == []
        table = table_of(client, name, 2)
        give(table, np.arange(5), 3.0)
        follower.wait_for(client.barrier("b"), 20)
        assert follower.pull(name, [4, 5]).tolist() == [[3.0, 3.0], [0.0, 0.0]]


def test_a_push_is_seen_as_a_whole(cluster1: Cluster, connect: Any, name: str) -> None:
    """Every push sets all rows to the same number, in many messages: no pull sees two."""
    client = connect(cluster1)
    table = table_of(client, name)
    keys = np.arange(3000)
    follower = Follower(client, tables=[name])
    follower._subscriber._streams[0]._request.chunk_bytes = 2000
    seen = set()
    with follower:
        give(table, keys)
        follower.wait_for(client.wait_durable(), 20)
        for _ in range(30):
            give(table, keys)
            for _ in range(10):
                time.sleep(0.002)
                rows = follower.pull(name, keys)
                assert (rows == rows[0, 0]).all()
                seen.add(float(rows[0, 0]))
        follower.wait_for(client.wait_durable(), 20)
        assert follower.pull(name, [0])[0, 0] == 31.0
    assert len(seen) > 2


def test_a_follower_says_how_long_it_was_waited_for(cluster1: Cluster, name: str) -> None:
    with Follower(cluster1.addresses, tables=[name]) as follower:
        with pytest.raises(DeadlineExceeded, match="the follower is at versions"):
            follower.wait_for([1 << 60], 0.2)
        with pytest.raises(InvalidArgument, match="2 versions for 1 shards"):
            follower.wait_for([0, 0])


def message(kind: Kind, version: int, *, stream: int, more: bool = False, **more_: Any) -> Change:
    """What shard 0 says of table u, whose head it is at."""
    nothing = np.empty(0, np.uint64)
    fields: dict[str, Any] = {"keys": nothing, "versions": nothing, "rows": None, "schema": None}
    return Change(
        shard=0,
        stream=stream,
        kind=kind,
        table="u",
        steps=None,
        frequencies=None,
        version=version,
        more=more,
        token=b"token",
        head=version,
        time=0.0,
        dim=1,
        barrier="",
        cause="",
        **{**fields, **more_},
    )


def one_row(key: int, version: int, value: float) -> dict[str, Any]:
    return {
        "keys": np.array([key], np.uint64),
        "versions": np.array([version], np.uint64),
        "rows": np.array([[value]], np.float32),
    }


def test_a_follower_goes_back_with_a_shard_that_was_restored() -> None:
    schema, lock, shard = pb.TableSchema(name="u", dim=1), threading.Condition(), _Shard()
    for change in (
        message("created", 1, stream=0, schema=schema),
        message("rows", 200, stream=0, **one_row(5, 200, 2.0)),
    ):
        shard.take(change, lock)
    assert (shard.version, shard.head) == (200, 200)
    for change in (
        message("snapshot", 100, stream=1, more=True),
        message("created", 100, stream=1, more=True, schema=schema),
        message("rows", 100, stream=1, more=True, **one_row(5, 90, 1.0)),
        message("snapshot_end", 100, stream=1),
    ):
        assert shard.version == 200
        shard.take(change, lock)
    assert (shard.version, shard.head) == (100, 100)
    assert shard.state.tables["u"].rows[:1].tolist() == [[1.0]]
    shard.take(message("rows", 101, stream=1, **one_row(5, 101, 3.0)), lock)
    assert (shard.version, shard.head) == (101, 101)
    assert shard.state.tables["u"].rows[:1].tolist() == [[3.0]]


def test_an_error_that_does_not_pass_ends_a_follower(cluster1: Cluster) -> None:
    follower = Follower(cluster1.addresses, tables=["no good"])
    with follower, pytest.raises(InvalidArgument, match="cannot be the name of a table"):
        follower.wait_for([0], 20)
    with pytest.raises(InvalidArgument):
        follower.pull("no good", [1])


MEANINGLESS = st.integers(0, 2**64 - 1)
KEYS = st.lists(st.integers(0, 40) | MEANINGLESS, unique=True, max_size=30)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.tuples(st.booleans(), KEYS, st.integers(1, 20)), max_size=30),
    crowd=st.booleans(),
)
def test_a_copy_is_a_dict_of_rows(steps: Any, crowd: bool) -> None:
    ours, theirs = _Copy(2, 0.0, 1), {}
    if crowd:  # few places, so that they are reused and the table grows
        ours.slots = np.zeros(16, np.int32)
        ours.keys, ours.versions = np.empty(4, np.uint64), np.empty(4, np.uint64)
        ours.rows = np.empty((4, 2), np.float32)
    for write, keys, version in steps:
        array = np.array(keys, np.uint64)
        versions = np.full(len(keys), version, np.uint64)
        if write:
            rows = np.stack([array.astype(np.float32), versions.astype(np.float32)], 1)
            ours.put(array, versions, rows)
            for key in keys:
                if key not in theirs or theirs[key] <= version:
                    theirs[key] = version
        else:
            ours.remove(array, versions)
            for key in keys:
                if theirs.get(key, version + 1) <= version:
                    del theirs[key]
        assert ours.count == len(theirs)
    asked = np.array([*theirs, *range(50)], np.uint64)
    places = ours.find(asked)
    for key, place in zip(asked.tolist(), places.tolist(), strict=True):
        assert (place >= 0) == (key in theirs)
        if place >= 0:
            assert ours.rows[place].tolist() == [np.float32(key), float(theirs[key])]
            assert ours.versions[place] == theirs[key]


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
