"""The contract of an eviction rule, which decides which rows are evicted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from storage.kernels import Slots
from storage.records import Cause
from storage.slots import Entries

FIRST_STEP, LAST_STEP = -(1 << 47), (1 << 47) - 1  # the range of steps
LARGEST = 1e30  # the largest magnitude of a parameter
WHOLE = 1 << 48  # whole-number parameters must be less than this
EMPTY = (1 << 63) - 1  # score of a slot without a row


@dataclass(frozen=True, slots=True)
class View:
    """The arrays of some rows that eviction sweeps read. Valid until the table changes."""

    entries: Entries  # uint64[capacity, 4], key and metadata of the row in each slot
    used: int  # slots that may have a row; a slot of version 0 has none
    norms: Callable[[Slots], NDArray[np.float64]]  # returns the L2 norms of embeddings by slot,
    # rounded to float32; see ``measure`` in kernels.py
    dim: int  # length of an embedding


@dataclass(frozen=True, slots=True)
class Bounds:
    """Some blocks of rows on disk, with bounds of the metadata of their rows; m blocks.

    Slot i of ``least`` has the least version, step, frequency and norm of any row in block i.
    ``greatest`` has the greatest ones. Both have key 0.
    """

    numbers: NDArray[np.int64]  # [m]  ascending
    rows: NDArray[np.int64]  # [m]  rows of the table that are in the block and not in memory
    least: View
    greatest: View


class ColdRows(Protocol):
    """The rows of a table that are in blocks on disk, for eviction sweeps."""

    def bounds(self, number: int) -> Bounds:
        """Return the bounds of some blocks, the next ones from block ``number`` on.

        The result has no blocks if there are none with this or a higher number.
        """
        ...

    def reads(self, number: int, norms: bool) -> Callable[[], None] | None:
        """Return a function that reads a block from the disk into memory; None: it is in memory.

        norms  also read the norms, or what they are computed from

        Another thread should call the function before ``view``, which otherwise waits for the disk.
        """
        ...

    def view(self, number: int) -> View | None:
        """Return the rows of a block: slot i has row i of the block, or version 0 if that row is
        in memory or out of date. None: the block is gone. Raises Corrupt.
        """
        ...


@dataclass(frozen=True, slots=True)
class Contents:
    """All rows of a table, for eviction sweeps. Valid until the table changes."""

    rows: int  # number of rows
    host: View  # rows in memory
    cold: ColdRows | None = None  # other rows; None: there are none


@dataclass(frozen=True, slots=True)
class Now:
    """The current values of a table that eviction rules compare rows with."""

    step: int  # the table's step: the largest step pushed to it
    version: int  # log version of the table's last push
    idle: int = 0  # rows of this version or older have exceeded the time TTL


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction(ABC):
    """Base class of eviction rules. The constructor raises ValueError for an invalid parameter."""

    name: ClassVar[str]
    cause: ClassVar[Cause]

    def on(self, share: float) -> Self:
        """Return the rule for a shard that owns the fraction ``share`` (0..1) of all keys."""
        return self  # unless a parameter counts rows over all shards

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, Real) and abs(float(value)) <= LARGEST
            self._require(field.name, number, f"a number of magnitude up to {LARGEST:g}")
            if field.type == "int":
                whole = float(value).is_integer() and abs(value) < WHOLE
                self._require(field.name, whole, "a whole number below 2^48")
                object.__setattr__(self, field.name, int(value))
            else:
                object.__setattr__(self, field.name, float(value))
        self._check()

    @abstractmethod
    def _check(self) -> None:
        """Validate the parameters: call ``_require`` for each condition. It raises ValueError."""

    def _require(self, field: str, holds: bool, rule: str) -> None:
        if not holds:
            value = getattr(self, field)
            raise ValueError(f"eviction {self.name!r}: {field} must be {rule}, got {value!r}")

    @abstractmethod
    def due(self, rows: int, last: Now, now: Now) -> bool:
        """Return whether a sweep over the table is due under this rule.

        rows  number of rows in the table
        last  values of the table when the last sweep began
        now   values of the table now
        """


class RowEviction(Eviction):
    """A rule that decides about each row without looking at other rows."""

    __slots__ = ()

    reads_norms: ClassVar[bool] = False  # whether it also reads norms, or metadata only

    @abstractmethod
    def mark(self, view: View, start: int, stop: int, now: Now, causes: NDArray[np.uint8]) -> None:
        """Set causes[i] to this rule's cause if the row in slot start + i is to be evicted.

        causes  uint8[stop - start]; entries that are not 0 are left unchanged

        A rule that evicts a row must also evict each row whose version, step, frequency and norm
        are all at most as large. Sweeps rely on that: they call this with the bounds of a block on
        disk, and skip the block if a row with the least values of all would stay.
        """


class TableEviction(Eviction):
    """A rule that limits the number of rows: it evicts the rows with the lowest scores."""

    __slots__ = ()

    @abstractmethod
    def excess(self, rows: int) -> int:
        """Return how many rows must be evicted from a table with ``rows`` rows."""

    @abstractmethod
    def score(self, view: View, start: int, stop: int, now: Now, out: NDArray[np.int64]) -> None:
        """Write the scores of slots start..stop-1 to ``out``.

        now  values of the table when the sweep began, the same for all its slices
        out  int64[stop - start]; scores in -2^62..2^62, EMPTY (2^63 - 1) for slots without a row

        A push during the sweep must not lower the score of a row. A row must not score higher than
        one whose version, step and frequency are all at least as large: so the scores of a block's
        Bounds are bounds for the scores of its rows.
        """


def require_distinct(rules: Sequence[Eviction]) -> None:
    """Raise ValueError if two rules evict for the same cause."""
    seen: dict[Cause, Eviction] = {}
    for rule in rules:
        other = seen.setdefault(rule.cause, rule)
        if other is not rule:
            raise ValueError(
                f"eviction rules {other.name!r} and {rule.name!r} both have the cause"
                f" {rule.cause.name.lower()!r}; a table may have only one rule per cause"
            )
