"""Copy in memory of one table's rows on one shard."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient import hashtable
from psclient.arrays import Rows

LEAST = 1024  # smallest capacity, in rows


class Copy:
    """Copy in memory of one table's rows on one shard. It grows and shrinks with their number.

    dim      length of a row
    default  a key without a row has an embedding of this number, repeated
    created  version of the shard at which the table was created
    count    number of rows
    """

    def __init__(self, dim: int, default: float, created: int) -> None:
        """Create a copy without rows."""
        self.dim = dim
        self.default = default
        self.created = created
        self.count = 0
        self.salt = np.uint64(secrets.randbits(64))
        self.slots = np.zeros(4 * LEAST, np.int32)
        self.keys = np.empty(LEAST, np.uint64)
        self.versions = np.empty(LEAST, np.uint64)
        self.rows = np.empty((LEAST, dim), np.float32)

    def put(self, keys: Any, versions: Any, rows: Rows) -> None:
        """Write rows, except rows that are stored with a newer version.

        keys      uint64[n]  distinct
        versions  uint64[n]
        rows      float32[n, dim]
        """
        self._make_room(self.count + len(keys))
        versions = np.ascontiguousarray(versions)
        mine = self.slots, self.salt, self.keys, self.versions, self.rows, self.count
        self.count = hashtable.put(*mine, keys, versions, rows)

    def remove(self, keys: Any, versions: Any) -> None:
        """Remove rows, except rows whose version is newer than that of their deletion.

        keys      uint64[n]  keys to remove; absent keys are ignored
        versions  uint64[n]  version of each deletion
        """
        versions = np.ascontiguousarray(versions)
        mine = self.slots, self.salt, self.keys, self.versions, self.rows, self.count
        self.count = hashtable.remove(*mine, keys, versions)
        self._give_back()

    def find(self, keys: Any) -> NDArray[np.int64]:
        """Return the place of each of keys uint64[n] as int64[n]: its row is ``rows[place]``.

        The place is -1 for a key without a row.
        """
        places = np.empty(len(keys), np.int64)
        hashtable.find(self.slots, self.salt, self.keys, keys, places)
        return places

    def _make_room(self, count: int) -> None:
        """Double the capacity until it is at least ``count`` rows."""
        capacity = len(self.keys)
        if count > capacity:
            while capacity < count:
                capacity *= 2
            self._move(capacity)

    def _give_back(self) -> None:
        """Halve the capacity while less than an eighth of it is in use and it exceeds LEAST."""
        capacity = len(self.keys)
        while capacity > LEAST and 8 * self.count < capacity:
            capacity //= 2
        if capacity < len(self.keys):
            self._move(capacity)

    def _move(self, capacity: int) -> None:
        """Reallocate all arrays for ``capacity`` rows and rebuild the hash table."""
        for name in ("keys", "versions", "rows"):
            old = getattr(self, name)
            new = np.empty((capacity, *old.shape[1:]), old.dtype)
            new[: self.count] = old[: self.count]
            setattr(self, name, new)
        self.slots = np.zeros(4 * capacity, np.int32)
        hashtable.fill(self.slots, self.salt, self.keys, self.count)
