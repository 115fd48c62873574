"""Checkpoints of real clusters: shards die, commands are typed, files are read by others."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import Cluster, eventually

from psclient import Client, Follower, PulledRows, Subscriber, Table, admin, calls, restores
from psclient.errors import (
    CheckpointNotFound,
    CheckpointUnfit,
    DataLoss,
    LogDiverged,
    NotEmpty,
    PsError,
    RestoreConflict,
    SchemaMismatch,
    SessionExpired,
)
from psproto import ps_pb2 as pb

pytestmark = pytest.mark.slow
KEYS = np.concatenate([np.arange(30_000), np.array([-1, -(2**63), 2**63 - 1])])
ROUNDS = int(os.environ.get("PS_RESTORE_KILLS", "3"))
Start = Callable[..., Cluster]
Connect = Callable[..., Client]


@pytest.fixture
def flags(tmp_path: Path) -> tuple[str, ...]:
    return ("--checkpoint-url", f"file://{tmp_path}/checkpoints")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three shards with a filled table "t" and a checkpoint "full" of it; nobody harms them."""
    directory = tmp_path_factory.mktemp("shared")
    cluster = Cluster(3, "--checkpoint-url", f"file://{directory}").start()
    try:
        with Client(cluster.addresses) as client:
            fill(client)
            admin.checkpoint(client, "full")
        yield cluster
    finally:
        assert cluster.stop() == 0


def fill(client: Client) -> Table:
    rng = np.random.default_rng(0)
    table = client.create_table("t", 6, optimizer="adam")
    for step in range(4):
        some = KEYS[rng.random(len(KEYS)) < 0.7]
        table.push(some, rng.standard_normal((len(some), 6)), step=step)
    table.delete(KEYS[:100])
    return table


def assert_same(one: PulledRows, other: PulledRows) -> None:
    for field in ("embeddings", "found", "versions", "steps", "frequencies"):
        assert np.array_equal(getattr(one, field), getattr(other, field)), field


def whole(client: Client, table: str, **more: Any) -> dict[int, tuple[Any, ...]]:
    """By key: the row with its state, version, step, frequency."""
    found: dict[int, tuple[Any, ...]] = {}
    for batch in admin.read_rows(client, table, **more):
        if isinstance(batch, pb.TableSchema):
            continue
        rows = map(bytes, batch.rows)
        columns = (batch.versions.tolist(), batch.steps.tolist(), batch.frequencies.tolist())
        for key, *rest in zip(batch.keys.tolist(), rows, *columns, strict=True):
            assert key not in found
            found[key] = tuple(rest)
    return found


def test_three_shards_are_restored_onto_two_and_onto_five(
    start_cluster: Start, connect: Connect, flags: tuple[str, ...]
) -> None:
    old = connect(start_cluster(3, *flags))
    table = fill(old)
    admin.checkpoint(old, "a")
    table.push(KEYS[50:500], np.ones((450, 6)), step=9)
    table.delete(KEYS[900:1000])
    admin.checkpoint(old, "b", parent="a")
    rows, stored = table.pull_rows(KEYS), whole(old, "t")
    for shards in (2, 5):
        new = connect(start_cluster(shards, *flags))
        assert admin.restore(new, "b") == old.describe_table("t").rows
        assert_same(rows, new.table("t").pull_rows(KEYS))
        assert whole(new, "t") == stored
        info = new.describe_table("t")
        assert set(info.versions) == {max(old.describe_table("t").versions)}
        new.table("t").push(KEYS, np.ones((len(KEYS), 6)), step=10)
        with pytest.raises(NotEmpty):
            admin.restore(new, "a")
        if shards == 2:
            admin.restore(new, "a", replace=True)
            assert whole(new, "t") == whole(new, "t", checkpoint="a")
        assert [each.name for each in admin.checkpoints(new)] == ["a", "b"]


