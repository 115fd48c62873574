"""Tables filled from a checkpoint while other clients are at work and the disk is slow or full."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from homes import Continue, Homes, Load
from stores import schema

from psproto import ps_pb2 as pb
from psserver import loading
from psserver.calls import Call
from psserver.errors import CheckpointBusy, Draining, NotEmpty, Overloaded, TableLoading
from psserver.work import Work
from storage.admission.rules import Sketch
from storage.errors import DiskFull

INTO = "mine"
ID = "0123456789abcdef"
ALL = set(range(400))  # keys of the stored table


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Homes]:
    """One shard, and a checkpoint "full" of another with the table "t"."""
    url = f"file://{tmp_path}/checkpoints"
    with Homes(tmp_path / "source", 1, url) as source:
        source.create(schema())
        source.push(sorted(ALL), 1.0, step=1)
        source.checkpoint("full")
    with Homes(tmp_path / "target", 1, url) as cluster:
        yield cluster


def keys(cluster: Homes) -> set[int] | None:
    rows = cluster.rows().get(INTO)
    return None if rows is None else set(rows)


def after_note(target: Homes, then: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Let another client act once, between the write of LOADING and the next engine call."""
    real = loading.TableLoader._write_file
    acted: list[bool] = []

    def write(loader: Any, note: Any) -> None:
        real(loader, note)
        if not acted:
            acted.append(True)
            then()

    patch.setattr(loading.TableLoader, "_write_file", write)


