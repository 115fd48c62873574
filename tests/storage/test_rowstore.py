"""A table whose rows are mostly on disk does what a table in memory does, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import raised
from cold import ColdTable

from storage.arena import Budget
from storage.errors import OutOfMemory
from storage.initializers import make_initializer
from storage.kernels import Images
from storage.optimizers import make_optimizer
from storage.schema import TableSchema
from storage.slots import FREQUENCY, VERSION
from storage.table import Table

both = raised.both

ROW = 4 * 16 + 32  # bytes that a row of dim 8 with Adagrad takes in memory
SMALL = 3 << 20


def schema(**fields: Any) -> TableSchema:
    values: dict[str, Any] = {
        "name": "t",
        "dim": 8,
        "optimizer": make_optimizer("adagrad", 0.1, {}),
        "initializer": make_initializer("uniform", {}),
    }
    return TableSchema(**values | fields)


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[ColdTable]:
    made = ColdTable(schema(), tmp_path / "base", SMALL)
    yield made
    made.close()


def push(table: Table, keys: Any, version: int, seed: int = 0) -> None:
    keys = np.asarray(keys, np.uint64)
    gradients = np.random.default_rng((seed, version)).standard_normal((len(keys), 8), np.float32)
    counts = np.full(len(keys), 1 + version % 3, np.uint32)
    table.push(keys, gradients, counts, version=version, step=version)


def pull(table: Table, keys: Any, mode: Any = "train") -> np.ndarray:
    out = np.empty((len(keys), table.schema.dim), np.float32)
    table.pull(np.asarray(keys, np.uint64), mode, out)
    return out


def same(one: Table, other: Table) -> None:
    """Check that two tables have the same rows, state and metadata, bit for bit."""
    mine, theirs = one.dump(), other.dump()
    assert mine.keys.tolist() == theirs.keys.tolist()
    assert mine.rows.tobytes() == theirs.rows.tobytes()
    assert mine.meta.tobytes() == theirs.meta.tobytes()


def test_a_clean_row_leaves_memory_without_a_write_and_is_read_from_its_block(
    cold: ColdTable,
) -> None:
    twin = Table(schema(), Budget(1 << 30))
    keys = np.arange(5000)
    for table in (cold.table, twin):
        push(table, keys, 1)
    assert cold.flush() == 5000
    commits = cold.commits
    assert cold.table.store.demote(1000) >= 1000
    assert cold.commits == commits
    assert cold.blocks.rows == 5000 - cold.table.store.host.rows > 0
    same(cold.table, twin)
    assert pull(cold.table, keys).tobytes() == pull(twin, keys).tobytes()
    assert cold.blocks.rows == 5000 - cold.table.store.host.rows  # a pull moves nothing


def test_dirty_rows_never_leave_memory(cold: ColdTable) -> None:
    push(cold.table, np.arange(3000), 1)
    assert cold.table.store.demote(1000) == 0
    cold.flush()
    push(cold.table, np.arange(100), 2)
    cold.table.store.demote(3000)
    assert cold.table.store.host.rows == 100


def test_a_push_brings_cold_rows_back_and_makes_their_copies_out_of_date(cold: ColdTable) -> None:
    push(cold.table, np.arange(2000), 1)
    cold.flush()
    cold.table.store.demote(2000)
    assert cold.table.store.host.rows == 0
    push(cold.table, np.arange(500), 2)
    assert (cold.table.store.host.rows, cold.blocks.rows, cold.blocks.live_rows) == (
        500,
        1500,
        1500,
    )
    meta = cold.table.store.meta(cold.table.store.find(np.arange(2000, dtype=np.uint64))[0])
    assert meta[:, VERSION].tolist() == [2] * 500 + [1] * 1500
    assert meta[:, FREQUENCY].tolist() == [2 + 3] * 500 + [2] * 1500


def test_a_check_of_a_push_changes_no_contents(cold: ColdTable) -> None:
    keys = np.arange(2000, dtype=np.uint64)
    push(cold.table, keys, 1)
    cold.flush()
    cold.table.store.demote(2000)
    before = cold.table.dump()
    cold.table.check_push(keys, np.ones((2000, 8), np.float32), step=1)
    after = cold.table.dump()
    assert before.rows.tobytes() == after.rows.tobytes()
    assert before.meta.tobytes() == after.meta.tobytes()
    assert cold.blocks.live_rows == 2000  # they are still clean
    assert cold.table.store.demote(2000) == 2000


def test_a_cold_row_is_deleted_without_being_read(cold: ColdTable) -> None:
    push(cold.table, np.arange(1000), 1)
    cold.flush()
    cold.table.store.demote(1000)
    gone, rows = cold.table.delete(np.arange(0, 2000, 2, dtype=np.uint64))
    assert (len(gone), rows, len(cold.table), cold.blocks.live_rows) == (500, 500, 500, 500)
    assert cold.table.store.host.rows == 0


def test_a_whole_row_replaces_a_cold_one_unless_that_is_newer(cold: ColdTable) -> None:
    keys = np.arange(10, dtype=np.uint64)
    push(cold.table, keys, 5)
    cold.flush()
    cold.table.store.demote(10)
    old = cold.table.dump()
    versions = np.where(keys < 5, 9, 4).astype(np.uint64)
    rows = np.full((10, 16), 7, np.float32)
    cold.table.put(Images(keys, versions, np.zeros(10, np.int64), keys + np.uint64(1), rows))
    new = cold.table.dump()
    assert new.rows[:5].tolist() == rows[:5].tolist()
    assert new.rows[5:].tobytes() == old.rows[5:].tobytes()
    assert new.meta[:, VERSION].tolist() == [9] * 5 + [5] * 5


@pytest.mark.parametrize("pushes", [60, pytest.param(99, marks=pytest.mark.slow)])
def test_rows_beyond_the_budget_are_pushed_while_their_neighbours_leave(
    cold: ColdTable, pushes: int
) -> None:
    twin = Table(schema(), Budget(1 << 30))
    rng = np.random.default_rng(3)
    for version in range(1, pushes + 1):
        keys = rng.choice(20_000, 800, replace=False)
        for table in (cold.table, twin):
            push(table, keys, version)
        cold.flush()
        assert cold.budget.held <= cold.budget.limit
    assert cold.table.store.host.rows < len(cold.table)
    same(cold.table, twin)


def test_a_push_without_room_changes_nothing_until_rows_are_flushed(cold: ColdTable) -> None:
    most = SMALL // ROW
    version = 1
    while cold.table.store.room() >= 1000:
        push(cold.table, np.arange(version * 1000, version * 1000 + 1000), version)
        version += 1
    with pytest.raises(OutOfMemory):
        push(cold.table, np.arange(version * 1000, version * 1000 + 1000), version)
    rows = (version - 1) * 1000
    assert len(cold.table) == rows <= most
    cold.flush()
    push(cold.table, np.arange(version * 1000, version * 1000 + 1000), version)
    assert len(cold.table) == rows + 1000


@pytest.mark.quick(4)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "sgd"])
def test_random_operations_against_a_table_in_memory(
    seed: int, optimizer: str, tmp_path: Path
) -> None:
    asked = schema(optimizer=make_optimizer(optimizer, 0.05, {}))
    cold, twin = ColdTable(asked, tmp_path / "base", SMALL), Table(asked, Budget(1 << 30))
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 1 << 63, 8000).astype(np.uint64) * np.uint64(2)
    for version in range(1, 80):
        some = keys[rng.zipf(1.3, 900) % len(keys)]
        some = np.unique(some)
        match rng.integers(0, 12):
            case 0:
                for table in (cold.table, twin):
                    table.delete(some[:40])
            case 1 | 2:
                cold.flush()
            case 3:
                cold.flush()
                cold.table.store.demote(int(rng.integers(1, 5000)))
            case 4:
                cold.reflush(float(rng.uniform(0.2, 1.01)))
            case 5:
                assert pull(cold.table, some).tobytes() == pull(twin, some).tobytes()
            case 6:
                cold.table.check_push(some, np.ones((len(some), 8), np.float32), step=version)
            case _:
                for table in (cold.table, twin):
                    push(table, some, version, seed)
        assert cold.blocks.rows + cold.table.store.host.rows == len(cold.table) == len(twin)
    same(cold.table, twin)
    cold.flush()
    cold.table.store.demote(1 << 20)
    assert cold.table.store.host.rows == 0
    same(cold.table, twin)
    cold.close()
