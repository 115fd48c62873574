"""The base state: what was committed is there, whole, after whatever happened to the process."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from lmdb.verify import verify as verify_pages

import storage.base
from storage.base import _SEAL, _STATE, Base
from storage.basestate import BaseState, BaseTable
from storage.block import Block, pack_rows, pack_tombstones
from storage.errors import Corrupt, DiskFull, UnknownFormat
from storage.history import History
from storage.pages import Pages, check

KNOWN = frozenset((_STATE, _SEAL))
STATE = BaseState(
    lineage=bytes(range(16)),
    history=History((3, 2**64 - 1), (11,)),
    version=17,
    next_table=4,
    tables=(
        BaseTable(number=1, schema='{"name":"a"}', created=2, policy=b"\0\xff"),
        BaseTable(number=3, schema='{"name":"\u00fc"}', created=9),
    ),
    horizon=5,
    sessions=b"\0sessions",
    blocks=(1, 2**40),
    cells=1,
    logged=True,
)
STATE_GOLDEN = (
    "5053424153450a00 02000000 e8000000 0200000000000000 0900000000000000 9cd95034f6b51a66"
    + (
        '{"lineage":"000102030405060708090a0b0c0d0e0f","epochs":[3,18446744073709551615],'
        '"ends":[11],"version":17,"next_table":4,'
        '"tables":[[1,"{\\"name\\":\\"a\\"}",2,"00ff"],[3,"{\\"name\\":\\"\u00fc\\"}",9,""]],'
        '"horizon":5,"cells":1,"logged":true}    '
    )
    .encode()
    .hex()
    + "0100000000000000 0000000000010000 0073657373696f6e73"
)
OLDER_GOLDEN = (  # format 1: one epoch
    "5053424153450a00 01000000 c0000000 0200000000000000 0900000000000000 f55372af7f7881f3"
    + (
        '{"lineage":"000102030405060708090a0b0c0d0e0f","epoch":3,"version":17,"next_table":4,'
        '"tables":[[1,"{\\"name\\":\\"a\\"}",2,"00ff"],[3,"{\\"name\\":\\"\u00fc\\"}",9,""]],'
        '"horizon":5,"cells":1,"logged":true}'
    )
    .encode()
    .hex()
    + "0100000000000000 0000000000010000 0073657373696f6e73"
)
FIRST_GOLDEN = (  # the first states, without `logged`
    "5053424153450a00 01000000 b8000000 0200000000000000 0900000000000000 cb7988ec27351086"
    + (
        '{"lineage":"000102030405060708090a0b0c0d0e0f","epoch":3,"version":17,"next_table":4,'
        '"tables":[[1,"{\\"name\\":\\"a\\"}",2,"00ff"],[3,"{\\"name\\":\\"\u00fc\\"}",9,""]],'
        '"horizon":5,"cells":1}      '
    )
    .encode()
    .hex()
    + "0100000000000000 0000000000010000 0073657373696f6e73"
)


def rows(number: int, count: int = 4, width: int = 3) -> memoryview:
    """A block whose every array says its number."""
    numbers = np.arange(number, number + count, dtype=np.uint64)
    values = np.full((count, width), number, np.float32)
    return pack_rows(1, numbers, numbers, numbers.view(np.int64), numbers, values)


def state(version: int, blocks: tuple[int, ...] | list[int], sessions: bytes = b"") -> BaseState:
    return dataclasses.replace(STATE, version=version, blocks=tuple(blocks), sessions=sessions)


def contents(block: Block) -> bytes:
    return block.data.tobytes()


def listed(base: Base) -> dict[int, bytes]:
    return {number: contents(block) for number, block in base.blocks()}


def stored(directory: Path) -> set[int]:
    """Numbers of the blocks in the file, listed or not."""
    with open(directory / "data.mdb", "rb") as file:
        return Pages(file.fileno(), str(directory), KNOWN).numbers


# ---- the format


def test_the_format_of_the_state_is_what_it_always_was() -> None:
    assert STATE.pack().hex(" ", 8) == bytes.fromhex(STATE_GOLDEN).hex(" ", 8)
    assert BaseState.unpack(bytes.fromhex(STATE_GOLDEN), "golden") == STATE
    older = dataclasses.replace(STATE, history=History((3,)))
    assert BaseState.unpack(bytes.fromhex(OLDER_GOLDEN), "golden") == older
    first = dataclasses.replace(older, logged=False)
    assert BaseState.unpack(bytes.fromhex(FIRST_GOLDEN), "golden") == first


def test_an_empty_state_comes_back() -> None:
    empty = BaseState(lineage=bytes(16), history=History((0,)), version=0, next_table=1)
    assert BaseState.unpack(empty.pack(), "here") == empty


def test_every_flipped_bit_and_every_other_length_of_a_state_is_found() -> None:
    data = bytearray(STATE.pack())
    for place in range(len(data)):
        for bit in range(8):
            data[place] ^= 1 << bit
            with pytest.raises(Corrupt):
                BaseState.unpack(bytes(data), "here")
            data[place] ^= 1 << bit
        with pytest.raises(Corrupt):
            BaseState.unpack(bytes(data[:place]), "here")


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


# ---- other processes: this file runs itself


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *map(str, arguments)]
    path = os.pathsep.join(sys.path)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **pipes, **options)


def run(*arguments: object) -> Any:
    """What a function of this file prints as JSON, run in a process of its own."""
    process = start(*arguments)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, f"exit status {process.returncode}: {output}"
    return json.loads(output)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: a sync costs nothing."""
    if not os.access("/dev/shm", os.W_OK):  # noqa: S108
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def reader(directory: str) -> None:
    """Open read-only, read, wait for a line, read again."""
    with Base(Path(directory), readonly=True) as base:
        for _ in range(2):
            assert base.state is not None
            seen = [base.state.version, [int(block.keys[0]) for _, block in base.blocks()]]
            print(json.dumps(seen), flush=True)
            sys.stdin.readline()


