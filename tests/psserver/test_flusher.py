"""A flush and the log behind it bring back the very state, whatever happened meanwhile."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import DIM, Home, change, contents, copy_of, make_shard, push, schema

from psserver.engine import Engine
from psserver.errors import NoLog
from psserver.metrics import FlushCollector
from psserver.shard import Shard
from psserver.tombstones import joined
from storage.admission.rules import Sketch
from storage.block import ROWS, TOMBSTONES, rows_per_block
from storage.errors import Corrupt, DiskFull, LogFailed
from storage.eviction import rules as eviction
from storage.initializers import make_initializer
from storage.optimizers import make_optimizer
from storage.records import Cause


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path / "shard") as home:
        home.shard.create_table(schema())
        yield home


def blocks(home: Home) -> list[tuple[int, list[int], list[int]]]:
    """Kind, keys and versions of each block of the base."""
    return [
        (block.kind, block.keys.tolist(), block.versions.tolist())
        for _, block in home.base.blocks()
    ]


def assert_restarts_equal(home: Home) -> None:
    """Stopped and started again, the shard holds what it held."""
    before = contents(home.shard)
    home.reopen()
    assert contents(home.shard) == before


# ---- what a flush writes


def test_a_shard_without_a_flush_is_replayed_from_the_log(home: Home) -> None:
    home.shard.exchange([push([1, 2]), push([2, 3])], [])
    assert_restarts_equal(home)
    assert (home.recovered.rows, home.recovered.records) == (0, 3)


def test_the_first_flush_holds_every_row_and_nothing_is_replayed(home: Home) -> None:
    home.shard.exchange([push([3, 1, 2]), push([2])], [])
    home.flush()
    assert home.base.state is not None
    assert home.base.state.version == home.shard.version == 3
    assert blocks(home) == [(ROWS, [3, 1, 2], [2, 2, 3])]
    assert_restarts_equal(home)
    assert (home.recovered.rows, home.recovered.records) == (3, 0)


def test_the_next_flush_holds_what_changed_since(home: Home) -> None:
    home.shard.exchange([push([1, 2, 3])], [])
    home.flush()
    home.shard.exchange([push([2, 4])], [])
    home.flush()
    assert blocks(home) == [(ROWS, [1, 2, 3], [2, 2, 2]), (ROWS, [2, 4], [3, 3])]
    assert_restarts_equal(home)
    assert (home.recovered.rows, home.recovered.records) == (5, 0)


def test_what_came_after_a_flush_is_replayed_over_it(home: Home) -> None:
    home.shard.exchange([push([1, 2, 3])], [])
    home.flush()
    home.shard.exchange([push([2], 5.0), push([9])], [])
    home.shard.delete(change([1]))
    assert_restarts_equal(home)
    assert (home.recovered.rows, home.recovered.records) == (3, 3)


def test_nothing_is_written_when_nothing_changed(home: Home) -> None:
    home.shard.exchange([push([1])], [])
    home.flush()
    state = home.base.state
    home.flush()
    assert home.base.state is state
    home.reopen()
    state = home.base.state
    home.flush()
    assert home.base.state is state


def test_an_empty_shard_makes_a_flush_too(tmp_path: Path) -> None:
    with Home(tmp_path / "shard") as home:
        home.flush()
        assert home.base.state is not None
        assert (home.base.state.version, home.base.state.blocks) == (0, ())
        assert_restarts_equal(home)


def test_at_two_stored_rows_for_one_that_lives_all_are_written_anew(home: Home) -> None:
    home.shard.exchange([push([1, 2, 3])], [])
    home.flush()
    stored = []
    for _ in range(12):
        home.shard.exchange([push([1, 2])], [])
        home.flush()
        stored.append(sum(len(keys) for _, keys, _ in blocks(home)))
        before = contents(home.shard)
        with Home(copy_of(home.directory, home.directory.with_name(f"c{len(stored)}"))) as other:
            assert contents(other.shard) == before
    assert stored == [5, 7, 3, 5, 7, 3, 5, 7, 3, 5, 7, 3]


def test_the_rows_stored_are_counted_across_a_restart(home: Home) -> None:
    home.shard.exchange([push([1, 2, 3])], [])
    home.flush()
    stored = []
    for _ in range(6):
        home.reopen()
        home.shard.exchange([push([1, 2])], [])
        home.flush()
        stored.append(sum(len(keys) for _, keys, _ in blocks(home)))
    assert stored == [5, 7, 3, 5, 7, 3]


def test_rows_that_fill_several_blocks(tmp_path: Path) -> None:
    wide = {"dim": 1500, "optimizer": make_optimizer("adam", 0.1, {})}
    with Home(tmp_path / "shard", segment_bytes=1 << 24) as home:
        home.shard.create_table(schema("wide", **wide))
        most = rows_per_block(schema("wide", **wide).width)
        keys = list(range(2 * most + 1))
        gradients = np.random.default_rng(1).normal(size=(len(keys), 1500)).astype(np.float32)
        home.shard.exchange([push(keys, table="wide", gradients=gradients)], [])
        home.flush()
        assert [len(keys) for _, keys, _ in blocks(home)] == [most, most, 1]
        assert_restarts_equal(home)


@pytest.mark.slow
def test_a_row_larger_than_a_block_is_a_block_of_its_own(tmp_path: Path) -> None:
    dim = 8192
    with Home(tmp_path / "shard", segment_bytes=1 << 24) as home:
        home.shard.create_table(schema(dim=dim, optimizer=make_optimizer("adam", 0.1, {})))
        home.shard.exchange([push([1, 2], gradients=np.ones((2, dim), np.float32))], [])
        home.flush()
        assert_restarts_equal(home)


@pytest.mark.parametrize(
    "optimizer", ["sgd", "momentum", "adagrad", "adam", "adam_async", "ftrl", "adagrad_decay"]
)
def test_state_comes_back_with_the_rows(tmp_path: Path, optimizer: str) -> None:
    made = schema(optimizer=make_optimizer(optimizer, 0.1, {}))
    rng = np.random.default_rng(2)
    with Home(tmp_path / "shard") as home:
        home.shard.create_table(made)
        for step in range(6):
            keys = rng.choice(20, 8, replace=False).tolist()
            gradients = rng.normal(size=(8, DIM)).astype(np.float32)
            home.shard.exchange([push(keys, gradients=gradients, step=step)], [])
            if step % 2:
                home.flush()
                assert_restarts_equal(home)
        assert_restarts_equal(home)


# ---- deletes


def test_deleted_rows_stay_deleted(home: Home) -> None:
    home.shard.exchange([push([1, 2, 3])], [])
    home.flush()
    home.shard.delete(change([2, 3, 77]))
    home.shard.exchange([push([3])], [])
    home.flush()
    assert blocks(home)[1:] == [(TOMBSTONES, [2, 3], [3, 3]), (ROWS, [3], [4])]
    assert_restarts_equal(home)
    assert home.shard.dump()["t"].keys.tolist() == [1, 3]


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 100])
def test_deleted_rows_stay_deleted_when_their_tombstones_were_forgotten(
    tmp_path: Path, limit: int
) -> None:
    with Home(tmp_path / "shard", max_tombstones=limit) as home:
        home.shard.create_table(schema())
        home.shard.exchange([push(list(range(10)))], [])
        home.flush()
        for key in (2, 3, 5):
            home.shard.delete(change([key]))
        home.flush()
        assert_restarts_equal(home)
        home.shard.exchange([push([3])], [])
        home.flush()
        assert_restarts_equal(home)
        assert home.shard.dump()["t"].keys.tolist() == [0, 1, 3, 4, 6, 7, 8, 9]


def test_the_horizon_of_tombstones_never_goes_back(tmp_path: Path) -> None:
    with Home(tmp_path / "shard", max_tombstones=2) as home:
        home.shard.create_table(schema())
        home.shard.exchange([push(list(range(10)))], [])
        for key in range(2):
            home.shard.delete(change([key]))
        home.flush()
        for key in range(2, 9):
            home.shard.delete(change([key]))
            if key % 3 == 0:
                home.flush()
            horizon = home.shard.tombstone_horizon
            home.reopen()
            assert home.shard.tombstone_horizon >= horizon
            kept = set(joined(home.shard.capture().tombstones).keys.tolist())
            assert kept <= set(range(key + 1))
            deleted_after = {n for n in range(key + 1) if 3 + n > home.shard.tombstone_horizon}
            assert deleted_after <= kept, "a delete behind the horizon has no tombstone"


def test_a_delete_of_nothing_takes_no_memory(home: Home) -> None:
    for _ in range(100):
        home.shard.delete(change([5]))
    assert len(joined(home.shard.capture().tombstones)) == 0


def test_the_causes_of_deletes_come_back(home: Home) -> None:
    home.shard.exchange([push([1, 2])], [])
    home.shard.delete(change([1]))
    home.flush()
    home.shard.delete(change([2]))
    home.reopen()
    assert joined(home.shard.capture().tombstones).causes.tolist() == [Cause.REQUEST] * 2


# ---- tables


def test_a_dropped_table_stays_dropped_and_its_number_is_not_used_again(home: Home) -> None:
    home.shard.create_table(schema("gone", dim=3))
    rows = push([1, 2], table="gone", gradients=np.ones((2, 3), np.float32))
    home.shard.exchange([push([7]), rows], [])
    home.flush()
    home.shard.drop_table("gone")
    home.flush()
    assert_restarts_equal(home)
    home.shard.create_table(schema("new"))
    home.shard.exchange([push([7], table="new")], [])
    home.flush()
    assert_restarts_equal(home)
    assert home.shard.tables() == ["new", "t"]
    assert home.shard.dump()["new"].keys.tolist() == [7]


def test_a_table_dropped_and_created_again_under_its_name_is_another(home: Home) -> None:
    home.shard.exchange([push([1, 2])], [])
    home.flush()
    home.shard.drop_table("t")
    home.shard.create_table(schema(seed=9))
    home.shard.exchange([push([2])], [])
    assert_restarts_equal(home)
    home.flush()
    assert_restarts_equal(home)
    assert home.shard.dump()["t"].keys.tolist() == [2]


def test_a_table_dropped_behind_the_flush_is_dropped_again(home: Home) -> None:
    home.shard.exchange([push([1, 2])], [])
    home.flush()
    home.shard.drop_table("t")
    assert_restarts_equal(home)
    assert home.shard.tables() == []


def test_a_schema_comes_back_whole(home: Home) -> None:
    made = schema(
        "whole",
        dim=3,
        optimizer=make_optimizer("ftrl", 0.25, {}),
        initializer=make_initializer("normal", {}),
        seed=2**64 - 1,
        serving_default=-0.5,
        durability="fsync",
    )
    home.shard.create_table(made)
    home.reopen()
    assert home.shard.describe("whole")[0] == made
    home.flush()
    home.reopen()
    assert home.shard.describe("whole")[0] == made


def test_sessions_come_back_from_the_base_and_from_the_log(home: Home) -> None:
    for sequence in (1, 2, 4):
        home.shard.exchange([push([sequence], client=0xA, sequence=sequence)], [])
    home.shard.delete(change([1], client=0xB, incarnation=3, sequence=9, acknowledged=0))
    home.flush()
    home.shard.exchange([push([5], client=0xA, sequence=5, acknowledged=1)], [])
    assert_restarts_equal(home)
    again = home.shard.exchange([push([2], client=0xA, sequence=2)], []).pushes[0]
    assert (again.version, again.duplicate) == (3, True)
    last = home.shard.exchange([push([5], client=0xA, sequence=5)], []).pushes[0]
    assert (last.version, last.duplicate) == (6, True)
    repeated = home.shard.delete(change([1], client=0xB, incarnation=3, sequence=9))
    assert (repeated.version, repeated.duplicate) == (5, True)


# ---- the log behind a flush


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


def test_it_is_known_when_the_last_flush_was_made(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def age() -> float:
        (metric,) = FlushCollector(home.flusher).collect()
        (sample,) = metric.samples
        assert sample.name == "ps_flush_age_seconds"
        return float(sample.value)

    def refuse(*_: Any) -> int:
        raise DiskFull("base", 1)

    now = [home.flusher.flushed]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    home.flush()
    now[0] += 100
    home.shard.exchange([push([1])], [])
    with monkeypatch.context() as full:
        full.setattr(home.base, "add", refuse)
        with pytest.raises(DiskFull):
            home.flush()
    home.base.discard()
    assert age() == 100
    home.flush()
    now[0] += 5
    assert age() == 5
    home.flush()  # nothing is to be done: all is there
    assert age() == 0


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
    with pytest.raises(Corrupt, match=r"log: no segment is left of a log that was synced"):
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
        with pytest.raises(Corrupt, match=r"copy/log: no segment is left of a log that was synced"):
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
        with pytest.raises(Corrupt, match=r"copy/base: stands at version 0, but the log begins"):
            Home(copy).open()


def test_without_a_log_there_are_no_barriers() -> None:
    with pytest.raises(NoLog):
        make_shard().barrier("b")


# ---- rows that are copied while they change


class Paused:
    """A scan that lets the engine work between finding rows and copying them."""

    def __init__(self, scan: Any, between: Callable[[], None]) -> None:
        self._scan = scan
        self._between = between

    def find(self, *args: Any) -> Any:
        return self._scan.find(*args)

    def copy(self, *args: Any) -> Any:
        self._between()
        return self._scan.copy(*args)


def flush_with(home: Home, meanwhile: Callable[[Shard], None]) -> None:
    """A flush during which ``meanwhile`` happens, after rows were found."""
    captured = home.shard.capture()
    done = []

    def once() -> None:
        if not done:
            done.append(1)
            meanwhile(home.shard)

    tables = tuple(replace(each, scan=Paused(each.scan, once)) for each in captured.tables)
    changed = replace(captured, tables=tables)
    engine = home.flusher._engine
    calls = iter([changed])

    class First:
        def run(self, call: Callable[[], Any]) -> Any:
            return next(calls, None) or engine.run(call)

    home.flusher._engine = First()
    try:
        home.flush()
    finally:
        home.flusher._engine = engine


def push_some(shard: Shard) -> None:
    shard.exchange([push([2, 3], 4.0)], [])


def delete_some(shard: Shard) -> None:
    shard.delete(change([2, 3]))


def move_up(shard: Shard) -> None:
    """Key 1 leaves its slot, which stays empty, and comes back in key 2's."""
    shard.delete(change([1]))
    shard.delete(change([2]))
    shard.exchange([push([1], 7.0)], [])


