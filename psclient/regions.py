"""Shared memory of a same-host lane: regions, and the chunks in which requests are.

A region is a file in memory (memfd) that client and server both map. A chunk is a part of a region
that holds the arrays of one request and of its answer. It is freed once nobody refers to it: the
pipe does until the answer arrives, and the call does until its caller has copied the answer.

A chunk has no ``__del__``: if a signal handler raised in it, the exception would be lost.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from bisect import insort
from collections import deque
from typing import Any
from weakref import ref

from psclient.errors import NoLane
from psclient.signals import Shield
from psproto import lanes

SMALLEST = 4 << 20  # bytes of the first region; each further one has at least twice as many
PAGE = 4096
LINE = 64  # chunks begin at a multiple of it, a cache line


class Space:
    """Memory that is divided into chunks.

    start, end  offsets of the part that chunks may take
    """

    def __init__(self, start: int, end: int) -> None:
        self._free = [(start, end)]  # ascending, not adjacent: (start, end)
        self._uses: set[Use] = set()
        self._freed: deque[ref[Chunk]] = deque()  # of the uses that ended; any thread appends

    def take(self, size: int) -> Chunk | None:
        """Return a free chunk of at least ``size`` bytes; None if there is none.

        The caller holds the lock of the lane.
        """
        size = max(size + LINE - 1 & -LINE, LINE)
        while self._freed:
            use = self._freed.popleft()
            assert isinstance(use, Use)
            self._uses.discard(use)
            start, end = use.start, use.end
            if size <= end - start <= 2 * size and not self._freed:  # the usual case
                return self._chunk(start, end)
            self._put_back(start, end)
        for i, (start, end) in enumerate(self._free):
            if end - start >= size:
                if end - start == size:
                    del self._free[i]
                else:
                    self._free[i] = start + size, end
                return self._chunk(start, start + size)
        return None

    def _chunk(self, start: int, end: int) -> Chunk:
        """Return a chunk from ``start`` to ``end``, which is not among the free parts."""
        chunk = Chunk(self, start, end)
        self._uses.add(Use(chunk, self._freed))
        return chunk

    def _put_back(self, start: int, end: int) -> None:
        """Add a part to the free ones, and join it with its neighbours."""
        free = self._free
        insort(free, (start, end))
        i = free.index((start, end))
        if i + 1 < len(free) and free[i + 1][0] == end:
            free[i : i + 2] = [(start, free[i + 1][1])]
        if i and free[i - 1][1] == start:
            free[i - 1 : i + 1] = [(free[i - 1][0], free[i][1])]


class Region(Space):
    """Shared memory for requests.

    number  its number on the lane
    size    bytes
    token   token of the lane, which the header of the region has

    memory  the mapped memory
    fd      descriptor of the file, until ``sent``; -1 afterwards

    Raises OSError if the system has no memory.
    """

    def __init__(self, number: int, size: int, token: bytes) -> None:
        self.number = number
        self.fd = os.memfd_create("ps-lane", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self.fd, 0, size)  # so that the memory is charged to this process
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            self.memory = mmap.mmap(
                self.fd, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            )
        except BaseException:
            self.sent()
            raise
        header = lanes.HEADER.pack(lanes.MAGIC, size, token)
        self.memory[: len(header)] = header
        super().__init__(lanes.HEADER_BYTES, size)

    def sent(self) -> None:
        """Close the descriptor, because the server has its own."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.sent()


class Chunk:
    """A part of a region, which holds the arrays of one request. Freed with its last reference.

    region  the region, a Space
    start   offset of its first byte in the region
    end     offset after its last byte
    """

    __slots__ = ("__weakref__", "end", "region", "start")

    def __init__(self, region: Any, start: int, end: int) -> None:
        self.region = region
        self.start = start
        self.end = end


class Use(ref[Chunk]):
    """Reference to a chunk that outlives it, to tell its region which part is free then.

    start, end  offsets of the chunk in the region
    """

    __slots__ = ("end", "start")

    def __new__(cls, chunk: Chunk, freed: deque[ref[Chunk]]) -> Use:
        """Create a reference that is appended to ``freed`` once the chunk is freed."""
        return super().__new__(cls, chunk, freed.append)

    def __init__(self, chunk: Chunk, freed: deque[ref[Chunk]]) -> None:
        super().__init__(chunk, freed.append)  # type: ignore[call-arg]
        self.start, self.end = chunk.start, chunk.end


class Regions:
    """The regions of one lane.

    token  token of the lane

    fresh  regions that the server does not know yet
    """

    def __init__(self, token: bytes) -> None:
        self.fresh: list[Region] = []
        self._token = token
        self._all: list[Region] = []

    def take(self, size: int) -> Chunk:
        """Return a chunk of at least ``size`` bytes; create a region if none has room.

        Raises NoLane if the system has no memory.
        """
        for region in reversed(self._all):
            if (chunk := region.take(size)) is not None:
                return chunk
        least = 2 * len(self._all[-1].memory) if self._all else SMALLEST
        wanted = max(least, size + lanes.HEADER_BYTES + LINE)
        wanted = wanted + PAGE - 1 & -PAGE
        try:
            with Shield():
                region = Region(len(self._all), wanted, self._token)
        except OSError as error:
            if error.errno is None:  # a signal handler raised it
                raise
            raise NoLane(f"no memory for a region of {wanted} bytes: {error.strerror}") from error
        self._all.append(region)
        self.fresh.append(region)
        chunk = region.take(size)
        assert chunk is not None
        return chunk

    def forget(self) -> None:
        """Forget all regions. Each is unmapped once no chunk of it is in use."""
        self._all.clear()
        self.fresh.clear()
