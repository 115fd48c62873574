"""One shard's part of one table in memory: rows by key."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from psclient.arrays import Rows

LEAST = 1024  # rows that an empty copy has room for
jit = njit(nogil=True, cache=True, error_model="numpy")


@jit
def _home(key: Any, salt: Any, mask: Any) -> Any:
    """Return the first slot to probe for a key.

    This is not the routing hash, of which all keys of a shard share bits. The salt is random, so
    that nobody can choose keys that collide.
    """
    x = np.uint64(key) ^ salt
    x ^= x >> np.uint64(32)
    x *= np.uint64(0xD6E8FEB86659FD93)
    x ^= x >> np.uint64(32)
    x *= np.uint64(0xD6E8FEB86659FD93)
    x ^= x >> np.uint64(32)
    return x & mask


@jit
def _find(slots: Any, salt: Any, keys: Any, wanted: Any, places: Any) -> None:
    """Find the places of keys; -1 for absent keys.

    slots   int32[power of two]  place + 1 of a key, 0: empty; linear probing
    salt    uint64               of the hash
    keys    uint64[capacity]     by place
    wanted  uint64[n]
    places  int64[n]             written
    """
    mask = np.uint64(slots.shape[0] - 1)
    for i in range(wanted.shape[0]):
        at = _home(wanted[i], salt, mask)
        while slots[at] and keys[slots[at] - 1] != wanted[i]:
            at = (at + np.uint64(1)) & mask
        places[i] = slots[at] - 1


@jit
def _fill(slots: Any, salt: Any, keys: Any, count: int) -> None:
    """Enter the first ``count`` keys, which are distinct, into empty slots."""
    mask = np.uint64(slots.shape[0] - 1)
    for place in range(count):
        at = _home(keys[place], salt, mask)
        while slots[at]:
            at = (at + np.uint64(1)) & mask
        slots[at] = place + 1


@jit
def _put(
    slots: Any,
    salt: Any,
    keys: Any,
    versions: Any,
    rows: Any,
    count: int,
    new_keys: Any,
    new_versions: Any,
    new_rows: Any,
) -> int:
    """Write rows, except over newer ones. Returns the number of rows afterwards.

    slots     int32[power of two]  more than half of them empty, at the end too
    salt      uint64               of the hash
    keys      uint64[capacity], versions uint64[capacity], rows float32[capacity, dim]; with room
    new_keys  uint64[n], distinct; new_versions uint64[n]; new_rows float32[n, dim]
    """
    mask = np.uint64(slots.shape[0] - 1)
    n, dim = new_rows.shape
    for i in range(n):
        key = new_keys[i]
        at = _home(key, salt, mask)
        while slots[at] and keys[slots[at] - 1] != key:
            at = (at + np.uint64(1)) & mask
        place = slots[at] - 1
        if place < 0:
            place = count
            count += 1
            slots[at] = place + 1
            keys[place] = key
        elif versions[place] > new_versions[i]:
            continue
        versions[place] = new_versions[i]
        for j in range(dim):
            rows[place, j] = new_rows[i, j]
    return count


@jit
def _remove(
    slots: Any,
    salt: Any,
    keys: Any,
    versions: Any,
    rows: Any,
    count: int,
    gone: Any,
    gone_versions: Any,
) -> int:
    """Remove rows, except newer ones. Returns the number of rows left.

    The last row moves to the place of the removed one. Entries after an emptied slot move up.
    """
    mask = np.uint64(slots.shape[0] - 1)
    one = np.uint64(1)
    for i in range(gone.shape[0]):
        at = _home(gone[i], salt, mask)
        while slots[at] and keys[slots[at] - 1] != gone[i]:
            at = (at + one) & mask
        place = slots[at] - 1
        if place < 0 or versions[place] > gone_versions[i]:
            continue
        empty = at
        probe = (at + one) & mask
        while slots[probe]:
            home = _home(keys[slots[probe] - 1], salt, mask)
            if ((probe - home) & mask) >= ((probe - empty) & mask):
                slots[empty] = slots[probe]
                empty = probe
            probe = (probe + one) & mask
        slots[empty] = 0
        count -= 1
        if place != count:
            at = _home(keys[count], salt, mask)
            while slots[at] != count + 1:
                at = (at + one) & mask
            slots[at] = place + 1
            keys[place] = keys[count]
            versions[place] = versions[count]
            for j in range(rows.shape[1]):
                rows[place, j] = rows[count, j]
    return count


class Copy:
    """One shard's part of one table: rows by key.

    created  version of the table's creation
    count    number of rows
    default  value of the numbers of absent rows
    """

    def __init__(self, dim: int, default: float, created: int) -> None:
        """Create an empty copy of rows of ``dim`` numbers."""
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
        """Write rows, except over newer ones."""
        self._make_room(self.count + len(keys))
        versions = np.ascontiguousarray(versions)
        mine = self.slots, self.salt, self.keys, self.versions, self.rows, self.count
        self.count = _put(*mine, keys, versions, rows)

    def remove(self, keys: Any, versions: Any) -> None:
        """Remove rows, except newer ones."""
        versions = np.ascontiguousarray(versions)
        mine = self.slots, self.salt, self.keys, self.versions, self.rows, self.count
        self.count = _remove(*mine, keys, versions)
        self._give_back()

    def find(self, keys: Any) -> NDArray[np.int64]:
        """Return the places of keys; -1 for absent keys."""
        places = np.empty(len(keys), np.int64)
        _find(self.slots, self.salt, self.keys, keys, places)
        return places

    def _make_room(self, count: int) -> None:
        capacity = len(self.keys)
        if count > capacity:
            while capacity < count:
                capacity *= 2
            self._move(capacity)

    def _give_back(self) -> None:
        """Halve the memory until an eighth of it is in use."""
        capacity = len(self.keys)
        while capacity > LEAST and 8 * self.count < capacity:
            capacity //= 2
        if capacity < len(self.keys):
            self._move(capacity)

    def _move(self, capacity: int) -> None:
        for name in ("keys", "versions", "rows"):
            old = getattr(self, name)
            new = np.empty((capacity, *old.shape[1:]), old.dtype)
            new[: self.count] = old[: self.count]
            setattr(self, name, new)
        self.slots = np.zeros(4 * capacity, np.int32)
        _fill(self.slots, self.salt, self.keys, self.count)