def test_pushes_go_on_during_a_checkpoint_and_it_is_one_cut(
    start_cluster: Start, connect: Connect, flags: tuple[str, ...]
) -> None:
    """Each push adds 1 to all rows of both shards, so those of a shard are alike at a cut."""
    source, target = start_cluster(2, *flags, "--segment-bytes", "67108864"), None
    with connect(source) as old:
        table = old.create_table("sum", 4, optimizer="sgd", lr=1.0, initializer="zeros")
        keys, ones = np.arange(100_000), np.full((100_000, 4), -1, np.float32)
        batch = old.batch(keys)
        stop, pushed = threading.Event(), 0

        def train() -> None:
            nonlocal pushed
            while not stop.is_set():
                table.push(batch, ones, step=pushed)
                pushed += 1

        trainer = threading.Thread(target=train)
        trainer.start()
        try:
            eventually(lambda: pushed > 2)
            before = pushed
            infos = [
                admin.checkpoint(old, "a"),
                admin.checkpoint(old, "b", parent="a"),
                admin.checkpoint(old, "c", parent="b"),
            ]
            eventually(lambda: pushed > before)
        finally:
            stop.set()
            trainer.join()
        target = start_cluster(3, *flags)
        with connect(target) as new:
            for info in infos[::2]:  # the last one is built on both
                admin.restore(new, info.name, replace=True)
                rows = new.table("sum").pull_rows(keys)
                owners = batch.split
                for shard, version in enumerate(info.versions):
                    mine = owners.keys[owners.bounds[shard] : owners.bounds[shard + 1]]
                    at = mine.astype(np.int64)
                    assert (rows.versions[at] == version).all()
                    assert (rows.frequencies[at] == version - 1).all()
                    assert (rows.embeddings[at] == version - 1).all()
                    assert (rows.steps[at] == version - 2).all()


def test_a_client_that_trains_on_gets_through_a_restore(
    start_cluster: Start, connect: Connect, flags: tuple[str, ...]
) -> None:
    cluster = start_cluster(2, *flags)
    with connect(cluster) as client, connect(cluster, timeout=60.0) as trainer:
        table = client.create_table("sum", 2, optimizer="sgd", lr=1.0, initializer="zeros")
        keys = np.arange(50)
        table.push(keys[::2], -np.ones((25, 2)))
        admin.checkpoint(client, "full")
        other = trainer.table("sum")
        stop, failures, expired, pushed = threading.Event(), [], [], 0

        def train() -> None:
            nonlocal pushed
            while not stop.is_set():
                try:
                    other.push(keys, -np.ones((50, 2)))
                    pushed += 1
                except SessionExpired:  # begun before: nobody can tell what became of it
                    expired.append(pushed)
                except PsError as error:
                    failures.append(error)
                    return

        thread = threading.Thread(target=train)
        thread.start()
        eventually(lambda: pushed > 5)
        admin.restore(client, "full", replace=True)
        now = pushed
        eventually(lambda: pushed > now + 5 or failures)
        stop.set()
        thread.join()
        assert failures == []
        assert len(expired) <= 2  # one for each shard at most
        rows = table.pull(keys)[:, 0]
        split = client.batch(keys).split
        for shard in (0, 1):  # what was restored is there once, and what came after on all keys
            mine = split.keys[split.bounds[shard] : split.bounds[shard + 1]].astype(np.int64)
            assert len({rows[key] - (key % 2 == 0) for key in mine}) == 1


def test_who_follows_holds_what_was_restored_though_its_versions_are_lower(
    start_cluster: Start, connect: Connect, flags: tuple[str, ...]
) -> None:
    cluster = start_cluster(1, *flags)
    with connect(cluster) as client:
        table = client.create_table("sum", 2, optimizer="sgd", lr=1.0, initializer="zeros")
        keys = np.arange(50)
        table.push(keys, -np.ones((50, 2)))
        admin.checkpoint(client, "early")
        for _ in range(20):
            table.push(keys[:40], -np.ones((40, 2)))
        with Follower(cluster.addresses, tables=["sum"]) as follower:
            before = client.wait_durable()
            follower.wait_for(before, 20)
            with Subscriber(cluster.addresses, start="latest") as changes:
                assert changes.next(20) is not None
                tokens = changes.tokens()
            admin.restore(client, "early", replace=True)
            restored = client.wait_durable()
            follower.wait_for(restored, 20)  # the state that was given up has a larger version
            assert follower.versions == restored < before
            assert np.array_equal(follower.pull("sum", keys), table.pull(keys))
            with pytest.raises(LogDiverged, match="restored to an older state"):
                follower.wait_for(before, 20)
            assert follower.lag == (0,)
            table.push(keys[:10], -np.ones((10, 2)))
            after = client.wait_durable()
            assert after < before
            follower.wait_for(after, 20)  # would be there at once by the versions of before
            assert follower.versions == after
            assert np.array_equal(follower.pull("sum", keys), table.pull(keys))
            assert follower.pull("sum", keys)[:, 0].tolist() == [2.0] * 10 + [1.0] * 40
        with Subscriber(cluster.addresses, tokens=tokens) as changes, pytest.raises(LogDiverged):
            changes.next(20)
        with Subscriber(cluster.addresses, tokens=tokens, when_lost="snapshot") as changes:
            first = changes.next(20)
            assert first is not None
            assert (first.kind, first.version) == ("snapshot", after[0])


# ---- death


def kill(cluster: Cluster, shard: int) -> None:
    os.kill(cluster.pids(shard)[-1], signal.SIGKILL)


