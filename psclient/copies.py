"""Copy of one table's rows on one shard, in memory, by key.

A row's place is its index in the arrays of keys, versions and rows.
"""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from psclient.arrays import Rows

LEAST = 1024  # smallest capacity, in rows
jit = njit(nogil=True, cache=True, error_model="numpy")


@jit
def _home(key: Any, salt: Any, mask: Any) -> Any:
    """Return the first slot to probe for a key.

    key   uint64
    salt  uint64, random, so that nobody can choose keys that collide
    mask  uint64, number of slots - 1

    This hash differs from the routing hash, because all keys of a shard share bits of that one.
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

    slots   int32[power of two]  hash table with linear probing: place + 1 of a key; 0: empty
    salt    uint64               see ``_home``
    keys    uint64[capacity]     key at each place
    wanted  uint64[n]            keys to find
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
    """Enter the first ``count`` keys, which must be distinct, into an empty hash table.

    slots, salt, keys  see ``_find``; slots must be zero
    """
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
    """Write rows by key, but keep stored rows with a newer version. Returns the new number of rows.

    slots         int32[power of two]      see ``_find``; more than half must stay empty
    salt          uint64                   see ``_home``
    keys          uint64[capacity]         key at each place; room for all new keys
    versions      uint64[capacity]
    rows          float32[capacity, dim]
    count         number of rows before
    new_keys      uint64[n]                distinct
    new_versions  uint64[n]
    new_rows      float32[n, dim]
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
    """Remove rows by key, but keep rows with a newer version. Returns the new number of rows.

    slots, salt, keys, versions, rows, count  see ``_put``
    gone           uint64[n]  keys to remove; absent keys are ignored
    gone_versions  uint64[n]  version of each deletion

    The last row moves to the place of the removed one, so that places stay 0..count - 1. The
    removed slot is filled by moving later entries of its probe sequence.
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
    """Copy of one table's rows on one shard.

    dim      length of a row
    default  value of every number of a row that does not exist
    created  version of the shard at which the table was created
    count    number of rows
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
        """Write rows, but keep stored rows with a newer version.

        keys uint64[n] (distinct), versions uint64[n], rows float32[n, dim]
        """
        self._make_room(self.count + len(keys))
        versions = np.ascontiguousarray(versions)
        mine = self.slots, self.salt, self.keys, self.versions, self.rows, self.count
        self.count = _put(*mine, keys, versions, rows)

    def remove(self, keys: Any, versions: Any) -> None:
        """Remove rows, but keep rows with a newer version than that of their deletion.

        keys uint64[n], versions uint64[n] of the deletions
        """
        versions = np.ascontiguousarray(versions)
        mine = self.slots, self.salt, self.keys, self.versions, self.rows, self.count
        self.count = _remove(*mine, keys, versions)
        self._give_back()

    def find(self, keys: Any) -> NDArray[np.int64]:
        """Return the indices of keys uint64[n] in ``rows`` and ``versions``; -1 for absent keys."""
        places = np.empty(len(keys), np.int64)
        _find(self.slots, self.salt, self.keys, keys, places)
        return places

    def _make_room(self, count: int) -> None:
        """Double the capacity until ``count`` rows fit."""
        capacity = len(self.keys)
        if count > capacity:
            while capacity < count:
                capacity *= 2
            self._move(capacity)

    def _give_back(self) -> None:
        """Halve the capacity until at least an eighth of it is in use."""
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
        _fill(self.slots, self.salt, self.keys, self.count)
