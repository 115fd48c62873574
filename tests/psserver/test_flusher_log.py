"""Flushes, the log and the disk: what is kept, what is truncated, what ends the process."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
from stores import Home, contents, copy_of, make_shard, push, schema

from psserver.errors import NoLog
from psserver.metrics.flushes import FlushCollector
from storage.admission.rules import Sketch
from storage.errors import Corrupt, DiskFull, LogFailed
from storage.eviction import rules as eviction


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path / "shard") as home:
        home.shard.create_table(schema())
        yield home


def assert_restarts_equal(home: Home) -> None:
    """Stopped and started again, the shard holds what it held."""
    before = contents(home.shard)
    home.reopen()
    assert contents(home.shard) == before


def test_a_sketch_is_written_again_if_it_changed(home: Home) -> None:
    rules = {"admission": Sketch(expected_keys=1000), "evictions": (eviction.StepTtl(steps=10),)}
    for name in "ab":
        home.shard.create_table(schema(name, **rules))
    change = [
        lambda: home.shard.exchange([push([1, 2], table="a"), push([1], table="b")], []),
        lambda: home.shard.exchange([push([1])], []),
        lambda: home.shard.exchange([push([3], table="a")], []),
        lambda: home.shard.exchange([push([], step=100, table="b")], []),  # ages it
        lambda: home.shard.drop_table("a"),
    ]
    sketches = []
    for each in change:
        each()
        for _ in range(4):
            home.shard.sweeps.tick()
        home.flush()
        assert home.base.state is not None
        sketches.append(home.base.state.blocks[-home.base.state.cells :])
        before = contents(home.shard)
    (a, b), second, (a2, b2), (a3, b3), last = sketches
    assert second == (a, b)
    assert (b2, a3) == (b, a2)
    assert a2 != a
    assert b3 != b
    assert last == (b3,)
    home.reopen()
    assert contents(home.shard) == before


def test_the_log_is_cut_up_to_the_flush(tmp_path: Path) -> None:
    with Home(tmp_path / "shard", segment_bytes=4096) as home:
        home.shard.create_table(schema())
        for _ in range(40):
            home.shard.exchange([push(list(range(10)))], [])
        assert home.log.first == 1
        home.flush()
        assert home.log.first > 1
        assert len(list((home.directory / "log").glob("*.log"))) == 1
        assert_restarts_equal(home)


def test_the_log_is_kept_as_long_as_the_settings_say(tmp_path: Path) -> None:
    with Home(tmp_path / "shard", segment_bytes=4096, keep=(1 << 30, 0.0)) as home:
        home.shard.create_table(schema())
        for _ in range(40):
            home.shard.exchange([push(list(range(10)))], [])
        home.flush()
        assert home.log.first == 1
        assert_restarts_equal(home)


def test_a_flush_that_finds_the_disk_full_leaves_the_last_one(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.shard.exchange([push([1])], [])
    home.flush()
    state = home.base.state
    home.shard.exchange([push([2])], [])

    def refuse(*_: Any) -> int:
        raise DiskFull("base", 1)

    with monkeypatch.context() as full:
        full.setattr(home.base, "add", refuse)
        with pytest.raises(DiskFull):
            home.flush()
    assert home.base.state is state
    home.base.discard()
    assert_restarts_equal(home)
    home.shard.exchange([push([3])], [])
    home.flush()
    assert_restarts_equal(home)


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [DiskFull("base", 1), OSError(5, "broken"), ZeroDivisionError("a defect")]
)
def test_the_thread_goes_on_after_a_flush_and_its_cleaning_up_failed(
    home: Home, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    calls = []
    home.flusher._seconds = 0.001

    def refuse() -> None:
        calls.append(1)
        raise error

    with monkeypatch.context() as full:
        full.setattr(home.base, "discard", refuse)
        full.setattr(home.flusher, "flush", refuse)
        home.flusher.open()
        for _ in range(1000):
            if len(calls) >= 6:
                break
            threading.Event().wait(0.005)
        home.flusher.close()
    assert len(calls) >= 6


def run_thread(home: Home) -> None:
    """Let the flusher's thread work until it ends by itself."""
    home.flusher._seconds = 0.001
    home.flusher.open()
    home.flusher._thread.join(10)
    assert not home.flusher._thread.is_alive()


