"""The contract of an eviction rule, and the data that it compares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from storage.kernels import Rows
from storage.records import Cause

FIRST_STEP, LAST_STEP = -(1 << 47), (1 << 47) - 1  # the range of steps
LARGEST = 1e30  # the largest parameter
WHOLE = 1 << 48  # parameters that are whole numbers are below
EMPTY = (1 << 63) - 1  # score of a slot without a row


@dataclass(frozen=True, slots=True)
class View:
    """The slots of a tier now. Valid until the next change of the table."""

    slab: Rows  # float32[capacity, width]  [embedding | state]
    meta: NDArray[np.uint64]  # [capacity, 3]  packed; see tiers/host.py
    used: int  # slots ever allocated; a slot of version 0 has no row
    rows: int  # slots with a row
    dim: int  # length of an embedding


@dataclass(frozen=True, slots=True)
class Now:
    """The values that rules compare rows with."""

    step: int  # of the table: the largest step that was pushed to it
    version: int  # of the last push
    idle: int = 0  # rows of versions up to this one have been idle longer than the time TTL


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction(ABC):
    """An eviction rule. The constructor raises ValueError for a parameter that breaks a rule."""

    name: ClassVar[str]
    cause: ClassVar[Cause]

    def on(self, share: float) -> Self:
        """Return the rule for a shard that owns this share of the keys, 0..1."""
        return self  # unless a parameter counts rows over all shards

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, Real) and abs(float(value)) <= LARGEST
            self._require(field.name, number, f"a number of size up to {LARGEST:g}")
            if field.type == "int":
                whole = float(value).is_integer() and abs(value) < WHOLE
                self._require(field.name, whole, "a whole number below 2^48")
                object.__setattr__(self, field.name, int(value))
            else:
                object.__setattr__(self, field.name, float(value))
        self._check()

    @abstractmethod
    def _check(self) -> None:
        """Raise ValueError, by ``_require``, for a parameter that breaks a rule."""

    def _require(self, field: str, holds: bool, rule: str) -> None:
        if not holds:
            value = getattr(self, field)
            raise ValueError(f"eviction {self.name!r}: {field} must be {rule}, got {value!r}")

    @abstractmethod
    def due(self, rows: int, last: Now, now: Now) -> bool:
        """Return whether a sweep is due.

        rows  number of rows in the table
        last  the values when the last sweep began
        """


class RowEviction(Eviction):
    """A rule for single rows: whether a row leaves does not depend on other rows."""

    __slots__ = ()

    reads_rows: ClassVar[bool] = False  # whether it reads rows, or metadata only

    @abstractmethod
    def mark(self, view: View, start: int, stop: int, now: Now, causes: NDArray[np.uint8]) -> None:
        """Set causes[i] to this rule's cause if the row in slot start + i leaves.

        causes  uint8[stop - start]; entries that are not 0 stay as they are
        """


class TableEviction(Eviction):
    """A rule for tables: while a table has too many rows, those with the lowest scores leave."""

    __slots__ = ()

    @abstractmethod
    def excess(self, rows: int) -> int:
        """Return how many rows must leave a table of this many rows."""

    @abstractmethod
    def score(self, view: View, start: int, stop: int, now: Now, out: NDArray[np.int64]) -> None:
        """Write the scores of slots start..stop-1, EMPTY for slots without a row.

        now  the same for all slices of a sweep; a later push must not lower a row's score
        out  int64[stop - start]; scores are in -2^62..2^62
        """


def require_distinct(rules: Sequence[Eviction]) -> None:
    """Raise ValueError if two rules evict for the same cause."""
    seen: dict[Cause, Eviction] = {}
    for rule in rules:
        other = seen.setdefault(rule.cause, rule)
        if other is not rule:
            raise ValueError(
                f"evictions {other.name!r} and {rule.name!r} are of one kind; a table takes one of"
                " each kind"
            )
