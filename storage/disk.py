"""Write files so that names and contents survive a power failure; open only regular files."""

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
    """The system calls that write to disk. Tests replace one of them to make it fail."""

    pwritev: Callable[[int, Sequence[memoryview], int], int] = os.pwritev
    fdatasync: Callable[[int], None] = os.fdatasync
    fsync: Callable[[int], None] = os.fsync
    posix_fallocate: Callable[[int, int, int], None] = os.posix_fallocate


def open_file(path: Path, flags: int, mode: int = 0o640) -> int:
    """Open a regular file and return its descriptor.

    flags  of ``os.open``
    mode   permissions of a file that is created

    Raises Corrupt for a directory, FIFO or other special file, and OSError for other failures.
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
    """Return the contents of a regular file. Raises OSError, or Corrupt for a special file."""
    with open(open_file(path, os.O_RDONLY), "rb") as file:
        return file.read()


def sync(path: Path) -> None:
    """Flush a file's contents, or a directory's entries, to the disk. Raises OSError on failure."""
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
    """Raise DiskFull instead of an OSError about a full disk that the block raises.

    directory  directory that the block writes to
    wanted     bytes that it writes
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise DiskFull(str(directory), wanted) from error
        raise


def write_all(disk: Disk, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Write ``buffers`` one after another to ``fd``, from byte ``offset`` on.

    Returns the offset after the last byte. Repeats the system call until everything is written.
    After an OSError a part of the bytes, from the start, may be written.
    """
    left = list(buffers)
    done = 0  # buffers that are written in full
    while done < len(left):
        written = disk.pwritev(fd, left[done : done + MAX_BUFFERS], offset)
        if written <= 0:
            raise OSError(errno.EIO, "the system call wrote 0 bytes without reporting an error")
        offset += written
        while done < len(left) and written >= len(left[done]):
            written -= len(left[done])
            done += 1
        if written:
            left[done] = left[done][written:]
    return offset


def preallocate(disk: Disk, fd: int, path: Path, old: int, size: int) -> None:
    """Extend a file from ``old`` to ``size`` bytes of zeros, and allocate disk space for them.

    path  path of the open file ``fd``

    Raises DiskFull, or OSError for other errors; the file is unchanged then. Compares the free
    space first, because a failing allocation is slow.
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
    """Overwrite the bytes from ``start`` to ``end`` (exclusive) with zeros, and sync the file."""
    zeros = memoryview(bytes(min(CHUNK, end - start)))
    while start < end:
        start = write_all(disk, fd, [zeros[: end - start]], start)
    disk.fdatasync(fd)


def pread_all(fd: int, size: int, offset: int) -> bytes:
    """Read ``size`` bytes from ``offset`` on; fewer only if the file ends before."""
    data = os.pread(fd, size, offset)
    if len(data) == size or not data:
        return data
    parts = [data]
    while data and (size := size - len(data)):
        offset += len(data)
        data = os.pread(fd, size, offset)
        parts.append(data)
    return b"".join(parts)