def move_down(shard: Shard) -> None:
    """Key 2 leaves its slot, which stays empty, and comes back in key 1's."""
    shard.delete(change([2]))
    shard.delete(change([1]))
    shard.exchange([push([2], 7.0)], [])


def move_all(shard: Shard) -> None:
    """Every key comes back in another slot."""
    shard.delete(change([1, 2, 3, 4]))
    shard.exchange([push([4, 2, 3, 1], 7.0)], [])


def replace_one(shard: Shard) -> None:
    shard.delete(change([3]))
    shard.exchange([push([99], 4.0)], [])


def drop(shard: Shard) -> None:
    shard.drop_table("t")


def drop_and_create(shard: Shard) -> None:
    shard.drop_table("t")
    shard.create_table(schema())
    shard.exchange([push([1, 4])], [])


MEANWHILE = (
    push_some,
    delete_some,
    move_up,
    move_down,
    move_all,
    replace_one,
    drop,
    drop_and_create,
)


@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("restart", [False, True])
def test_changes_while_rows_are_copied_are_not_lost(
    home: Home, meanwhile: Callable[[Shard], None], before: int, restart: bool
) -> None:
    home.shard.exchange([push([1, 2, 3, 4], 2.0)], [])
    for _ in range(before):
        home.flush()
        home.shard.exchange([push([1, 2, 3, 4])], [])
    flush_with(home, meanwhile)
    if restart:
        assert_restarts_equal(home)
    home.flush()
    assert_restarts_equal(home)
    if "t" in home.shard.tables():
        home.shard.delete(change([1, 2, 3, 4]))
        home.flush()
        assert_restarts_equal(home)
        home.shard.exchange([push([1, 2, 3, 4])], [])
        assert_restarts_equal(home)


