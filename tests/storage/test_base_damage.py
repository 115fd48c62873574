"""A damaged base is refused by name, or the damage has no meaning."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash
from bases import (
    KNOWN,
    STATE,
    contents,
    listed,
    rows,
    start,
    state,
)

import storage.base
from storage.base import Base
from storage.basestate import BaseState
from storage.errors import Corrupt, UnknownFormat
from storage.pages import Pages, check


def small_base(directory: Path) -> None:
    """A base with a tree of two levels, blocks in leaves and in overflow pages, free pages."""
    with Base(directory) as base:
        old = [base.add(rows(i, count=90, width=50)) for i in range(30)]
        base.commit(state(1, old))
        new = [base.add(rows(i, count=4, width=30)) for i in range(12)]
        new += [base.add(rows(i, count=20, width=150)) for i in range(4)]
        base.commit(state(2, [*old[::10], *new]))
        base.commit(state(3, [*old[::10], *new], sessions=b"sessions" * 3))


def flips(directory: str, seed: str, share: str) -> None:
    """Flip bytes of a closed base, one at a time; each must be found or change nothing.

    Nothing: the base opens, with the newest state and every block, and takes another commit.
    """
    dice = random.Random(int(seed))
    path = Path(directory)
    storage.base.BATCH_BYTES, storage.base.SLACK = 1 << 16, 1 << 17  # allocate less ahead
    small_base(path)
    with Base(path) as base:
        expected = (base.state, listed(base))
        end = (base._env.info()["last_pgno"] + 1) * 4096
    os.truncate(path / "data.mdb", end)  # what lies behind means nothing
    whole = (path / "data.mdb").read_bytes()
    file = os.open(path / "data.mdb", os.O_RDWR)
    found = harmless = 0
    for place, mask in damages(whole, dice, float(share)):
        os.pwrite(file, bytes([whole[place] ^ mask]), place)
        (path / "last").write_text(f"{place} {mask}")
        try:
            with Base(path) as base:
                assert (base.state, listed(base)) == expected, (place, mask)
                assert base.state is not None
                added = base.add(rows(77, count=100, width=50))
                base.commit(state(4, [*base.state.blocks, added]))
                after = {**expected[1], added: bytes(rows(77, count=100, width=50))}
            with Base(path, readonly=True) as base:
                assert (base.state, listed(base)) == (state(4, list(after)), after), (place, mask)
            harmless += 1
        except Corrupt as error:
            found += error.where.startswith(str(path / "data.mdb"))
        os.truncate(path / "data.mdb", len(whole))
        os.pwrite(file, whole, 0)  # also what was written before the damage was found
    print(json.dumps([found, harmless]))


def damages(whole: bytes, dice: random.Random, share: float) -> Iterator[tuple[int, int]]:
    """Where to flip which bits: all of the meta pages, a share of what else LMDB may follow."""
    page = 4096
    for number in range(len(whole) // page):
        start = number * page
        flags = int.from_bytes(whole[start + 10 : start + 12], "little")
        mine = int.from_bytes(whole[start : start + 8], "little") == number
        if flags == 8 and mine:  # meta
            yield from ((start + i, 1 << bit) for i in range(160) for bit in range(8))
        elif flags in (1, 2) and mine:  # branch or leaf, of the newest tree or an older one
            lower, upper = np.frombuffer(whole, "<u2", 2, start + 12).tolist()
            used = [*range(lower), *range(upper, page)]
            some = [i for i in used if dice.random() < share]
            yield from ((start + i, dice.randrange(1, 256)) for i in some)
        elif flags == 4 and mine:
            some = [i for i in range(128) if dice.random() < share]
            yield from ((start + i // 8, 1 << i % 8) for i in some)
    for _ in range(1000):
        yield dice.randrange(len(whole)), dice.randrange(1, 256)


def meta_of(directory: Path, newest: bool) -> int:
    """Offset of the newest or the older meta page's transaction number."""
    whole = (directory / "data.mdb").read_bytes()
    places = sorted((144, 4096 + 144), key=lambda at: int.from_bytes(whole[at : at + 8], "little"))
    return places[newest]


def overwrite(path: Path, place: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(data)


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "killed after the commit"])
def test_the_older_meta_page_stands_for_the_newest_state_too(tmp_path: Path, closed: bool) -> None:
    with Base(tmp_path / "base") as base:
        for version in (1, 2, 3):
            base.commit(state(version, [base.add(rows(version))]))
        if not closed:
            shutil.copytree(tmp_path / "base", tmp_path / "copy")
    directory = tmp_path / ("base" if closed else "copy")
    place = meta_of(directory, newest=True)
    number = int.from_bytes((directory / "data.mdb").read_bytes()[place : place + 8], "little")
    overwrite(directory / "data.mdb", place, (number - 2).to_bytes(8, "little"))
    with Base(directory) as base:
        assert base.state == state(3, [3])
        assert listed(base) == {3: bytes(rows(3))}


