"""Kernels that find, write and remove rows by key, for copies.py.

The rows have the places 0..count - 1: a row's place is its index in the arrays of keys, versions
and rows. A hash table with linear probing, ``slots``, leads from a key to its place: a slot
contains a place plus 1, or 0 if it is empty.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

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
def _probe(slots: Any, salt: Any, keys: Any, key: Any) -> Any:
    """Return the index of the slot that contains ``key``, or of the empty slot to put it into.

    slots  int32[power of two]  hash table: place + 1 of a key, or 0 if the slot is empty
    salt   uint64               random number that the hash of a key depends on
    keys   uint64[capacity]     key at each place
    key    uint64
    """
    mask = np.uint64(slots.shape[0] - 1)
    at = _home(key, salt, mask)
    while slots[at] and keys[slots[at] - 1] != key:
        at = (at + np.uint64(1)) & mask
    return at


@jit
def find(slots: Any, salt: Any, keys: Any, wanted: Any, places: Any) -> None:
    """Write the place of each wanted key into ``places``, or -1 if the key is absent.

    slots, salt, keys  see ``_probe``
    wanted  uint64[n]  keys to find
    places  int64[n]   written
    """
    for i in range(wanted.shape[0]):
        places[i] = slots[_probe(slots, salt, keys, wanted[i])] - 1


@jit
def fill(slots: Any, salt: Any, keys: Any, count: int) -> None:
    """Enter the keys at places 0..count - 1, which must be distinct, into an empty hash table.

    slots, salt, keys  see ``_probe``; all slots must be 0
    """
    mask = np.uint64(slots.shape[0] - 1)
    for place in range(count):
        at = _home(keys[place], salt, mask)
        while slots[at]:
            at = (at + np.uint64(1)) & mask
        slots[at] = place + 1


@jit
def put(
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
    """Write rows by key, except rows that are stored with a newer version.

    slots         int32[power of two]     see ``_probe``; more than half must stay empty
    salt          uint64                  see ``_probe``
    keys          uint64[capacity]        key at each place; needs room for all new keys
    versions      uint64[capacity]        version at each place
    rows          float32[capacity, dim]  row at each place
    count         number of rows before the call
    new_keys      uint64[n]               distinct
    new_versions  uint64[n]
    new_rows      float32[n, dim]

    Returns the number of rows after the call.
    """
    n, dim = new_rows.shape
    for i in range(n):
        key = new_keys[i]
        at = _probe(slots, salt, keys, key)
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
def _clear(slots: Any, salt: Any, keys: Any, empty: Any) -> None:
    """Empty the slot with index ``empty``, so that all other keys are still found.

    slots, salt, keys  see ``_probe``

    Later entries of the probe sequence move forward to fill the gap.
    """
    mask = np.uint64(slots.shape[0] - 1)
    probe = (empty + np.uint64(1)) & mask
    while slots[probe]:
        home = _home(keys[slots[probe] - 1], salt, mask)
        if ((probe - home) & mask) >= ((probe - empty) & mask):
            slots[empty] = slots[probe]
            empty = probe
        probe = (probe + np.uint64(1)) & mask
    slots[empty] = 0


@jit
def remove(
    slots: Any,
    salt: Any,
    keys: Any,
    versions: Any,
    rows: Any,
    count: int,
    gone: Any,
    gone_versions: Any,
) -> int:
    """Remove rows by key, except rows whose version is newer than that of their deletion.

    slots, salt, keys, versions, rows, count  see ``put``
    gone           uint64[n]  keys to remove; absent keys are ignored
    gone_versions  uint64[n]  version of each deletion

    The last row moves to the place of a removed row, so that the places stay 0..count - 1. Returns
    the number of rows after the call.
    """
    for i in range(gone.shape[0]):
        at = _probe(slots, salt, keys, gone[i])
        place = slots[at] - 1
        if place < 0 or versions[place] > gone_versions[i]:
            continue
        _clear(slots, salt, keys, at)
        count -= 1
        if place != count:
            slots[_probe(slots, salt, keys, keys[count])] = place + 1
            keys[place] = keys[count]
            versions[place] = versions[count]
            for j in range(rows.shape[1]):
                rows[place, j] = rows[count, j]
    return count
