"""System calls that write, and what it takes for a name or a file to survive a power failure."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.errors import Corrupt, DiskFull

CHUNK = 1 << 20  # bytes read or written by one system call
MAX_BUFFERS = 1024  # buffers per pwritev call (IOV_MAX)
KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the quota or the file is full


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The system calls that write. A test replaces one of them to let it fail."""

    pwritev: Callable[[int, Sequence[memoryview], int], int] = os.pwritev
    fdatasync: Callable[[int], None] = os.fdatasync
    fsync: Callable[[int], None] = os.fsync
    posix_fallocate: Callable[[int, int, int], None] = os.posix_fallocate


def open_file(path: Path, flags: int, mode: int = 0o640) -> int:
    """Open a regular file and return its descriptor. Raises OSError, or Corrupt for another kind.

    Returns at once where ``os.open`` would wait for the other end of a FIFO.
    """
    require_file(path)
    fd = os.open(path, flags | os.O_NONBLOCK, mode)
    if not stat.S_ISREG(os.fstat(fd).st_mode):  # replaced a moment ago
        os.close(fd)
        raise Corrupt(str(path), "is not a regular file")
    return fd


def require_file(path: Path) -> None:
    """Raise Corrupt if ``path`` exists and is not a regular file."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        return
    if kind != stat.S_IFREG:
        raise Corrupt(str(path), f"is {KINDS.get(kind, 'not a regular file')}, not a regular file")


def read_file(path: Path) -> bytes:
    """Return the contents of a regular file. Raises OSError, or Corrupt for another kind."""
    with open(open_file(path, os.O_RDONLY), "rb") as file:
        return file.read()


def sync(path: Path) -> None:
    """Flush a file's bytes, or a directory's names, to the disk. Raises OSError on failure."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace(path: Path, data: bytes) -> None:
    """Atomically replace a file: after a crash it has either the old or the new contents."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    with fresh.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    sync(path.parent)


@contextlib.contextmanager
def as_disk_full(directory: Path, wanted: int) -> Iterator[None]:
    """Turn an OSError that reports a full disk into DiskFull.

    wanted  bytes that the caller tried to write to ``directory``
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise DiskFull(str(directory), wanted) from error
        raise


def write_all(disk: Disk, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Write ``buffers`` one after another from byte ``offset`` on. Returns the offset after the
    last byte.

    A system call may write less than it was given, so it is repeated. After an error some prefix
    of the bytes is written.
    """
    left = list(buffers)
    done = 0  # buffers that are written in full
    while done < len(left):
        written = disk.pwritev(fd, left[done : done + MAX_BUFFERS], offset)
        if written <= 0:
            raise OSError(errno.EIO, "nothing could be written, and no error was given")
        offset += written
        while done < len(left) and written >= len(left[done]):
            written -= len(left[done])
            done += 1
        if written:
            left[done] = left[done][written:]
    return offset


def preallocate(disk: Disk, fd: int, path: Path, old: int, size: int) -> None:
    """Extend a file from ``old`` to ``size`` bytes with zeros that the disk has room for.

    Raises DiskFull, or another OSError, and leaves the file as it was. The free space is compared
    first: on a full disk this runs for every push, and asking the disk is slow.
    """
    wanted = size - old
    room = os.fstatvfs(fd)
    if room.f_blocks and room.f_bfree * room.f_frsize < wanted:
        raise DiskFull(str(path.parent), wanted)
    try:
        with as_disk_full(path.parent, wanted):
            disk.posix_fallocate(fd, old, wanted)
    except (OSError, DiskFull):
        os.ftruncate(fd, old)
        raise


def erase(disk: Disk, fd: int, start: int, end: int) -> None:
    """Overwrite the bytes ``start``..``end`` with zeros, and sync them."""
    zeros = memoryview(bytes(min(CHUNK, end - start)))
    while start < end:
        start = write_all(disk, fd, [zeros[: end - start]], start)
    disk.fdatasync(fd)


def pread_all(fd: int, size: int, offset: int) -> bytes:
    """Read ``size`` bytes from ``offset`` on; fewer only where the file ends."""
    data = os.pread(fd, size, offset)
    if len(data) == size or not data:
        return data
    parts = [data]
    while data and (size := size - len(data)):
        offset += len(data)
        data = os.pread(fd, size, offset)
        parts.append(data)
    return b"".join(parts)
