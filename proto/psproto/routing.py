"""The owner shard of a key, and the kernels that split and join batches of keys.

    hash(key)   SplitMix64's finalizer, Stafford's variant 13: every bit of the key counts
    bucket      hash >> 52, one of 4096; a bucket moves between shards as a whole
    shard       shard_of_bucket[bucket], from the shard map

Keys are 64 bits wide, here uint64. The index of a shard uses a different hash, so that the keys of
one shard do not share bits there.

mix64 is public and invertible, so anyone can choose keys with equal hashes. The hash tables in this
file therefore place a key by a second hash, with random numbers drawn by each process.
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
    """Return SplitMix64's finalizer of a key (Steele, Lea, Flood, 2014; Stafford's variant 13)."""
    x = np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@jit
def _place(key: Any, salt: Any, mask: Any) -> Any:
    """Return the slot of a key: the upper half of (x ^ x >> 32) * salt[2], x = (key ^ salt[0]) *
    salt[1]. It does not wait for the key's routing hash, so a core computes both at once.

    salt  uint64[3], random; the multipliers are odd
    """
    x = (key ^ salt[0]) * salt[1]
    x = (x ^ (x >> np.uint64(32))) * salt[2]
    return (x >> np.uint64(32)) & mask


def draw_salt() -> NDArray[np.uint64]:
    """Draw the random numbers of a process's hash tables, uint64[3]."""
    return np.frombuffer(os.urandom(24), np.uint64) | np.array([0, 1, 1], np.uint64)


_SALT = draw_salt()


@dataclass(frozen=True, slots=True, eq=False)
class ShardMap:
    """The shard that owns each bucket. ``epoch`` grows with every change."""

    epoch: int
    shards: int
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
            raise ValueError(f"shard map names shard {table.max()} of {self.shards}")


def even_map(shards: int) -> ShardMap:
    """Return the map of epoch 1: bucket b belongs to shard b * shards // 4096."""
    buckets = np.arange(BUCKETS, dtype=np.int64)
    return ShardMap(1, shards, (buckets * shards // BUCKETS).astype(np.uint16))


@jit
def _owners(keys: Any, shard_of_bucket: Any, out: Any) -> None:
    """Write the shard of each key: keys uint64[n], out uint16[n]."""
    for i in range(keys.shape[0]):
        out[i] = shard_of_bucket[mix64(keys[i]) >> np.uint64(52)]


def owners(keys: Keys, shard_map: ShardMap) -> NDArray[np.uint16]:
    """Return the owner of each key, uint16[n]."""
    out = np.empty(len(keys), np.uint16)
    _owners(keys, shard_map.shard_of_bucket, out)
    return out


@dataclass(frozen=True, slots=True)
class Split:
    """The distinct keys of a batch, grouped by shard.

    keys[inverse] is the batch; keys[bounds[s]:bounds[s + 1]] belong to shard s. Within a shard,
    keys are in the order of their first occurrence.
    """

    keys: Keys  # uint64[u]
    counts: NDArray[np.uint32]  # [u] occurrences in the batch
    inverse: NDArray[np.int32]  # [n]
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
    """Find the distinct keys in order of first occurrence; return how many.

    slots     int32[power of two > n]  scratch
    distinct  uint64[n], counts uint32[n], of uint16[n]   the key, its occurrences, its shard
    inverse   int32[n]
    bounds    int64[shards + 1]        distinct keys of the shards below s, and of all
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
    """Reorder the distinct keys by shard, stably, and the inverse with them.

    bounds  int64[shards + 1]  first distinct key of each shard
    where   int32[u]           scratch
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
    """Return the size of a hash table for n keys: a power of two, at least 2 n."""
    return 1 << max(2 * n - 1, 1).bit_length()


def split(keys: Keys, shard_map: ShardMap) -> Split:
    """Return the distinct keys of a batch, grouped by shard.

    keys  uint64[n], n < 2^31, contiguous
    """
    n = len(keys)
    slots = np.empty(_slots_for(n), np.int32)
    distinct = np.empty(n, np.uint64)
    counts = np.empty(n, np.uint32)
    inverse = np.empty(n, np.int32)
    of = np.empty(n, np.uint16)
    bounds = np.empty(shard_map.shards + 1, np.int64)
    found = _distinct(
        keys, shard_map.shard_of_bucket, _SALT, slots, distinct, counts, inverse, of, bounds
    )
    if shard_map.shards == 1:
        return Split(distinct[:found], counts[:found], inverse, bounds)
    keys_out, counts_out = np.empty(found, np.uint64), np.empty(found, np.uint32)
    where = np.empty(found, np.int32)
    _group(distinct[:found], counts, of, inverse, bounds, where, keys_out, counts_out)
    return Split(keys_out, counts_out, inverse, bounds)


@jit
def _check(keys: Any, shard_of_bucket: Any, shard: int, salt: Any, slots: Any, foreign: Any) -> int:
    """Return the number of keys that repeat an earlier one.

    foreign  int64[1]  written: the index of the first key of another shard, or -1
    slots    int32     scratch, as in ``_distinct``
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
    """Return the number of keys that repeat an earlier one, and the index of the first key that
    belongs to another shard, or -1.
    """
    slots, foreign = np.empty(_slots_for(len(keys)), np.int32), np.empty(1, np.int64)
    return _check(keys, shard_map.shard_of_bucket, shard, _SALT, slots, foreign), int(foreign[0])


@jit
def _first_foreign(keys: Any, shard_of_bucket: Any, shard: int) -> int:
    for i in range(keys.shape[0]):
        if shard_of_bucket[mix64(keys[i]) >> np.uint64(52)] != shard:
            return i
    return -1


def first_foreign(keys: Keys, shard_map: ShardMap, shard: int) -> int:
    """Return the index of the first key that belongs to another shard, or -1."""
    return int(_first_foreign(keys, shard_map.shard_of_bucket, shard))


@jit
def sum_rows(rows: Any, inverse: Any, out: Any) -> None:
    """Sum the rows of equal keys: out[inverse[i]] += rows[i].

    rows     float32[n, dim]
    inverse  int32[n]
    out      float32[u, dim]  zero
    """
    dim = rows.shape[1]
    for i in range(rows.shape[0]):
        u = inverse[i]
        for j in range(dim):
            out[u, j] += rows[i, j]


@jit
def scatter(rows: Any, first: int, inverse: Any, out: Any) -> None:
    """Copy the rows of distinct keys to their positions in a batch: out[i] = rows[inverse[i]].

    rows     [m, dim]  rows of the distinct keys first..first + m - 1
    inverse  int32[n]
    out      [n, dim]  written where inverse[i] is in that range
    """
    m, dim = rows.shape
    for i in range(inverse.shape[0]):
        u = inverse[i] - first
        if 0 <= u < m:
            for j in range(dim):
                out[i, j] = rows[u, j]


@jit
def all_finite(values: Any) -> Any:
    """Return whether all float32 numbers are finite; ``values`` has their bits, uint32[n]."""
    worst = np.uint32(0)
    for i in range(values.shape[0]):
        worst = max(worst, values[i] & np.uint32(0x7FFFFFFF))
    return worst < np.uint32(0x7F800000)
