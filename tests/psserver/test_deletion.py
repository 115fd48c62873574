"""Checkpoints deleted: never one that another needs, never one in use, and never half."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from homes import Continue, Homes, Load
from stores import schema

from psproto import ps_pb2 as pb
from psserver.deletion import newest_first, surplus
from psserver.errors import BadRequest, CheckpointBusy, CheckpointNeeded, Draining, UnknownCall
from storage.errors import StoreFailed, UnknownCheckpoint
from storage.manifest import MANIFEST

ID = "0123456789abcdef"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Homes]:
    """Two shards with the checkpoints a <- b <- c, x <- y, and z, taken in this order."""
    with Homes(tmp_path / "shards", 2, f"file://{tmp_path}/checkpoints") as cluster:
        cluster.create(schema())
        for at, (name, parent) in enumerate(
            [("a", ""), ("b", "a"), ("c", "b"), ("x", ""), ("y", "x"), ("z", "")]
        ):
            for node in cluster.nodes:
                node.checkpoints._now = lambda at=at: float(at)  # type: ignore[misc]
            cluster.push(range(at, at + 20))
            cluster.checkpoint(name, parent)
        yield cluster


def names(cluster: Homes) -> list[str]:
    return cluster.nodes[0].checkpoints.catalog.names()


def delete(cluster: Homes, *wanted: str, keep: int = 0, dry_run: bool = False) -> list[str]:
    """What a client does, shard 1 being ready before shard 0 begins."""
    request = pb.DeleteCheckpointsRequest(id=ID, names=wanted, keep=keep, dry_run=dry_run)
    work = [node.checkpoints for node in cluster.nodes]
    progress = [each.work.progress() for each in work]
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(work[1].deletion.delete(request, progress[1]))
        except Exception as error:
            result.append(error)

    other = threading.Thread(target=run)
    ended = threading.Event()
    if not dry_run:
        other.start()
        while not progress[1].stage and not result:
            pass
        for each in result:
            raise each
    try:
        if not dry_run:
            for each in work:
                each.calls._ended.clear()
            starter = threading.Thread(target=start, args=(work[0], ended))
            starter.start()
        return list(work[0].deletion.delete(request, progress[0]).names)
    finally:
        ended.set()
        if not dry_run:
            starter.join()
            progress[1].given_up = True
            other.join()
            for each in work:
                each.calls._ended.clear()


def start(checkpoints: Any, ended: threading.Event) -> None:
    """Let the deletion start, as soon as it waits for that."""
    while not ended.wait(0.005):
        with suppress(UnknownCall):
            checkpoints.calls.proceed(pb.ContinueRequest(id=ID, step=Continue.STEP_START))
            return


# ---- what is deleted


def test_a_checkpoint_is_deleted_with_all_its_files(cluster: Homes, tmp_path: Path) -> None:
    assert delete(cluster, "z") == ["z"]
    assert names(cluster) == ["a", "b", "c", "x", "y"]
    assert not (tmp_path / "checkpoints" / "z").exists()
    for name in names(cluster):
        cluster.verify(name)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("wanted", "child"), [("a", "b"), ("b", "c"), ("ab", "c"), ("ac", "b"), ("xz", "y")]
)
def test_a_checkpoint_that_another_one_needs_is_kept(
    cluster: Homes, wanted: str, child: str
) -> None:
    with pytest.raises(CheckpointNeeded, match=f"is needed by '{child}'"):
        delete(cluster, *wanted)
    assert names(cluster) == list("abcxyz")


@pytest.mark.quick(2)
@pytest.mark.parametrize("wanted", ["c", "bc", "cab", "xyabc"])
def test_the_newest_of_a_chain_goes_first(cluster: Homes, wanted: str) -> None:
    deleted = delete(cluster, *wanted)
    for child, parent in (("c", "b"), ("b", "a"), ("y", "x")):
        if child in deleted and parent in deleted:
            assert deleted.index(child) < deleted.index(parent)
    assert names(cluster) == sorted(set("abcxyz") - set(wanted))


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("keep", "gone"), [(1, "abcxy"), (2, "abc"), (3, "abc"), (4, ""), (6, ""), (100, "")]
)
def test_the_newest_are_kept_and_what_they_need(cluster: Homes, keep: int, gone: str) -> None:
    assert sorted(delete(cluster, keep=keep, dry_run=True)) == list(gone)
    assert names(cluster) == list("abcxyz")
    assert sorted(delete(cluster, keep=keep)) == list(gone)
    assert names(cluster) == sorted(set("abcxyz") - set(gone))
    for name in names(cluster):
        cluster.verify(name)


def test_incomplete_and_damaged_ones_are_not_counted_but_may_be_named(
    cluster: Homes, tmp_path: Path
) -> None:
    cluster.write("begun")
    damaged = tmp_path / "checkpoints" / "y" / MANIFEST
    damaged.write_bytes(b"{}")
    assert sorted(delete(cluster, keep=1)) == list("abcx")
    assert names(cluster) == ["begun", "y", "z"]
    assert delete(cluster, "begun", "y") == ["begun", "y"]
    assert names(cluster) == ["z"]


def test_a_link_is_removed_and_not_what_it_links_to(cluster: Homes, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"x")
    (tmp_path / "checkpoints" / "link").symlink_to(outside)
    problem = cluster.nodes[0].checkpoints.catalog.listed(pb.ListCheckpointsRequest())
    assert next(each.problem for each in problem.checkpoints if each.name == "link").endswith(
        "link is a symbolic link, which is not followed"
    )
    assert delete(cluster, "link") == ["link"]
    assert (outside / "file").exists()


def test_what_is_not_there_is_named(cluster: Homes) -> None:
    with pytest.raises(UnknownCheckpoint, match="'no'"):
        delete(cluster, "z", "no")
    for request in (
        pb.DeleteCheckpointsRequest(id=ID),
        pb.DeleteCheckpointsRequest(id=ID, names=["z"], keep=1),
        pb.DeleteCheckpointsRequest(id=ID, names=["../z"]),
        pb.DeleteCheckpointsRequest(id="x", names=["z"]),
    ):
        work = cluster.nodes[0].checkpoints
        with pytest.raises(BadRequest):
            work.deletion.delete(request, work.work.progress())
    assert names(cluster) == list("abcxyz")


def test_a_deletion_that_is_cut_off_leaves_nothing_that_looks_good(
    cluster: Homes, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = cluster.nodes[0].checkpoints.catalog.store
    for stop in range(1, 8):
        for name, parent in (("p", ""), ("q", "p")):
            if name not in names(cluster):
                cluster.checkpoint(name, parent)
        calls = 0
        real = store.remove

        def failing(path: str, stop: int = stop, real: Callable[[str], None] = real) -> None:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise StoreFailed(path, "gone")
            real(path)

        with monkeypatch.context() as patch:
            patch.setattr(store, "remove", failing)
            try:
                delete(cluster, "p", "q")
            except StoreFailed:
                pass
            else:
                break
        listed = cluster.nodes[0].checkpoints.catalog.listed(pb.ListCheckpointsRequest())
        for each in listed.checkpoints:
            if not each.problem:
                cluster.verify(each.name)
        if left := {"p", "q"} & set(names(cluster)):
            delete(cluster, *left)
    else:
        pytest.fail("it never came to an end")
    assert stop == 5


# ---- in use


def test_a_checkpoint_in_use_is_not_deleted_nor_what_it_needs(cluster: Homes) -> None:
    catalogs = [node.checkpoints.catalog for node in cluster.nodes]
    for catalog in catalogs:
        with catalog.reading("b", "it is being verified"):
            for wanted in (["c", "b"], ["a", "b", "c"]):
                with pytest.raises(CheckpointBusy, match="in use: it is being verified"):
                    delete(cluster, *wanted)
            with pytest.raises(CheckpointBusy, match="in use"):
                delete(cluster, keep=1)
            delete(cluster, "z") if "z" in names(cluster) else None
    assert names(cluster) == list("abcxy")


def test_a_checkpoint_that_a_load_reads_is_in_use(cluster: Homes) -> None:
    with Load(cluster, "z", "t", "other") as load:
        load.reach("ready")
        with pytest.raises(CheckpointBusy, match="it fills table 'other'"):
            delete(cluster, "z")
    delete(cluster, "z")


def test_nobody_begins_to_read_what_is_being_deleted(cluster: Homes) -> None:
    work = cluster.nodes[0].checkpoints
    progress = work.work.progress()
    request = pb.DeleteCheckpointsRequest(id=ID, names=["z"])
    errors: list[Exception] = []

    def run() -> None:
        try:
            work.deletion.delete(request, progress)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not progress.stage:
        pass
    for use in (
        lambda: cluster.verify("z"),
        lambda: cluster.nodes[0].prepare("z", "a" * 16, replace=True),
        lambda: next(work.rows.read_rows(pb.ReadRowsRequest(table="t", checkpoint="z"))),
        lambda: cluster.checkpoint("more", "z"),
    ):
        with pytest.raises(CheckpointBusy, match="'z' is being deleted"):
            use()
    progress.given_up = True
    thread.join()
    assert isinstance(errors[0], Draining)
    assert names(cluster) == list("abcxyz")
    cluster.verify("z")


# ---- which


class Info:
    def __init__(self, name: str, parent: str | None, micros: int) -> None:
        self.name, self.micros = name, micros
        self.parent = None if parent is None else Info(parent, None, 0)


def test_a_chain_that_bites_its_tail_is_no_endless_loop() -> None:
    manifests: Any = {"a": Info("a", "b", 1), "b": Info("b", "a", 2), "c": Info("c", "c", 3)}
    assert surplus(manifests, 2) == []
    assert sorted(newest_first("abc", manifests)) == list("abc")
