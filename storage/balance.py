"""Choose which rows of a table are in GPU memory: those with the highest scores.

The scores are those by which rows leave host memory; see cache.py. The GPU has room for some share
of the rows in memory. Scores of a sample of rows give two thresholds. A row in host memory enters
the GPU if its score is at least that of the best ENTER of this share. If the GPU is full, the row
changes places with one whose score is not among the best of this share. Rows between the two stay
where they are. At most one row per SWAPPED pushed rows changes places. Otherwise, rows would move
back and forth if more of them are in use than the GPU has room for.

A hand goes over the slots in circles, a slice per call, between requests.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from storage.arena import Budget
from storage.cache import HALF_LIFE, SAMPLE, Policy, score
from storage.errors import OutOfMemory
from storage.kernels import ABSENT, Slots, jit
from storage.owners import Owners
from storage.results import Moves
from storage.tiers.hbm import HbmTier
from storage.tiers.places import Places, find_near

ENTER = 0.9  # share of the rows for which the GPU has room that are good enough to enter it
STIR = 16  # a circle begins when 1/STIR of the rows in memory were pushed or written
LEAST_STIR = 1024  # the same in rows, but at most the number of rows
LOOK, LEAST_LOOK = 1 << 16, 1 << 12  # slots that a slice looks at: at most, and at least
LOOKED = 16  # slots that a slice looks at per row that was pushed since the last slice
MOVED = 256 << 10  # bytes of rows that a slice moves each way at most; but at least one row
SWAPPED = 8  # pushed rows per row that changes places
LEAST_MOVED = 64  # rows that a slice may move if little was pushed since the last slice


@jit
def _scores(entries: Any, slots: Any, lfu: bool, half_life: float, out: Any) -> Any:
    """Write the scores of the rows in some slots to ``out``; return how many rows there are."""
    rows = 0
    for i in range(slots.shape[0]):
        if entries[slots[i], 1] >> np.uint64(16) != 0:
            out[rows] = score(entries, slots[i], lfu, half_life)
            rows += 1
    return rows


@jit
def _choose(
    entries: Any,
    where: Any,
    start: int,
    stop: int,
    enter: float,
    leave: float,
    lfu: bool,
    half_life: float,
    up: Any,
    down: Any,
) -> Any:
    """Find rows to move among the slots start..stop-1.

    where       of the numbers of each slot; see tiers/places.py
    enter       rows in host memory with at least this score enter the GPU
    leave       rows in GPU memory with at most this score may leave it
    up, down    int64[n]  written: slots of rows that enter, and that may leave

    Returns (rows that enter, rows that may leave, slot to continue at).
    """
    rising, sinking, slot = 0, 0, start
    while slot < stop:
        if entries[slot, 1] >> np.uint64(16) != 0:
            if where[slot] >= 0:
                if score(entries, slot, lfu, half_life) >= enter:
                    if rising == up.shape[0]:
                        break
                    up[rising] = slot
                    rising += 1
            elif (
                where[slot] < ABSENT
                and sinking < down.shape[0]
                and score(entries, slot, lfu, half_life) <= leave
            ):
                down[sinking] = slot
                sinking += 1
        slot += 1
    return rising, sinking, slot


class Balance:
    """Moves rows of one table between host memory and GPU memory.

    moves              counts the rows that move
    policy, half_life  see Cache
    """

    def __init__(
        self, tier: HbmTier, moves: Moves, policy: Policy = "lru", half_life: float = HALF_LIFE
    ) -> None:
        self._tier, self._moves = tier, moves
        self._scoring = policy == "lfu", half_life
        self._rng = np.random.default_rng(0)
        # rows that a slice moves; one more piece of GPU memory is enough for them
        self._most = min(max(1, MOVED // (4 * tier.width)), tier.piece_rows)
        self._hand: int | None = None  # next slot of this circle; None: it has ended
        self._begun = self._seen = 0  # ``tier.stirred`` when circle and last slice began
        self._limits = np.inf, -np.inf  # scores of rows that enter, and that may leave
        self._all = False  # fill the GPU, although many rows have the score of the threshold
        self._swaps = 0.0  # rows that may change places now
        self._leavers = np.empty(0, np.int64)  # slots of rows that may leave

    def count(self) -> None:
        """Count those rows of a pull that were in GPU memory. Call it after ``gather``."""
        self._tier.hits += self._tier.recent

    @property
    def due(self) -> bool:
        """True if ``slice`` may find rows to move."""
        stirred, rows = self._tier.stirred - self._begun, self._tier.rows
        if self._hand is not None or not stirred:
            return self._hand is not None
        return stirred >= max(min(LEAST_STIR, rows), rows // STIR)

    def slice(self, *, idle: bool = True) -> bool:
        """Move some rows, if there are any to move. Returns whether to call it again soon.

        idle  nobody waits; otherwise the slice takes little time, compared with the last pushes
        """
        if not self.due:
            return False
        tier, entries = self._tier, self._tier.slots
        room = tier.hbm_room()
        fresh, self._seen = tier.stirred - self._seen, tier.stirred
        self._swaps = min(self._swaps + fresh / SWAPPED, tier.rows)
        if self._hand is None and not self._begin(room):
            return False
        look = LOOK if idle else min(LOOK, max(LEAST_LOOK, LOOKED * fresh))
        most = self._most if idle else min(self._most, max(LEAST_MOVED, fresh // 2))
        start, used, (enter, leave) = self._hand or 0, entries.used, self._limits
        left, worse = room - tier.hbm_rows, enter <= leave  # many rows have the same score
        if left > 0:
            most = min(most, left)
        if left <= 0 or not self._all:  # rows that are no better must not take places
            enter = max(enter, np.nextafter(leave, np.inf))
        up, down = np.empty(most, np.int64), np.empty(most, np.int64)
        rising, sinking, following = _choose(
            *(entries.array, tier.where, start, min(used, start + look)),
            enter, leave, *self._scoring, up, down,
        )  # fmt: skip
        self._leavers = np.concatenate([self._leavers, down[:sinking]])
        if rising and not self._enter(up[:rising], max(0, left)):
            return False  # a flush is copying rows; the next slice begins where this one did
        self._leavers = self._leavers[-4 * self._most :]
        self._hand = int(following) if following < used else None
        if self._hand is None and worse and not self._all and room > tier.hbm_rows:
            self._hand, self._all = 0, True
        return self._hand is not None

    def _begin(self, room: int) -> bool:
        """Begin a circle: compute the thresholds. Returns False if no row can move.

        room  rows that GPU memory can have
        """
        tier, entries = self._tier, self._tier.slots
        self._begun, self._leavers = tier.stirred, self._leavers[:0]
        if tier.hbm_unused > 1:
            tier.shrink_hbm()
        if room <= 0:
            return False
        self._hand, self._all, self._limits = 0, room >= tier.rows, (-np.inf, -np.inf)
        if self._all:
            return True
        used, scores = entries.used, np.empty(min(SAMPLE, entries.used))
        looked = np.arange(used) if used <= SAMPLE else self._rng.integers(0, used, SAMPLE)
        count = _scores(entries.array, looked, *self._scoring, scores)
        if count:
            scores, share = np.sort(scores[:count]), room / tier.rows
            enter, leave = (int(count * (1 - part * share)) for part in (ENTER, 1.0))
            self._limits = (
                float(scores[min(enter, count - 1)]),
                float(scores[min(leave, count - 1)]),
            )
        return True

    def _enter(self, up: Slots, room: int) -> bool:
        """Move rows to the GPU, and others to host memory if it is full.

        up    slots of rows in host memory
        room  rows for which there may be room in GPU memory

        Returns False, and moves nothing, if rows cannot be moved now.
        """
        tier = self._tier
        leavers = np.unique(self._leavers)
        leavers = leavers[tier.in_hbm(leavers)]  # others left meanwhile, or were deleted
        leavers = leavers[: int(self._swaps)]
        down = leavers[: max(0, len(up) - room)]
        up = up[: room + len(down)]
        try:
            moved = tier.move(up, down)
        except OutOfMemory:  # no more than there is
            up, down = up[: len(leavers)], leavers[: len(up)]
            moved = tier.move(up, down)
        if moved:
            self._leavers = np.setdiff1d(leavers, down, assume_unique=True)
            self._swaps -= len(down)
            self._moves.hbm_promotions += len(up)
            self._moves.hbm_demotions += len(down)
        return moved


def compile_all() -> None:
    """Run the kernels that move rows once: they are compiled, or loaded. No GPU is needed."""
    entries, slots = np.zeros((1, 4), np.uint64), np.zeros(1, np.int64)
    for lfu in (False, True):
        _scores(entries, slots, lfu, HALF_LIFE, np.empty(1))
        _choose(entries, slots, 0, 1, 0.0, 0.0, lfu, HALF_LIFE, slots, slots.copy())
    Places(slots, slots)
    find_near(slots, slots, slots.copy())
    owners = Owners(Budget(1 << 20))
    owners.grow(1)
    owners.give(owners.take(slots))
    owners.empty_from(0)
    owners.close()
