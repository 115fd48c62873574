"""The results of a table's methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.admission.gates import Occurrences
from storage.kernels import Keys, Rows, Slots
from storage.records import Cause
from storage.slots import Meta


@dataclass(frozen=True, slots=True)
class TierStats:
    """Number of rows of a table in one tier, and what they take there."""

    tier: str  # name of the tier
    rows: int
    bytes: int  # memory or disk, including unused space
    hits: int  # keys of pulls and pushes whose row was here, since the start
    misses: int  # keys of pulls and pushes whose row was in a slower tier
    on_disk: bool  # the tier is on disk, so that ``bytes`` is no memory


@dataclass(frozen=True, slots=True)
class TableStats:
    """Number of rows and memory of a table on one shard."""

    rows: int
    bytes: int  # memory of rows, metadata, index and counters, including unused reserves
    index_bytes: int  # memory of the index, and of what it knows of the blocks on disk
    waiting: int  # keys that are counted but have no row; an estimate for a sketch
    counter_bytes: int  # memory of the counters alone
    tiers: tuple[TierStats, ...] = ()  # fastest first
    # (blocks on disk that are known to be damaged, their rows that cannot be read)
    damage: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Dump:
    """Copies of all rows and counters of a table on one shard, by ascending key."""

    keys: Keys  # uint64[n]
    rows: Rows  # float32[n, width]
    meta: Meta  # uint64[n, 4]: key, version, step, frequency
    counters: NDArray[np.uint64]  # [m, 3]  exact counters: key, total, version
    cells: NDArray[Any]  # uint8 or uint16, the counters of a sketch; empty without a sketch


class Pushed(NamedTuple):
    """The result of a push: the keys that have rows, and the keys that are not admitted yet."""

    keys: Keys  # uint64[n]  keys that have a row after the push
    slots: Slots  # int64[n]  slots of the rows of ``keys``
    waiting: Keys  # uint64[m]  keys of the push that have a counter but no row
    totals: Occurrences  # uint32[m]  occurrences of ``waiting``, including this push
    step: int  # step recorded in the rows: the largest step pushed to the table so far


@dataclass(slots=True)
class Moves:
    """What happened between the tiers of a table since the shard was started."""

    hits: int = 0  # keys of pulls and pushes whose row was in host memory
    misses: int = 0  # keys of pulls and pushes whose row was on disk
    promotions: int = 0  # rows copied from disk to host memory
    demotions: int = 0  # rows that left host memory
    flushed: int = 0  # dirty rows written to disk
    reflushed: int = 0  # blocks whose current rows were written again
    hbm_promotions: int = 0  # rows moved from host memory to GPU memory
    hbm_demotions: int = 0  # rows that left GPU memory

    def used(self, rows: int, misses: int) -> None:
        """Count the keys of a push that have a row; ``misses`` of them at most were on disk."""
        misses = min(misses, rows)
        self.hits += rows - misses
        self.misses += misses


@dataclass(slots=True)
class Tally:
    """Numbers of keys and rows that a table's rules admitted, refused and evicted.

    They count from the table's creation, or from the last start of the shard.
    """

    admitted: int = 0  # keys that got a row in a push
    refused: int = 0  # keys without a row that a push did not admit, counted once per push
    dropped: int = 0  # occurrences of refused keys, whose gradients were dropped
    evicted: dict[Cause, int] = field(default_factory=dict)  # evicted rows, by cause