@contextmanager
def working_engine() -> Iterator[Engine]:
    engine, loop = Engine(), asyncio.new_event_loop()
    engine.open(loop)
    yield engine
    engine.close()
    loop.close()


@contextmanager
def flushes_meanwhile(home: Home) -> Iterator[list[int]]:
    """One flush after the other; the versions at which they stood."""
    stop = threading.Event()
    failed: list[BaseException] = []
    made: list[int] = []

    def run() -> None:
        try:
            while not stop.is_set():
                home.flush()
                assert home.base.state is not None
                made.append(home.base.state.version)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield made
    finally:
        stop.set()
        thread.join()
    assert failed == []


operations = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.lists(st.integers(0, 40), unique=True, max_size=12)),
        st.tuples(st.just("push"), st.lists(st.integers(0, 9), unique=True, max_size=4)),
        st.tuples(st.just("delete"), st.lists(st.integers(0, 40), unique=True, max_size=6)),
        st.tuples(st.sampled_from(["drop", "create"]), st.just([])),
    ),
    min_size=1,
    max_size=60,
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(operations, st.sampled_from([0, 3, 1000]), st.randoms(use_true_random=False))
def test_flushes_beside_a_working_engine_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    work: list[tuple[str, list[int]]],
    tombstones: int,
    rng: random.Random,
) -> None:
    options = {"segment_bytes": 8192, "max_tombstones": tombstones}
    directory = tmp_path_factory.mktemp("shard")
    with working_engine() as engine, Home(directory, engine=engine, **options) as home:
        home.shard.create_table(schema())
        with flushes_meanwhile(home):
            for kind, keys in work:
                engine.run(partial(act, home.shard, kind, keys))
                if rng.random() < 0.1:
                    home.written()
        assert_restarts_equal(home)


