"""Flushes: the base and the log after it restore the very state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from stores import DIM, Home, change, contents, push, schema, stored

from psserver import compaction
from psserver.compaction import MOST_SMALL
from psserver.tombstones import joined
from storage.admission.rules import Counter
from storage.block import COUNTERS, DIRECTORY, ROWS, TOMBSTONES, rows_per_block
from storage.initializers import make_initializer
from storage.optimizers import make_optimizer
from storage.records import Cause


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
    assert stored(home.base) == [(ROWS, [3, 1, 2], [2, 2, 3])]
    assert_restarts_equal(home)
    assert (home.recovered.rows, home.recovered.records) == (3, 0)


def test_the_next_flush_holds_what_changed_since(home: Home) -> None:
    home.shard.exchange([push([1, 2, 3])], [])
    home.flush()
    home.shard.exchange([push([2, 4])], [])
    home.flush()
    assert stored(home.base) == [(ROWS, [1, 3], [2, 2]), (ROWS, [2, 4], [3, 3])]
    assert_restarts_equal(home)
    assert (home.recovered.rows, home.recovered.records) == (4, 0)


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


def counts(home: Home) -> list[int]:
    """Rows in each block of rows, current or not, in the order in which they were written."""
    return [len(block) for _, block in home.base.blocks() if block.kind == ROWS]


def test_a_block_with_few_current_rows_is_moved_and_then_deleted(home: Home) -> None:
    home.shard.exchange([push(list(range(10)))], [])
    home.flush()
    home.shard.exchange([push(list(range(5)))], [])
    home.flush()
    assert counts(home) == [10, 5]  # half of the first block is current
    home.shard.exchange([push([5])], [])
    home.flush()
    assert counts(home) == [10, 5, 1, 4]  # the old block is needed until the shard knows the new
    assert [keys for _, keys, _ in stored(home.base)] == [[0, 1, 2, 3, 4], [5], [6, 7, 8, 9]]
    assert_restarts_equal(home)
    home.shard.exchange([push([77])], [])
    home.flush()
    assert counts(home) == [5, 1, 4, 1]
    assert_restarts_equal(home)


def test_a_block_without_current_rows_is_deleted(home: Home) -> None:
    home.shard.exchange([push([1, 2])], [])
    home.flush()
    home.shard.exchange([push([1, 2, 3])], [])
    home.flush()
    assert counts(home) == [3]
    home.shard.delete(change([1, 2, 3]))
    home.flush()
    assert counts(home) == []
    assert_restarts_equal(home)


def test_rows_are_moved_whole(home: Home) -> None:
    home.shard.exchange([push(list(range(10)), 3.0, step=7)], [])
    home.flush()
    home.shard.exchange([push(list(range(8)))], [])
    for _ in range(3):
        home.flush()
        assert_restarts_equal(home)
        home.shard.exchange([push([0])], [])
    assert home.shard.dump()["t"].meta[8:].tolist() == [[8, 2, 7, 1], [9, 2, 7, 1]]
    assert home.shard.dump()["t"].rows[8:].tolist() == [[-3, -3], [-3, -3]]


def test_many_small_blocks_are_merged(home: Home) -> None:
    for key in range(60):
        home.shard.exchange([push([key])], [])
        home.flush()
        if key % 10 == 5:
            assert_restarts_equal(home)
    assert len(counts(home)) <= MOST_SMALL + 3
    assert sorted(key for _, keys, _ in stored(home.base) for key in keys) == list(range(60))


@pytest.mark.parametrize("flushes", [25, pytest.param(40, marks=pytest.mark.slow)])
def test_steady_changes_keep_the_disk_small(tmp_path: Path, flushes: int) -> None:
    """Blocks of 100 rows, so that there are many of them."""
    rng = np.random.default_rng(1)
    with Home(tmp_path / "shard") as home, pytest.MonkeyPatch.context() as patch:
        for where in ("packing", "compaction", "basewriter"):
            patch.setattr(f"psserver.{where}.rows_per_block", lambda _: 100)
        patch.setattr(compaction, "SMALL_BYTES", 0)
        home.shard.create_table(schema(dim=100))
        ones = np.ones((3000, 100), np.float32)
        home.shard.exchange([push(range(3000), gradients=ones)], [])
        for at in range(flushes):
            keys = rng.choice(3000, 300, replace=False).tolist()
            home.shard.exchange([push(keys, gradients=ones[:300])], [])
            home.flush()
            if at >= 20:
                assert sum(counts(home)) <= 1.5 * 3000
        assert_restarts_equal(home)


def test_tombstones_that_are_kept_do_not_make_every_flush_write_all_rows(home: Home) -> None:
    home.shard.exchange([push(list(range(40)))], [])
    home.shard.delete(change(list(range(4, 40))))  # far more tombstones than rows
    home.flush()
    written = []
    for _ in range(4):
        before = {number for number, _ in home.base.blocks()}
        home.shard.exchange([push([1])], [])
        home.flush()
        new = [
            block.keys.tolist()
            for number, block in home.base.blocks()
            if number not in before and block.kind != DIRECTORY
        ]
        written.append(new)
    assert written == [[[1]]] * 4
    assert_restarts_equal(home)


def test_tombstones_and_counters_are_written_again_when_most_are_outdated(tmp_path: Path) -> None:
    with Home(tmp_path / "shard") as home:
        home.shard.create_table(schema(admission=Counter(threshold=100)))
        entries = []
        for at in range(9):
            home.shard.exchange([push([1, 2, 3])], [])
            home.flush()
            found = [len(keys) for kind, keys, _ in stored(home.base) if kind == COUNTERS]
            entries.append(sum(found))
            if at % 3 == 1:
                assert_restarts_equal(home)
        assert entries == [3, 6, 9, 3, 6, 9, 3, 6, 9]


def test_rows_that_fill_several_blocks(tmp_path: Path) -> None:
    wide = {"dim": 1500, "optimizer": make_optimizer("adam", 0.1, {})}
    with Home(tmp_path / "shard", segment_bytes=1 << 24) as home:
        home.shard.create_table(schema("wide", **wide))
        most = rows_per_block(schema("wide", **wide).width)
        keys = list(range(2 * most + 1))
        gradients = np.random.default_rng(1).normal(size=(len(keys), 1500)).astype(np.float32)
        home.shard.exchange([push(keys, table="wide", gradients=gradients)], [])
        home.flush()
        assert counts(home) == [most, most, 1]
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
    assert stored(home.base) == [
        (ROWS, [3], [4]),
        (ROWS, [1], [2]),  # moved
        (TOMBSTONES, [2, 3], [3, 3]),
    ]
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
