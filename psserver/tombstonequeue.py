"""Queue of a shard's newest tombstones: the oldest are discarded beyond a limit."""

from __future__ import annotations

import numpy as np

from psserver.tombstones import Tombstones, joined, no_tombstones
from storage.kernels import Keys
from storage.records import Cause

CHUNK = 1 << 16  # tombstones per allocation


class TombstoneQueue:
    """Queue of a shard's newest tombstones, oldest first. Discards the oldest beyond a limit.

    The queue is a list of Tombstones that are slices of larger arrays. Filled elements of the
    arrays never change, so results of ``all`` stay valid, and neither ``all`` nor ``add`` copies
    old tombstones. The tombstones of one version are always in one item of the list.

    limit    maximum number of tombstones
    horizon  largest version whose tombstones may have been discarded; 0: none
    """

    def __init__(self, limit: int) -> None:
        """Create an empty queue."""
        self._limit = limit
        self._chunk = no_tombstones(CHUNK)  # arrays that are being filled
        self._end = 0  # number of tombstones in them
        self._parts = [no_tombstones()]  # the last part is a slice of the chunk
        self._count = 0
        self.horizon = 0

    def __len__(self) -> int:
        """Return the number of tombstones."""
        return self._count

    def add(self, table: int, keys: Keys, version: int, cause: Cause) -> None:
        """Append the tombstones of one delete, and discard the oldest beyond the limit.

        table    number of the table
        keys     uint64[n]
        version  version of the delete, not smaller than those before
        """
        count = len(keys)
        if not count:
            return
        if self._end + count > len(self._chunk):
            self._chunk, self._end = no_tombstones(max(CHUNK, count)), 0
            self._parts.append(no_tombstones())
        chunk, part = self._chunk, slice(self._end, self._end + count)
        chunk.tables[part], chunk.keys[part] = table, keys
        chunk.versions[part], chunk.causes[part] = version, cause
        start = self._end - len(self._parts[-1])
        self._end += count
        self._parts[-1] = chunk.take(slice(start, self._end))
        self._count += count
        self._trim()

    def load(self, dead: Tombstones) -> None:
        """Add copies of tombstones while a shard is loaded. They need not be newer than those added
        before. Call ``settle`` after the last call.
        """
        self._parts.insert(-1, dead.take(np.arange(len(dead))))  # a copy
        self._count += len(dead)

    def settle(self) -> None:
        """Sort all tombstones by version, and discard the oldest beyond the limit.

        Completes a series of ``load`` calls.
        """
        found = joined(self._parts)
        order = np.argsort(found.versions, kind="stable")
        self._chunk, self._end = no_tombstones(CHUNK), 0
        self._parts = [found.take(order), no_tombstones()]
        self._trim()

    def all(self) -> list[Tombstones]:
        """Return all tombstones, oldest first, as a list of Tombstones; nothing is copied."""
        return list(self._parts)

    def after(self, version: int, limit: int) -> Tombstones:
        """Return about ``limit`` tombstones newer than ``version``, oldest first.

        Never splits the tombstones of one version, so the result may exceed ``limit``.
        """
        found, left = list[Tombstones](), limit
        for part in self._parts:
            part = part.after(version)
            if len(part) > left:
                last = part.versions[left - 1]
                part = part.take(slice(0, int(np.searchsorted(part.versions, last, "right"))))
            found.append(part)
            left -= len(part)
            if left <= 0:
                break
        return joined(found)

    def _trim(self) -> None:
        """Discard tombstones, oldest version first, until at most ``limit`` are left."""
        while self._count > self._limit:
            oldest = self._parts[0]
            if not len(oldest):
                self._parts = self._parts[1:]
                continue
            last = oldest.versions[min(self._count - self._limit, len(oldest)) - 1]
            rest = oldest.after(last)
            self.horizon = max(self.horizon, int(last))
            self._count -= len(oldest) - len(rest)
            if len(rest) or len(self._parts) == 1:
                self._parts[0] = rest
            else:
                self._parts = self._parts[1:]