def test_a_damaged_block_is_named(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        numbers = [base.add(rows(i, count=100, width=50)) for i in range(3)]
        base.commit(state(1, numbers))
    path = tmp_path / "data.mdb"
    place = path.read_bytes().index(np.full(50, 1, np.float32).tobytes())
    overwrite(path, place, b"damaged!")
    with Base(tmp_path) as base:
        seen = []
        with pytest.raises(Corrupt) as caught:
            seen.extend(number for number, _ in base.blocks())
        assert (seen, caught.value.where) == (numbers[:1], f"{path}: block {numbers[1]}")
        with pytest.raises(Corrupt, match=f"block {numbers[1]}: "):
            base.block(numbers[1])
        assert contents(base.block(numbers[2])) == bytes(rows(2, count=100, width=50))


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        base.commit(state(1, [], sessions=b"remember"))
    path = tmp_path / "data.mdb"
    while (place := path.read_bytes().find(b"remember")) >= 0:
        overwrite(path, place, b"forgotten"[:8])
    for readonly in (False, True):
        with pytest.raises(Corrupt) as caught:
            Base(tmp_path, readonly=readonly).open()
        assert caught.value.where == f"{path}: state"


def test_a_state_of_a_newer_format_is_not_called_damage() -> None:
    data = bytearray(STATE.pack())
    data[8] = 4
    checksum = xxhash.xxh3_64_intdigest(data[:32] + data[40:])
    data[32:40] = checksum.to_bytes(8, "little")
    with pytest.raises(UnknownFormat) as caught:
        BaseState.unpack(bytes(data), "here")
    assert (caught.value.where, caught.value.found, caught.value.known) == ("here", 4, 3)


def test_a_page_in_use_that_is_listed_as_free_is_found(tmp_path: Path) -> None:
    """LMDB would write over it, sooner or later."""
    small_base(tmp_path)
    path, lists = tmp_path / "data.mdb", []

    class Recorded(Pages):
        def _check_free(self, page: int, transaction: int, value: bytes, newest: int) -> None:
            lists.append((page, value))
            super()._check_free(page, transaction, value, newest)

    with open(path, "rb") as file:
        used = set(np.flatnonzero(Recorded(file.fileno(), "whole", KNOWN)._used).tolist())
        whole = file.read()
    numbers = [np.frombuffer(value, "<u8")[1:].tolist() for _, value in lists]
    live = used.difference(*numbers)
    tried = 0
    for (page, value), free in zip(lists, numbers, strict=True):
        place = whole.index(value, page * 4096) + 8
        for i, (above, below) in enumerate(zip([2**63, *free], [*free[1:], 0], strict=False)):
            for other in [p for p in live if below < p < above]:
                overwrite(path, place + 8 * i, other.to_bytes(8, "little"))
                with pytest.raises(Corrupt, match="are in use"):
                    check(path, KNOWN)
                tried += 1
            overwrite(path, place + 8 * i, free[i].to_bytes(8, "little"))
    assert tried > 10
    check(path, KNOWN)


def test_a_listed_block_that_is_missing_is_found_before_anything_is_deleted(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        numbers = [base.add(rows(i, count=100, width=50)) for i in range(3)]
        base.commit(state(1, numbers))
    path = tmp_path / "data.mdb"
    key = (8).to_bytes(2, "little") + numbers[-1].to_bytes(8, "big")  # and its size before it
    whole = path.read_bytes()
    place = whole.find(key)
    while place >= 0:
        overwrite(path, place + 9, b"\x77")
        place = whole.find(key, place + 1)
    before = path.read_bytes()
    with pytest.raises(Corrupt, match=f"block {numbers[-1]}: the block is missing"):
        Base(tmp_path).open()
    assert path.read_bytes() == before


def test_a_file_that_was_cut_is_found(tmp_path: Path) -> None:
    small_base(tmp_path)
    path = tmp_path / "data.mdb"
    with Base(tmp_path) as base:
        expected = (base.state, listed(base))
        end = (base._env.info()["last_pgno"] + 1) * 4096
    found = 0
    for size in range(end, -1, -2048):
        os.truncate(path, size)
        try:
            with Base(tmp_path, readonly=True) as base:
                assert (base.state, listed(base)) == expected
        except Corrupt:
            found += 1
    assert found > end // 4096


@pytest.mark.slow
def test_pages_that_change_while_they_are_checked_are_no_damage(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        done, checked = threading.Event(), 0

        def keep_checking() -> None:
            nonlocal checked
            while not done.is_set():
                with contextlib.suppress(BlockingIOError):
                    check(tmp_path / "data.mdb", KNOWN)
                checked += 1

        with ThreadPoolExecutor() as pool:
            checks = pool.submit(keep_checking)
            live: list[int] = []
            for version in range(100):
                live = [*live, *(base.add(rows(version, 100, 20)) for _ in range(5))][-100:]
                base.commit(state(version, live))
            done.set()
            checks.result()
    assert checked > 10


@pytest.mark.slow
def test_every_flipped_byte_is_found_or_changes_nothing(memory: Path) -> None:
    process = start(__file__, "flips", memory / "base", 11, 0.2)
    output, _ = process.communicate()
    last = (memory / "base" / "last").read_text()
    assert process.returncode == 0, f"status {process.returncode} at (place, mask) {last}"
    found, harmless = json.loads(output)
    assert found > 2000
    assert harmless > 500


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
