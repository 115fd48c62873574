"""A shard whose memory is full: what it acknowledged loads again, and it refuses growth."""

from __future__ import annotations

from pathlib import Path

import pytest
from stores import Home, change, contents, make_shard, push, schema

from psserver.errors import Overloaded
from psserver.replay import recover
from psserver.requests import Push
from storage.errors import OutOfMemory
from storage.optimizers import make_optimizer

MIB = 1 << 20
STEP = 5_000  # keys of a push


def many(start: int, count: int = STEP, table: str = "t") -> Push:
    """A push of consecutive keys."""
    return push(range(start, start + count), table=table)


def fill(home: Home, *tables: str) -> None:
    """Push to the tables in turn until none of them can grow."""
    growing, at = list(tables), 0
    while growing:
        for table in list(growing):
            count = STEP
            while count:
                try:
                    home.shard.exchange([many(at, count, table)], [])
                    break
                except OutOfMemory:
                    count //= 8
                except Overloaded:
                    home.written()
            else:
                growing.remove(table)
        at += STEP


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("memory", [5 * MIB, pytest.param(12 * MIB, marks=pytest.mark.slow)])
def test_a_full_shard_loads_all_that_it_acknowledged(
    tmp_path: Path, memory: int, flushed: bool
) -> None:
    options = {"memory_bytes": memory, "segment_bytes": 8 * MIB}
    adagrad = make_optimizer("adagrad", 1.0, {})
    with Home(tmp_path / "shard", **options) as home:
        for name in ("t", "u"):
            home.shard.create_table(schema(name, optimizer=adagrad))
        fill(home, "t", "u")
        if flushed:
            home.flush()
            home.shard.exchange([push([1, 2], 5.0)], [])
        before = contents(home.shard)
        for _ in range(2):  # indexes are random: not one start, but every start must work
            home.reopen()
            assert contents(home.shard) == before
        with pytest.raises(OutOfMemory):
            home.shard.exchange([many(1 << 40, 100_000)], [])
        home.shard.exchange([push([1, 2], 3.0)], [])  # rows that are there are served
        home.shard.delete(change([1, 2, 3]))
        home.shard.exchange([push([1 << 40, 1 << 41], 3.0)], [])  # and their places used again


def test_a_budget_made_smaller_serves_what_there_is_and_refuses_growth(tmp_path: Path) -> None:
    with Home(tmp_path / "shard", memory_bytes=64 * MIB, segment_bytes=8 * MIB) as home:
        home.shard.create_table(schema())
        for start in range(0, 100_000, STEP):
            home.shard.exchange([many(start)], [])
        home.flush()
        before, held = contents(home.shard), home.shard.budget.held
    with Home(tmp_path / "shard", memory_bytes=2 * MIB, segment_bytes=8 * MIB) as home:
        assert contents(home.shard) == before
        budget = home.shard.budget
        assert budget.limit == 2 * MIB < budget.held <= held
        with pytest.raises(OutOfMemory):
            home.shard.create_table(schema("u"))
        with pytest.raises(OutOfMemory):
            home.shard.exchange([many(1 << 40, 50_000)], [])
        home.shard.exchange([push([1, 2], 3.0)], [])
        home.shard.drop_table("t")
        assert budget.held == 0
        home.shard.create_table(schema("u"))
        home.shard.exchange([many(0, table="u")], [])


def test_a_restore_may_exceed_the_budget_by_a_little_and_not_by_much(tmp_path: Path) -> None:
    with Home(tmp_path / "shard", memory_bytes=64 * MIB, segment_bytes=8 * MIB) as home:
        home.shard.create_table(schema())
        for start in range(0, 200_000, STEP):
            home.shard.exchange([many(start)], [])
        home.flush()
        needed = home.shard.budget.held
    for limit, excess, fits in ((needed, MIB, True), (2 * MIB, MIB, False)):
        with Home(tmp_path / "shard", memory_bytes=limit, segment_bytes=8 * MIB) as home:
            shard = make_shard(memory_bytes=limit)
            if fits:
                recover(shard, home.base, home.log, excess)
            else:
                with pytest.raises(OutOfMemory):
                    recover(shard, home.base, home.log, excess)
