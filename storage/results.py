"""What the calls of a table return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.admission.gates import Occurrences
from storage.kernels import Keys, Rows, Slots
from storage.records import Cause
from storage.tiers.base import Meta


@dataclass(frozen=True, slots=True)
class TableStats:
    """What a table holds on this shard."""

    rows: int
    bytes: int  # taken from the budget: slab, metadata, index, counters, unused room in each
    index_bytes: int
    waiting: int  # keys that are counted and have no row; of a sketch, about
    counter_bytes: int  # of their counters


@dataclass(frozen=True, slots=True)
class Dump:
    """Every row and counter of a table on this shard, by ascending key."""

    keys: Keys  # uint64[n]
    rows: Rows  # float32[n, width]
    meta: Meta  # uint64[n, 4]: key, version, step, frequency
    counters: NDArray[np.uint64]  # [m, 3]  of exact ones: key, total, version
    cells: NDArray[Any]  # of a sketch


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did: keys that have rows now, and keys that wait for theirs."""

    keys: Keys  # uint64[n]
    slots: Slots  # int64[n]  where their rows are
    waiting: Keys  # uint64[m]  those that have a counter
    totals: Occurrences  # uint32[m]  what it became
    step: int  # the rows' step now: the largest that was pushed to the table


@dataclass(slots=True)
class Tally:
    """What a table's rules have done since it was opened."""

    admitted: int = 0  # keys that got a row by a push
    refused: int = 0  # keys of pushes that got none
    dropped: int = 0  # occurrences whose gradients were dropped with them
    evicted: dict[Cause, int] = field(default_factory=dict)  # rows that left by a rule
