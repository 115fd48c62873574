"""What an eviction rule is, and what it looks at."""

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

FIRST_STEP, LAST_STEP = -(1 << 47), (1 << 47) - 1  # that there can be
LARGEST = 1e30  # a parameter beyond it is a mistake
WHOLE = 1 << 48  # versions and steps end there
EMPTY = (1 << 63) - 1  # the score of a slot without a row


@dataclass(frozen=True, slots=True)
class View:
    """The slots of a tier, as they are now."""

    slab: Rows  # float32[capacity, width]  [embedding | state]
    meta: NDArray[np.uint64]  # [capacity, 3]  packed; see tiers/host.py
    used: int  # slots ever handed out; those of version 0 hold no row
    rows: int  # slots that hold one
    dim: int  # numbers of an embedding


@dataclass(frozen=True, slots=True)
class Now:
    """What rules compare rows with."""

    step: int  # of the table: the largest that was pushed
    version: int  # of the shard
    idle: int = 0  # rows up to this version are idle for longer than the time TTL


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction(ABC):
    """Which rows leave. Parameters are checked at birth."""

    name: ClassVar[str]
    cause: ClassVar[Cause]

    def on(self, share: float) -> Self:
        """The rule for a shard that has this share of the keys, 0..1."""
        return self  # unless a parameter is of the whole table

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
        """Refuse numbers that make no sense."""

    def _require(self, field: str, holds: bool, rule: str) -> None:
        if not holds:
            value = getattr(self, field)
            raise ValueError(f"eviction {self.name!r}: {field} must be {rule}, got {value!r}")

    @abstractmethod
    def due(self, rows: int, last: Now, now: Now) -> bool:
        """Whether a sweep would find enough to be worth it.

        rows  in the table
        last  when the last sweep began
        """


class RowEviction(Eviction):
    """A rule for rows: one leaves for what it is, whatever the others are."""

    __slots__ = ()

    reads_rows: ClassVar[bool] = False  # not metadata alone

    @abstractmethod
    def mark(self, view: View, start: int, stop: int, now: Now, causes: NDArray[np.uint8]) -> None:
        """Set causes[i] = self.cause for slot start + i, where it is 0 and the row is to leave.

        causes  uint8[stop - start]
        """


class TableEviction(Eviction):
    """A rule for tables: rows leave while there are too many, those of the lowest score first."""

    __slots__ = ()

    @abstractmethod
    def excess(self, rows: int) -> int:
        """How many of so many rows are too many."""

    @abstractmethod
    def score(self, view: View, start: int, stop: int, now: Now, out: NDArray[np.int64]) -> None:
        """Write the scores of the slots start..stop-1, EMPTY for slots without a row.

        now  the same during a sweep; rows that were pushed later score no lower
        out  int64[stop - start], of -2^62..2^62 or EMPTY
        """


def require_distinct(rules: Sequence[Eviction]) -> None:
    """Raise ValueError if two rules evict for the same cause."""
    seen: dict[Cause, Eviction] = {}
    for rule in rules:
        other = seen.setdefault(rule.cause, rule)
        if other is not rule:
            raise ValueError(
                f"evictions {other.name!r} and {rule.name!r} are of one kind; a table takes one"
            )
