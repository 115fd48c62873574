"""Choose the clean rows that leave host memory: those with the lowest scores.

    lru  score: version of the last push. Rows that were pushed once come before all others, so
         that a scan over many new keys does not drive out rows that are used again and again
    lfu  score: log2(frequency) + step / half_life, where step is the training step of the last
         push. So a frequency counts half after half_life steps without a push of the row

Finding the exact rows would need a pass over all rows. Instead, the scores of a sample of rows give
a threshold, and a hand goes over the slots in circles, like a clock's, and takes the clean rows
that score no higher.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from storage.index import Locations
from storage.kernels import Keys, Slots, inline, jit
from storage.tiers.base import Writable
from storage.tiers.hbm import HbmTier

Policy = Literal["lru", "lfu"]

SAMPLE = 4096  # slots whose scores are looked at to find a threshold
SHARE = 1 / 16  # the lowest-scoring part of the clean rows that may be chosen, at least
BATCH = 8192  # maximum number of rows chosen per call
HALF_LIFE = 1e5  # steps, as of the eviction rule capacity_lfu

_EVERYWHERE = np.empty(0, np.int64)
_NONE = np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.uint64)


@inline
def score(entries: Any, slot: Any, lfu: bool, half_life: float) -> Any:
    """Return the score of a row, a float64."""
    low = np.uint64(0xFFFF)
    version = np.float64(entries[slot, 1] >> np.uint64(16))
    frequency = (entries[slot, 1] & low) << np.uint64(16) | (entries[slot, 2] & low)
    if lfu:
        step = np.float64(np.int64(entries[slot, 2]) >> np.int64(16))
        return np.log2(max(np.float64(frequency), 1.0)) + step / half_life
    return version if frequency > np.uint64(1) else version - 2.0**48


@inline
def _clean(entries: Any, where: Any, slot: Any) -> Any:
    clean = entries[slot, 3] != 0 and entries[slot, 1] >> np.uint64(16) != 0
    return clean and (where.shape[0] == 0 or where[slot] >= 0)


@jit
def _sample(entries: Any, where: Any, slots: Any, lfu: bool, half_life: float, out: Any) -> Any:
    """Write the scores of the clean rows in some slots to ``out``; return how many there are.

    where  of the numbers of each slot, see tiers/places.py: only rows in host memory count; if it
           is empty, all rows
    """
    clean = 0
    for i in range(slots.shape[0]):
        if _clean(entries, where, slots[i]):
            out[clean] = score(entries, slots[i], lfu, half_life)
            clean += 1
    return clean


@jit
def _take(
    entries: Any,
    where: Any,
    used: int,
    hand: int,
    threshold: float,
    lfu: bool,
    half_life: float,
    slots: Any,
    keys: Any,
    homes: Any,
) -> Any:
    """Take clean rows that score at most ``threshold``, from slot ``hand`` on, at most one circle.

    where               see ``_sample``
    slots, keys, homes  [n]  written from index 0 on; n is the maximum to take

    Returns (number of rows taken, slot to continue at).
    """
    taken = 0
    for _ in range(used):
        if taken == slots.shape[0]:
            break
        slot = hand
        hand = hand + 1 if hand + 1 < used else 0
        if _clean(entries, where, slot) and score(entries, slot, lfu, half_life) <= threshold:
            slots[taken] = slot
            keys[taken] = entries[slot, 0]
            homes[taken] = entries[slot, 3]
            taken += 1
    return taken, hand


@jit
def _tail(entries: Any, first: int, used: int, slots: Any, keys: Any, homes: Any) -> Any:
    """Find the clean rows after the last dirty row, from the last slot down to slot ``first``.

    slots, keys, homes  [used - first]  written from index 0 on

    Returns (number of rows found, slot after the last dirty row or ``first``).
    """
    found = 0
    for slot in range(used - 1, first - 1, -1):
        if entries[slot, 1] >> np.uint64(16) == 0:
            continue
        if entries[slot, 3] == 0:
            return found, slot + 1
        slots[found] = slot
        keys[found] = entries[slot, 0]
        homes[found] = entries[slot, 3]
        found += 1
    return found, first


class Cache:
    """Chooses rows of one table that leave host memory.

    tier       has the rows
    policy     "lru" or "lfu"
    half_life  for lfu: number of training steps of the table after which a row that is not pushed
               counts as if it had been pushed half as often
    """

    def __init__(
        self, tier: Writable, policy: Policy = "lru", half_life: float = HALF_LIFE
    ) -> None:
        self._tier, self._entries = tier, tier.slots
        self._lfu = policy == "lfu"
        self._half_life = half_life
        self._hand = 0
        self._rng = np.random.default_rng(0)

    def victims(self, count: int) -> tuple[Slots, Keys, Locations]:
        """Return (slots, keys, homes) of up to ``count`` clean rows with the lowest scores.

        Returns at most BATCH rows; none if there are no clean rows. The caller must release the
        slots before the next call. Rows in GPU memory stay as long as that would make no room:
        while host memory has other rows, and has slots for all the rows that fit into it.
        """
        tier = self._tier
        if not isinstance(tier, HbmTier):
            return self._victims(count, _EVERYWHERE)
        found = self._victims(count, tier.where)
        if len(found[0]) or (tier.in_host and not tier.few_slots):
            return found
        return self._victims(count, _EVERYWHERE)

    def _victims(self, count: int, where: NDArray[np.int64]) -> tuple[Slots, Keys, Locations]:
        """Do what ``victims`` describes. where: see ``_sample``."""
        entries, used = self._entries.array, self._entries.used
        count = min(count, BATCH)
        if not used:
            return _NONE
        scoring = self._lfu, self._half_life
        scores = np.empty(min(SAMPLE, used))
        looked = np.arange(used) if used <= SAMPLE else self._rng.integers(0, used, SAMPLE)
        clean = _sample(entries, where, looked, *scoring, scores)
        threshold = np.inf
        if clean:
            share = max(SHARE, 2 * count * len(looked) / (clean * used))
            last = min(clean - 1, int(share * clean))
            threshold = np.partition(scores[:clean], last)[last]
        slots, keys = np.empty(count, np.int64), np.empty(count, np.uint64)
        homes = np.empty(count, np.uint64)
        self._hand = self._hand if self._hand < used else 0
        taken, self._hand = _take(
            entries, where, used, self._hand, float(threshold), *scoring, slots, keys, homes
        )
        return slots[:taken], keys[:taken], homes[:taken]

    def tail(self, first: int) -> tuple[Slots, Keys, Locations, int]:
        """Return the clean rows after the last dirty row, but only those from slot ``first`` on.

        Returns (slots, keys, homes, number of slots that must stay: up to the last dirty row, and
        all before ``first``).
        """
        entries, used = self._entries.array, self._entries.used
        n = max(0, used - first)
        slots, keys, homes = np.empty(n, np.int64), np.empty(n, np.uint64), np.empty(n, np.uint64)
        found, stay = _tail(entries, min(first, used), used, slots, keys, homes)
        return slots[:found], keys[:found], homes[:found], stay
