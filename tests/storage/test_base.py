"""The base: what was committed is there, whatever is added, discarded or read meanwhile."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bases import (
    contents,
    listed,
    rows,
    run,
    start,
    state,
    stored,
)
from blocks import pack_tombstones
from lmdb.verify import verify as verify_pages

from storage.base import Base
from storage.block import Block
from storage.errors import Corrupt

# ---- life


def test_a_new_base_has_no_state_and_no_blocks(tmp_path: Path) -> None:
    directory = tmp_path / "shard" / "base"
    for _ in range(2):
        with Base(directory) as base:
            assert base.state is None
            assert list(base.blocks()) == []
        assert sorted(os.listdir(directory)) == ["data.mdb", "lock.mdb"]


def test_what_was_committed_is_there_after_opening_again(tmp_path: Path) -> None:
    blocks = [rows(1), rows(2, count=1000, width=500), pack_tombstones(1, *three()), rows(3, 0)]
    with Base(tmp_path) as base:
        numbers = [base.add(block) for block in blocks]
        committed = state(5, numbers, sessions=os.urandom(3 << 20))
        base.commit(committed)
        assert base.state == committed
    expected = dict(zip(numbers, map(bytes, blocks), strict=True))
    for readonly in (False, True):
        with Base(tmp_path, readonly=readonly) as base:
            assert base.state == committed
            assert listed(base) == expected
            assert {n: contents(base.block(n)) for n in numbers} == expected


def three() -> tuple[Any, Any, Any]:
    return np.arange(3, dtype=np.uint64), np.arange(3, dtype=np.uint64), np.ones(3, np.uint32)


def test_blocks_come_in_the_order_in_which_the_state_lists_them(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        numbers = [base.add(rows(i)) for i in range(5)][::-1]
        base.commit(state(1, numbers))
        assert [number for number, _ in base.blocks()] == numbers


def test_a_block_in_its_own_memory_outlives_the_base(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        number = base.add(rows(1))
        base.commit(state(1, [number]))
        block = base.block(number)
    assert contents(block) == bytes(rows(1))


def test_the_buffer_of_an_added_block_may_be_used_again(tmp_path: Path) -> None:
    buffer = np.empty(1 << 20, np.uint8)
    with Base(tmp_path) as base:
        numbers = []
        for i in range(40):
            block = Block.empty(1, 2, 100, buffer)
            block.data[64:] = i
            numbers.append(base.add(block.seal()))
        base.commit(state(1, numbers))
        assert [block.data[64] for _, block in base.blocks()] == list(range(40))


def test_blocks_that_were_added_but_never_committed_are_gone(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        kept = base.add(rows(1))
        base.commit(state(1, [kept]))
        for i in range(40):  # more than a transaction takes
            base.add(rows(100 + i))
    assert len(stored(tmp_path)) > 1
    with Base(tmp_path) as base:
        assert base.state == state(1, [kept])
        assert listed(base) == {kept: bytes(rows(1))}
    assert stored(tmp_path) == {kept}


def test_a_commit_deletes_what_it_does_not_list(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        first = [base.add(rows(i)) for i in range(20)]
        base.commit(state(1, first))
        second = [*first[::3], base.add(rows(50))]
        base.add(rows(51))
        base.commit(state(2, second))
        assert stored(tmp_path) == set(second)
        with pytest.raises(Corrupt, match="block 2: the block is missing"):
            base.block(first[1])


def test_numbers_are_not_given_twice(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        first = base.add(rows(1))
        base.commit(state(1, [first]))
        second = base.add(rows(2))
        base.discard()
        third = base.add(rows(3))
        base.commit(state(2, [third]))
    with Base(tmp_path) as base:
        assert first < second < third < base.add(rows(4))


def test_a_state_cannot_list_a_block_that_is_not_stored(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        number = base.add(rows(1))
        base.commit(state(1, [number]))
        with pytest.raises(ValueError, match="block 7"):
            base.commit(state(2, [number, 7]))
        assert base.state == state(1, [number])
    with Base(tmp_path) as base:
        assert base.state == state(1, [number])


def test_a_discarded_checkpoint_leaves_no_blocks_and_their_room_is_used_again(
    tmp_path: Path,
) -> None:
    with Base(tmp_path) as base:
        kept = base.add(rows(1))
        base.commit(state(1, [kept]))
        sizes = []
        for _ in range(12):
            for i in range(20):
                base.add(rows(i, count=100, width=500))
            base.discard()
            sizes.append(base.bytes)
        assert stored(tmp_path) == {kept}
        assert sizes[-1] - sizes[2] < 100_000  # of 4 MB written each time
        assert listed(base) == {kept: bytes(rows(1))}


def test_the_file_does_not_grow_with_the_number_of_checkpoints(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        sizes = []
        for version in range(20):
            numbers = [base.add(rows(i, count=100, width=500)) for i in range(10)]
            base.commit(state(version, numbers))
            sizes.append(base.bytes)
        assert sizes[-1] - sizes[5] < 100_000  # of 2 MB written each time
    assert verify_pages(str(tmp_path)) == []


# ---- blocks in place


def in_place(directory: Path, offset: int | None, size: int) -> bytes:
    """Bytes of the file at an offset."""
    assert offset is not None
    with (directory / "data.mdb").open("rb") as file:
        file.seek(offset)
        return file.read(size)


def test_a_committed_block_is_at_its_offset_in_the_file(tmp_path: Path) -> None:
    blocks = [rows(1, 1, 1), rows(2, 30, 9), rows(3, 1000, 20), pack_tombstones(1, *three())]
    blocks += [rows(n, n, 1) for n in range(4, 70)]
    with Base(tmp_path) as base:
        numbers = [base.add(block) for block in blocks]
        base.commit(state(1, numbers))
        offsets = [base.offset(number) for number in numbers]
        for offset, block in zip(offsets, blocks, strict=True):
            assert offset is not None
            assert offset % 4096 == 16
            assert in_place(tmp_path, offset, len(block)) == bytes(block)
        with pytest.raises(Corrupt, match="block 1000"):
            base.offset(1000)
        for version in range(2, 10):  # other blocks come and go
            more = [base.add(rows(100, 1000, 100)) for _ in range(3)]
            base.commit(state(version, [*numbers, *more]))
        assert [base.offset(number) for number in numbers] == offsets
    for readonly in (True, False):
        with Base(tmp_path, readonly=readonly) as base:
            assert [base.offset(number) for number in numbers] == offsets


def test_small_blocks_of_older_releases_have_no_offset(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        base._padded = lambda data: data  # type: ignore[method-assign]
        numbers = [base.add(rows(n, count)) for n, count in ((1, 1), (2, 5), (3, 30), (4, 2000))]
        base.commit(state(1, numbers))
        assert [base.offset(number) is None for number in numbers] == [True, True, True, False]
        assert len(listed(base)) == 4


def test_pinned_blocks_stay_until_they_are_unpinned(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        first = [base.add(rows(i, 100)) for i in range(3)]
        base.commit(state(1, first))
        base.pin(first[:2])
        base.pin(first[1:2])
        base.commit(state(2, [base.add(rows(9))]))
        assert stored(tmp_path) == {1, 2, 4}
        base.discard()
        assert contents(base.block(1)) == bytes(rows(0, 100))
        base.unpin(first[:2])
        assert dict(base.pins) == {2: 1}
        base.commit(state(3, [4]))
        assert stored(tmp_path) == {2, 4}
        assert base.offset(2) is not None
    with Base(tmp_path) as base:  # pins do not outlive the base
        assert stored(tmp_path) == {4}
        assert base.state == state(3, [4])


def test_an_interrupted_creation_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "data.mdb").write_bytes(b"half")
    with Base(tmp_path) as base:
        assert base.state is None
    assert sorted(os.listdir(tmp_path)) == ["data.mdb", "lock.mdb"]


def test_a_read_only_base_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Base(tmp_path, readonly=True).open()


# ---- the map


def test_the_map_grows_with_what_is_stored(tmp_path: Path) -> None:
    with Base(tmp_path, map_bytes=1 << 20) as base:
        numbers = [base.add(rows(i, count=500, width=1000)) for i in range(40)]
        base.commit(state(1, numbers))
        base.commit(state(2, [*numbers, base.add(rows(41, count=5000, width=2000))]))
        assert len(listed(base)) == 41
    with Base(tmp_path, map_bytes=1 << 20) as base:
        assert [block.keys[0] for _, block in base.blocks()] == [*range(40), 41]


def test_blocks_are_read_while_the_map_grows(tmp_path: Path) -> None:
    with Base(tmp_path, map_bytes=1 << 20) as base:
        kept = [base.add(rows(i, count=200, width=200)) for i in range(5)]
        base.commit(state(1, kept))
        expected = listed(base)
        done = threading.Event()
        read, wrong = 0, []

        def reads() -> None:
            nonlocal read
            while not done.is_set():
                if listed(base) != expected:
                    wrong.append(read)
                read += 1

        reader = threading.Thread(target=reads)
        reader.start()
        for i in range(60):
            base.add(rows(i, count=500, width=1000))
        base.discard()
        done.set()
        reader.join()
    assert read > 0
    assert wrong == []


# ---- other processes


def reader(directory: str) -> None:
    """Open read-only, read, wait for a line, read again."""
    with Base(Path(directory), readonly=True) as base:
        for _ in range(2):
            assert base.state is not None
            seen = [base.state.version, [int(block.keys[0]) for _, block in base.blocks()]]
            print(json.dumps(seen), flush=True)
            sys.stdin.readline()


@pytest.mark.slow
def test_a_tool_beside_the_shard_stays_at_the_state_it_found(tmp_path: Path) -> None:
    with Base(tmp_path, map_bytes=1 << 20) as base:
        base.commit(state(1, [base.add(rows(i)) for i in range(3)]))
        tool = start(__file__, "reader", tmp_path)
        assert tool.stdin is not None
        assert tool.stdout is not None
        assert json.loads(tool.stdout.readline()) == [1, [0, 1, 2]]
        for version in range(2, 9):
            numbers = [base.add(rows(10 * version, count=500, width=500)) for _ in range(5)]
            base.commit(state(version, numbers))
        tool.stdin.write("\n")
        tool.stdin.flush()
        assert json.loads(tool.stdout.readline()) == [1, [0, 1, 2]]
        tool.communicate("\n")
        assert tool.returncode == 0
        assert run(__file__, "newest", tmp_path) == [8, [80] * 5]


def newest(directory: str) -> None:
    with Base(Path(directory), readonly=True) as base:
        assert base.state is not None
        print(json.dumps([base.state.version, [int(b.keys[0]) for _, b in base.blocks()]]))


@pytest.mark.slow
def test_readers_that_died_no_longer_hold_pages(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        base.commit(state(1, [base.add(rows(1))]))
    tools = [start(__file__, "reader", tmp_path) for _ in range(2)]
    for tool in tools:
        assert tool.stdout is not None
        tool.stdout.readline()
    dead, alive = tools
    dead.kill()
    dead.communicate()
    with Base(tmp_path) as base:
        readers = base._env.readers()
        assert str(alive.pid) in readers
        assert str(dead.pid) not in readers
    alive.communicate("\n\n")
    assert alive.returncode == 0


def test_a_base_is_opened_once_in_a_process(tmp_path: Path) -> None:
    with Base(tmp_path), pytest.raises(OSError, match="already open"):
        Base(tmp_path).open()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
