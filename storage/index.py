"""Map keys to the locations of their rows, for one table on one shard.

A location is the tier that stores the row, and the row's place (int64) in that tier. The index uses
extendible hashing over segments, each a hash table with open addressing:

    hash      = mix64(key ^ salt), a random salt for each index
    segment   = directory[top `depth` bits of hash]
    position  = low bits of hash, then the next ones (linear probing), wrapping in the segment
    entry     = key uint64, location uint64, next to each other in one cache line
    location  = tier code << 56 | place; 0 marks an empty entry, so that every key is valid

A full segment is split in two by the next bit of the hash. That moves at most 26,624 entries (under
a millisecond), whatever the size of the table, so that growth never pauses the shard. Each segment
has its own load at which it counts as full, from 5/8 to 13/16: since the hash fills all segments
evenly, they would otherwise all split within a few pushes. New memory is zero, which is an empty
segment.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.arena import Arena, Budget
from storage.kernels import ABSENT, Keys, Slots, jit, mix64, prefetch

SEGMENT = 1 << 15  # entries
LEAST_FULL = SEGMENT * 5 // 8
FULL_RANGE = SEGMENT * 3 // 16
MAX_DEPTH = 22  # bits of the directory, which then takes 16 MiB: room for about 10^11 keys
PLACE_BITS = 56  # low bits of a location that contain the place
AHEAD = 16  # keys whose entries are prefetched in advance

Locations = NDArray[np.uint64]
Ahead = tuple[weakref.ref[Keys], Locations, int]  # keys, locations, how many keys are absent

_MASK = np.uint64(SEGMENT - 1)
_PLACE = np.uint64((1 << PLACE_BITS) - 1)


@jit
def _home(directory: Any, depth: int, hashed: Any) -> Any:
    """Return the index of the first entry at which a key with hash ``hashed`` may be stored.

    directory, depth  see ``find``
    """
    segment = directory[(hashed >> np.uint64(1)) >> np.uint64(63 - depth)]
    return np.uint64(segment) * np.uint64(SEGMENT) + (hashed & _MASK)


@jit
def _next(at: Any) -> Any:
    """Return the index of the entry after ``at`` in the same segment, cyclically."""
    return (at & ~_MASK) | ((at + np.uint64(1)) & _MASK)


@jit
def _full(segment: Any) -> Any:
    """Return the number of entries at which segment number ``segment`` is split."""
    return LEAST_FULL + (((np.int64(segment) * 40503) & 0xFFFF) * FULL_RANGE >> 16)


@jit
def _limits(segments: int) -> Any:
    """Return the number of entries at which each of the first ``segments`` segments is split."""
    out = np.empty(segments, np.int64)
    for i in range(segments):
        out[i] = _full(i)
    return out


@jit
def find(entries: Any, directory: Any, depth: int, salt: Any, keys: Any, out: Any) -> Any:
    """Write the location of each key to ``out``, 0 for absent keys; return how many are absent.

    entries    uint64[capacity, 2]   key, location
    directory  int32[2**depth]       segment of each prefix of ``depth`` bits of the hash
    salt       uint64                random number of this index that is mixed into the hash
    keys       uint64[n]
    out        uint64[n]             written
    """
    n = keys.shape[0]
    absent = 0
    for i in range(min(AHEAD, n)):
        out[i] = _home(directory, depth, mix64(keys[i] ^ salt))  # replaced by the result below
        prefetch(entries, np.int64(out[i]), 0)
    for i in range(n):
        if i + AHEAD < n:
            home = _home(directory, depth, mix64(keys[i + AHEAD] ^ salt))
            out[i + AHEAD] = home
            prefetch(entries, np.int64(home), 0)
        key = keys[i]
        at = out[i]
        while entries[at, 1] != 0 and entries[at, 0] != key:
            at = _next(at)
        location = entries[at, 1]
        out[i] = location
        absent += location == 0
    return absent


@jit
def insert(
    entries: Any,
    directory: Any,
    depth: int,
    salt: Any,
    counts: Any,
    keys: Any,
    locations: Any,
    start: int,
) -> Any:
    """Add absent, distinct keys to the index, from ``keys[start]`` on.

    entries, directory, depth, salt  see ``find``
    counts     int64[segments]  entries in use per segment, updated
    keys       uint64[n]
    locations  uint64[n]        location of each key, not 0

    Stops at a key whose segment is full. Returns the index of that key, or n if all were added.
    """
    n = keys.shape[0]
    for i in range(start, min(start + AHEAD, n)):
        prefetch(entries, np.int64(_home(directory, depth, mix64(keys[i] ^ salt))), 0)
    for i in range(start, n):
        if i + AHEAD < n:
            prefetch(entries, np.int64(_home(directory, depth, mix64(keys[i + AHEAD] ^ salt))), 0)
        at = _home(directory, depth, mix64(keys[i] ^ salt))
        segment = at // np.uint64(SEGMENT)
        if counts[segment] >= _full(segment):
            return i
        counts[segment] += 1
        while entries[at, 1] != 0:
            at = _next(at)
        entries[at, 0] = keys[i]
        entries[at, 1] = locations[i]
    return n


@jit
def assign(entries: Any, directory: Any, depth: int, salt: Any, keys: Any, locations: Any) -> None:
    """Change the locations of keys that are present.

    entries, directory, depth, salt  see ``find``
    keys       uint64[n]
    locations  uint64[n]  the new location of each key, not 0
    """
    n = keys.shape[0]
    for i in range(-AHEAD, n):
        if i + AHEAD < n:
            prefetch(entries, np.int64(_home(directory, depth, mix64(keys[i + AHEAD] ^ salt))), 0)
        if i < 0:
            continue
        at = _home(directory, depth, mix64(keys[i] ^ salt))
        while entries[at, 0] != keys[i] or entries[at, 1] == 0:
            at = _next(at)
        entries[at, 1] = locations[i]


@jit
def remove(entries: Any, directory: Any, depth: int, salt: Any, counts: Any, keys: Any) -> Any:
    """Remove keys, uint64[n], and return how many of them were present.

    entries, directory, depth, salt, counts  see ``insert``

    Moves later entries of the same probe sequence into the hole that a removed entry leaves.
    """
    removed = 0
    for i in range(keys.shape[0]):
        key = keys[i]
        at = _home(directory, depth, mix64(key ^ salt))
        while entries[at, 1] != 0 and entries[at, 0] != key:
            at = _next(at)
        if entries[at, 1] == 0:
            continue
        removed += 1
        counts[at // np.uint64(SEGMENT)] -= 1
        hole = at
        at = _next(at)
        while entries[at, 1] != 0:
            home = mix64(entries[at, 0] ^ salt) & _MASK
            # The entry at `at` may move to `hole` only if its home is not between them.
            if ((at - home) & _MASK) >= ((at - hole) & _MASK):
                entries[hole, 0] = entries[at, 0]
                entries[hole, 1] = entries[at, 1]
                hole = at
            at = _next(at)
        entries[hole, 0] = 0
        entries[hole, 1] = 0
    return removed


@jit
def split(
    entries: Any, counts: Any, source: int, target: int, bit: int, salt: Any, scratch: Any
) -> None:
    """Move the entries of segment ``source`` whose hash has bit ``bit`` set to segment ``target``.

    entries, counts, salt         see ``insert``
    source   number of a segment
    target   number of an empty segment
    bit      number of a bit of the hash; 0 is the lowest
    scratch  uint64[SEGMENT, 2]   overwritten
    """
    first = source * SEGMENT
    for i in range(SEGMENT):
        scratch[i, 0] = entries[first + i, 0]
        scratch[i, 1] = entries[first + i, 1]
        entries[first + i, 0] = 0
        entries[first + i, 1] = 0
    counts[source] = 0
    counts[target] = 0
    for i in range(SEGMENT):
        if scratch[i, 1] == 0:
            continue
        hashed = mix64(scratch[i, 0] ^ salt)
        segment = target if (hashed >> np.uint64(bit)) & np.uint64(1) else source
        counts[segment] += 1
        at = np.uint64(segment) * np.uint64(SEGMENT) + (hashed & _MASK)
        while entries[at, 1] != 0:
            at = _next(at)
        entries[at, 0] = scratch[i, 0]
        entries[at, 1] = scratch[i, 1]


@jit
def _places(locations: Any, code: int, out: Any) -> Any:
    """Write the places of locations in the tier with this code, ABSENT for all others.

    Returns how many locations are in other tiers.
    """
    others = 0
    for i in range(locations.shape[0]):
        mine = np.int64(locations[i] >> np.uint64(PLACE_BITS)) == code
        out[i] = np.int64(locations[i] & _PLACE) if mine else np.int64(ABSENT)
        others += not mine and locations[i] != 0
    return others


def places(locations: Locations, code: int) -> tuple[Slots, int]:
    """Return (places of locations in one tier, how many locations are in other tiers).

    locations  uint64[n]; 0 for keys without a row
    code       of the tier

    The places are int64[n], ABSENT for location 0 and for other tiers.
    """
    out = np.empty(len(locations), np.int64)
    return out, _places(locations, code, out)


def locations_of(places: Slots, code: int) -> Locations:
    """Return the locations, uint64[n], of places int64[n] in the tier with this code."""
    return places.view(np.uint64) | np.uint64(code << PLACE_BITS)


class Index:
    """Hash table from the keys of one table to the locations of their rows.

    The keys within one call must be distinct, except for ``find``.
    """

    def __init__(self, budget: Budget) -> None:
        self._salt = np.uint64(
            int.from_bytes(os.urandom(8))
        )  # so that no client can choose keys that all fall into one segment
        self._entries = Arena(2, np.uint64, budget)
        self._entries.grow(SEGMENT)
        self._directory = np.zeros(1, np.int32)
        self._depth = 0
        self._depths = [0]  # per segment: number of leading hash bits that its keys share
        self._counts = np.zeros(1, np.int64)
        self._ahead: Ahead | None = None  # the last result of ``find_ahead``

    def __len__(self) -> int:
        return int(self._counts.sum())

    @property
    def bytes(self) -> int:
        """Bytes of memory taken from the budget."""
        return self._entries.bytes

    def most_growth(self, count: int) -> int:
        """Return an upper bound of ``growth(count)``, which is faster to compute."""
        return 2 * self.bytes + (1 + 2 * count // LEAST_FULL) * SEGMENT * 16 if count else 0

    def growth(self, count: int) -> int:
        """Return how many bytes of memory the index may need for ``count`` more keys.

        Keys spread over the segments at random. So a segment may get some more of them than its
        share, and several segments may have to be split at once.
        """
        if not count:
            return 0
        segments = len(self._depths)
        share = count * np.exp2(-np.array(self._depths, np.float64))
        most = self._counts[:segments] + share + 5 * np.sqrt(share) + 5
        added = np.exp2(np.maximum(1, np.ceil(np.log2(most / LEAST_FULL)))) - 1
        splits = np.where(most > _limits(segments), added, 0)
        return int(splits.sum()) * SEGMENT * 16

    def find(self, keys: Keys) -> tuple[Locations, int]:
        """Return (locations uint64[n] of keys uint64[n], number of absent keys).

        The location of an absent key is 0.
        """
        if self._ahead is not None and self._ahead[0]() is keys:
            return self._ahead[1:]
        out = np.empty(len(keys), np.uint64)
        return out, find(self._entries.array, self._directory, self._depth, self._salt, keys, out)

    def find_ahead(self, keys: Keys) -> tuple[Locations, int]:
        """Return the result of ``find``, and let ``find`` use it again for the same array.

        ``find`` uses it until the index changes. The contents of ``keys`` must not change.
        """
        found = self.find(keys)
        self._ahead = weakref.ref(keys), *found
        return found

    def insert(self, keys: Keys, locations: Locations) -> None:
        """Add absent keys uint64[n] with their locations uint64[n].

        Raises OutOfMemory, and adds no key then, if the budget does not suffice for a new segment.
        """
        done, self._ahead = 0, None
        try:
            while True:
                done = insert(
                    self._entries.array,
                    self._directory,
                    self._depth,
                    self._salt,
                    self._counts,
                    keys,
                    locations,
                    done,
                )
                if done == len(keys):
                    return
                self._split(keys[done])
        except BaseException:
            self.remove(keys[:done])
            raise

    def assign(self, keys: Keys, locations: Locations) -> None:
        """Replace the location of each key.

        keys       uint64[n]  all of them present
        locations  uint64[n]  the new locations
        """
        self._ahead = None
        assign(self._entries.array, self._directory, self._depth, self._salt, keys, locations)

    def remove(self, keys: Keys) -> int:
        """Remove keys uint64[n], ignoring absent ones; return how many were present."""
        self._ahead = None
        return int(
            remove(
                self._entries.array, self._directory, self._depth, self._salt, self._counts, keys
            )
        )

    def slices(self) -> Iterator[tuple[Keys, Locations]]:
        """Yield (keys, locations), both uint64[], of one segment at a time, in no particular order.

        The arrays are copies.
        """
        for segment in range(len(self._depths)):
            entries = self._entries.array[segment * SEGMENT : (segment + 1) * SEGMENT]
            used = entries[entries[:, 1] != 0]
            yield used[:, 0].copy(), used[:, 1].copy()

    def close(self) -> None:
        """Free the memory."""
        self._entries.close()

    def _split(self, key: np.uint64) -> None:
        """Split the segment of ``key`` in two. Raises OutOfMemory, and changes nothing then."""
        prefix = int(mix64(key ^ self._salt)) >> (64 - self._depth) if self._depth else 0
        source = int(self._directory[prefix])
        target = len(self._depths)
        if self._depths[source] == MAX_DEPTH:
            raise RuntimeError(
                f"the index is unbalanced: {MAX_DEPTH} bits of the hash do not split a segment"
            )
        self._entries.grow((target + 1) * SEGMENT)
        if self._depths[source] == self._depth:
            self._directory = np.repeat(self._directory, 2)
            self._depth += 1
        if target == len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(target, np.int64)])
        scratch = np.empty((SEGMENT, 2), np.uint64)  # 512 KiB, freed again
        depth = self._depths[source] + 1
        self._depths[source] = depth
        self._depths.append(depth)
        split(self._entries.array, self._counts, source, target, 64 - depth, self._salt, scratch)
        mine = np.flatnonzero(self._directory == source)
        upper = (mine >> (self._depth - depth)) & 1 == 1
        self._directory[mine[upper]] = target
