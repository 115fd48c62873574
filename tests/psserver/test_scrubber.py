"""Blocks that are damaged while a shard runs: found, named, kept apart, and replaced."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import DIM, Home, change, contents, push, schema

from psproto import ps_pb2 as pb
from psserver.blockchecks import DamagedBlock
from psserver.requests import Pull
from psserver.scrubber import Scrubber
from psserver.work import Progress
from storage.block import row_layout
from storage.errors import Corrupt
from storage.sums import PIECE, SHIFT

ROWS = 20_000


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path / "shard") as home:
        home.shard.create_table(schema())
        home.shard.exchange([push(range(ROWS), 2.0)], [])
        home.flush()
        home.reopen()  # all rows are on disk only
        yield home


def blocks_of(home: Home) -> Any:
    return home.shard._tables.get("t").table.store.blocks


def flip(home: Home, block: int, byte: int) -> None:
    """Flip a bit of a byte of a block in the base's file."""
    offset = home.base.offset(block)
    assert offset is not None
    with (home.directory / "base" / "data.mdb").open("r+b") as file:
        file.seek(offset + byte)
        old = file.read(1)[0]
        file.seek(offset + byte)
        file.write(bytes([old ^ 4]))


def verified(home: Home) -> list[DamagedBlock]:
    """Verify all blocks, and return the damaged ones."""
    engine: Any = home._engine
    scrubber = Scrubber(home.shard.checks, engine, home.flusher, 0.0)
    progress = Progress(threading.Event())
    found = list(scrubber.verify(pb.VerifyRowsRequest(table="t", keys=True), progress))
    assert found[-1].bytes == progress.bytes == scrubber.bytes
    damaged = [each.damaged for each in found if each.HasField("damaged")]
    known = home.shard.checks.damaged(1)
    assert [(each.number, each.rows, each.lost_rows) for each in damaged] == [
        (each.number, each.live, each.lost) for each in known
    ]
    return known


def pulled(home: Home, keys: Any) -> np.ndarray:
    pull = Pull("t", np.array(keys, np.uint64), pb.DType.DTYPE_FLOAT32, "train", False, 0)
    return home.shard.exchange([], [pull]).pulls[0].embeddings.reshape(-1, DIM)


def readable(home: Home) -> list[int]:
    """Return the keys whose rows can be pulled; all of them must be right."""
    found = []
    for first in range(0, ROWS, 50):
        keys = [*range(first, first + 50)]
        try:
            assert (pulled(home, keys) == -2.0).all()
            found += keys
        except Corrupt:
            found += [key for key in keys if _intact(home, key)]
    return found


def _intact(home: Home, key: int) -> bool:
    try:
        assert (pulled(home, [key]) == -2.0).all()
    except Corrupt as error:
        return "of table 't', with" not in str(error)
    return True


def first_block(home: Home) -> tuple[int, int]:
    """Return (number, rows) of the first block."""
    extent, number = next(iter(blocks_of(home).extents()))
    return number, len(blocks_of(home).live(extent))


@pytest.mark.parametrize("warm", [False, True])
def test_a_scrub_finds_damage_of_rows_and_the_readable_ones_move(home: Home, warm: bool) -> None:
    if warm:
        assert len(readable(home)) == ROWS  # all pieces were verified before
    number, count = first_block(home)
    byte = row_layout(DIM, count, 3).rows + 8 * 3000
    flip(home, number, byte)
    found = verified(home)
    assert [(each.table, each.number, each.live) for each in found] == [("t", number, count)]
    lost = found[0].lost
    assert 0 < lost <= PIECE // 8 + 1
    assert home.shard.describe("t")[1].damage[1] == lost
    assert len(readable(home)) == ROWS - lost
    home.flush()
    (after,) = home.shard.checks.damaged(1)
    assert (after.number, after.live, after.lost) == (number, lost, lost)
    keys = home.shard.checks.lost_keys(1, number)
    assert keys is not None
    assert sorted(set(range(ROWS)) - set(readable(home))) == sorted(keys.tolist())
    home.reopen()
    assert sorted(set(range(ROWS)) - set(readable(home))) == sorted(keys.tolist())


