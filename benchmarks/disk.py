"""Load files into the file cache, drop them from it, and measure the disk's own random reads.

The file cache is the memory in which the operating system keeps pages of files. Nothing here needs
root: a process may drop the pages of its own files.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PAGE = 4096  # bytes of one random read
DEPTH = 32  # random reads that are in progress at the same time
CHUNK = 4 << 20  # bytes per read or write of a whole file
MADV_DONTNEED = 4  # Linux; unmaps the pages of a file without dropping them from the cache


def files_of(directory: Path) -> list[Path]:
    """Return all regular files below a directory."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def size_of(directory: Path) -> int:
    """Return the bytes that all files below a directory take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in files_of(directory))


def load(directory: Path) -> None:
    """Read all files below a directory once, so that they are in the file cache."""
    buffer = bytearray(CHUNK)
    for path in files_of(directory):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(directory: Path) -> None:
    """Remove all files below a directory from the file cache.

    Pages that a process has mapped are not removed. So this process's own mappings of the files are
    emptied first; the next access fills them again. No other process may have mapped the files.
    """
    for path in files_of(directory):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # changed pages cannot be removed
            _unmap(path)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _unmap(path: Path) -> None:
    """Empty the mappings of a file in this process. They stay valid."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    name = str(path.resolve())
    with open("/proc/self/maps") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(None, 5)
            if len(fields) == 6 and fields[5] == name:
                start, end = (int(word, 16) for word in fields[0].split("-"))
                if madvise(start, end - start, MADV_DONTNEED):
                    raise OSError(ctypes.get_errno(), f"cannot unmap pages of {name}")


def resident(directory: Path) -> float:
    """Return the share of the bytes of all files below a directory that are in the file cache."""
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    there = pages = 0
    for path in files_of(directory):
        size = path.stat().st_size
        if not size:
            continue
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        array = np.frombuffer(mapped, np.uint8)
        flags = np.zeros(-(-size // PAGE), np.uint8)
        mincore(array.ctypes.data, size, flags.ctypes.data)
        there, pages = there + int((flags & 1).sum()), pages + len(flags)
    return there / max(1, pages)


def random_reads(directory: Path, size: int, seconds: float) -> tuple[float, str]:
    """Measure random reads of 4 KiB, 32 at once, of a new file that is not in the file cache.

    directory  directory for the file
    size       bytes of the file
    seconds    duration of the measurement

    Returns (reads per second, name of the tool). The tool is fio if it is installed. Otherwise
    threads of this process read, which can be slower on a fast disk.
    """
    path = directory / "random"
    block = np.random.default_rng(0).integers(0, 256, CHUNK, np.uint8).tobytes()
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-size // CHUNK)):
            file.write(block)
        os.fsync(file.fileno())
    try:
        if shutil.which("fio"):
            return _fio(path, seconds), "fio"
        return _threads(path, seconds), f"{DEPTH} threads"
    finally:
        path.unlink()


def _fio(path: Path, seconds: float) -> float:
    """Return the random reads per second of a file, as fio measures them."""
    command = ["fio", "--name=reads", f"--filename={path}", "--rw=randread", f"--bs={PAGE}"]
    command += ["--direct=1", "--ioengine=libaio", f"--iodepth={DEPTH}", "--readonly"]
    command += ["--time_based", f"--runtime={seconds}", "--output-format=json"]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(run.stdout)["jobs"][0]["read"]["iops"])


def _threads(path: Path, seconds: float) -> float:
    """Return the random reads per second of a file by DEPTH threads, past the file cache."""
    pages = path.stat().st_size // PAGE
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    start = time.perf_counter()

    def read(seed: int) -> int:
        done = 0
        with mmap.mmap(-1, PAGE) as buffer:  # direct reads need aligned memory
            while time.perf_counter() - start < seconds:
                for page in np.random.default_rng((seed, done)).integers(0, pages, 64).tolist():
                    os.preadv(descriptor, [buffer], page * PAGE)
                    done += 1
        return done

    try:
        with ThreadPoolExecutor(DEPTH) as pool:
            done = sum(pool.map(read, range(DEPTH)))
        return done / (time.perf_counter() - start)
    finally:
        os.close(descriptor)
