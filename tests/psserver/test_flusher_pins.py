"""Flushes on request, blocks that are pinned or still read, and damaged blocks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import Home, change, contents, push, schema, stored

from psserver.errors import Draining
from storage.block import COUNTERS, TOMBSTONES, unpack
from storage.errors import Corrupt, DiskFull


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path / "shard") as home:
        home.shard.create_table(schema())
        yield home


def numbers(home: Home) -> set[int]:
    """Numbers of all blocks of rows in the file, listed or not."""
    found = set()
    for number in home.base._numbers:
        if home.base.block(number).kind not in (TOMBSTONES, COUNTERS):
            found.add(number)
    return found


def keys_of(data: Any) -> list[int]:
    return unpack(bytes(data), "block").keys.tolist()


# ---- on request


def wait_for(home: Home, rounds: int) -> None:
    for _ in range(1000):
        if home.flusher.rounds >= rounds:
            return
        threading.Event().wait(0.005)
    pytest.fail("there was no flush")


def test_a_flush_is_made_when_it_is_asked_for(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.shard.exchange([push([1])], [])
    home.flusher.open()
    home.flusher.ask()
    wait_for(home, 1)
    assert home.flusher.failure == ""
    assert home.base.state is not None
    assert home.base.state.version == 2

    def refuse(*_: Any) -> int:
        raise DiskFull("base", 1)

    with monkeypatch.context() as full:
        full.setattr(home.base, "add", refuse)
        home.shard.exchange([push([1])], [])
        home.flusher.ask()
        wait_for(home, 2)
        assert "base" in home.flusher.failure
    home.flusher.ask()
    wait_for(home, 3)
    assert home.flusher.failure == ""
    assert home.base.state.version == 3
    home.flusher.close()


def test_a_flush_is_asked_for_when_memory_is_full_of_changed_rows(tmp_path: Path) -> None:
    asked = []
    with Home(tmp_path / "shard", memory_bytes=4 << 20, segment_bytes=8 << 20) as home:
        home.shard.create_table(schema(dim=64))
        home.shard.on_pressure(lambda: asked.append(home.shard.rows("t")))
        ones = np.ones((250, 64), np.float32)
        for start in range(0, 20_000, 250):
            if not asked:  # in time: there is still room
                home.shard.exchange([push(range(start, start + 250), gradients=ones)], [])
    assert 6000 <= asked[0] <= 12_000


# ---- pins


def test_pinned_rows_are_those_of_the_flush_while_others_go_on(home: Home) -> None:
    home.shard.exchange([push(range(20))], [])
    home.flush()
    home.shard.exchange([push(range(8))], [])
    with home.flusher.pinned() as pinned:
        assert pinned.captured.version == home.shard.version
        before = numbers(home)
        home.shard.exchange([push(range(20))], [])
        for _ in range(3):
            home.flush()
            home.shard.exchange([push([3])], [])
        assert before <= numbers(home)
        found = [keys_of(data) for data in pinned.rows()]
        assert sorted(found) == [list(range(8)), list(range(8, 20))]
        assert [keys_of(data) for data in pinned.rows(2)] == [list(range(8))]
        assert [keys_of(data) for data in pinned.rows(3)] == []
    home.flush()
    assert not before & numbers(home)
    assert not home.base.pins


def test_a_block_whose_rows_are_all_wanted_is_returned_as_it_is_stored(home: Home) -> None:
    home.shard.exchange([push(range(20))], [])
    home.flush()
    whole = [block.data.tobytes() for _, block in home.base.blocks() if len(block.keys)]
    with home.flusher.pinned() as pinned:
        assert [bytes(data) for data in pinned.rows()] == whole


def test_a_server_that_stops_pins_nothing(home: Home) -> None:
    home.shard.exchange([push([1])], [])
    home.flusher._stop.set()
    with pytest.raises(Draining), home.flusher.pinned():
        pass
    assert not home.base.pins
    assert home.base.state is not None
    assert home.base.state.version == 0


# ---- scans


def test_blocks_of_a_dropped_table_stay_while_a_scan_reads_them(home: Home) -> None:
    home.shard.exchange([push(range(20), 3.0)], [])
    home.flush()
    table = home.shard._tables.get("t").table
    table.store.demote(20)
    scan = table.store.blocks.scan()
    places, _ = scan.find(0, 0, 1 << 47, 100)
    home.shard.drop_table("t")
    for version in range(3):
        home.shard.create_table(schema(f"n{version}"))
        home.shard.exchange([push(range(20), 9.0, table=f"n{version}")], [])
        home.flush()
    rows = np.empty((len(places), 2), np.float32)
    scan.copy(places, np.empty(len(places), np.uint64), rows)
    assert rows.tolist() == [[-3.0, -3.0]] * 20
    before = numbers(home)
    del scan
    home.shard.exchange([push([1], table="n0")], [])
    home.flush()
    assert len(before - numbers(home)) >= 1
    assert not home.shard.held_blocks()


# ---- damage


def test_an_unreadable_block_is_not_moved_and_the_others_are(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.shard.exchange([push(range(10))], [])
    home.flush()
    home.shard.exchange([push(range(10, 20))], [])
    home.flush()
    [first, second] = [number for number, block in home.base.blocks() if len(block.keys)]
    real = home.base.block

    def block(number: int, *more: Any) -> Any:
        if number == first:
            raise Corrupt(f"data.mdb: block {number}", "the checksum does not match")
        return real(number, *more)

    raw = home.base.raw

    def noise(number: int) -> Any:
        data = raw(number)
        return data ^ np.uint8(0xFF) if number == first else data

    with monkeypatch.context() as patch:
        patch.setattr(home.base, "block", block)
        patch.setattr(home.base, "raw", noise)
        for _ in range(4):
            home.shard.exchange([push([*range(7), *range(10, 17)])], [])
            home.flush()
        patch.undo()
        left = {number for number, _ in home.base.blocks()}
        assert first in left
        assert second not in left
    assert sorted(key for _, keys, _ in stored(home.base) for key in keys) == list(range(20))
    before = contents(home.shard)
    home.reopen()
    assert contents(home.shard) == before
    home.shard.delete(change([7, 8, 9]))
    home.flush()
    assert first not in {number for number, _ in home.base.blocks()}
