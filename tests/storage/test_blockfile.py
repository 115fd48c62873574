"""The map of the base's file: what is in the file is in the map, also when it grows."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from storage.blockfile import PAGE, BlockFile, request
from storage.errors import Corrupt


def content(pages: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(pages * PAGE)


def mapped(path: Path) -> int:
    """How many maps of the file the process has."""
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_the_map_shows_the_file_while_it_is_written_and_grows(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(4))
    with BlockFile(path, 16 * PAGE) as file:
        assert file.bytes[: 4 * PAGE].tobytes() == content(4)
        first = file.bytes
        with path.open("r+b") as writer:
            writer.write(content(12, 2))
            writer.flush()
            file.cover(12 * PAGE)
            assert file.bytes is first
            assert file.bytes[: 12 * PAGE].tobytes() == content(12, 2)
            writer.seek(0)
            writer.write(content(100, 3))
        file.cover(100 * PAGE)
        assert len(file.bytes) >= 400 * PAGE
        assert file.words[: 100 * PAGE // 8].tobytes() == content(100, 3)
        assert file.floats[: 100 * PAGE // 4].tobytes() == content(100, 3)
        assert first[: 16 * PAGE].tobytes() == content(100, 3)[: 16 * PAGE]
        assert mapped(path) == 2
        del first
        gc.collect()
        assert mapped(path) == 1
        with pytest.raises(ValueError, match="read-only"):
            file.bytes[0] = 1


def test_arrays_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(4))
    with BlockFile(path) as file:
        numbers = file.floats[5:10]
    assert mapped(path) == 1
    assert numbers.tobytes() == content(4)[20:40]
    del numbers
    gc.collect()
    assert mapped(path) == 0
    assert len(file.bytes) == 0


def test_only_a_regular_file_is_mapped(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        BlockFile(tmp_path / "none").open()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(Corrupt, match="FIFO"):
        BlockFile(tmp_path / "fifo").open()


def evict(path: Path) -> None:
    """Drop a file from memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("size", [1, PAGE, 3 * PAGE, 64 * PAGE])
def test_warm_ranges_are_in_memory(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(2000))
    random = np.random.default_rng(1)
    for order in (np.sort, random.permutation):
        evict(path)
        with BlockFile(path) as file:
            offsets = order(random.integers(0, 2000 * PAGE - size, 30))
            assert not file.resident(np.array([1500 * PAGE]))
            file.warm(offsets, size)
            assert file.resident(offsets, size)
            file.warm(offsets, size)
            for offset in offsets:
                assert file.resident(np.array([offset, offset + size - 1]), 1)
                expected = content(2000)[offset : offset + size]
                assert file.bytes[offset : offset + size].tobytes() == expected


def test_all_missing_pages_are_listed_once_whatever_the_order(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(200))
    evict(path)
    with BlockFile(path) as file:
        absent, states = np.zeros(1000, np.int64), np.zeros(100, np.uint8)
        offsets = np.array([90, 91, 91, 3, 4, 40, 38]) * PAGE + 5
        address = np.uint64(file.bytes.ctypes.data)
        fd = os.open(path, os.O_RDONLY)
        found = request(address, fd, offsets, 2 * PAGE, PAGE, states, absent)
        os.close(fd)
        pages = set((absent[:found] // PAGE).tolist())
        assert pages >= {90, 91, 92, 93, 3, 4, 5, 6}
        assert pages <= {90, 91, 92, 93, 3, 4, 5, 6, 38, 39, 40, 41, 42}


def test_nothing_is_warm_after_the_end_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(4))
    with BlockFile(path) as file, pytest.raises(EOFError, match="ends before byte"):
        file.warm(np.array([0, 100 * PAGE]))


def test_threads_warm_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(3000))
    evict(path)
    with BlockFile(path) as file:
        offsets = [np.random.default_rng(i).integers(0, 3000, 500) * PAGE for i in range(4)]
        threads = [threading.Thread(target=file.warm, args=(each,)) for each in offsets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(file.resident(each) for each in offsets)
