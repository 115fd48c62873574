"""The base on a disk that is full, and in a process that is killed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bases import (
    contents,
    listed,
    rows,
    run,
    state,
    stored,
)
from lmdb.verify import verify as verify_pages

from storage.base import Base
from storage.errors import DiskFull

# ---- a disk that runs full


def fill(base: Base, first: int) -> int:
    """Add blocks of 1 MiB until there is no room; how many could be added."""
    with contextlib.suppress(DiskFull):
        for i in range(1000):
            base.add(rows(first + i, count=256, width=1000))
        raise AssertionError("the disk never got full")
    return i


@contextlib.contextmanager
def small_disk(directory: Path, size: str) -> Iterator[None]:
    """Mount a file system in memory at a directory. Skips the test if that is not permitted.

    size  as the mount option of tmpfs, for example "80m"
    """
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(directory)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


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


@pytest.mark.slow
def test_a_full_disk_changes_nothing(memory: Path) -> None:
    assert run(__file__, "file_limit", memory / "base") == []


def test_a_small_disk_that_is_full_changes_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path, "80m"):
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


# ---- a process that is killed

KILLS = 20


def kills(directory: str, seed: str) -> None:
    """Kill writers at any time; after each, the last committed state must be there, whole."""
    dice = random.Random(int(seed))
    path, beyond = Path(directory), 0
    rows(1)  # loads the kernels once, not in each child
    for at in range(KILLS):
        heard, said = os.pipe()
        child = os.fork()
        if child == 0:
            write_for_ever(path, said, dice.randrange(1 << 30))
        os.close(said)
        with os.fdopen(heard, "rb") as pipe:
            begun = pipe.read(16) if at % 4 else b""  # two commits; or none, perhaps
            time.sleep(dice.uniform(0.0, 0.12))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            promised = int.from_bytes((begun + pipe.read())[-8:], "little")
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


def check_written(base: Base) -> None:
    if base.state is None:
        return
    assert base.state.sessions == bytes([base.state.version % 256]) * 5000
    assert stored(base.directory) == set(base.state.blocks)
    for number, block in base.blocks():
        assert contents(block) == bytes(rows(1000 + number, len(block), 50)), number


@pytest.mark.slow
def test_a_killed_process_loses_no_committed_state(tmp_path: Path) -> None:
    assert run(__file__, "kills", tmp_path / "base", 5) > KILLS


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])


@pytest.mark.slow
def test_many_blocks_of_a_failed_flush_are_deleted_from_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path, "820500k"), Base(tmp_path / "base") as base:
        first = state(1, [base.add(rows(0))])
        base.commit(first)
        assert fill(base, 100) > 700  # the list of their free pages exceeds the spare file
        base.discard()
        assert base.bytes < 64 << 20
        base.commit(state(2, [*first.blocks, base.add(rows(1))]))
