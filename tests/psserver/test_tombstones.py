"""Deleted keys: kept in order, within a limit, and written in few blocks."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stores import Home, change, contents, push, schema, stored

from psserver import tombstonequeue
from psserver.counted import CounterWriter, Layer
from psserver.tombstonequeue import TombstoneQueue
from psserver.tombstones import Tombstones, joined
from storage.block import TOMBSTONES, tombstones_per_block
from storage.records import Cause


def listed(dead: Tombstones) -> list[tuple[int, int, int, int]]:
    return list(zip(*(column.tolist() for column in dead.columns()), strict=True))


def u64(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def test_tombstones_are_kept_in_the_order_of_their_versions() -> None:
    queue = TombstoneQueue(10)
    queue.add(1, u64(7, 8), 3, Cause.REQUEST)
    queue.add(2, u64(), 4, Cause.NORM)
    queue.add(2, u64(7), 5, Cause.NORM)
    assert listed(joined(queue.all())) == [(1, 7, 3, 1), (1, 8, 3, 1), (2, 7, 5, 4)]
    assert listed(queue.after(3, 10)) == [(2, 7, 5, 4)]
    assert listed(queue.after(0, 1)) == [(1, 7, 3, 1), (1, 8, 3, 1)]  # whole versions
    assert listed(queue.after(5, 10)) == []
    assert queue.horizon == 0


def test_tombstones_of_each_table_keep_their_order() -> None:
    queue = TombstoneQueue(10)
    queue.add(9, u64(5, 3), 1, Cause.NORM)
    queue.add(2, u64(5), 2, Cause.REQUEST)
    queue.add(9, u64(1, 5), 3, Cause.REQUEST)
    split = [(number, listed(dead)) for number, dead in joined(queue.all()).by_table()]
    nine = [(9, 5, 1, 4), (9, 3, 1, 4), (9, 1, 3, 1), (9, 5, 3, 1)]
    assert split == [(2, [(2, 5, 2, 1)]), (9, nine)]
    assert joined([]).by_table() == []


@pytest.mark.parametrize("seed", range(20))
def test_the_queue_is_a_list_that_loses_its_oldest_versions(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(tombstonequeue, "CHUNK", 8)
    rng = random.Random(seed)
    queue, model, version, horizon = TombstoneQueue(40), list[tuple[int, ...]](), 0, 0
    for _ in range(150):
        version += rng.choice((1, 1, 3))
        table, count = rng.randrange(3), rng.choice((0, 1, 2, 5, 12))
        queue.add(table, np.arange(count, dtype=np.uint64), version, Cause.REQUEST)
        model += [(table, key, version, 1) for key in range(count)]
        while len(model) > 40:
            horizon = model[0][2]
            model = [each for each in model if each[2] > horizon]
        assert queue.horizon == horizon
        assert len(queue) == len(model)
        assert listed(joined(queue.all())) == model
        after, limit = rng.randrange(version + 2), rng.randrange(1, 12)
        later = [each for each in model if each[2] > after]
        found = listed(queue.after(after, limit))
        assert found == later[: len(found)]
        assert len(found) == len(later) or len(found) >= limit
        assert not found or later[len(found) :] == [e for e in later if e[2] > found[-1][2]]


def test_what_was_captured_does_not_change_and_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tombstonequeue, "CHUNK", 8192)
    queue = TombstoneQueue(5000)
    for version in range(1, 2001):
        queue.add(1, u64(version), version, Cause.NORM)
    seen = queue.all()
    for version in range(2001, 30_000):
        queue.add(1, u64(version), version, Cause.NORM)
        assert len(queue._parts) <= 2
    assert joined(seen).keys.tolist() == list(range(1, 2001))
    assert len(joined(queue.all())) == len(queue) == 5000
    assert queue.horizon == 29_999 - 5000


def test_versions_are_discarded_whole() -> None:
    queue = TombstoneQueue(3)
    queue.add(1, u64(1, 2, 3), 1, Cause.REQUEST)
    queue.add(1, u64(4), 2, Cause.REQUEST)
    assert (listed(joined(queue.all())), queue.horizon) == ([(1, 4, 2, 1)], 1)
    queue.add(1, u64(5, 6, 7, 8), 3, Cause.REQUEST)
    assert (listed(joined(queue.all())), queue.horizon) == ([], 3)


def test_loaded_tombstones_are_ordered_once_all_are_there() -> None:
    queue = TombstoneQueue(3)
    queue.horizon = 1
    u32 = np.array([1, 1], np.uint32)
    queue.load(Tombstones(u32, u64(1, 2), u64(2, 5), u32))
    queue.load(Tombstones(u32 + 1, u64(3, 4), u64(3, 4), u32))
    queue.settle()
    assert [version for _, _, version, _ in listed(joined(queue.all()))] == [3, 4, 5]
    assert queue.horizon == 2


@pytest.mark.parametrize("tables", [1, 2])
def test_many_small_deletes_are_few_blocks(tmp_path: Path, tables: int) -> None:
    count = 3000
    with Home(tmp_path / "shard", segment_bytes=1 << 20) as home:
        for table in range(tables):
            home.shard.create_table(schema(f"t{table}"))
            home.shard.exchange([push(list(range(count)), table=f"t{table}")], [])
        home.flush()
        for key in range(count // 2):
            home.shard.delete(change([key], f"t{key % tables}"))
        for key in range(0, count // 2, 3):  # they come back, and are newer than their tombstone
            home.shard.exchange([push([key], table=f"t{key % tables}")], [])
        home.flush()
        dead = [block for _, block in home.base.blocks() if block.kind == TOMBSTONES]
        assert len(dead) == tables
        assert sum(map(len, dead)) == count // 2
        before = contents(home.shard)
        home.reopen()
        assert home.recovered.records == 0
        assert contents(home.shard) == before


def test_a_key_deleted_twice_between_two_flushes_stays_deleted(tmp_path: Path) -> None:
    with Home(tmp_path / "shard") as home:
        home.shard.create_table(schema())
        for _ in range(3):
            home.shard.exchange([push([1, 2])], [])
            home.flush()
            home.shard.delete(change([1]))
            home.shard.exchange([push([1])], [])
            home.shard.delete(change([1]))
        home.flush()
        home.reopen()
        assert home.shard.dump()["t"].keys.tolist() == [2]


@pytest.mark.slow
def test_a_flush_and_a_recovery_of_sixty_thousand_single_deletes(tmp_path: Path) -> None:
    count = 60_000
    with Home(tmp_path / "shard", segment_bytes=64 << 20) as home:
        home.shard.create_table(schema())
        home.shard.exchange([push(list(range(2 * count)))], [])
        home.flush()
        for key in range(count):
            home.shard.delete(change([key]))
        home.flush()
        blocks = sum(block.kind == TOMBSTONES for _, block in home.base.blocks())
        assert blocks == -(-count // tombstones_per_block())
        home.reopen()
        assert len(joined(home.shard.capture().tombstones)) == count


def test_a_delete_in_each_of_many_flushes_is_few_blocks(tmp_path: Path) -> None:
    count = 200
    with Home(tmp_path / "shard", segment_bytes=1 << 20, max_tombstones=150) as home:
        home.shard.create_table(schema())
        home.shard.exchange([push(list(range(count)))], [])
        home.flush()
        most = 0
        for key in range(count):
            home.shard.delete(change([key]))
            home.flush()
            blocks = [dead for kind, *dead in stored(home.base) if kind == TOMBSTONES]
            most = max(most, len(blocks))
            assert blocks[-1][1][-1] == home.shard.version
        assert most <= 10
        assert {key for keys, _ in blocks for key in keys} >= set(range(count - 150, count))
        before = contents(home.shard)
        home.reopen()
        assert contents(home.shard) == before


@pytest.mark.parametrize("horizon", [0, 20_000])
def test_layers_of_tombstones_grow_with_the_logarithm_of_the_flushes(horizon: int) -> None:
    """What 60,000 flushes with one delete each keep, without writing any block."""
    base: Any = SimpleNamespace()
    writer = CounterWriter(base, [], np.empty(0, np.uint8), lambda: None)
    most = written = 0
    for version in range(1, 60_001):
        oldest = max(0, version - horizon) if horizon else 0  # of which tombstones are discarded
        captured: Any = SimpleNamespace(
            tables=[], tombstones=[range(oldest, version)], horizon=oldest if horizon else 0
        )
        state: Any = SimpleNamespace(version=version - 1) if version > 1 else None
        kept = writer._kept(captured, state)
        start = writer.layers[len(kept)].after if len(kept) < len(writer.layers) else version - 1
        after = start if kept else oldest
        writer.layers = [*kept, Layer(after if kept else 0, [version], version - after)]
        written += version - after
        most = max(most, len(writer.layers))
    assert most <= 20
    assert written < 20 * 60_000
