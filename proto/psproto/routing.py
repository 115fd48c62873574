"""Find the shard that owns a key; split batches of keys by shard, and join the results.

    hash(key)   SplitMix64's finalizer, Stafford's variant 13: depends on every bit of the key
    bucket      hash >> 52, one of 4096; all keys of a bucket belong to the same shard
    shard       shard_of_bucket[bucket], from the shard map

Keys have 64 bits, here uint64. A shard's index of its rows uses a different hash, because the
routing hashes of its keys have upper bits in common.

mix64 is public and invertible, so anyone can choose keys with equal hashes. Therefore the hash
tables in this file use a second hash, with random numbers (a salt) that each process draws.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

BUCKETS = 4096
MAX_SHARDS = 1024

Keys = NDArray[np.uint64]
Rows = NDArray[np.float32]

jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)


@jit
def mix64(key: Any) -> Any:
    """Return the routing hash of a key as uint64: SplitMix64's finalizer (Steele, Lea, Flood, 2014;
    Stafford's variant 13).
    """
    x = np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@jit
def _place(key: Any, salt: Any, mask: Any) -> Any:
    """Return the slot of a key in a hash table: upper half of ``(x ^ x >> 32) * salt[2]`` & mask,
    where ``x = (key ^ salt[0]) * salt[1]``.

    salt  uint64[3], random; the multipliers salt[1] and salt[2] are odd
    mask  number of slots - 1; the number of slots is a power of two

    Does not use the key's routing hash, so that a core can compute both at the same time.
    """
    x = (key ^ salt[0]) * salt[1]
    x = (x ^ (x >> np.uint64(32))) * salt[2]
    return (x >> np.uint64(32)) & mask


def draw_salt() -> NDArray[np.uint64]:
    """Return a random salt for ``_place``: uint64[3], the last two odd."""
    return np.frombuffer(os.urandom(24), np.uint64) | np.array([0, 1, 1], np.uint64)


_SALT = draw_salt()


@dataclass(frozen=True, slots=True, eq=False)
class ShardMap:
    """The assignment of buckets (and so of keys) to shards."""

    epoch: int  # number of this map; grows with every change of the assignment
    shards: int  # number of shards
    shard_of_bucket: NDArray[np.uint16]  # [4096]

    def __post_init__(self) -> None:
        table = self.shard_of_bucket
        if not 1 <= self.shards <= MAX_SHARDS:
            raise ValueError(f"shards must be in 1..{MAX_SHARDS}, got {self.shards}")
        if table.shape != (BUCKETS,) or table.dtype != np.uint16:
            raise ValueError(
                f"shard map must be uint16[{BUCKETS}], got {table.dtype}{list(table.shape)}"
            )
        if int(table.max()) >= self.shards:
            raise ValueError(
                f"shard map: shards must be in 0..{self.shards - 1}, got {table.max()}"
            )


def even_map(shards: int) -> ShardMap:
    """Return a map, with epoch 1, in which bucket b belongs to shard ``b * shards // 4096``."""
    buckets = np.arange(BUCKETS, dtype=np.int64)
    return ShardMap(1, shards, (buckets * shards // BUCKETS).astype(np.uint16))


@jit
def _owners(keys: Any, shard_of_bucket: Any, out: Any) -> None:
    """Write the owner shard of each key (uint64[n]) to out (uint16[n])."""
    for i in range(keys.shape[0]):
        out[i] = shard_of_bucket[mix64(keys[i]) >> np.uint64(52)]


def owners(keys: Keys, shard_map: ShardMap) -> NDArray[np.uint16]:
    """Return the number of the shard that owns each key, uint16[n]."""
    out = np.empty(len(keys), np.uint16)
    _owners(keys, shard_map.shard_of_bucket, out)
    return out


@dataclass(frozen=True, slots=True)
class Split:
    """The u distinct keys of a batch of n keys, grouped by shard.

    ``keys[inverse]`` is the batch. ``keys[bounds[s]:bounds[s + 1]]`` belong to shard s, in the
    order of their first occurrence in the batch.
    """

    keys: Keys  # uint64[u]
    counts: NDArray[np.uint32]  # [u]  occurrences of each key in the batch
    inverse: NDArray[np.int32]  # [n]  index of each key of the batch in ``keys``
    bounds: NDArray[np.int64]  # [shards + 1]


@jit
def _distinct(
    keys: Any,
    shard_of_bucket: Any,
    salt: Any,
    slots: Any,
    distinct: Any,
    counts: Any,
    inverse: Any,
    of: Any,
    bounds: Any,
) -> int:
    """Find the distinct keys of a batch, in order of first occurrence; return their number u.

    keys             uint64[n]     the batch
    shard_of_bucket  uint16[4096]  see ShardMap
    salt             uint64[3]     see ``_place``
    slots            int32[m]      scratch; m is a power of two, larger than n

    These are written; the first three only up to u:

    distinct  uint64[n]          distinct keys
    counts    uint32[n]          occurrences of each distinct key
    of        uint16[n]          shard of each distinct key
    inverse   int32[n]           index of each key of the batch in ``distinct``
    bounds    int64[shards + 1]  bounds[s]: number of distinct keys of the shards before s
    """
    mask = np.uint64(slots.shape[0] - 1)
    slots[:] = -1
    bounds[:] = 0
    found = 0
    for i in range(keys.shape[0]):
        key = keys[i]
        hashed = mix64(key)
        at = _place(key, salt, mask)
        while slots[at] >= 0 and distinct[slots[at]] != key:
            at = (at + np.uint64(1)) & mask
        u = slots[at]
        if u < 0:
            u = found
            found += 1
            slots[at] = u
            distinct[u] = key
            counts[u] = 0
            shard = shard_of_bucket[hashed >> np.uint64(52)]
            of[u] = shard
            bounds[shard + 1] += 1
        counts[u] += np.uint32(1)
        inverse[i] = u
    for shard in range(1, bounds.shape[0]):
        bounds[shard] += bounds[shard - 1]
    return found


@jit
def _distinct_of_one(
    keys: Any, salt: Any, slots: Any, distinct: Any, counts: Any, inverse: Any
) -> int:
    """Do the same as ``_distinct`` for a cluster of one shard, which owns every key."""
    mask = np.uint64(slots.shape[0] - 1)
    slots[:] = -1
    found = 0
    for i in range(keys.shape[0]):
        key = keys[i]
        at = _place(key, salt, mask)
        while slots[at] >= 0 and distinct[slots[at]] != key:
            at = (at + np.uint64(1)) & mask
        u = slots[at]
        if u < 0:
            u = found
            found += 1
            slots[at] = u
            distinct[u] = key
            counts[u] = 0
        counts[u] += np.uint32(1)
        inverse[i] = u
    return found


@jit
def _group(
    distinct: Any,
    counts: Any,
    of: Any,
    inverse: Any,
    bounds: Any,
    where: Any,
    keys_out: Any,
    counts_out: Any,
) -> None:
    """Sort the distinct keys by shard (stable) into keys_out and counts_out; update ``inverse``.

    distinct    uint64[u]          distinct keys of a batch
    counts      uint32[u]          occurrences of each
    of          uint16[u]          shard of each
    inverse     int32[n]           index of each key of the batch in ``distinct``, replaced by its
                                   index in keys_out
    bounds      int64[shards + 1]  index in keys_out of the first key of each shard
    where       int32[u]           scratch
    keys_out    uint64[u]          written
    counts_out  uint32[u]          written
    """
    position = bounds.copy()
    for u in range(distinct.shape[0]):
        at = position[of[u]]
        position[of[u]] = at + 1
        where[u] = at
        keys_out[at] = distinct[u]
        counts_out[at] = counts[u]
    for i in range(inverse.shape[0]):
        inverse[i] = where[inverse[i]]


def _slots_for(n: int) -> int:
    """Return the number of slots of a hash table for n keys: a power of two, at least ``4 * n``.

    Most searches then end at the first slot, as the processor predicts.
    """
    return 1 << max(4 * n - 1, 1).bit_length()


def split(keys: Keys, shard_map: ShardMap) -> Split:
    """Return the distinct keys of a batch, grouped by the shards that own them.

    keys  uint64[n], contiguous, n < 2^31
    """
    n = len(keys)
    slots = np.empty(_slots_for(n), np.int32)
    distinct = np.empty(n, np.uint64)
    counts = np.empty(n, np.uint32)
    inverse = np.empty(n, np.int32)
    if shard_map.shards == 1:
        found = _distinct_of_one(keys, _SALT, slots, distinct, counts, inverse)
        return Split(distinct[:found], counts[:found], inverse, np.array([0, found]))
    of = np.empty(n, np.uint16)
    bounds = np.empty(shard_map.shards + 1, np.int64)
    found = _distinct(
        keys, shard_map.shard_of_bucket, _SALT, slots, distinct, counts, inverse, of, bounds
    )
    keys_out, counts_out = np.empty(found, np.uint64), np.empty(found, np.uint32)
    where = np.empty(found, np.int32)
    _group(distinct[:found], counts, of, inverse, bounds, where, keys_out, counts_out)
    return Split(keys_out, counts_out, inverse, bounds)


@jit
def _check(keys: Any, shard_of_bucket: Any, shard: int, salt: Any, slots: Any, foreign: Any) -> int:
    """Return the number of keys that are equal to an earlier key of the batch.

    keys             uint64[n]     the batch
    shard_of_bucket  uint16[4096]  see ShardMap
    shard            number of the shard that should own all keys
    salt             uint64[3]     see ``_place``
    slots            int32[m]      scratch; m is a power of two, larger than n
    foreign          int64[1]      written: index of the first key that another shard owns, or -1
    """
    mask = np.uint64(slots.shape[0] - 1)
    slots[:] = -1
    foreign[0] = -1
    repeated = 0
    for i in range(keys.shape[0]):
        key = keys[i]
        hashed = mix64(key)
        if shard_of_bucket[hashed >> np.uint64(52)] != shard and foreign[0] < 0:
            foreign[0] = i
        at = _place(key, salt, mask)
        while slots[at] >= 0 and keys[slots[at]] != key:
            at = (at + np.uint64(1)) & mask
        if slots[at] >= 0:
            repeated += 1
        else:
            slots[at] = i
    return repeated


def check(keys: Keys, shard_map: ShardMap, shard: int) -> tuple[int, int]:
    """Check a batch of keys uint64[n] that ``shard`` should own.

    Returns (number of keys equal to an earlier key, index of the first key that a different shard
    owns, or -1).
    """
    slots, foreign = np.empty(_slots_for(len(keys)), np.int32), np.empty(1, np.int64)
    return _check(keys, shard_map.shard_of_bucket, shard, _SALT, slots, foreign), int(foreign[0])


@jit
def _first_foreign(keys: Any, shard_of_bucket: Any, shard: int) -> int:
    """Return the index of the first key that ``shard`` does not own, or -1 if it owns all.

    keys             uint64[n]
    shard_of_bucket  uint16[4096]  see ShardMap
    """
    for i in range(keys.shape[0]):
        if shard_of_bucket[mix64(keys[i]) >> np.uint64(52)] != shard:
            return i
    return -1


def first_foreign(keys: Keys, shard_map: ShardMap, shard: int) -> int:
    """Return the index of the first key that ``shard`` does not own, or -1 if it owns all."""
    return int(_first_foreign(keys, shard_map.shard_of_bucket, shard))


@jit
def sum_rows(rows: Any, inverse: Any, out: Any) -> None:
    """Sum the rows of equal keys: ``out[inverse[i]] += rows[i]``.

    rows     float32[n, dim]  a row for each key of a batch
    inverse  int32[n]         index of each key among the u distinct keys
    out      float32[u, dim]  zeros; receives the sums
    """
    dim = rows.shape[1]
    for i in range(rows.shape[0]):
        u = inverse[i]
        for j in range(dim):
            out[u, j] += rows[i, j]


@jit
def scatter(rows: Any, first: int, inverse: Any, out: Any) -> None:
    """Copy rows of distinct keys to all their positions in a batch.

    rows     [m, dim]  rows of the distinct keys with the indices first..first + m - 1
    first    index of the distinct key whose row is rows[0]
    inverse  int32[n]  index of each key of the batch among the distinct keys
    out      [n, dim]  ``out[i] = rows[inverse[i] - first]`` where that index is in 0..m-1; other
                       rows are left unchanged
    """
    m, dim = rows.shape
    for i in range(inverse.shape[0]):
        u = inverse[i] - first
        if 0 <= u < m:
            for j in range(dim):
                out[i, j] = rows[u, j]


@jit
def all_finite(values: Any) -> Any:
    """Return whether all float32 numbers are finite.

    values  uint32[n], the bits of the numbers
    """
    worst = np.uint32(0)
    for i in range(values.shape[0]):
        worst = max(worst, values[i] & np.uint32(0x7FFFFFFF))
    return worst < np.uint32(0x7F800000)