def test_a_tool_beside_the_shard_stays_at_the_state_it_found(tmp_path: Path) -> None:
    with Base(tmp_path, map_bytes=1 << 20) as base:
        base.commit(state(1, [base.add(rows(i)) for i in range(3)]))
        tool = start("reader", tmp_path)
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
        assert run("newest", tmp_path) == [8, [80] * 5]


def newest(directory: str) -> None:
    with Base(Path(directory), readonly=True) as base:
        assert base.state is not None
        print(json.dumps([base.state.version, [int(b.keys[0]) for _, b in base.blocks()]]))


def test_readers_that_died_no_longer_hold_pages(tmp_path: Path) -> None:
    with Base(tmp_path) as base:
        base.commit(state(1, [base.add(rows(1))]))
    tools = [start("reader", tmp_path) for _ in range(2)]
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


# ---- a disk that runs full


def fill(base: Base, first: int) -> int:
    """Add blocks of 1 MiB until there is no room; how many could be added."""
    with contextlib.suppress(DiskFull):
        for i in range(1000):
            base.add(rows(first + i, count=256, width=1000))
        raise AssertionError("the disk never got full")
    return i


def file_limit(directory: str) -> None:
    """What a full disk does, with a limit on the size of files in its place."""
    path = Path(directory)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    limit(1000)
    with pytest.raises(DiskFull) as caught:
        Base(path).open()
    assert caught.value.directory == directory
    limit(100 << 20)
    with Base(path) as base:
        first = state(1, [base.add(rows(i)) for i in range(3)])
        base.commit(first)
        expected = listed(base)
        added = fill(base, 100)
        assert added > 30, added
        assert (base.state, listed(base)) == (first, expected)
        base.discard()
        again = fill(base, 100)  # into the pages of those discarded, for there is no other room
        assert again >= added - 16, (again, added)
        with pytest.raises(DiskFull) as caught:
            base.commit(state(2, [], sessions=bytes(50 << 20)))
        assert caught.value.wanted > 0
        assert (base.state, listed(base)) == (first, expected)
    with Base(path) as base:
        assert (base.state, listed(base)) == (first, expected)
        limit(200 << 20)
        base.discard()
        number = base.add(rows(7))
        base.commit(state(3, [*first.blocks, number]))
    assert stored(path) == {*first.blocks, number}

    # Without the allocation LMDB calls it a broken disk, and then nothing more is written.
    os.posix_fallocate = lambda *_: None
    with Base(path) as base:
        limit(os.path.getsize(path / "data.mdb") + (1 << 20))
        with contextlib.suppress(OSError):
            fill(base, 100)
        limit(resource.RLIM_INFINITY)
        for write in (base.discard, lambda: base.add(rows(1)), lambda: base.commit(first)):
            with pytest.raises(OSError, match="Input/output error") as failed:
                write()
            assert failed.value.errno == errno.EIO
        assert listed(base) == {**expected, number: bytes(rows(7))}
    print(json.dumps(verify_pages(directory)))