def test_a_shard_that_dies_during_a_checkpoint_leaves_none(
    start_cluster: Start, connect: Connect, flags: tuple[str, ...], tmp_path: Path
) -> None:
    cluster = start_cluster(2, *flags)
    with connect(cluster, timeout=60.0) as client:
        table = fill(client)
        before = whole(client, "t")
        died = False

        def progress(done: int, total: int) -> None:
            nonlocal died
            if not died:
                died = True
                kill(cluster, 1)

        failed = False
        try:
            admin.checkpoint(client, "a", progress=progress)
        except PsError:
            failed = True
        assert died
        eventually(lambda: len(cluster.pids(1)) == 2)
        if failed:
            with pytest.raises(CheckpointNotFound):
                admin.verify(client, "a")
            admin.checkpoint(client, "a")
        admin.verify(client, "a")
        assert whole(client, "t") == before == whole(client, "t", checkpoint="a")
        table.push(KEYS, np.ones((len(KEYS), 6)), step=10)
        assert len([p for p in (tmp_path / "checkpoints" / "a").iterdir() if p.is_dir()]) == 1


@pytest.mark.parametrize("after", ["prepare", "hold", "commit", "half committed", "loaded"])
def test_a_shard_that_dies_during_a_restore_leaves_all_or_nothing(
    start_cluster: Start,
    connect: Connect,
    flags: tuple[str, ...],
    after: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever restores dies too: the restore is finished, or taken back, by somebody else."""
    cluster = start_cluster(2, *flags)
    step = pb.RestoreRequest
    with connect(cluster, timeout=60.0) as client:
        fill(client)
        admin.checkpoint(client, "full")
        stored = whole(client, "t")
        client.table("t").push(KEYS, np.ones((len(KEYS), 6)), step=11)
        later = whole(client, "t")
        id = "0123456789abcdef"
        links = calls.links(client)
        request = pb.PrepareRestoreRequest(name="full", id=id, replace=True)
        calls.on_all(client, "PrepareRestore", request, None)
        if after != "prepare":
            for link in links:
                restores.take_step(client, link, id, step.STEP_HOLD)
        if after in ("commit", "half committed", "loaded"):
            for link in links[: 1 if after == "half committed" else 2]:
                restores.take_step(client, link, id, step.STEP_COMMIT)
        if after == "loaded":
            restores.await_phases(client, [pb.RestoreStatus.PHASE_LOADED])
        for shard in (0, 1):
            kill(cluster, shard)
        restores.statuses_of(client, 60.0)  # once they are there again
        if after == "prepare":
            assert whole(client, "t") == later
            admin.restore(client, "full", replace=True)
            assert whole(client, "t") == stored
            return
        with pytest.raises(PsError), connect(cluster, timeout=2.0) as other:
            other.table("t").pull(KEYS[:5])
        with pytest.raises(RestoreConflict):
            admin.restore(client, "another", replace=True)
        if after in ("hold", "half committed"):
            admin.abort_restore(client)
            assert whole(client, "t") == later
        else:
            admin.restore(client, "full", replace=True)
            assert whole(client, "t") == stored
        client.table("t").push(KEYS, np.ones((len(KEYS), 6)), step=12)


def test_a_shard_is_killed_at_random_moments_of_restores(
    start_cluster: Start, connect: Connect, flags: tuple[str, ...]
) -> None:
    cluster = start_cluster(2, *flags)
    rng = np.random.default_rng(5)
    with connect(cluster, timeout=60.0) as client:
        table = fill(client)
        admin.checkpoint(client, "full")
        stored = whole(client, "t")
        for _ in range(ROUNDS):
            table.push(KEYS[:50], np.ones((50, 6)), step=11)
            later = whole(client, "t")
            kills = threading.Timer(rng.random() * 1.5, kill, (cluster, int(rng.integers(2))))
            kills.start()
            try:
                admin.restore(client, "full", replace=True)
                told = True
            except PsError:
                told = False
            kills.join()
            statuses = restores.statuses_of(client, 60.0)
            if any(each.phase not in (*restores.OVER, restores.PREPARED) for each in statuses):
                admin.restore(client, "full", replace=True)
                told = True
            found = whole(client, "t")
            assert found == stored if told else found in (stored, later)


# ---- refusals


def test_what_is_damaged_is_named_and_changes_nothing(
    start_cluster: Start, connect: Connect, flags: tuple[str, ...], tmp_path: Path
) -> None:
    source = start_cluster(2, *flags)
    with connect(source) as client:
        fill(client)
        admin.checkpoint(client, "full")
        before = whole(client, "t")
        path = next((tmp_path / "checkpoints" / "full").glob("*/00001.*.blocks"))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        for call in (
            lambda: admin.verify(client, "full"),
            lambda: admin.restore(client, "full", replace=True),
            lambda: admin.warm_start(client, "full", "t", "other"),
        ):
            with pytest.raises(DataLoss, match=path.name):
                call()
        assert whole(client, "t") == before
        assert [table.name for table in client.list_tables()] == ["t"]
        assert all(each.phase in restores.OVER for each in restores.statuses_of(client))


def test_memory_that_does_not_suffice_is_told_and_changes_nothing(
    start_cluster: Start, connect: Connect, flags: tuple[str, ...]
) -> None:
    source = start_cluster(1, *flags)
    target = start_cluster(2, *flags, "--memory-bytes", "2000000")
    with connect(source) as old, connect(target) as new:
        large = old.create_table("large", 1)  # rows may be on disk, but the index is in memory
        large.push(np.arange(400_000), np.ones((400_000, 1), np.float32))
        admin.checkpoint(old, "full")
        new.create_table("mine", 2)
        new.table("mine").push([1], np.ones((1, 2)))
        before = whole(new, "mine")
        with pytest.raises(PsError, match="budget") as caught:
            admin.restore(new, "full", replace=True)
        assert caught.value.reason == "RESTORE_FAILED"
        assert whole(new, "mine") == before
        new.table("mine").push([1], np.ones((1, 2)))


def test_a_server_without_a_place_for_checkpoints_says_so(cluster1: Cluster) -> None:
    with (
        Client(cluster1.addresses) as client,
        pytest.raises(CheckpointUnfit, match="checkpoint_url"),
    ):
        admin.checkpoint(client, "full")


# ---- tables


def test_a_table_starts_from_another(shared: Cluster) -> None:
    with Client(shared.addresses) as client:
        rows = whole(client, "t")
        assert admin.warm_start(client, "full", "t", "same") == len(rows)
        assert client.describe_table("same").optimizer == "adam"
        for key, (row, _, *history) in whole(client, "same").items():
            assert (row, *history) == (rows[key][0], *rows[key][2:])
        client.create_table("other", 6, optimizer="ftrl")
        admin.warm_start(client, "full", "t", "other")
        there = np.array(list(rows), np.uint64)
        assert np.array_equal(client.table("other").pull(there), client.table("t").pull(there))
        with pytest.raises(NotEmpty):
            admin.warm_start(client, "full", "t", "other")
        assert admin.warm_start(client, "full", "t", "other", replace=True) == len(rows)
        client.create_table("wide", 7)
        with pytest.raises(SchemaMismatch):
            admin.warm_start(client, "full", "t", "wide")
        assert client.describe_table("wide").rows == 0
        for name in ("same", "other", "wide"):
            client.drop_table(name)


def test_nobody_waits_when_a_checkpoint_is_given_up(
    start_cluster: Start, connect: Connect, flags: tuple[str, ...]
) -> None:
    """A client that goes away frees the shard for another checkpoint."""
    cluster = start_cluster(1, *flags)
    with connect(cluster) as client:
        fill(client)
        request = pb.WriteCheckpointRequest(name="a", attempt="0" * 16)
        link = calls.links(client)[0]
        stream = calls.stream(link, "WriteCheckpoint", request, pb.CheckpointProgress)
        next(stream)
        stream.close()
        started = time.monotonic()
        while True:
            try:
                admin.checkpoint(client, "b")
                break
            except PsError as error:
                if error.reason != "CHECKPOINT_BUSY" or time.monotonic() > started + 20:
                    raise


@pytest.mark.parametrize("names", [("a", "a"), ("a", "b")])
def test_of_two_restores_at_once_one_is_done_and_the_other_refused_by_name(
    start_cluster: Start, connect: Connect, flags: tuple[str, ...], names: tuple[str, str]
) -> None:
    cluster = start_cluster(2, *flags)
    client = connect(cluster)
    table = client.create_table("t", 4, optimizer="sgd", lr=1.0, initializer="zeros")
    for name, rows in (("a", 2000), ("b", 3000)):
        table.push(np.arange(rows), np.ones((rows, 4)))
        admin.checkpoint(client, name)
    for _ in range(2):
        done: list[Any] = []

        def work(name: str, done: list[Any] = done) -> None:
            with Client(cluster.addresses) as other:
                try:
                    done.append((name, admin.restore(other, name, replace=True)))
                except PsError as error:
                    done.append(error)

        threads = [threading.Thread(target=work, args=[name]) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        won = [each for each in done if isinstance(each, tuple)]
        lost = [each for each in done if isinstance(each, PsError)]
        assert len(won) == len(lost) == 1, done
        assert lost[0].reason in ("RESTORE_CONFLICT", "CHECKPOINT_BUSY"), lost
        assert client.describe_table("t").rows == won[0][1] == {"a": 2000, "b": 3000}[won[0][0]]
