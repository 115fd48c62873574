"""Followers have what the servers have, whatever happens to either."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import Cluster

from psclient import Change, Client, Follower
from psclient.changes import Kind
from psclient.copies import Copy
from psclient.errors import (
    DeadlineExceeded,
    InvalidArgument,
    TableNotFound,
)
from psclient.replica import ShardReplica
from psproto import ps_pb2 as pb

DIM = 4


def table_of(client: Client, name: str, dim: int = DIM) -> Any:
    """A table whose rows are the sums of what was pushed."""
    return client.create_table(name, dim, optimizer="sgd", lr=1.0, initializer="zeros")


def give(table: Any, keys: Any, value: float = 1.0) -> None:
    table.push(keys, np.full((len(keys), table.dim), -value, np.float32))


def pulled(table: Any, keys: Any) -> dict[int, tuple[float, ...]]:
    got = table.pull_rows(np.asarray(keys))
    return {
        int(np.uint64(key)): tuple(row.tolist())
        for key, row, found in zip(keys, got.embeddings, got.found, strict=True)
        if found
    }


# ---- followers


@pytest.mark.slow
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
    follower._following._subscriber._request.chunk_bytes = 2000
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
        with pytest.raises(DeadlineExceeded, match="the follower did not reach versions"):
            follower.wait_for([1 << 60], 0.2)
        with pytest.raises(InvalidArgument, match="each of 1 shards, got 2"):
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
    schema, lock, shard = pb.TableSchema(name="u", dim=1), threading.Condition(), ShardReplica()
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
    with follower, pytest.raises(InvalidArgument, match="table name must be"):
        follower.wait_for([0], 20)
    with pytest.raises(InvalidArgument):
        follower.pull("no good", [1])


MEANINGLESS = st.integers(0, 2**64 - 1)
KEYS = st.lists(st.integers(0, 40) | MEANINGLESS, unique=True, max_size=30)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.tuples(st.booleans(), KEYS, st.integers(1, 20)), max_size=30),
    crowd=st.booleans(),
)
def test_a_copy_is_a_dict_of_rows(steps: Any, crowd: bool) -> None:
    ours, theirs = Copy(2, 0.0, 1), {}
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
