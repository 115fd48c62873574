"""Free pages of the base take no space on disk, and what readers still see stays."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from bases import listed, rows, state, stored
from lmdb.verify import verify as verify_pages

from storage import holes
from storage.base import Base
from storage.errors import DiskFull
from storage.holes import LEAST_KEPT, Spare

MB, MIB = 10**6, 1 << 20


def megabytes(first: int, count: int) -> list[bytes]:
    """Blocks of about 1 MiB."""
    return [rows(first + i, count=256, width=1000) for i in range(count)]


def test_deleted_blocks_give_their_space_back(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        numbers = [base.add(block) for block in megabytes(0, 40)]
        base.commit(state(1, numbers))
        full, size = base.bytes, base.size
        assert full >= 40 * MB
        base.commit(state(2, numbers[::4]))
        assert base.bytes < 10 * MIB + LEAST_KEPT + 2 * MIB
        assert size <= base.size < size + MIB
        expected = listed(base)
    assert verify_pages(str(tmp_path)) == []
    with Base(tmp_path) as base:
        assert listed(base) == expected
        again = [base.add(block) for block in megabytes(100, 30)]
        base.commit(state(3, [*numbers[::4], *again]))
        assert base.size < size + 4 * MIB  # the holes are used again
        assert expected.items() <= listed(base).items()
    assert verify_pages(str(tmp_path)) == []
    assert stored(tmp_path) == {*numbers[::4], *again}


def test_added_blocks_take_no_more_space_than_they_need(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        base.commit(state(1, [base.add(rows(1))]))
        assert base.bytes < MIB
        assert (tmp_path / "spare").stat().st_blocks * 512 == MIB


def test_a_reader_keeps_what_it_sees(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        numbers = [base.add(block) for block in megabytes(0, 20)]
        base.commit(state(1, numbers))
        with base._env.begin() as reader:  # as a tool that reads the base of a running shard
            expected = [reader.get(number.to_bytes(8, "big")) for number in numbers]
            for version in range(2, 6):
                base.commit(state(version, numbers[:1]))
                assert [reader.get(number.to_bytes(8, "big")) for number in numbers] == expected
            assert base.bytes >= 20 * MB
        base.commit(state(6, numbers[:1]))
        assert base.bytes < 2 * MIB + LEAST_KEPT


@pytest.mark.slow
def test_random_commits_keep_blocks_and_space(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    base, live = Base(tmp_path).open(), dict[int, bytes]()
    for version in range(1, 120):
        for _ in range(int(random.integers(0, 6))):
            block = rows(1000 * version + len(live), int(random.integers(1, 3000)), 64)
            live[base.add(block)] = bytes(block)
        for number in random.permutation(list(live))[: int(random.integers(0, 6))].tolist():
            del live[number]
        if random.random() < 0.1:
            base.discard()
            live = {n: block for n, block in live.items() if n in base._numbers}
        base.commit(state(version, sorted(live)))
        used = sum(-(-(len(block) + 16) // 4096) * 4096 for block in live.values())
        assert base.bytes <= used + LEAST_KEPT + MIB
        if random.random() < 0.1:
            assert listed(base) == live
            base.close()
            assert verify_pages(str(tmp_path)) == []
            base = Base(tmp_path).open()
    base.close()


def test_a_file_system_without_holes_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holes, "_punch", lambda *_: False)
    with Base(tmp_path) as base:
        numbers = [base.add(block) for block in megabytes(0, 12)]
        base.commit(state(1, numbers))
        base.commit(state(2, numbers[:1]))
        assert base.bytes >= 12 * MB
        assert list(listed(base)) == numbers[:1]


def test_the_spare_file_takes_its_space_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "spare"
    spare = Spare(path, MIB)
    spare.release()
    assert not path.exists()
    spare.hold()
    assert path.stat().st_blocks * 512 == MIB
    spare.release()
    assert path.stat().st_blocks == 0
    spare.hold()
    assert path.stat().st_blocks * 512 == MIB


def test_no_space_for_the_spare_file_is_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with Base(tmp_path) as base, pytest.raises(DiskFull):
        base.add(rows(1))