def test_a_checkpoint_of_a_damaged_block_fails_by_name_and_others_go_on(home: Home) -> None:
    number, count = first_block(home)
    flip(home, number, row_layout(DIM, count, 3).rows + 100)
    with home.flusher.pinned() as base, pytest.raises(Corrupt) as caught:
        list(base.rows())
    assert f"block {number} of table 't', with {count} live rows" in str(caught.value)
    assert home.shard.checks.suspects.get_nowait() == (1, number)


def test_lost_rows_can_be_overwritten_or_deleted_and_then_the_block_is_gone(home: Home) -> None:
    number, count = first_block(home)
    flip(home, number, row_layout(DIM, count, 3).rows + 8 * 3000)
    assert verified(home)
    keys = home.shard.checks.lost_keys(1, number)
    assert keys is not None
    half = len(keys) // 2
    with pytest.raises(Corrupt):
        home.shard.exchange([push(keys.tolist())], [])
    rows, ones = np.full((half, DIM), 7.0, np.float32), np.ones(half, np.uint64)
    home.shard.write_rows(1, 5, keys[:half], ones, rows)
    home.shard.delete(change(keys[half:].tolist()))
    assert home.shard.describe("t")[1].damage[1] == 0
    home.flush()
    home.flush()
    assert verified(home) == []
    assert (pulled(home, keys[:half]) == 7.0).all()
    assert (pulled(home, keys[half:]) == 0.0).all()
    before = contents(home.shard)
    home.reopen()
    assert contents(home.shard) == before
    with home.flusher.pinned() as base:
        assert list(base.rows())


def test_a_replay_overwrites_rows_that_cannot_be_read(home: Home) -> None:
    number, count = first_block(home)
    home.shard.exchange([push([5], 1.0)], [])
    home.written()
    offset = row_layout(DIM, count, 3).rows
    at = int(np.flatnonzero(blocks_of(home).keys(0) == 5)[0])
    flip(home, number, offset + 8 * at)
    home.reopen()
    assert (pulled(home, [5]) == -3.0).all()


def test_rows_that_are_in_memory_too_are_written_again(home: Home) -> None:
    number, count = first_block(home)
    home.shard.exchange([push(range(ROWS), 1.0)], [])
    home.flush()
    home.flush()
    number, count = first_block(home)
    assert blocks_of(home).rows == 0  # all are cached
    flip(home, number, row_layout(DIM, count, 3).rows + 8 * 3000)
    assert [each.lost for each in verified(home)] == [0]
    home.flush()
    home.reopen()
    assert (pulled(home, range(ROWS)) == -3.0).all()


def test_flips_anywhere_in_a_block_never_give_a_wrong_row(home: Home) -> None:
    rng = random.Random(3)
    number, count = first_block(home)
    size = row_layout(DIM, count, 3).size
    for byte in [0, 8, 40, 63, 64, size - 1, *(rng.randrange(size) for _ in range(12))]:
        flip(home, number, byte)
        found = verified(home)
        assert [each.number for each in found] == [number], byte
        assert len(readable(home)) >= ROWS - found[0].lost, byte
        flip(home, number, byte)
        assert verified(home) == []
        assert home.shard.describe("t")[1].damage[0] == 0


def test_pages_that_a_scrub_read_leave_memory_again(home: Home) -> None:
    number, count = first_block(home)
    offset = home.base.offset(number)
    assert offset is not None
    size = row_layout(DIM, count, 3).size
    check = blocks_of(home).check()
    assert check.next(0)
    assert check.number == number
    assert check.examine() is None
    assert offset % PIECE == SHIFT
    assert check.size == size
