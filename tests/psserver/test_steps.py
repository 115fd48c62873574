"""A table's step: which pushes move it, how far, and what one wrong step cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from homes import Homes
from stores import Home, contents, make_shard, push, schema

from psproto import ps_pb2 as pb
from psserver.errors import StepTooFar
from psserver.shard import Shard
from psserver.status import code_of, status_of
from storage.eviction.contract import LAST_STEP
from storage.eviction.rules import CapacityLfu, Norm, StepTtl
from storage.schema import MAX_STEP_AHEAD

MILLISECONDS = 1_764_000_000_000  # since 1970: the step of a trainer that confuses the two
TTL = {"evictions": (StepTtl(steps=100),)}
RULES: list[Any] = [(), TTL["evictions"], (Norm(),), (CapacityLfu(),)]


def give(shard: Shard, keys: Any, step: int, **changes: Any) -> None:
    shard.exchange([push(keys, step=step, **changes)], [])


def ticks(shard: Shard) -> None:
    for _ in range(100):
        if not shard.sweeps.tick():
            return
    raise AssertionError("sweeps go on for ever")


def rows(shard: Shard, table: str = "t") -> dict[int, int]:
    """Steps of a table's rows by key."""
    return {key: step for key, _, step, _ in shard.dump()[table].meta.tolist()}


def write(shard: Shard, keys: Any, step: int, table: str = "t") -> None:
    n = len(keys)
    values = np.ones((n, 2), np.float32)
    shard.write_rows(
        shard.number_of(table), step, np.array(keys, np.uint64), np.ones(n, np.uint64), values
    )


@pytest.mark.parametrize("evictions", RULES, ids=repr)
def test_a_step_that_is_too_far_ahead_is_refused_by_name_and_nothing_is_applied(
    evictions: Any,
) -> None:
    shard = make_shard()
    shard.create_table(schema(evictions=evictions))
    shard.create_table(schema("u"))
    for step in range(20):
        give(shard, range(50), step)
    before = contents(shard)
    with pytest.raises(StepTooFar, match=f"'t' is at step 19: a push of step {MILLISECONDS} ") as e:
        shard.exchange([push([1], table="u", step=3), push([1], step=MILLISECONDS)], [])
    assert contents(shard) == before
    status = status_of(e.value)
    assert code_of(status).name == "OUT_OF_RANGE"
    info = pb.ErrorInfo.FromString(status.details[0].value)
    assert info.reason == "STEP_TOO_FAR"
    assert dict(info.metadata) == {"table_step": "19", "max_step_ahead": str(MAX_STEP_AHEAD)}
    ticks(shard)
    assert len(rows(shard)) == 50
    give(shard, [99], 19 + 101)  # the rule still holds
    ticks(shard)
    assert len(rows(shard)) == (1 if evictions == TTL["evictions"] else 51)


@pytest.mark.parametrize("ahead", [1, 1000, MAX_STEP_AHEAD])
def test_the_bound_is_the_last_step_to_be_taken(ahead: int) -> None:
    shard = make_shard()
    shard.create_table(schema(max_step_ahead=ahead))
    with pytest.raises(StepTooFar):  # a table that no push has reached is at step 0
        give(shard, [1], ahead + 1)
    give(shard, [1], ahead)
    with pytest.raises(StepTooFar):
        give(shard, [1], 2 * ahead + 1)
    give(shard, [1], 2 * ahead)
    assert shard.step("t") == 2 * ahead


def test_a_bound_of_0_is_none() -> None:
    shard = make_shard()
    shard.create_table(schema(max_step_ahead=0))
    give(shard, [1], LAST_STEP)
    assert shard.step("t") == LAST_STEP


def test_before_step_0_the_bound_counts_from_0() -> None:
    shard = make_shard()
    shard.create_table(schema(max_step_ahead=10))
    give(shard, [1], -1000)
    with pytest.raises(StepTooFar, match="is at step 0"):
        give(shard, [1], 11)
    give(shard, [1], 10)


def test_trainers_that_start_again_or_are_behind_are_taken_and_make_no_row_idle() -> None:
    shard = make_shard()
    shard.create_table(schema(max_step_ahead=1000, **TTL))
    for step in range(0, 5001, 50):
        give(shard, [1], step)
        give(shard, [2], max(0, step - 4000))
        give(shard, [3], 0)
        ticks(shard)
    assert rows(shard) == {1: 5000, 2: 5000, 3: 5000}
    for step in range(0, 6001, 50):  # all start again
        give(shard, [4], step)
        ticks(shard)
    assert rows(shard) == {4: 6000}  # and the rule holds again behind the table's step


def test_a_push_that_was_applied_is_a_duplicate_whatever_its_step() -> None:
    shard = make_shard()
    shard.create_table(schema(max_step_ahead=1000))
    asked = push([1], step=900, client=7, incarnation=1, sequence=1)
    [first] = shard.exchange([asked], []).pushes
    far = push([1], step=MILLISECONDS, client=7, incarnation=1, sequence=1)
    [again] = shard.exchange([far], []).pushes
    assert (again.version, again.duplicate) == (first.version, True)


@pytest.mark.parametrize("flush", [False, True])
def test_rows_that_are_written_keep_their_steps_and_move_no_table_s(
    tmp_path: Path, flush: bool
) -> None:
    with Home(tmp_path / "home") as home:
        home.shard.create_table(schema(**TTL))
        give(home.shard, range(50), 5)
        write(home.shard, [100, 101], MILLISECONDS)
        assert (home.shard.step("t"), rows(home.shard)[100]) == (5, MILLISECONDS)
        if flush:
            home.flush()
        before = contents(home.shard)
        home.reopen()
        assert contents(home.shard) == before
        ticks(home.shard)
        assert len(rows(home.shard)) == 52
        give(home.shard, [1, 101], 106)  # the rule is not dead, and a push makes a row ordinary
        ticks(home.shard)
        assert rows(home.shard) == {1: 106, 100: MILLISECONDS, 101: 106}
        give(home.shard, [1], 207)
        ticks(home.shard)
        assert rows(home.shard) == {1: 207, 100: MILLISECONDS}


def test_rows_that_are_written_far_behind_leave_by_their_own_steps() -> None:
    shard = make_shard()
    shard.create_table(schema(**TTL))
    give(shard, [1], 1000)
    write(shard, [2], 3)
    ticks(shard)
    write(shard, [3], 3)
    give(shard, [1], 1002)
    ticks(shard)
    assert rows(shard) == {1: 1002}


@pytest.mark.parametrize("shards", [1, 2])
def test_the_step_of_a_table_comes_with_a_restore_and_not_with_rows_of_another(
    tmp_path: Path, shards: int
) -> None:
    url = f"file://{tmp_path}/checkpoints"
    with Homes(tmp_path / "one", 1, url) as one, Homes(tmp_path / "more", shards, url) as more:
        one.create(schema())
        one.push(range(100), step=700)
        write(one.nodes[0].shard, [1000, 1001, 1002, 1003], MILLISECONDS)
        one.checkpoint("a")
        more.restore("a", replace=True)
        more.create(schema("u"))
        more.load("a", "t", "u")
        for node in more.nodes:
            assert [node.shard.step(name) for name in "tu"] == [700, 0]
        more.push(range(100), step=3)
        more.push(range(100), step=3, table="u")
        for table, step in (("t", 700), ("u", 3)):
            steps = {k: v for node in more.nodes for k, v in rows(node.shard, table).items()}
            assert steps == dict.fromkeys(range(100), step) | dict.fromkeys(
                range(1000, 1004), MILLISECONDS
            )
