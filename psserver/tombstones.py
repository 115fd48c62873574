"""Keys that were deleted, kept for subscribers and flushes that come later."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import chain, islice
from typing import NamedTuple

from storage.kernels import Keys
from storage.records import Cause

CHUNK = 1024  # entries


class Tombstones(NamedTuple):
    """Keys that one change deleted."""

    table: int  # number of the table
    keys: Keys
    version: int  # of the change
    cause: Cause


class TombstoneQueue:
    """The newest tombstones of a shard, oldest first.

    limit    keys that are kept
    horizon  tombstones up to this version may have been discarded

    Entries are in chunks. A chunk that is full does not change any more, so ``all`` copies one
    chunk and not the queue, which may have a million entries.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._chunks: list[list[Tombstones]] = [[]]  # of CHUNK entries each, but for the last
        self._discarded = 0  # entries of the first chunk
        self._keys = 0  # in the entries that are left
        self.horizon = 0

    def add(self, dead: Tombstones) -> None:
        """Append tombstones, and discard the oldest beyond the limit."""
        if not len(dead.keys):
            return
        if len(self._chunks[-1]) == CHUNK:
            self._chunks.append([])
        self._chunks[-1].append(dead)
        self._keys += len(dead.keys)
        while self._keys > self._limit:
            self._discard()

    def _discard(self) -> None:
        oldest = self._chunks[0][self._discarded]
        self._discarded += 1
        self._keys -= len(oldest.keys)
        self.horizon = max(self.horizon, oldest.version)
        if self._discarded == CHUNK:
            self._chunks = self._chunks[1:] or [[]]
            self._discarded = 0

    def all(self) -> TombstoneList:
        """Return all tombstones as they are now."""
        return TombstoneList((*self._chunks[:-1], self._chunks[-1].copy()), self._discarded)

    def after(self, version: int, limit: int) -> list[Tombstones]:
        """Return the oldest entries after a version: about ``limit``, and whole versions."""
        entries: list[Tombstones] = []
        chunks, number = self._chunks, max(bisect_right(self._chunks, version, key=_first) - 1, 0)
        least = 0 if number else self._discarded
        start = bisect_right(chunks[number], version, lo=least, key=lambda each: each.version)
        for chunk in chunks[number:]:
            for dead in islice(chunk, start, None):
                if len(entries) >= limit and dead.version != entries[-1].version:
                    return entries
                entries.append(dead)
            start = 0
        return entries


class TombstoneList:
    """Tombstones as they were at one moment, oldest first."""

    def __init__(self, chunks: tuple[list[Tombstones], ...], discarded: int) -> None:
        self._chunks, self._discarded = chunks, discarded

    def __len__(self) -> int:
        return sum(map(len, self._chunks)) - self._discarded

    def __iter__(self) -> Iterator[Tombstones]:
        return islice(chain.from_iterable(self._chunks), self._discarded, None)


def _first(chunk: list[Tombstones]) -> int:
    """Return the version of the first entry of a chunk."""
    return chunk[0].version if chunk else 1 << 64