def test_damage_that_a_flush_meets_ends_the_process(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage = Corrupt("data.mdb", "MDB_PAGE_NOTFOUND")

    def find(_: Any) -> int:
        raise damage

    home.shard.exchange([push([1])], [])
    with monkeypatch.context() as patch:
        patch.setattr(home.base, "add", find)
        run_thread(home)
    assert home.failures == [damage]


def test_a_sync_of_the_base_that_fails_ends_the_process(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, commits = home.base._try, list[int]()
    failure = lmdb.DiskError("mdb_txn_commit: Input/output error")
    failure.code = errno.EIO  # type: ignore[misc]

    def fail() -> None:
        commits.append(1)
        raise failure

    def broken(call: Callable[..., Any], *args: Any, **more: Any) -> Any:
        return real(fail if call.__name__ == "commit" else call, *args, **more)

    home.shard.exchange([push([1])], [])
    with monkeypatch.context() as patch:
        patch.setattr(home.base, "_try", broken)
        run_thread(home)
    assert len(commits) == 1  # nobody tries again
    assert home.failures == [home.base.failure]
    assert isinstance(home.base.failure, OSError)


def test_a_failed_log_ends_the_thread_which_need_not_tell(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise LogFailed("the disk is gone")

    monkeypatch.setattr(home.flusher, "flush", refuse)
    run_thread(home)
    assert home.failures == []


def values(home: Home) -> dict[str, float]:
    """The metrics of flushes."""
    metrics = FlushCollector(home.flusher).collect()
    return {each.name: each.value for metric in metrics for each in metric.samples}


def fail_to_flush(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Push a row, and flush to a disk that is full."""

    def refuse(*_: Any) -> int:
        raise DiskFull("base", 1)

    home.shard.exchange([push([1])], [])
    with monkeypatch.context() as full:
        full.setattr(home.base, "add", refuse)
        with pytest.raises(DiskFull):
            home.flush()
    home.base.discard()


def test_it_is_known_when_the_last_flush_was_made(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def age() -> float:
        return now[0] - values(home)["ps_flush_timestamp_seconds"]

    now = [1e9]
    monkeypatch.setattr(time, "time", lambda: now[0])
    home.flush()
    now[0] += 100
    fail_to_flush(home, monkeypatch)
    assert age() == 100
    home.flush()
    now[0] += 5
    assert age() == 5
    home.flush()  # nothing is to be done: all is there
    assert age() == 0
    assert values(home)["ps_flush_failures_total"] == 1


def test_flushes_that_write_are_timed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.flush()
    fail_to_flush(home, monkeypatch)
    home.flush()
    assert values(home)["ps_flush_duration_seconds_count"] == 2
    home.flush()  # finds nothing to write
    assert values(home)["ps_flush_duration_seconds_count"] == 2


def test_the_log_is_kept_for_a_time_and_goes_on_an_idle_shard_too(tmp_path: Path) -> None:
    with Home(tmp_path / "shard", segment_bytes=4096, keep=(0, 300.0)) as home:
        home.shard.create_table(schema())
        for _ in range(40):
            home.shard.exchange([push(list(range(10)))], [])
        home.flush()
        assert home.log.first == 1
        state = home.base.state
        segments = sorted((home.directory / "log").glob("*.log"))
        assert len(segments) > 3
        for path in segments[:2]:
            os.utime(path, (0, 0))
        home.flush()
        assert home.log.first == int(segments[2].stem)
        assert home.base.state is state
        for path in segments[2:]:
            os.utime(path, (0, 0))
        home.flusher.pins["somebody"] = int(segments[3].stem)
        home.flush()
        assert home.log.first == int(segments[3].stem)
        del home.flusher.pins["somebody"]
        home.flush()
        assert home.log.first == int(segments[-1].stem)
        assert_restarts_equal(home)


def test_a_log_without_its_segments_is_damage(home: Home) -> None:
    home.shard.exchange([push([1])], [])
    home.flush()
    home.written()
    copy = Home(copy_of(home.directory, home.directory.with_name("copy")))
    for path in (copy.directory / "log").glob("*.log"):
        path.unlink()
    with pytest.raises(Corrupt, match=r"log: all segments of an existing log are missing"):
        copy.open()


@pytest.mark.parametrize("flushes", [0, 1])
def test_a_lost_log_is_damage_and_not_the_beginning_of_a_new_one(home: Home, flushes: int) -> None:
    for _ in range(flushes):
        home.flush()
    home.shard.exchange([push([1])], [])
    home.written()
    copy = Home(copy_of(home.directory, home.directory.with_name("copy")))
    shutil.rmtree(copy.directory / "log")
    for _ in range(2):
        with pytest.raises(Corrupt, match=r"copy/log: all segments of an existing log are missing"):
            copy.open()
    assert not (copy.directory / "log").exists()


def test_a_lost_base_is_damage_if_the_log_has_not_all(tmp_path: Path) -> None:
    with Home(tmp_path / "shard", segment_bytes=4096) as home:
        home.shard.create_table(schema())
        for _ in range(40):
            home.shard.exchange([push(list(range(10)))], [])
        home.flush()
        home.written()
        copy = copy_of(home.directory, tmp_path / "copy")
    (copy / "base" / "data.mdb").unlink()
    for _ in range(2):
        with pytest.raises(
            Corrupt, match=r"copy/base: the base ends at version 0, but the log begins"
        ):
            Home(copy).open()


def test_without_a_log_there_are_no_barriers() -> None:
    with pytest.raises(NoLog):
        make_shard().barrier("b")
