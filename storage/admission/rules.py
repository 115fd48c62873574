"""The admission rules of a table's schema: when a key gets a row.

To add a rule, write its class and its gate, and add the class to ADMISSIONS. Nothing else changes:
the tests run over the dict.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np

from storage.admission.counter import MOST, CounterGate
from storage.admission.gates import AlwaysGate, Gate, ProbabilityGate
from storage.admission.sketch import SketchGate
from storage.arena import Budget
from storage.errors import OutOfMemory
from storage.registry import build

PLANNED = 30 / 64  # share of a sketch's cells in use when the expected number of keys wait
SMALLEST = 1 << 12  # cells; in a smaller sketch the share in use varies too much


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission(ABC):
    """Base class of admission rules. The constructor raises ValueError for an invalid parameter."""

    name: ClassVar[str]

    def on(self, share: float) -> Self:
        """Return the rule for a shard that owns the fraction ``share`` (0..1) of all keys."""
        return self  # unless a parameter counts keys over all shards

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int":
                value = getattr(self, field.name)
                whole = isinstance(value, Real) and float(value).is_integer()
                self._require(field.name, whole, "a whole number")
                object.__setattr__(self, field.name, int(value))
        self._check()

    def _check(self) -> None:
        """Validate the parameters: call ``_require`` for each condition. It raises ValueError."""
        return  # unless a rule has parameters

    def _require(self, field: str, holds: bool, rule: str) -> None:
        if not holds:
            value = getattr(self, field)
            raise ValueError(f"admission {self.name!r}: {field} must be {rule}, got {value!r}")

    def keeps(self, other: Admission) -> bool:
        """Return whether a gate of rule ``other`` can keep its counters under this rule."""
        return self == other

    def alter(self, gate: Gate) -> None:
        """Change ``gate`` to this rule, keeping its counters.

        The gate must belong to a rule for which ``keeps`` returns True.
        """
        return  # unless a gate counts

    @abstractmethod
    def gate(self, budget: Budget, seed: int) -> Gate:
        """Return a new gate for one table. Raises OutOfMemory if the budget does not suffice.

        seed  seed of the table's random values, from ``table_seed``
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Always(Admission):
    """Admits a key at its first push."""

    name: ClassVar[str] = "always"

    def gate(self, budget: Budget, seed: int) -> Gate:
        return AlwaysGate()


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter(Admission):
    """Admits a key at the push with its ``threshold``-th occurrence, exactly.

    Takes 20 to 51 bytes of memory per waiting key, 27 on average. If more than ``max_keys`` keys
    wait, the stalest counters are dropped, and their keys start again from zero.
    """

    name: ClassVar[str] = "counter"

    threshold: int = 2  # occurrences
    max_keys: int = 10_000_000  # waiting keys, over all shards

    def _check(self) -> None:
        self._require("threshold", 1 <= self.threshold <= MOST, f"in 1..{MOST}")
        self._require("max_keys", 1 <= self.max_keys <= 1 << 36, "in 1..2^36")

    def on(self, share: float) -> Self:
        return replace(self, max_keys=math.ceil(self.max_keys * share))

    def keeps(self, other: Admission) -> bool:
        return isinstance(other, Counter)

    def alter(self, gate: Gate) -> None:
        gate.alter(self.threshold, self.max_keys)

    def gate(self, budget: Budget, seed: int) -> Gate:
        return CounterGate(self.threshold, self.max_keys, budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch(Admission):
    """Admits a key at about its ``threshold``-th occurrence, by a sketch of fixed size.

    A few keys are admitted early. All of the memory is taken at creation: 11 bytes per expected key
    at an error rate of 1 %.

    The size is that of a Bloom filter (Bloom, "Space/time trade-offs in hash coding with allowable
    errors", CACM 13, 1970). A key has k = log2(1 / error_rate) cells, rounded up. For n keys there
    are m = n k / -ln(1 - 30/64) cells, so that n keys use 30/64 (PLANNED) of the cells. One half
    would be optimal. The margin is for random variation, and for keys that are counted while the
    sketch ages.
    """

    name: ClassVar[str] = "sketch"

    threshold: int = 2  # occurrences
    expected_keys: int = 1_000_000  # waiting keys, over all shards
    error_rate: float = 0.01  # share of keys that may be admitted early

    def _check(self) -> None:
        self._require("threshold", 1 <= self.threshold <= 1 << 13, "in 1..8192")
        self._require("expected_keys", 1 <= self.expected_keys <= 1 << 32, "in 1..2^32")
        rate = isinstance(self.error_rate, Real) and 1e-6 <= self.error_rate <= 0.5
        self._require("error_rate", rate, "in 1e-6..0.5")
        object.__setattr__(self, "error_rate", float(self.error_rate))
        rule = f"small enough for 2^32 cells (it needs {self.cells})"
        self._require("expected_keys", self.cells <= 1 << 32, rule)

    def on(self, share: float) -> Self:
        return replace(self, expected_keys=math.ceil(self.expected_keys * share))

    def keeps(self, other: Admission) -> bool:
        if not isinstance(other, Sketch):
            return False
        return (self.cells, self.hashes, self.dtype) == (other.cells, other.hashes, other.dtype)

    def alter(self, gate: Gate) -> None:
        gate.alter(self.threshold, self.expected_keys)

    @property
    def hashes(self) -> int:
        """Number of cells per key."""
        return max(1, math.ceil(-math.log2(self.error_rate)))

    @property
    def cells(self) -> int:
        """Number of cells in the sketch."""
        wanted = math.ceil(self.expected_keys * self.hashes / -math.log1p(-PLANNED))
        return max(SMALLEST, wanted)

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """Type of a cell: it can count eight keys that are just below the threshold."""
        return np.uint8 if self.threshold <= 32 else np.uint16

    @property
    def bytes(self) -> int:
        """Size of all cells in bytes. A gate takes a little more: whole pages of memory."""
        return self.cells * np.dtype(self.dtype).itemsize

    def gate(self, budget: Budget, seed: int) -> Gate:
        try:
            return SketchGate(
                budget,
                seed,
                threshold=self.threshold,
                expected_keys=self.expected_keys,
                hashes=self.hashes,
                cells=self.cells,
                dtype=self.dtype,
            )
        except OutOfMemory as error:
            what = (
                f"admission 'sketch' with expected_keys {self.expected_keys} on this shard and"
                f" error_rate {self.error_rate:g}: "
            )
            raise OutOfMemory(error.budget, error.held, error.wanted, what) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Probability(Admission):
    """Admits a key with probability ``p`` at each occurrence.

    The random numbers depend only on the table's seed, the key and the version of the push.
    """

    name: ClassVar[str] = "probability"

    p: float = 0.1

    def _check(self) -> None:
        self._require("p", isinstance(self.p, Real) and 0 < self.p <= 1, "above 0 and at most 1")
        object.__setattr__(self, "p", float(self.p))

    def gate(self, budget: Budget, seed: int) -> Gate:
        return ProbabilityGate(self.p, seed)


def make_admission(name: str, params: Mapping[str, float]) -> Admission:
    """Construct the admission rule with this name, for example "counter".

    params  parameters by name; those left out keep their defaults

    Raises ValueError for an unknown name or parameter, or for a value that is not allowed.
    """
    return build("admission", ADMISSIONS, name, params)


def compile_all() -> None:
    """Run every gate once, to compile its kernels or load them from the cache."""
    small = Sketch(expected_keys=1)
    every = [make_admission(name, {}) for name in ADMISSIONS if name != small.name]
    for rule in (*every, small, Sketch(threshold=100, expected_keys=1)):
        gate = rule.gate(Budget(64 << 20), 0)
        keys, ones = np.arange(2, dtype=np.uint64), np.ones(2, np.uint32)
        gate.admit(keys, ones, 1)
        gate.put(keys, ones, ones.astype(np.uint64))
        gate.discard(keys)
        gate.expire(1)
        gate.close()


ADMISSIONS: dict[str, type[Admission]] = {c.name: c for c in (Always, Counter, Sketch, Probability)}
