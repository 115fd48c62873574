"""Keys that were deleted, kept for subscribers and flushes that come later."""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from storage.kernels import Keys
from storage.records import Cause


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
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: list[Tombstones] = []
        self._discarded = 0  # entries at the front; removed from the list many at a time
        self._keys = 0  # in the entries that are left
        self.horizon = 0

    def add(self, dead: Tombstones) -> None:
        """Append tombstones, and discard the oldest beyond the limit."""
        if not len(dead.keys):
            return
        self._entries.append(dead)
        self._keys += len(dead.keys)
        while self._keys > self._limit:
            oldest = self._entries[self._discarded]
            self._discarded += 1
            self._keys -= len(oldest.keys)
            self.horizon = max(self.horizon, oldest.version)
        if self._discarded > max(1024, len(self._entries) // 2):
            del self._entries[: self._discarded]
            self._discarded = 0

    def all(self) -> tuple[Tombstones, ...]:
        """Return all tombstones."""
        return tuple(self._entries[self._discarded :])

    def after(self, version: int, limit: int) -> list[Tombstones]:
        """Return the oldest entries after a version: about ``limit``, and whole versions."""
        entries = self._entries
        start = bisect_right(entries, version, lo=self._discarded, key=lambda each: each.version)
        end = min(start + limit, len(entries))
        while start < end < len(entries) and entries[end].version == entries[end - 1].version:
            end += 1
        return entries[start:end]