def act(shard: Shard, kind: str, keys: list[int]) -> None:
    """One change, or none where it makes no sense."""
    there = "t" in shard.tables()
    if kind == "create":
        shard.create_table(schema())
    elif kind == "drop" and there:
        shard.drop_table("t")
    elif kind == "push" and there:
        shard.exchange([push(keys, float(shard.version))], [])
    elif kind == "delete" and there:
        shard.delete(change(keys))


@pytest.mark.slow
def test_long_flushes_beside_large_pushes_lose_nothing(tmp_path: Path) -> None:
    """Blocks take long enough to be copied that pushes and deletes come in between."""
    rng, options = np.random.default_rng(3), {"segment_bytes": 8 << 20}
    made = schema(dim=64, optimizer=make_optimizer("adam", 0.1, {}))
    with working_engine() as engine, Home(tmp_path / "shard", engine=engine, **options) as home:
        home.shard.create_table(made)
        with flushes_meanwhile(home) as versions:
            pushed = 0
            while pushed < 300 or len(set(versions)) <= 5:
                pushed += 1
                keys = rng.choice(20_000, 500, replace=False).tolist()
                gone = rng.choice(20_000, 300, replace=False).tolist()
                gradients = rng.normal(size=(500, 64)).astype(np.float32)
                pushes = [push(keys, gradients=gradients)]
                engine.run(partial(home.shard.exchange, pushes, []))
                engine.run(partial(home.shard.delete, change(gone)))
                if pushed % 50 == 0:  # the log has room for so many
                    home.written()
        dump, version = home.shard.dump()["t"], home.shard.version
        home.reopen()
        again = home.shard.dump()["t"]
        assert home.shard.version == version
        for field in ("keys", "rows", "meta"):
            np.testing.assert_array_equal(getattr(again, field), getattr(dump, field))
