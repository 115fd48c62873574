"""Sample how long ago the rows of pulls and pushes were last pushed, measured in pushed keys.

Host memory keeps the rows that were pushed last (LRU). So from these distances follows how often a
pull or push would miss in a memory of any size. A pull moves nothing, so it does not count as a use
of its row, but it can miss.

Keys are sampled by their hash: a key is in the sample for ever or never, as in SHARDS (Waldspurger
et al., Efficient MRC Construction with SHARDS, USENIX FAST 2015). A hash table contains the sampled
keys, with the number of keys that had been pushed to the table when the key was pushed last. If it
becomes too full, the sample is halved. So the memory is bounded, and a kernel finds the few keys of
a request that are in the sample. Only one of ``EVERY`` pulls is looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.index import Locations
from storage.kernels import Keys, Slots, jit, mix64
from storage.slots import Entries

EVERY = 8  # about 1/EVERY of the pulls are sampled
SHARE = 16  # 1/SHARE of the keys are sampled at first
LEAST, MOST = 256, 1 << 13  # slots of the hash table: at first, and at most
EDGES = 2.0 ** (np.arange(4 * 44 + 1) / 4)  # distances that divide the counts; 4 per power of two
UNKNOWN = len(EDGES)  # bucket of rows whose last push was not seen

Sampled = NDArray[np.uint64]  # [slots, 2]  key, keys pushed up to it and with it; 0: free


@jit
def _slot(sampled: Any, key: Any, hashed: Any) -> Any:
    """Return the slot of a key, or the free slot where it belongs."""
    mask = sampled.shape[0] - 1
    slot = np.int64(hashed & np.uint64(mask))
    while sampled[slot, 1] != 0 and sampled[slot, 0] != key:
        slot = slot + 1 & mask
    return slot


@jit
def _bucket(distance: Any) -> Any:
    """Return the number of EDGES that are at most ``distance``."""
    return np.int64(4 * np.log2(np.float64(distance))) + 1 if distance > 0 else 0


@jit
def _pulled(
    sampled: Any, limit: Any, keys: Any, locations: Any, now: Any, weight: Any, counts: Any
) -> None:
    """Count the sampled keys of a pull by distance; keys without a row are skipped.

    sampled    uint64[slots, 2]
    limit      a key is in the sample if its hash is less than limit
    locations  uint64[n]  0: the key has no row
    now        keys pushed to the table so far; a key's distance is the number of those after it
    weight     number of keys that one sampled key stands for
    counts     int64[len(EDGES) + 1]  updated
    """
    for i in range(keys.shape[0]):
        hashed = mix64(keys[i])
        if hashed >> np.uint64(32) < limit and locations[i] != 0:
            then = sampled[_slot(sampled, keys[i], hashed), 1]
            at = counts.shape[0] - 1 if then == 0 else _bucket(np.int64(now - then))
            counts[at] += weight


@jit
def _pushed(
    sampled: Any,
    limit: Any,
    keys: Any,
    slots: Any,
    entries: Any,
    now: Any,
    room: int,
    weight: Any,
    counts: Any,
    start: int,
) -> Any:
    """Count the sampled keys of a push by distance, from ``keys[start]`` on; remember the push.

    slots    int64[n]  slots of their rows
    entries  uint64[capacity, 4]  see slots.py; the version of a new row is 0
    now      keys pushed to the table before this push
    room     number of free slots of ``sampled`` that may be used

    For the other parameters see ``_pulled``. Returns (number of slots that were used, index of the
    first key that was not looked at: n, or less if there was no room, weight of the new rows).
    """
    used, first = 0, np.int64(0)
    for i in range(start, keys.shape[0]):
        hashed = mix64(keys[i])
        if hashed >> np.uint64(32) >= limit:
            continue
        slot = _slot(sampled, keys[i], hashed)
        then = sampled[slot, 1]
        if then == 0:
            if used == room:
                return used, i, first
            used += 1
        if entries[slots[i], 1] >> np.uint64(16) == 0:
            first += weight
        elif then == 0:
            counts[counts.shape[0] - 1] += weight
        else:
            counts[_bucket(np.int64(now - then))] += weight
        sampled[slot, 0] = keys[i]
        sampled[slot, 1] = now + i + 1
    return used, keys.shape[0], first


@jit
def _move(old: Any, limit: Any, new: Any) -> Any:
    """Copy the sampled keys with hashes less than ``limit`` to an empty table; return how many."""
    count = 0
    for i in range(old.shape[0]):
        hashed = mix64(old[i, 0])
        if old[i, 1] != 0 and hashed >> np.uint64(32) < limit:
            new[_slot(new, old[i, 0], hashed)] = old[i]
            count += 1
    return count


class Reuse:
    """Histograms of the distances between the uses of rows and their last push, since the start.

    pushes  int64[len(EDGES) + 1]  pushed keys that had a row, by distance: the keys pushed to the
            table since the last push of the key. The last count is of keys whose last push was not
            seen. All counts are estimates: each sampled key counts for many
    pulls   int64[len(EDGES) + 1]  the same of pulled keys that have a row
    first   pushed keys that had no row
    """

    def __init__(self) -> None:
        self.pushes = np.zeros(len(EDGES) + 1, np.int64)
        self.pulls = np.zeros(len(EDGES) + 1, np.int64)
        self.first = 0
        self._sampled = np.zeros((LEAST, 2), np.uint64)
        self._room = 3 * LEAST // 4  # free slots of ``_sampled`` that may be used
        self._share = SHARE  # 1/_share of the keys are in the sample
        self._pushed = 0  # keys pushed so far
        self._pulled = 0  # pulled keys with a row so far
        self._random = 1  # state of a generator of random numbers
        self._left = 1  # pulls until the next sample

    @property
    def counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(``pushes``, ``pulls``), adjusted to the true numbers of keys; copies.

        Whether the hottest keys are in the sample changes the sums much. Their distances are small,
        so the first counts are changed, as SHARDS does.
        """
        pushes, pulls = self.pushes.copy(), self.pulls.copy()
        _adjust(pushes, self._pushed - self.first)
        _adjust(pulls, self._pulled)
        return pushes, pulls

    def pulled(self, keys: Keys, locations: Locations, found: int) -> None:
        """Note a pull.

        keys       uint64[n]
        locations  uint64[n]  of their rows; 0 for keys without a row
        found      number of keys with a row
        """
        self._pulled += found
        self._left -= 1
        if self._left:
            return
        self._random = self._random * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        self._left = 1 + (self._random >> 40) % (2 * EVERY - 1)
        weight, limit = EVERY * self._share, (1 << 32) // self._share
        _pulled(self._sampled, limit, keys, locations, self._pushed, weight, self.pulls)

    def pushed(self, keys: Keys, slots: Slots, entries: Entries) -> None:
        """Note a push, before it changes the metadata of its rows.

        keys     uint64[n]  distinct
        slots    int64[n]   slots of their rows
        entries  uint64[capacity, 4]  metadata by slot; see slots.py
        """
        at = 0
        while True:
            share = self._share
            used, at, first = _pushed(
                self._sampled, (1 << 32) // share, keys, slots, entries,
                self._pushed, self._room, share, self.pushes, at,
            )  # fmt: skip
            self._room -= used
            self.first += first
            if at == len(keys):
                self._pushed += len(keys)
                return
            self.make_room()

    def make_room(self) -> None:
        """Enlarge the hash table, or halve the sample if it is large enough."""
        size = len(self._sampled)
        if size < MOST:
            size *= 2
        else:
            self._share *= 2
        old, self._sampled = self._sampled, np.zeros((size, 2), np.uint64)
        self._room = 3 * size // 4 - _move(old, (1 << 32) // self._share, self._sampled)


def _adjust(counts: NDArray[np.int64], total: int) -> None:
    """Change the first counts so that the sum of all is ``total``, or 0 if that is negative."""
    counts[0] += max(total, 0) - counts.sum()
    for i in range(len(counts) - 1):
        if counts[i] >= 0:
            break
        counts[i + 1] += counts[i]
        counts[i] = 0