def test_a_full_disk_changes_nothing(memory: Path) -> None:
    assert run("file_limit", memory / "base") == []


def test_a_small_disk_that_is_full_changes_nothing(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=80m", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with Base(tmp_path / "base") as base:
            first = state(1, [base.add(rows(i)) for i in range(3)])
            base.commit(first)
            expected = listed(base)
            assert fill(base, 100) > 10
            assert (base.state, listed(base)) == (first, expected)
            base.discard()
            assert fill(base, 100) > 10
        with Base(tmp_path / "base") as base:
            assert (base.state, listed(base)) == (first, expected)
            base.commit(state(2, [*first.blocks, base.add(rows(9))]))
            assert listed(base).items() > expected.items()
        assert verify_pages(str(tmp_path / "base")) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ---- a process that is killed

KILLS = 20


def kills(directory: str, seed: str) -> None:
    """Kill writers at any time; after each, the last committed state must be there, whole."""
    dice = random.Random(int(seed))
    path, beyond = Path(directory), 0
    for _ in range(KILLS):
        heard, said = os.pipe()
        child = os.fork()
        if child == 0:
            write_for_ever(path, said, dice.randrange(1 << 30))
        os.close(said)
        time.sleep(dice.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        promised = last_number(heard)
        if not (path / "data.mdb").exists():
            assert promised == 0
            continue
        assert verify_pages(directory) == []
        with Base(path) as base:
            version = base.state.version if base.state else 0
            assert promised <= version, (promised, version)
            beyond += version > promised
            check_written(base)
        assert verify_pages(directory) == []
    print(json.dumps(version))


def write_for_ever(path: Path, said: int, seed: int) -> None:
    dice = random.Random(seed)
    with Base(path, map_bytes=1 << 20) as base:
        version = base.state.version if base.state else 0
        live = list(base.state.blocks) if base.state else []
        while True:
            version += 1
            for _ in range(dice.randrange(1, 20)):
                live.append(base.add(rows(1000 + base._next, dice.randrange(1, 300), 50)))
            live = sorted(dice.sample(live, min(len(live), 12)))
            base.commit(state(version, live, sessions=bytes([version % 256]) * 5000))
            os.write(said, version.to_bytes(8, "little"))


def last_number(heard: int) -> int:
    with os.fdopen(heard, "rb") as pipe:
        data = pipe.read()
    return int.from_bytes(data[-8:], "little")


def check_written(base: Base) -> None:
    if base.state is None:
        return
    assert base.state.sessions == bytes([base.state.version % 256]) * 5000
    assert stored(base.directory) == set(base.state.blocks)
    for number, block in base.blocks():
        assert contents(block) == bytes(rows(1000 + number, len(block), 50)), number


@pytest.mark.slow
def test_a_killed_process_loses_no_committed_state(tmp_path: Path) -> None:
    assert run("kills", tmp_path / "base", 5) > KILLS


# ---- damage


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
            os.truncate(path / "data.mdb", len(whole))
            os.pwrite(file, whole, 0)
        except Corrupt as error:
            found += error.where.startswith(str(path / "data.mdb"))
            os.pwrite(file, whole[place : place + 1], place)
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
    data[8] = 3
    checksum = xxhash.xxh3_64_intdigest(data[:32] + data[40:])
    data[32:40] = checksum.to_bytes(8, "little")
    with pytest.raises(UnknownFormat) as caught:
        BaseState.unpack(bytes(data), "here")
    assert (caught.value.where, caught.value.held, caught.value.known) == ("here", 3, 2)


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
    process = start("flips", memory / "base", 11, 0.05)
    output, _ = process.communicate(timeout=100)
    last = (memory / "base" / "last").read_text()
    assert process.returncode == 0, f"status {process.returncode} at (place, mask) {last}"
    found, harmless = json.loads(output)
    assert found > 2000
    assert harmless > 500


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
