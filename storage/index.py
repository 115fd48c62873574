"""Map keys to the locations of their rows, for one table on one shard.

A location is the tier that stores the row, and the row's place (int64) in that tier. The index uses
extendible hashing over segments, each a hash table with open addressing:

    hash      = mix64(key ^ salt), a random salt for each index
    segment   = directory[top `depth` bits of hash]; each segment has a range of hashes
    position  = low bits of hash; then the other entries of the same cache line, then those of the
                next cache lines, wrapping in the segment
    entry     = key uint64, location uint64; four in a cache line
    location  = tier code << 56 | place; 0 marks an empty entry, so that every key is valid

A key is never in a cache line after one that has an empty entry. So most searches need one cache
line, even if the segment is nearly full.

A full segment is split in two. That moves 27,136 entries (under a millisecond), whatever the size
of the table, so that growth never pauses the shard. New memory is zero, which is an empty segment.

Segments with ranges of equal size would fill evenly. They would all split within a few pushes, and
the memory per key would double. So the first splits make ranges of unequal sizes; see ``_middle``.
Then the number of segments grows in proportion to the number of keys. They take 27.9 bytes per key
on average, and at most 29 if there are more than a million keys.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.arena import Arena, Budget
from storage.kernels import ABSENT, Keys, Slots, inline, jit, mix64, prefetch

SEGMENT = 1 << 15  # entries
FULL = SEGMENT * 53 // 64  # entries of a segment that is split before it gets another
LARGER = 0.6  # the larger part of a split segment gets at most this share of its entries
PARTS = 2.5  # keys for n full segments, in one segment, need at most PARTS * n segments
CELLS = 32  # a segment that is split has at least so many elements of the directory
LEAST_DEPTH = 10  # bits of the directory after the first split; it takes 4 KiB then
MAX_DEPTH = 24  # bits of the directory, which then takes 64 MiB: room for about 10^10 keys
PLACE_BITS = 56  # low bits of a location that contain the place
PER_LINE = 4  # entries in a cache line
NOWHERE = np.uint64(2**64 - 1)  # no entry
AHEAD = 16  # keys whose entries are prefetched in advance

Locations = NDArray[np.uint64]
Ahead = tuple[weakref.ref[Keys], Locations, int]  # keys, locations, how many keys are absent

_MASK = np.uint64(SEGMENT - 1)
_LINE = np.uint64(PER_LINE - 1)
_LINE_BITS = np.uint64(PER_LINE.bit_length() - 1)
_PLACE = np.uint64((1 << PLACE_BITS) - 1)


@jit
def _home(directory: Any, depth: int, hashed: Any) -> Any:
    """Return the index of the first entry at which a key with hash ``hashed`` may be stored.

    directory, depth  see ``find``
    """
    segment = directory[(hashed >> np.uint64(1)) >> np.uint64(63 - depth)]
    return np.uint64(segment) * np.uint64(SEGMENT) + (hashed & _MASK)


@inline
def _beside(at: Any) -> Any:
    """Return the index of the entry after ``at`` in the same cache line, cyclically."""
    return (at & ~_LINE) | ((at + np.uint64(1)) & _LINE)


@inline
def _next_line(at: Any) -> Any:
    """Return the index of the entry a cache line after ``at`` in the same segment, cyclically."""
    return (at & ~_MASK) | ((at + _LINE + np.uint64(1)) & _MASK)


@inline
def _lines(first: Any, last: Any) -> Any:
    """Return how many cache lines the line of entry ``last`` comes after that of ``first``.

    Both entries are in the same segment, and lines are counted cyclically. ``first`` may also be
    the hash of a key, instead of the entry at which a search for this key begins.
    """
    return ((last >> _LINE_BITS) - (first >> _LINE_BITS)) & (_MASK >> _LINE_BITS)


@inline
def _seek(entries: Any, home: Any, key: Any) -> Any:
    """Return the index of the entry of ``key``, or NOWHERE if it is absent.

    home  first entry at which the key may be, see ``_home``
    """
    at = home
    while True:
        empty = 0
        for _ in range(PER_LINE):
            if entries[at, 0] == key and entries[at, 1] != 0:
                return at
            empty += entries[at, 1] == 0
            at = _beside(at)
        if empty:
            return NOWHERE
        at = _next_line(at)


@inline
def _vacancy(entries: Any, home: Any) -> Any:
    """Return the index of the first empty entry at or after ``home``, for an absent key."""
    at = home
    while True:
        for _ in range(PER_LINE):
            if entries[at, 1] == 0:
                return at
            at = _beside(at)
        at = _next_line(at)


def _middle(start: int, stop: int, count: int) -> int:
    """Return the first element of the directory that the second half of a split segment gets.

    start, stop  the segment has the elements start..stop-1 of the directory
    count        number of elements of the directory

    Let ``f(u) = 2 - 2 ** (1 - u)``, which maps 0..1 to itself. The result halves not the range
    ``start..stop``, but ``f(start / count)..f(stop / count)``. So the sizes of the ranges become
    different, up to a factor of two, and their segments are full at different times: just so that
    the number of splits per added key stays the same. A small range is halved, since f is nearly
    linear there.
    """
    mean = (2 ** (-start / count) + 2 ** (-stop / count)) / 2
    return min(max(round(-count * math.log2(mean)), start + 1), stop - 1)


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
        at = _seek(entries, out[i], key)
        if at == NOWHERE:
            absent += 1
            out[i] = 0
        else:
            out[i] = entries[at, 1]
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
        if counts[segment] >= FULL:
            return i
        counts[segment] += 1
        at = _vacancy(entries, at)
        entries[at, 0] = keys[i]
        entries[at, 1] = locations[i]
    return n


@jit
def assign(entries: Any, directory: Any, depth: int, salt: Any, keys: Any, locations: Any) -> Any:
    """Change the locations of keys; return how many keys are absent.

    entries, directory, depth, salt  see ``find``
    keys       uint64[n]
    locations  uint64[n]  the new location of each key, not 0
    """
    n, absent = keys.shape[0], 0
    for i in range(-AHEAD, n):
        if i + AHEAD < n:
            prefetch(entries, np.int64(_home(directory, depth, mix64(keys[i + AHEAD] ^ salt))), 0)
        if i < 0:
            continue
        home = _home(directory, depth, mix64(keys[i] ^ salt))
        at = _seek(entries, home, keys[i])
        if at == NOWHERE:
            absent += 1
        else:
            entries[at, 1] = locations[i]
    return absent


@inline
def _room_beside(entries: Any, at: Any) -> Any:
    """Return whether the cache line of entry ``at`` has another entry that is empty."""
    for _ in range(PER_LINE - 1):
        at = _beside(at)
        if entries[at, 1] == 0:
            return True
    return False


@inline
def _displaced(entries: Any, hole: Any, salt: Any) -> Any:
    """Return the index of an entry that may move to entry ``hole``, or NOWHERE if there is none.

    That is an entry of a later cache line, whose search comes through the line of the hole.
    """
    at, full, found = hole, True, NOWHERE
    while full and found == NOWHERE:
        at = _next_line(at)
        for _ in range(PER_LINE):
            at = _beside(at)
            if entries[at, 1] == 0:
                full = False
            elif _lines(mix64(entries[at, 0] ^ salt), at) >= _lines(hole, at):
                found = at
    return found


@jit
def _vacate(entries: Any, hole: Any, salt: Any) -> None:
    """Empty entry number ``hole``.

    If its cache line was full, searches for entries of later lines may come through it. One of
    these entries moves to the hole, so that the line stays full, and leaves a hole itself.
    """
    while not _room_beside(entries, hole):
        moved = _displaced(entries, hole, salt)
        if moved == NOWHERE:
            break
        entries[hole, 0] = entries[moved, 0]
        entries[hole, 1] = entries[moved, 1]
        hole = moved
    entries[hole, 0] = 0
    entries[hole, 1] = 0


@jit
def remove(entries: Any, directory: Any, depth: int, salt: Any, counts: Any, keys: Any) -> Any:
    """Remove keys, uint64[n], and return how many of them were present.

    entries, directory, depth, salt, counts  see ``insert``
    """
    removed = 0
    for i in range(keys.shape[0]):
        key = keys[i]
        at = _seek(entries, _home(directory, depth, mix64(key ^ salt)), key)
        if at != NOWHERE:
            removed += 1
            counts[at // np.uint64(SEGMENT)] -= 1
            _vacate(entries, at, salt)
    return removed


@jit
def split(
    entries: Any, counts: Any, source: int, target: int, bound: Any, salt: Any, scratch: Any
) -> None:
    """Move the entries of segment ``source`` whose hash is at least ``bound`` to ``target``.

    entries, counts, salt         see ``insert``
    source   number of a segment
    target   number of an empty segment
    bound    uint64, a hash
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
        segment = target if hashed >= bound else source
        counts[segment] += 1
        at = np.uint64(segment) * np.uint64(SEGMENT) + (hashed & _MASK)
        at = _vacancy(entries, at)
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
        # Random, so that no client can choose keys that all fall into one segment.
        self._salt = np.uint64(int.from_bytes(os.urandom(8)))
        self._entries = Arena(2, np.uint64, budget)
        self._entries.grow(SEGMENT)
        self._directory = np.zeros(1, np.int32)
        self._depth = 0
        self._segments = 1  # number of segments
        self._counts = np.zeros(1, np.int64)
        self._spans = np.ones(1, np.int64)  # elements of the directory of each segment
        self._ahead: Ahead | None = None  # the last result of ``find_ahead``

    def __len__(self) -> int:
        return int(self._counts.sum())

    @property
    def bytes(self) -> int:
        """Bytes of memory taken from the budget."""
        return self._entries.bytes

    def most_growth(self, count: int) -> int:
        """Return an upper bound of ``growth(count)``, which is faster to compute."""
        return 4 * self.bytes + (1 + 3 * count // FULL) * SEGMENT * 16 if count else 0

    def growth(self, count: int) -> int:
        """Return how many bytes of memory the index may need for ``count`` more keys.

        Keys spread over the segments at random. So a segment may get some more of them than its
        share, and several segments may have to be split at once.
        """
        if not count:
            return 0
        share = self._spans[: self._segments] * (count / len(self._directory))
        most = (self._counts[: self._segments] + share + 5 * np.sqrt(share) + 5) / FULL
        added = np.where(LARGER * most <= 1, most > 1, np.ceil(PARTS * most))
        return int(added.sum()) * SEGMENT * 16

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
                    self._entries.array, self._directory, self._depth, self._salt,
                    self._counts, keys, locations, done,
                )  # fmt: skip
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

        Raises RuntimeError if a key is absent; those of the present keys are replaced then.
        """
        self._ahead, entries = None, self._entries.array
        absent = assign(entries, self._directory, self._depth, self._salt, keys, locations)
        if absent:
            raise RuntimeError(f"{absent} of {len(keys)} keys are not in the index")

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
        for segment in range(self._segments):
            entries = self._entries.array[segment * SEGMENT : (segment + 1) * SEGMENT]
            used = entries[entries[:, 1] != 0]
            yield used[:, 0].copy(), used[:, 1].copy()

    def close(self) -> None:
        """Free the memory."""
        self._entries.close()

    def _split(self, key: np.uint64) -> None:
        """Split the segment of ``key`` in two. Raises OutOfMemory, and changes nothing then."""
        hashed, target = int(mix64(key ^ self._salt)), self._segments
        source = int(self._directory[hashed >> (64 - self._depth)])
        mine = np.flatnonzero(self._directory == source)  # ascending, without gaps
        while self._depth < MAX_DEPTH and (len(mine) < CELLS or self._depth < LEAST_DEPTH):
            self._directory = np.repeat(self._directory, 2)
            self._spans *= 2
            self._depth += 1
            mine = np.flatnonzero(self._directory == source)
        if len(mine) == 1:
            raise RuntimeError(
                f"the index is unbalanced: {MAX_DEPTH} bits of the hash do not split a segment"
            )
        self._entries.grow((target + 1) * SEGMENT)
        if target == len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(target, np.int64)])
            self._spans = np.concatenate([self._spans, np.zeros(target, np.int64)])
        middle = _middle(int(mine[0]), int(mine[-1]) + 1, len(self._directory))
        bound = np.uint64(middle << (64 - self._depth))
        scratch = np.empty((SEGMENT, 2), np.uint64)  # 512 KiB, freed again
        split(self._entries.array, self._counts, source, target, bound, self._salt, scratch)
        self._directory[middle : mine[-1] + 1] = target
        self._spans[source], self._spans[target] = middle - mine[0], mine[-1] + 1 - middle
        self._segments += 1