def test_a_load_that_is_refused_late_leaves_no_note_that_a_restart_acts_on(
    target: Homes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another table takes the number, then the target gets rows: the load is refused."""
    target.create(schema(INTO))

    def act() -> None:
        target.create(schema("other"))
        target.push([1, 2], table=INTO)

    after_note(target, act, monkeypatch)
    with pytest.raises(NotEmpty):
        target.load("full", "t", INTO)
    assert not (target.nodes[0].directory / loading.FILE).exists()
    target.nodes[0].reopen()
    assert keys(target) == {1, 2}


@pytest.mark.parametrize("existed", [True, False])
def test_nobody_takes_the_name_between_the_note_and_the_hidden_table(
    target: Homes, existed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a restart would take the table of the other client for the one that was filled."""
    if existed:
        target.create(schema(INTO))
    shard, seen = target.nodes[0].shard, []

    def act() -> None:
        for use in (
            lambda: existed and shard.drop_table(INTO),
            lambda: existed and shard.alter_table(INTO, lambda old: schema(INTO, seed=5)),
            lambda: existed or shard.create_table(schema(INTO)),
        ):
            try:
                use()
            except TableLoading:
                seen.append(True)

    after_note(target, act, monkeypatch)
    assert target.load("full", "t", INTO) == 400
    assert len(seen) == (2 if existed else 1)
    assert keys(target) == ALL
    shard.drop_table(INTO)


def test_an_alteration_between_acceptance_and_start_is_refused_not_lost(target: Homes) -> None:
    target.create(schema(INTO))
    shard = target.nodes[0].shard
    with Load(target, "full", "t", INTO) as load:
        load.reach("ready")
        with pytest.raises(TableLoading):
            shard.alter_table(INTO, lambda _: schema(INTO, serving_default=4.0))
        target.push([7], table=INTO)  # rows come and go as before
        assert keys(target) == {7}
    shard.alter_table(INTO, lambda _: schema(INTO, serving_default=4.0))


@pytest.mark.parametrize("error", [Overloaded("the disk is slow"), DiskFull("log", 1)])
def test_a_load_is_taken_back_once_the_log_has_room_again(
    target: Homes, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table does not stay hidden until the next start."""
    monkeypatch.setattr(loading, "PAUSE_SECONDS", 0.001)
    sequencer, refused = target.nodes[0].shard._sequencer, []
    with Load(target, "full", "t", INTO) as load:
        load.reach("ready")
        load.proceed(Continue.STEP_START)
        load.reach("done")
        real = sequencer.reserve

        def reserve(sizes: Any) -> None:
            if len(refused) < 3:
                refused.append(sizes)
                raise error
            real(sizes)

        monkeypatch.setattr(sequencer, "reserve", reserve)
    with pytest.raises(Draining):
        load.running[0].result()
    assert len(refused) == 3
    assert not (target.nodes[0].directory / loading.FILE).exists()
    target.create(schema(INTO))


def test_a_server_that_stops_does_not_wait_for_room_in_the_log(
    target: Homes, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = target.nodes[0]
    with Load(target, "full", "t", INTO) as load:
        load.reach("ready")
        load.proceed(Continue.STEP_START)
        load.reach("done")

        def reserve(sizes: Any) -> None:
            raise DiskFull("log", 1)

        monkeypatch.setattr(node.shard._sequencer, "reserve", reserve)
        node.checkpoints.work.stop()
    with pytest.raises(Draining):
        load.running[0].result()
    node.reopen()
    assert keys(target) is None


def test_what_could_not_be_taken_back_is_not_copied_nor_forgotten(
    target: Homes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another load would overwrite the note, and a checkpoint would have half of the rows.

    After a restore, the next start would drop a restored table of the same number and name.
    """
    node = target.nodes[0]
    node.prepare("full", ID)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "_cancel", lambda *_: 1 / 0)
        with Load(target, "full", "t", INTO) as load:
            load.reach("ready")
            load.proceed(Continue.STEP_START)
            load.reach("done")
    hold = pb.RestoreRequest(id=ID, step=pb.RestoreRequest.STEP_HOLD, owner=ID)
    for work in (
        lambda: target.load("full", "t", "other"),
        lambda: target.checkpoint("half"),
        lambda: node.prepare("full", ID[::-1], replace=True),
        lambda: node.restores.step(hold),
    ):
        with pytest.raises(CheckpointBusy, match="restart the shard"):
            work()
    node.reopen()
    assert keys(target) is None
    assert target.load("full", "t", "other") == 400


def test_a_note_that_cannot_be_removed_does_not_hide_the_table_for_ever(
    target: Homes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = loading._remove, []

    def remove(directory: Path) -> None:
        if not failed:
            failed.append(True)
            raise OSError(5, "broken")
        real(directory)

    monkeypatch.setattr(loading, "_remove", remove)
    with pytest.raises(OSError, match="broken"):
        target.load("full", "t", INTO)
    assert target.nodes[0].shard.tables() == []
    assert target.load("full", "t", INTO) == 400


def test_a_smaller_budget_does_not_stop_the_start_that_takes_a_load_back(
    target: Homes, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = target.nodes[0]
    rule = Sketch(expected_keys=1_000_000)
    target.create(schema(INTO, admission=rule))
    monkeypatch.setattr(loading.TableLoader, "_cancel", lambda *_: None)  # as if it died
    with Load(target, "full", "t", INTO) as load:
        load.reach("ready")
        load.proceed(Continue.STEP_START)
        load.reach("done")
    node._settings["memory_bytes"] = 1 << 20
    node.reopen()
    assert node.shard.describe(INTO)[0].admission == rule
    assert keys(target) == set()


def test_a_full_disk_is_reported_as_one(target: Homes, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loading, "replace", replace)
    with pytest.raises(DiskFull):
        target.load("full", "t", INTO)


def test_a_call_that_waits_for_its_second_step_does_not_spin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    progress, looks = Work().progress(), []
    monkeypatch.setattr(progress, "require_wanted", lambda: looks.append(True))
    call = Call(progress)
    call.advance(Continue.STEP_START)
    call.wait(Continue.STEP_START)
    waiting = threading.Thread(target=call.wait, args=(Continue.STEP_FINISH,))
    waiting.start()
    time.sleep(0.3)
    call.advance(Continue.STEP_FINISH)
    waiting.join()
    assert len(looks) < 20
