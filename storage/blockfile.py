"""A read-only memory map of the base's file, from which rows are read in place.

The base (the on-disk copy of all rows at one log version) is an LMDB file of blocks. LMDB never
moves a committed block, so kernels can read its rows straight from a map of the file. The map
reserves more address space than the file has bytes, so that it rarely has to be replaced when the
file grows. Nothing may be read after the end of the file, which never shrinks.

A read from the map waits for the disk if the page is not in memory, and kills the process if the
disk fails. Therefore ``warm`` first reads the pages with system calls, many at once: it asks for
all missing pages, then waits for each of them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import Any, Self

import numpy as np
from numba import types
from numpy.typing import NDArray

from storage.arena import MAP_NORESERVE, address_space
from storage.disk import open_file
from storage.holes import allocated
from storage.kernels import jit

RESERVED = 1 << 40  # bytes of address space that a map reserves, if the system has them
GROWTH = 4  # a new map reserves at least this many times the bytes that are needed
LOOK = 1 << 16  # pages that one system call looks at
NEAR = 200  # pages between two ranges that one system call looks at
PAGE = mmap.PAGESIZE

_WILLNEED = os.POSIX_FADV_WILLNEED
_FAILED = ctypes.c_void_p(-1).value  # what mmap returns if it fails
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)

# Functions of the C library, which kernels call. Addresses are integers.
mincore = types.ExternalFunction("mincore", types.int32(types.uintp, types.uintp, types.uintp))
_fadvise = types.ExternalFunction(
    "posix_fadvise", types.int32(types.int32, types.int64, types.int64, types.int32)
)
_pread = types.ExternalFunction(
    "pread", types.intp(types.int32, types.uintp, types.uintp, types.int64)
)


@jit
def _span(offsets: Any, first: int, size: int, page: int, most: int) -> Any:
    """Find ranges that are close to each other, so that one system call can look at all of them.

    offsets  int64[n]  start of each range
    first    index of the first range
    size     bytes in each range
    page     bytes in a page of the system
    most     maximum number of pages

    Returns (index after the last range, offset of the first page, offset after the last page).
    """
    start = offsets[first] // page * page
    stop = (offsets[first] + size + page - 1) // page * page
    i = first + 1
    while i < offsets.shape[0] and offsets[i - 1] <= offsets[i] <= stop + NEAR * page:
        end = (offsets[i] + size + page - 1) // page * page
        if end - start > most * page:
            break
        stop = max(stop, end)
        i += 1
    return i, start, stop


@jit
def request(
    address: Any, file: int, offsets: Any, size: int, page: int, states: Any, absent: Any
) -> Any:
    """Ask the system to read ranges of the file that are not in memory. Does not wait.

    address  of the memory map
    file     its descriptor
    offsets  int64[n]  start of each range
    size     bytes in each range
    page     bytes in a page of the system
    states   uint8[]   scratch, at least one element for each page of a range
    absent   int64[]   written from index 0 on: offsets of the pages that are not in memory

    Returns the number of these pages, or of the first ``len(absent)`` of them.
    """
    found, i = 0, 0
    while i < offsets.shape[0]:
        next_i, start, stop = _span(offsets, i, size, page, states.shape[0])
        base = np.uintp(address) + np.uintp(start)
        if mincore(base, np.uintp(stop - start), np.uintp(states.ctypes.data)) != 0:
            states[:] = 0
        done = start
        for each in range(i, next_i):
            at = max(done, offsets[each] // page * page)
            done = max(done, (offsets[each] + size + page - 1) // page * page)
            while at < done:
                begin = at
                while at < done and not states[(at - start) // page] & 1:
                    if found < absent.shape[0]:
                        absent[found] = at
                        found += 1
                    at += page
                if begin < at:
                    _fadvise(file, begin, at - begin, np.int32(_WILLNEED))
                at += page
        i = next_i
    return found


@jit
def await_pages(file: int, pages: Any, scratch: Any) -> Any:
    """Wait until pages of a file are in memory, by reading one byte of each.

    file     descriptor
    pages    int64[n]  offsets
    scratch  uint8[1]  overwritten

    Returns the index of the first page that cannot be read, or n.
    """
    for i in range(pages.shape[0]):
        if _pread(file, np.uintp(scratch.ctypes.data), np.uintp(1), pages[i]) != 1:
            return i
    return pages.shape[0]


@jit
def touch(memory: Any, offsets: Any, size: int, page: int) -> Any:
    """Read one byte of each page of ranges, so that the system maps the pages. Returns their sum.

    memory   uint8[]   the map
    offsets  int64[n]  start of each range
    size     bytes in each range
    page     bytes in a page of the system
    """
    total = 0
    for i in range(offsets.shape[0]):
        at, stop = offsets[i], offsets[i] + size
        while at < stop:
            total += memory[at]
            at = (at // page + 1) * page
    return total


class BlockFile:
    """The memory map of one base's file.

    bytes  uint8[], the whole map; only the bytes within the file may be read
    words  uint64[], the same memory
    floats float32[], the same memory

    The arrays stay valid as long as somebody refers to them, even after ``close``. ``cover`` may
    replace them by larger ones, so take them anew for each use.
    """

    def __init__(self, path: Path, reserved: int = RESERVED) -> None:
        """Store the settings. ``open`` maps the file, which must exist then.

        reserved  bytes of address space to reserve; less if the system does not have them
        """
        self.path = path
        self._reserved = min(reserved, address_space() // 16)
        self._file = -1
        self._drop()

    def _drop(self) -> None:
        self.bytes: NDArray[np.uint8] = np.empty(0, np.uint8)
        self.words: NDArray[np.uint64] = self.bytes.view(np.uint64)
        self.floats: NDArray[np.float32] = self.bytes.view(np.float32)

    def open(self) -> Self:
        """Map the file. Raises OSError if the file cannot be opened or mapped."""
        self._file = open_file(self.path, os.O_RDONLY)
        try:
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)  # reads only what is asked for
            self.cover(os.fstat(self._file).st_size)
        except BaseException:
            self.close()
            raise
        return self

    @property
    def allocated(self) -> int:
        """Bytes that the file takes on disk; holes take none."""
        return allocated(self._file)

    def cover(self, size: int) -> None:
        """Make sure that the first ``size`` bytes of the file are mapped. Raises OSError."""
        if size <= len(self.bytes):
            return
        length = max(self._reserved, GROWTH * size)
        while True:
            length = -(-length // PAGE) * PAGE
            address = _libc.mmap(
                None, length, mmap.PROT_READ, mmap.MAP_SHARED | MAP_NORESERVE, self._file, 0
            )
            if address != _FAILED:
                break
            if length < 2 * size:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), str(self.path))
            length //= 2
        _libc.madvise(address, length, mmap.MADV_RANDOM)
        memory = (ctypes.c_ubyte * length).from_address(address)
        weakref.finalize(memory, _libc.munmap, address, length).atexit = False
        whole: NDArray[np.uint8] = np.frombuffer(memoryview(memory), np.uint8)
        whole.flags.writeable = False
        self.words, self.floats = whole.view(np.uint64), whole.view(np.float32)
        self.bytes = whole

    def warm(self, offsets: NDArray[np.int64], size: int = PAGE) -> None:
        """Read ranges of the file into memory, many at once. Any thread may call this.

        offsets  int64[n]  start of each range in the file; ascending order is fastest
        size     bytes in each range

        Releases the GIL. Raises OSError if the disk fails. The file must stay open meanwhile.
        """
        memory, pages = self.bytes, size // PAGE + 2
        states = np.empty(max(pages, LOOK), np.uint8)
        absent = np.empty(pages * len(offsets), np.int64)
        address = np.uint64(memory.ctypes.data)
        found = request(address, self._file, offsets, size, PAGE, states, absent)
        read = await_pages(self._file, absent[:found], states)
        if read < found:
            at = int(absent[read])
            os.pread(self._file, 1, at)  # raises the error
            raise EOFError(f"{self.path}: the file ends before byte {at}")
        touch(memory, offsets, size, PAGE)

    def resident(self, offsets: NDArray[np.int64], size: int = PAGE) -> bool:
        """Return whether all ranges are in memory, as far as the system tells.

        For the parameters see ``warm``. Starts to read a page that is missing.
        """
        states, absent = np.empty(size // PAGE + 2, np.uint8), np.empty(1, np.int64)
        address = np.uint64(self.bytes.ctypes.data)
        return not request(address, self._file, offsets, size, PAGE, states, absent)

    def copy(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Copy bytes of the file, from ``offset`` on, to ``out``. Any thread may call this.

        Pages that were not in memory leave it again, so that a reader of the whole file does not
        drive out the pages that others need. Raises OSError if the disk fails.
        """
        start, stop = offset // PAGE * PAGE, -(-(offset + len(out)) // PAGE) * PAGE
        states = np.ones((stop - start) // PAGE, np.uint8)
        _libc.mincore(self.bytes.ctypes.data + start, stop - start, states.ctypes.data)
        done = 0
        while done < len(out):
            count = os.preadv(self._file, [out[done:].data], offset + done)
            if not count:
                raise EOFError(f"{self.path}: the file ends before byte {offset + len(out)}")
            done += count
        absent = np.diff(np.concatenate([[0], (states & 1) ^ 1, [0]]).astype(np.int8))
        for first, last in zip(
            np.flatnonzero(absent == 1).tolist(), np.flatnonzero(absent == -1).tolist(), strict=True
        ):
            at, size = start + first * PAGE, (last - first) * PAGE
            os.posix_fadvise(self._file, at, size, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file. The memory is unmapped once nobody refers to the arrays.

        No other thread may be in ``warm``.
        """
        if self._file >= 0:
            os.close(self._file)
        self._file = -1
        self._drop()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *error: object) -> None:
        self.close()
