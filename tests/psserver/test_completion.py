"""Names and attempts of checkpoints, and how the parts of all shards become one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from homes import Homes, fill
from stores import schema

from psproto import ps_pb2 as pb
from psserver.errors import (
    BadRequest,
    CheckpointBusy,
    CheckpointExists,
    CheckpointUnfit,
    Draining,
)
from storage.errors import (
    Corrupt,
    StoreFailed,
    UnknownCheckpoint,
)
from storage.manifest import MANIFEST

ID = "0123456789abcdef"
Make = Callable[..., Homes]


def test_a_checkpoint_is_there_when_it_is_complete_and_not_before(make: Make, url: str) -> None:
    source = make(2)
    fill(source)
    listed = source.nodes[0].checkpoints.catalog.listed
    attempt, parts = source.write("full")
    assert [each.problem for each in listed(pb.ListCheckpointsRequest()).checkpoints] == [
        "not completed"
    ]
    with pytest.raises(UnknownCheckpoint):
        source.verify("full")
    source.complete("full", attempt, parts)
    info = listed(pb.ListCheckpointsRequest()).checkpoints[0]
    assert (info.name, info.shards, info.problem) == ("full", 2, "")
    assert list(info.versions) == source.versions()
    assert source.verify("full") > 0


def test_a_name_is_used_once(make: Make) -> None:
    source = make(1)
    source.checkpoint("full")
    with pytest.raises(CheckpointExists):
        source.checkpoint("full")
    one, two = source.write("other"), source.write("other")
    source.complete("other", *one)
    with pytest.raises(CheckpointExists):
        source.complete("other", *two)


def test_a_completion_may_be_repeated_whatever_became_of_the_first(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(2)
    fill(source)
    attempt, parts = source.write("full")
    source.write("full")
    store = source.nodes[0].checkpoints.catalog.store

    def refuse(path: str) -> None:
        raise StoreFailed(path, "PermissionError: no")

    with monkeypatch.context() as patch, structlog.testing.capture_logs() as lines:
        patch.setattr(store, "remove", refuse)
        first = source.complete("full", attempt, parts)
    assert [(line["event"], line["checkpoint"]) for line in lines] == [
        ("earlier attempts are left", "full")
    ]
    source.nodes[0].checkpoints.completion._now = lambda: 9.5
    assert source.complete("full", attempt, parts) == first
    assert store.directories("full") == [attempt]
    assert source.verify("full") > 0


def test_what_earlier_attempts_left_is_cleared_away(make: Make, tmp_path: Path) -> None:
    source = make(1)
    fill(source)
    source.write("full", attempt="1" * 16)
    source.write("full", attempt="2" * 16)
    attempt, parts = source.write("full")
    source.complete("full", attempt, parts)
    there = {path.name for path in (tmp_path / "checkpoints" / "full").iterdir()}
    assert there == {MANIFEST, attempt}


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/tmp/x", "a\\b", "-x", "é", "a b", "x" * 129, "a\n"],  # noqa: S108
)
def test_a_checkpoint_is_named_and_never_pathed(make: Make, name: str) -> None:
    node = make(1).nodes[0]
    work, progress = node.checkpoints, node.checkpoints.work.progress()
    calls: list[Callable[[], Any]] = [
        lambda: work.write(pb.WriteCheckpointRequest(name=name, attempt=ID), progress),
        lambda: work.completion.complete(pb.CompleteCheckpointRequest(name=name, attempt=ID)),
        lambda: work.catalog.verify(pb.VerifyCheckpointRequest(name=name), progress),
        lambda: work.loader.load(
            pb.LoadTableRequest(name=name, table="t", into="t", id=ID), progress
        ),
        lambda: node.restores.prepare(pb.PrepareRestoreRequest(name=name, id=ID), progress),
    ]
    if name:
        calls += [
            lambda: work.catalog.listed(pb.ListCheckpointsRequest(name=name)),
            lambda: next(work.rows.read_rows(pb.ReadRowsRequest(table="t", checkpoint=name))),
            lambda: work.write(
                pb.WriteCheckpointRequest(name="a", attempt=ID, parent=name), progress
            ),
        ]
    for call in calls:
        with pytest.raises(BadRequest, match="checkpoint name must be"):
            call()


@pytest.mark.parametrize("bad", ["", "x", "../../../../etc/", ID.upper(), ID + "0"])
def test_attempts_and_ids_are_no_paths_either(make: Make, bad: str) -> None:
    node = make(1).nodes[0]
    progress = node.checkpoints.work.progress()
    with pytest.raises(BadRequest, match="attempt must be"):
        node.checkpoints.write(pb.WriteCheckpointRequest(name="a", attempt=bad), progress)
    with pytest.raises(BadRequest, match="attempt must be"):
        node.checkpoints.completion.complete(pb.CompleteCheckpointRequest(name="a", attempt=bad))
    with pytest.raises(BadRequest, match="id must be"):
        node.restores.prepare(pb.PrepareRestoreRequest(name="a", id=bad), progress)


def test_parts_that_no_shard_wrote_are_refused(make: Make) -> None:
    source = make(2)
    fill(source)
    attempt, parts = source.write("full")
    bad: list[list[Any]] = [parts[:1], [], parts[::-1], [*parts, parts[0]]]
    for field, value in (("path", "../x"), ("bytes", 0), ("checksum", "0" * 32)):
        other = pb.CheckpointPart()
        other.CopyFrom(parts[0])
        setattr(other, field, value)
        bad.append([other, parts[1]])
    for each in bad:
        with pytest.raises((CheckpointUnfit, Corrupt)):
            source.complete("full", attempt, each)
    with pytest.raises(UnknownCheckpoint):
        source.verify("full")
    source.complete("full", attempt, parts)


def test_a_table_that_not_all_shards_have_makes_no_checkpoint(make: Make) -> None:
    source = make(2)
    source.nodes[0].shard.create_table(schema())
    with pytest.raises(CheckpointUnfit, match="'t' was created, altered or dropped"):
        source.checkpoint("full")
    source.create(schema())
    source.checkpoint("full")


def test_work_that_nobody_waits_for_ends(make: Make) -> None:
    source = make(1)
    fill(source)
    work = source.nodes[0].checkpoints
    progress = work.work.progress()
    progress.given_up = True
    with pytest.raises(Draining):
        work.write(pb.WriteCheckpointRequest(name="full", attempt=ID), progress)
    source.checkpoint("full")
    work.work.stop()
    with pytest.raises((Draining, StoreFailed), match="the server is stopping"):
        source.verify("full")


def test_one_large_piece_of_work_at_a_time(make: Make) -> None:
    source = make(1)
    with (
        source.nodes[0].checkpoints.work.alone("a test"),
        pytest.raises(CheckpointBusy, match="busy: a test"),
    ):
        source.write("full")
    source.write("full")
