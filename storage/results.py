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
    """The size of one shard's part of a table."""

    rows: int
    bytes: int  # taken from the budget: slab, metadata, index and counters, reserves included
    index_bytes: int
    waiting: int  # keys that are counted and have no row; an estimate for a sketch
    counter_bytes: int  # of the counters


@dataclass(frozen=True, slots=True)
class Dump:
    """Every row and counter of one shard's part of a table, by ascending key."""

    keys: Keys  # uint64[n]
    rows: Rows  # float32[n, width]
    meta: Meta  # uint64[n, 4]: key, version, step, frequency
    counters: NDArray[np.uint64]  # [m, 3]  key, total, version of exact counters
    cells: NDArray[Any]  # of a sketch


@dataclass(frozen=True, slots=True)
class Pushed:
    """The result of a push: keys that have rows, and keys that are not admitted yet."""

    keys: Keys  # uint64[n]
    slots: Slots  # int64[n]  of their rows
    waiting: Keys  # uint64[m]  not admitted, with an exact counter
    totals: Occurrences  # uint32[m]  their counters after the push
    step: int  # step of the rows after the push: the largest that was pushed to the table


@dataclass(slots=True)
class Tally:
    """Counts of what a table's rules have done since it was opened."""

    admitted: int = 0  # keys that got a row by a push
    refused: int = 0  # keys of pushes that were not admitted
    dropped: int = 0  # occurrences whose gradients were dropped
    evicted: dict[Cause, int] = field(default_factory=dict)  # rows evicted, by the kind of rule
