"""The eviction rules of a table's schema.

To add a rule, write its class and add it to EVICTIONS. Nothing else changes: the tests run over the
dict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from storage.eviction.contract import (
    EMPTY,
    FIRST_STEP,
    Eviction,
    Now,
    RowEviction,
    TableEviction,
    View,
)
from storage.kernels import jit
from storage.records import Cause
from storage.registry import build

ROUNDS = 64  # sweeps per TTL
SCALE = 1 << 14  # LFU scores are multiplied by this and rounded down to integers

# ---- rules for rows
#
# entries  uint64[capacity, 4], see slots.py; version 0: no row
# causes   uint8[stop - start]  causes[i] belongs to slot start + i; 0: no cause yet


@jit
def _idle_steps(entries: Any, start: int, stop: int, last: int, cause: int, causes: Any) -> None:
    """Set causes[i] to ``cause`` if slot start + i has a row whose step is at most ``last``.

    entries  uint64[capacity, 4]  see slots.py
    causes   uint8[stop - start]  entries that are not 0 are left unchanged
    """
    most = (np.int64(last) << np.int64(16)) | np.int64(0xFFFF)  # largest metadata with that step
    for i in range(stop - start):
        if np.int64(entries[start + i, 2]) <= most and causes[i] == 0:
            present = entries[start + i, 1] >> np.uint64(16) != 0
            causes[i] = cause if present else 0


@jit
def _idle_versions(entries: Any, start: int, stop: int, last: Any, cause: int, causes: Any) -> None:
    """Set causes[i] to ``cause`` if slot start + i has a row whose version is at most ``last``.

    entries  uint64[capacity, 4]  see slots.py
    causes   uint8[stop - start]  entries that are not 0 are left unchanged
    """
    for i in range(stop - start):
        version = entries[start + i, 1] >> np.uint64(16)
        if version <= last and version != 0 and causes[i] == 0:
            causes[i] = cause


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTtl(RowEviction):
    """Evicts a row that was not pushed for more than ``steps`` steps of its table.

    Sweeps 64 times (ROUNDS) per TTL: whenever the table's step has advanced by ``steps / 64``.
    """

    name: ClassVar[str] = "step_ttl"
    cause: ClassVar[Cause] = Cause.STEP_TTL

    steps: int = 1_000_000

    def _check(self) -> None:
        self._require("steps", self.steps >= 1, "1 or more")

    def due(self, rows: int, last: Now, now: Now) -> bool:
        return now.step - last.step >= max(1, self.steps // ROUNDS)

    def mark(self, view: View, start: int, stop: int, now: Now, causes: NDArray[np.uint8]) -> None:
        last = now.step - self.steps - 1
        if last >= FIRST_STEP:
            _idle_steps(view.entries, start, stop, last, int(self.cause), causes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeTtl(RowEviction):
    """Evicts a row that was not pushed for ``seconds`` seconds; up to ``seconds / 256`` later."""

    name: ClassVar[str] = "time_ttl"
    cause: ClassVar[Cause] = Cause.TIME_TTL

    seconds: float = 30 * 24 * 3600.0

    def _check(self) -> None:
        self._require("seconds", self.seconds >= 1e-3, "0.001 or more")

    def due(self, rows: int, last: Now, now: Now) -> bool:
        return now.idle > last.idle

    def mark(self, view: View, start: int, stop: int, now: Now, causes: NDArray[np.uint8]) -> None:
        _idle_versions(view.entries, start, stop, np.uint64(now.idle), int(self.cause), causes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm(RowEviction):
    """Evicts a row that has a small embedding and was not pushed for ``grace`` steps of its table.

    An embedding is small if its L2 norm is less than ``threshold``. The grace keeps rows that are
    still trained: otherwise their next push would create them again with the initial value instead
    of the learnt one. With grace 0 every row with a small embedding is evicted.
    """

    name: ClassVar[str] = "norm"
    cause: ClassVar[Cause] = Cause.NORM
    reads_norms: ClassVar[bool] = True

    threshold: float = 1e-3
    grace: int = 10_000  # steps

    def _check(self) -> None:
        self._require("threshold", self.threshold > 0.0, "above 0")
        self._require("grace", self.grace >= 0, "0 or more")

    def due(self, rows: int, last: Now, now: Now) -> bool:
        pause = max(1, self.grace // ROUNDS)
        return now.step - last.step >= pause or (self.grace == 0 and now.version > last.version)

    def mark(self, view: View, start: int, stop: int, now: Now, causes: NDArray[np.uint8]) -> None:
        last = now.step - self.grace
        if last < FIRST_STEP:
            return
        idle = np.zeros(stop - start, np.uint8)
        _idle_steps(view.entries, start, stop, last, 1, idle)
        judged = np.flatnonzero((idle != 0) & (causes == 0))
        small = view.norms(judged + start) < self.threshold
        causes[judged[small]] = int(self.cause)


# ---- rules for tables
#
# scores  int64[n]


@jit
def _score_lru(entries: Any, start: int, stop: int, scores: Any) -> None:
    for i in range(stop - start):
        version = np.int64(entries[start + i, 1] >> np.uint64(16))
        scores[i] = version if version != 0 else EMPTY


@jit
def _score_lfu(
    entries: Any, start: int, stop: int, last: int, half_life: float, scores: Any
) -> None:
    low = np.uint64(0xFFFF)
    for i in range(stop - start):
        first, second = entries[start + i, 1], entries[start + i, 2]
        if first >> np.uint64(16) == 0:
            scores[i] = EMPTY
            continue
        frequency = np.float64((first & low) << np.uint64(16) | (second & low))
        age = max(np.float64(last - (np.int64(second) >> np.int64(16))), 0.0)
        scores[i] = np.int64(np.floor(SCALE * (np.log2(max(frequency, 1.0)) - age / half_life)))


class Capacity(TableEviction):
    """Evicts the rows with the lowest scores while the table has more than ``max_rows`` rows.

    A shard that owns the fraction ``share`` of all keys keeps ``max_rows * share`` rows, rounded
    up. A hash spreads the keys evenly over the shards.
    """

    __slots__ = ()

    cause: ClassVar[Cause] = Cause.CAPACITY

    max_rows: int

    def _check(self) -> None:
        self._require("max_rows", self.max_rows >= 1, "1 or more")

    def on(self, share: float) -> Self:
        # subclasses are dataclasses with this field
        return replace(self, max_rows=math.ceil(self.max_rows * share))  # type: ignore[call-arg]

    def due(self, rows: int, last: Now, now: Now) -> bool:
        return rows > self.max_rows

    def excess(self, rows: int) -> int:
        return max(0, rows - self.max_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityLru(Capacity):
    """Evicts the least recently pushed rows. The score is the version of a row's last push."""

    name: ClassVar[str] = "capacity_lru"

    max_rows: int = 100_000_000  # over all shards

    def score(self, view: View, start: int, stop: int, now: Now, out: NDArray[np.int64]) -> None:
        _score_lru(view.entries, start, stop, out)


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityLfu(Capacity):
    """Evicts the rows with the lowest frequency, which decays with age.

    Score: log2(frequency) - (table's step - step of the last push) / half_life. A row that was last
    pushed ``half_life`` steps ago scores like a row pushed now that has half its frequency.
    """

    name: ClassVar[str] = "capacity_lfu"

    max_rows: int = 100_000_000  # over all shards
    half_life: int = 100_000  # steps

    def _check(self) -> None:
        Capacity._check(self)
        self._require("half_life", self.half_life >= 1, "1 or more")

    def score(self, view: View, start: int, stop: int, now: Now, out: NDArray[np.int64]) -> None:
        _score_lfu(view.entries, start, stop, now.step, float(self.half_life), out)


def make_eviction(name: str, params: Mapping[str, float]) -> Eviction:
    """Construct the eviction rule with this name, for example "step_ttl".

    params  parameters by name; those left out keep their defaults

    Raises ValueError for an unknown name or parameter, or for a value that is not allowed.
    """
    return build("eviction", EVICTIONS, name, params)


EVICTIONS: dict[str, type[Eviction]] = {
    c.name: c for c in (StepTtl, TimeTtl, Norm, CapacityLru, CapacityLfu)
}
