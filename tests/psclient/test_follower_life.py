"""The life of followers and subscribers: unopened, closed, forked, pickled, forgotten, restored."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from servers import Cluster, eventually

from psclient import Change, Client, Follower, Subscriber, Versions
from psclient.errors import DeadlineExceeded, InvalidArgument, LogDiverged
from psclient.replica import ShardReplica
from psclient.versions import History

FORK = multiprocessing.get_context("fork")
DIM = 4
pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]


def table_of(client: Client, name: str) -> Any:
    return client.create_table(name, DIM, optimizer="sgd", lr=1.0, initializer="zeros")


def give(table: Any, keys: Any, value: float = 1.0) -> None:
    table.push(keys, np.full((len(keys), DIM), -value, np.float32))


def reloaded(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))  # noqa: S301


# ---- unopened and closed

METHODS: dict[str, Callable[[Follower], Any]] = {
    "pull": lambda follower: follower.pull("t", [1]),
    "row_versions": lambda follower: follower.row_versions("t", [1]),
    "keys": lambda follower: follower.keys("t"),
    "tables": lambda follower: follower.tables(),
    "wait_for": lambda follower: follower.wait_for([0]),
}


@pytest.mark.parametrize("method", METHODS)
def test_an_unopened_follower_raises_at_once(method: str) -> None:
    follower = Follower(["127.0.0.1:1"])
    with pytest.raises(InvalidArgument, match="the follower is not open"):
        METHODS[method](follower)
    assert (follower.versions, len(follower), bool(follower)) == ((-1,), 0, True)
    follower.close()


def test_a_closed_follower_keeps_its_rows_and_waits_for_nothing(
    cluster1: Cluster, connect: Any, name: str
) -> None:
    client = connect(cluster1)
    table = table_of(client, name)
    give(table, [1])
    follower = Follower(client, tables=[name]).open()
    assert follower.open() is follower
    versions = client.wait_durable()
    follower.wait_for(versions, 20)

    def wait() -> None:
        with pytest.raises(InvalidArgument):
            follower.wait_for([1 << 60])

    waiting = threading.Thread(target=wait)
    waiting.start()
    follower.close()
    waiting.join(10)
    assert not waiting.is_alive()
    follower.close()
    assert follower.pull(name, [1])[0, 0] == 1.0
    follower.wait_for(versions)
    with pytest.raises(InvalidArgument, match="the follower was closed at versions"):
        follower.wait_for([1 << 60])
    with pytest.raises(InvalidArgument, match="the follower is closed"):
        follower.open()


def test_a_closed_subscriber_ends_and_does_not_open_again(cluster1: Cluster) -> None:
    subscriber = Subscriber(cluster1.addresses)
    assert subscriber.tokens() == (b"",)
    subscriber.close()
    assert subscriber.next() is None
    assert list(subscriber) == []
    assert subscriber.tokens() == (b"",)
    with pytest.raises(InvalidArgument, match="the subscriber is closed"):
        subscriber.open()


# ---- forks


def public(kind: type) -> list[str]:
    """Names of what a user can call or read, and the special methods that have a meaning here."""
    special = ["__len__", "__enter__", "__next__"]
    names = [name for name in dir(kind) if not name.startswith("_")]
    return names + [name for name in special if hasattr(kind, name)]


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "pull": ("t", [1]),
    "row_versions": ("t", [1]),
    "keys": ("t",),
    "wait_for": ([0],),
}


def outcomes(thing: Any) -> dict[str, str]:
    """What every public member does."""
    found = {}
    for member in public(type(thing)):
        if member == "close":
            continue
        try:
            value = getattr(thing, member)
            if callable(value):
                value(*ARGUMENTS.get(member, ()))
            found[member] = "returned"
        except InvalidArgument as error:
            found[member] = str(error)
    thing.close()
    return found


def in_a_child(thing: Any) -> dict[str, str]:
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=lambda: theirs.send(outcomes(thing)))
    child.start()
    assert ours.poll(20), "the child hangs"
    found: dict[str, str] = ours.recv()
    child.join(20)
    assert child.exitcode == 0
    return found


@pytest.mark.parametrize("kind", [Follower, Subscriber])
def test_every_method_raises_at_once_after_a_fork(cluster1: Cluster, name: str, kind: Any) -> None:
    with Client(cluster1.addresses) as client, kind(cluster1.addresses, tables=[name]) as thing:
        give(table_of(client, name), [1])
        if kind is Follower:
            thing.wait_for(client.wait_durable(), 20)
        else:
            thing.next(20)
        found = in_a_child(thing)
        assert found
        for member, outcome in found.items():
            assert "before a fork" in outcome, member
        give(client.table(name), [2])
        if kind is Follower:  # the parent's goes on
            thing.wait_for(client.wait_durable(), 20)
        else:
            assert thing.next(20) is not None


def test_an_unopened_follower_works_in_a_child(cluster1: Cluster, name: str) -> None:
    with Client(cluster1.addresses) as client:
        give(table_of(client, name), [1])
        versions = client.wait_durable()
        follower = Follower(client, tables=[name])

        def work() -> None:
            with follower:
                follower.wait_for(versions, 20)
                assert follower.pull(name, [1])[0, 0] == 1.0

        child = FORK.Process(target=work)
        child.start()
        child.join(30)
        assert child.exitcode == 0


# ---- pickles and copies


def test_a_pickled_follower_connects_where_it_is_loaded(cluster2: Cluster, name: str) -> None:
    with Client(cluster2.addresses) as client:
        give(table_of(client, name), np.arange(20))
        unopened = reloaded(Follower(cluster2.addresses, tables=[name]))
        with pytest.raises(InvalidArgument, match="not open"):
            unopened.pull(name, [1])
        with Follower(cluster2.addresses, tables=[name], wire="float16") as follower:
            follower.wait_for(client.wait_durable(), 20)
            assert copy.copy(follower) is copy.deepcopy(follower) is follower
            loaded = reloaded(follower)
            again = reloaded(loaded)
        for each in (loaded, again):
            assert each.pull(name, [3])[0, 0] == 1.0
            each.close()
        assert loaded._options["wire"] == "float16"


def test_a_pickled_subscriber_starts_after_what_was_returned(
    cluster1: Cluster, connect: Any, name: str
) -> None:
    client = connect(cluster1)
    table = table_of(client, name)
    give(table, [1])

    def rows(subscriber: Subscriber, key: int) -> Change:
        while True:
            change = subscriber.next(20)
            assert change is not None
            if change.kind == "rows" and not change.more and key in change.keys.tolist():
                return change

    with Subscriber(
        client.addresses if hasattr(client, "addresses") else cluster1.addresses,
        tables=[name],
        progress_ms=60_000,
    ) as first:
        client.wait_durable()
        while (change := first.next(20)) is not None and change.kind != "snapshot_end":
            pass
        give(table, [2])
        rows(first, 2)
        data = pickle.dumps(first)
    give(table, [3])
    with pickle.loads(data) as second:  # noqa: S301
        assert second.tokens() == first.tokens()
        seen = [second.next(20), second.next(20)]
        assert [each.kind for each in seen] == ["progress", "rows"]
        assert seen[1].keys.tolist() == [3]


# ---- forgotten


@pytest.mark.parametrize("kind", [Follower, Subscriber])
def test_what_is_forgotten_leaves_no_thread(cluster1: Cluster, kind: Any) -> None:
    before = {thread.ident for thread in threading.enumerate()}

    def ours() -> list[str]:
        return [
            thread.name
            for thread in threading.enumerate()
            if thread.ident not in before and thread.name.startswith(("follower", "subscriber"))
        ]

    things = [kind(cluster1.addresses).open() for _ in range(3)]
    assert len(ours()) >= 3
    things.clear()
    gc.collect()
    eventually(lambda: not ours())


# ---- histories


def change(kind: Any, version: int, *, stream: int = 0, more: bool = False, **more_: Any) -> Change:
    nothing = np.empty(0, np.uint64)
    fields: dict[str, Any] = {"rows": None, "schema": None, "history": None}
    return Change(
        shard=0, stream=stream, kind=kind, table="t", keys=nothing, versions=nothing, steps=None,
        frequencies=None, version=version, more=more, token=b"token", head=version, time=0.0,
        dim=1, barrier="", cause="", **{**fields, **more_},
    )  # fmt: skip


def test_a_version_of_a_restored_state_is_not_met_by_the_state_that_was_given_up() -> None:
    lock, shard = threading.Condition(), ShardReplica()
    assert not shard.reached(0, 5)
    shard.take(change("snapshot", 1000, more=True, history=History((5,), ())), lock)
    assert not shard.reached(0, 5)
    shard.take(change("snapshot_end", 1000), lock)
    assert shard.reached(1000, 5)
    assert not shard.reached(1001, 5)
    assert not shard.reached(50, 6)  # restored: an epoch that is not known here yet
    shard.take(change("snapshot", 40, stream=1, more=True, history=History((6,), ())), lock)
    assert not shard.reached(50, 6)
    shard.take(change("snapshot_end", 40, stream=1), lock)
    assert not shard.reached(50, 6)
    shard.take(change("progress", 50, stream=1), lock)
    assert shard.reached(50, 6)
    with pytest.raises(LogDiverged, match=r"version 10 of epoch 0{15}5 no longer exists"):
        shard.reached(10, 5)


def test_versions_before_an_ordinary_restart_are_compared_with_those_after() -> None:
    lock, shard = threading.Condition(), ShardReplica()
    shard.take(change("progress", 10, history=History((5,), ())), lock)
    assert not shard.reached(12, 6)
    shard.take(change("progress", 12, stream=1, history=History((5, 6), (11,))), lock)
    assert shard.reached(11, 5)
    assert shard.reached(12, 6)
    assert not shard.reached(13, 6)
    with pytest.raises(LogDiverged):  # was answered, and lost with the power
        shard.reached(12, 5)


def test_versions_are_a_tuple_with_epochs() -> None:
    versions = Versions([3, 4], [7, 8])
    assert versions == (3, 4)
    for each in (versions, copy.deepcopy(versions), reloaded(versions)):
        assert (list(each), each.epochs) == ([3, 4], (7, 8))


def test_clients_and_followers_give_versions_with_the_same_epochs(
    cluster2: Cluster, connect: Any, name: str
) -> None:
    client = connect(cluster2)
    table = table_of(client, name)
    with Follower(client, tables=[name]) as follower:
        give(table, np.arange(100))
        versions = client.barrier("here")
        follower.wait_for(versions, 20)
        assert follower.versions.epochs == versions.epochs == client.wait_durable().epochs
        assert len(set(versions.epochs) - {0}) == 2
        assert client.describe_table(name).versions.epochs == versions.epochs
        other = Versions(versions, [epoch ^ 1 for epoch in versions.epochs])
        with pytest.raises(DeadlineExceeded):
            follower.wait_for(other, 0.2)


def test_a_pull_is_not_answered_for_a_version_of_an_abandoned_history(
    cluster2: Cluster, connect: Any, name: str
) -> None:
    client = connect(cluster2)
    table = table_of(client, name)
    give(table, np.arange(100))
    versions = client.describe_table(name).versions
    assert len(table.pull_rows(np.arange(100), min_version=versions).embeddings) == 100
    other = Versions(versions, [epoch ^ 1 for epoch in versions.epochs])
    with pytest.raises(LogDiverged, match=r"min_version \d+ of epoch [0-9a-f]{16} is not part"):
        table.pull_rows(np.arange(100), min_version=other)
