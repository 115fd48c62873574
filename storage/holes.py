"""Give the disk space of free pages of an LMDB file back to the file system.

LMDB never shrinks its file. Pages that are not needed any more stay in lists of free pages, and are
used again later. Until then they take disk space. ``give_back`` turns free pages into a hole of the
file: the file keeps its length, but the pages take no disk space until they are written again.

A page in the list of transaction t was in use until t. It is safe to lose its contents if nobody
can see the file as it was before t:

    * both meta pages lead to transactions t or newer, so that no restart comes before t;
    * each reader, in any process, reads the file as of t or newer.

LMDB writes a free page as a whole before it reads it. So it does not notice that it became a hole.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.disk import NO_SPACE, open_file
from storage.errors import DiskFull
from storage.pages import FreeList, FreePages

KEPT = 32  # 1/KEPT of the file is kept as free pages without holes,
LEAST_KEPT, MOST_KEPT = 1 << 20, 64 << 20  # within these bounds, in bytes

_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_UNABLE = (errno.EOPNOTSUPP, errno.ENOSYS)  # the file system has no holes
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def allocated(file: int) -> int:
    """Return the bytes on disk that an open file takes; holes take none."""
    return os.fstat(file).st_blocks * 512


def give_back(file: int, path: str, oldest: int | None) -> None:
    """Turn free pages into holes, except for some that LMDB will use first: 1/KEPT of the file.

    file    descriptor of an LMDB file, opened for writing. No write transaction may be open
    path    its name, for errors
    oldest  oldest transaction that a reader of the file sees; None: there is no reader

    Pages after the last one in use become a hole, too. Does nothing if the file system has no
    holes. Raises Corrupt if the lists of free pages are damaged, and OSError.
    """
    free = FreePages(file, path)
    end = (free.last + 1) * free.size
    used = end - free.size * sum(len(each.pages) for each in free.lists)
    keep = min(max(used // KEPT, LEAST_KEPT), MOST_KEPT)
    if allocated(file) <= used + keep or not _punch(file, end, os.fstat(file).st_size - end):
        return
    seen = free.older if oldest is None else min(free.older, oldest)
    for each in reversed(free.lists):
        if allocated(file) <= used + keep:
            return
        if each.transaction <= seen and not _punch_list(file, each, free.size):
            return


def oldest_seen(env: Any) -> int | None:
    """Return the oldest transaction that a reader sees, in any process; None: there is no reader.

    env  lmdb.Environment of the file. Its slots of readers that died are cleared
    """
    env.reader_check()
    lines = env.readers().splitlines()[1:]  # process, thread, transaction or "-"
    return min((int(line.split()[2]) for line in lines if not line.endswith("-")), default=None)


class Spare:
    """A file that only takes disk space, which can be given up when the disk is full."""

    def __init__(self, path: Path, size: int) -> None:
        """Store the settings. ``hold`` creates the file.

        size  bytes that it takes
        """
        self._path, self._size = path, size
        self._held = False

    def hold(self) -> None:
        """Make sure that the file takes its space. Raises DiskFull and OSError."""
        if self._held:
            return
        file = open_file(self._path, os.O_RDWR | os.O_CREAT)
        try:
            os.posix_fallocate(file, 0, self._size)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise DiskFull(str(self._path.parent), self._size) from error
        finally:
            os.close(file)
        self._held = True

    def release(self) -> None:
        """Give the space up."""
        self._held = False
        with suppress(FileNotFoundError):
            os.truncate(self._path, 0)


def _punch_list(file: int, free: FreeList, size: int) -> bool:
    """Turn the pages of a list into holes. Returns False if the file system has none.

    size  bytes per page
    """
    return all(_punch(file, at * size, count * size) for at, count in _runs(free.pages))


def _runs(pages: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return (first, count) of each run of consecutive numbers in ``pages``, which ascend."""
    starts = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
    counts = np.diff(starts, append=len(pages))
    return list(zip(pages[starts].tolist(), counts.tolist(), strict=True))


def _punch(file: int, offset: int, size: int) -> bool:
    """Turn a range of a file into a hole. Returns False if the file system has none."""
    if size <= 0:
        return True
    if _libc.fallocate(file, _PUNCH, offset, size) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNABLE:
        return False
    raise OSError(number, os.strerror(number))
