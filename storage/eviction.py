"""Which rows leave a table: rules of its schema, and sweeps that look for the rows.

A sweep goes through the slots of a tier a slice at a time, between pushes. Its caller deletes what
a slice found before the next slice, and writes it to the log with its cause; nothing is changed
here. Slices read the metadata, 24 bytes a slot, in order; only the norm rule reads rows.

    sweep    = rows *table
    rows     = every rule for rows, over all slots; the first rule that holds names the cause
    table    = range select+ take         for a rule for tables, if its table is too large
    range    = the least and the largest score
    select   = histogram of scores in 2^16 buckets; the one in which the last victim is becomes the
               range, until that is a single score or nothing more need be told apart
    take     = the rows below, and as many of that score as it takes, the first slots first

So the choice is exact, for tables of any size: no row that stays has a lower score than one that
left. Scores are taken as of the moment when ``range`` began, so that rows which are pushed during
the sweep only rise.

To add one: write the class, add it to EVICTIONS. Nothing else changes; the tests run over the dict.
"""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from storage.kernels import AHEAD, Keys, Rows, Slots, jit, prefetch_row, square_sum
from storage.records import Cause

FIRST_STEP = -(1 << 47)  # that there can be
LARGEST = 1e30  # a parameter beyond it is a mistake
WHOLE = 1 << 48  # versions and steps end there
PARTS = 256  # of a TTL: how closely time is known
ROUNDS = 64  # sweeps in a TTL
BUCKETS = 1 << 16  # of a histogram
EMPTY = (1 << 63) - 1  # the score of a slot without a row
SCALE = 1 << 14  # of lfu's scores, which are whole numbers to be told apart exactly
SLICE = 1 << 16  # slots looked at in a call
READ = 8 << 20  # bytes of rows read in a call
MOST = 1 << 13  # rows found in a call
_STATE = struct.Struct("<qQQ")  # step version bytes-of-times


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


# ---- time


class Timeline:
    """Which versions are older than a TTL; rows know the version of their last push, not its time.

    Pushes within 1/PARTS of a TTL share a sample, the last of them, so that a row is found idle by
    that much too late, and never too early. Samples older than a TTL tell nothing new: one is
    kept, and at most PARTS + 3 in all.

    A clock that goes back by less than such a part stands still until it has caught up. By more:
    it was ahead and is right again, or it is wrong now and will be set right. No row may seem more
    idle than it is in either case. So what was pushed in the future counts as pushed now; and when
    the clock reaches the future of then, all rows count as pushed at the next push.
    """

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._samples: list[tuple[int, float]] = []  # version, seconds; both ascending
        self._start = 0.0  # seconds of the first push that shares the last sample
        self._most = 0.0  # the latest that the clock has shown: later than that if it went back

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, version: int, seconds: float) -> None:
        """There was a push; ``seconds`` of any clock that goes on after a restart."""
        part = self._ttl / PARTS
        if self._samples:
            newest, last = self._samples[-1]
            if version <= newest:
                return  # known from the checkpoint, replayed from the log
            if self._caught_up(seconds):
                self._samples, self._start = [(newest, seconds)], seconds
            elif seconds < last - part:
                del self._samples[self._before(seconds - part) :]
                self._samples.append((newest, seconds))
                self._start = seconds
            else:
                seconds = max(seconds, last)
        self._most = max(self._most, seconds)
        if self._samples and seconds - self._start <= part:
            self._samples[-1] = version, seconds
            return
        del self._samples[: max(0, self._before(seconds - self._ttl) - 1)]
        self._samples.append((version, seconds))
        self._start = seconds

    def version_before(self, seconds: float) -> int:
        """All versions up to this one are older than a TTL; 0 if none is known to be."""
        idle = 0 if self._caught_up(seconds) else self._before(seconds - self._ttl)
        return self._samples[idle - 1][0] if idle else 0

    def _caught_up(self, seconds: float) -> bool:
        """Whether the clock went back and is again where it was."""
        return bool(self._samples) and self._samples[-1][1] < self._most <= seconds

    def _before(self, seconds: float) -> int:
        """Samples of earlier times: the first ones."""
        return bisect_left(self._samples, seconds, key=lambda sample: sample[1])

    def pack(self) -> bytes:
        """start f64 | most f64 | { version u64 | seconds f64 }*, little-endian."""
        pairs = b"".join(struct.pack("<Qd", *sample) for sample in self._samples)
        return struct.pack("<dd", self._start, self._most) + pairs

    def load(self, data: bytes) -> None:
        """Take over what ``pack`` returned; ValueError if it is not that."""
        if not data or len(data) % 16:
            raise ValueError(f"a timeline is 16 bytes and 16 for each sample, got {len(data)}")
        self._start, self._most = struct.unpack_from("<dd", data)
        self._samples = list(struct.iter_unpack("<Qd", data[16:]))


# ---- rules for rows
#
# meta    uint64[capacity, 3]  packed; version 0: no row
# causes  uint8[stop - start]  of the slots from start on; written where it is 0 and the rule holds


@jit
def _idle_steps(meta: Any, start: int, stop: int, last: int, cause: int, causes: Any) -> None:
    """Rows of steps up to ``last``, which is one that a row can have."""
    most = (np.int64(last) << np.int64(16)) | np.int64(0xFFFF)  # metadata of a row with that step
    for i in range(stop - start):
        if np.int64(meta[start + i, 2]) <= most and causes[i] == 0:
            held = meta[start + i, 1] >> np.uint64(16) != 0
            causes[i] = cause if held else 0


@jit
def _idle_versions(meta: Any, start: int, stop: int, last: Any, cause: int, causes: Any) -> None:
    """Rows of versions 1..last."""
    for i in range(stop - start):
        version = meta[start + i, 1] >> np.uint64(16)
        if version <= last and version != 0 and causes[i] == 0:
            causes[i] = cause


@jit
def _small(
    slab: Any, meta: Any, start: int, stop: int, dim: int, least: float, cause: int, causes: Any
) -> None:
    """Of the rows marked 255, mark those with a norm below ``least`` by ``cause``, others by 0.

    slab  float32[capacity, >= dim]
    """
    n = stop - start
    for i in range(n):
        if i + AHEAD < n and causes[i + AHEAD] == 255:
            prefetch_row(slab, start + i + AHEAD, 4 * dim)
        if causes[i] == 255:
            causes[i] = cause if np.sqrt(square_sum(slab[start + i], dim)) < least else 0


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTtl(RowEviction):
    """A row leaves when the table's step - its last step > steps.

    Found when the table's step has moved on by a ROUNDS-th of that, at the latest.
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
            _idle_steps(view.meta, start, stop, last, int(self.cause), causes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeTtl(RowEviction):
    """A row leaves when it is idle for longer than seconds; see Timeline for how closely."""

    name: ClassVar[str] = "time_ttl"
    cause: ClassVar[Cause] = Cause.TIME_TTL

    seconds: float = 30 * 24 * 3600.0

    def _check(self) -> None:
        self._require("seconds", self.seconds >= 1e-3, "0.001 or more")

    def due(self, rows: int, last: Now, now: Now) -> bool:
        return now.idle > last.idle

    def mark(self, view: View, start: int, stop: int, now: Now, causes: NDArray[np.uint8]) -> None:
        _idle_versions(view.meta, start, stop, np.uint64(now.idle), int(self.cause), causes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm(RowEviction):
    """A row leaves when the L2 norm of its embedding < threshold and it was not pushed for grace.

    The table's step - its last step >= grace. So no row is judged before it is ``grace`` steps old,
    and none while it is trained: it would come back with the next push, from its initial value
    instead of the small one that it had learnt. With grace 0 every row is judged in every sweep.
    """

    name: ClassVar[str] = "norm"
    cause: ClassVar[Cause] = Cause.NORM
    reads_rows: ClassVar[bool] = True

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
        judged = np.zeros(stop - start, np.uint8)
        _idle_steps(view.meta, start, stop, last, 255, judged)
        dim, least = view.dim, self.threshold
        _small(view.slab, view.meta, start, stop, dim, least, int(self.cause), judged)
        np.copyto(causes, judged, where=causes == 0)


# ---- rules for tables
#
# scores  int64[n]


@jit
def _score_lru(meta: Any, start: int, stop: int, scores: Any) -> None:
    for i in range(stop - start):
        version = np.int64(meta[start + i, 1] >> np.uint64(16))
        scores[i] = version if version != 0 else EMPTY


@jit
def _score_lfu(meta: Any, start: int, stop: int, last: int, half_life: float, scores: Any) -> None:
    low = np.uint64(0xFFFF)
    for i in range(stop - start):
        first, second = meta[start + i, 1], meta[start + i, 2]
        if first >> np.uint64(16) == 0:
            scores[i] = EMPTY
            continue
        frequency = np.float64((first & low) << np.uint64(16) | (second & low))
        age = max(np.float64(last - (np.int64(second) >> np.int64(16))), 0.0)
        scores[i] = np.int64(np.floor(SCALE * (np.log2(max(frequency, 1.0)) - age / half_life)))


@jit
def _range(scores: Any) -> Any:
    """Least and largest of the scores that are not EMPTY; (EMPTY, -EMPTY) if all are."""
    low, high = EMPTY, -EMPTY
    for i in range(scores.shape[0]):
        low = min(low, scores[i])
        if scores[i] != EMPTY:
            high = max(high, scores[i])
    return low, high


@jit
def _histogram(scores: Any, low: int, high: int, shift: int, counts: Any) -> None:
    """Count scores of low..high by (score - low) >> shift.

    counts  int64[BUCKETS]  updated
    """
    for i in range(scores.shape[0]):
        if low <= scores[i] <= high:
            counts[np.uint64(scores[i] - low) >> np.uint64(shift)] += 1


@jit
def _lowest(scores: Any, bound: int, ties: int, places: Any) -> Any:
    """Find scores below ``bound``, and ``ties`` that are equal to it, as many as there is room for.

    places  int64[n]  filled with their positions, ascending

    Returns how many were found, the ties left, and the position behind the last one looked at.
    """
    found = 0
    for i in range(scores.shape[0]):
        if scores[i] > bound or (scores[i] == bound and ties == 0):
            continue
        if found == places.shape[0]:
            return found, ties, i
        ties -= scores[i] == bound
        places[found] = i
        found += 1
    return found, ties, scores.shape[0]


class Capacity(TableEviction):
    """The table exceeds max_rows: the lowest score leaves first.

    Each shard keeps the share of max_rows that it has of the keys, which a hash spreads evenly.
    """

    __slots__ = ()

    cause: ClassVar[Cause] = Cause.CAPACITY

    max_rows: int

    def _check(self) -> None:
        self._require("max_rows", self.max_rows >= 1, "1 or more")

    def on(self, share: float) -> Self:
        # every rule of this kind is a dataclass with the field
        return replace(self, max_rows=math.ceil(self.max_rows * share))  # type: ignore[call-arg]

    def due(self, rows: int, last: Now, now: Now) -> bool:
        return rows > self.max_rows

    def excess(self, rows: int) -> int:
        return max(0, rows - self.max_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityLru(Capacity):
    """Score: the version of the last push."""

    name: ClassVar[str] = "capacity_lru"

    max_rows: int = 100_000_000  # over all shards

    def score(self, view: View, start: int, stop: int, now: Now, out: NDArray[np.int64]) -> None:
        _score_lru(view.meta, start, stop, out)


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityLfu(Capacity):
    """Score: log2(frequency) - (table's step - last step) / half_life.

    So a row that is not pushed for a half-life counts as one of half its frequency.
    """

    name: ClassVar[str] = "capacity_lfu"

    max_rows: int = 100_000_000  # over all shards
    half_life: int = 100_000  # steps

    def _check(self) -> None:
        Capacity._check(self)
        self._require("half_life", self.half_life >= 1, "1 or more")

    def score(self, view: View, start: int, stop: int, now: Now, out: NDArray[np.int64]) -> None:
        _score_lfu(view.meta, start, stop, now.step, float(self.half_life), out)


# ---- sweeps


@dataclass(frozen=True, slots=True)
class Victims:
    """Rows that are to leave."""

    slots: Slots  # int64[n], distinct
    causes: NDArray[np.uint8]  # [n]  values of Cause

    def __len__(self) -> int:
        return len(self.slots)

    def keys(self, view: View) -> dict[Cause, Keys]:
        """Their keys, uint64[], by cause; causes without one are left out."""
        return {
            Cause(cause): view.meta[self.slots[self.causes == cause], 0]
            for cause in np.unique(self.causes).tolist()
        }


NOBODY = Victims(np.empty(0, np.int64), np.empty(0, np.uint8))


class Selection:
    """The choice of the rows that leave for one rule for tables, a slice at a time."""

    def __init__(self, rule: TableEviction, view: View, excess: int, now: Now) -> None:
        self._rule, self._end, self._now = rule, view.used, now
        self._left = excess  # rows that are still to leave
        self._stage: Literal["range", "select", "take", "done"] = "range"
        self._at = 0  # the next slot of this stage
        self._low, self._high = EMPTY, -EMPTY  # scores of which the last victim's is one
        self._need = excess  # victims with such scores; all rows of lower ones are victims
        self._shift = 0  # a bucket is 2^shift scores
        self._counts = np.zeros(BUCKETS, np.int64)

    @property
    def done(self) -> bool:
        """Whether there is no slice left."""
        return self._stage == "done"

    def slice(self, view: View, limit: int, most: int) -> Victims:
        """Look at up to ``limit`` slots; return up to ``most`` victims, in the last stage."""
        start, stop = self._at, min(self._at + limit, self._end)
        scores = np.empty(stop - start, np.int64)
        self._rule.score(view, start, stop, self._now, scores)
        self._at = stop
        victims = NOBODY
        match self._stage:
            case "range":
                low, high = _range(scores)
                self._low, self._high = min(self._low, int(low)), max(self._high, int(high))
            case "select":
                _histogram(scores, self._low, self._high, self._shift, self._counts)
            case "take":
                self._left = min(self._left, self._rule.excess(view.rows))
                slots = np.empty(min(most, self._left), np.int64)
                found, ties, looked = _lowest(scores, self._high, self._need, slots)
                self._left -= found
                self._need = ties
                self._at = start + looked
                victims = Victims(slots[:found] + start, np.full(found, self._rule.cause, np.uint8))
        if self._at == self._end or not self._left:
            self._next()
        return victims

    def _next(self) -> None:
        """Go on to the next stage."""
        self._at = 0
        if self._stage == "take" or self._low > self._high:
            self._stage = "done"
            return
        self._stage = "take" if self._stage == "select" and self._narrow() else "select"
        self._shift = max(0, (self._high - self._low).bit_length() - 16)
        self._counts[:] = 0

    def _narrow(self) -> bool:
        """Make the bucket of the last victim the range; whether nothing more need be told apart.

        Then all rows below ``high`` are victims, and ``need`` of those with this very score.
        """
        sums = np.cumsum(self._counts)
        bucket = int(np.searchsorted(sums, self._need))
        if bucket == BUCKETS:  # rows left, or have risen, since they were counted
            self._high, self._need = self._high + 1, 0
            return True
        self._need -= int(sums[bucket] - self._counts[bucket])
        self._low += bucket << self._shift
        self._high = min(self._high, self._low + (1 << self._shift) - 1)
        if self._need == self._counts[bucket]:
            self._high, self._need = self._high + 1, 0
            return True
        return self._low == self._high


class Sweep:
    """One pass of rules over the rows of a table, a slice at a time.

    A dry sweep only counts. Then its victims stay, so rules for tables are asked what would be
    left to do for them, and their victims are not looked for.
    """

    def __init__(self, rules: Sequence[Eviction], *, dry: bool = False) -> None:
        self.counts = {rule.cause: 0 for rule in rules}
        self._dry = dry
        self._rows = [rule for rule in rules if isinstance(rule, RowEviction)]
        self._tables = [rule for rule in rules if isinstance(rule, TableEviction)]  # to do
        self._at = 0  # the next slot for the rules for rows
        self._end: int | None = None  # slots that there were at the beginning
        self._selection: Selection | None = None  # for the first of the tables' rules

    @property
    def done(self) -> bool:
        """Whether there is no slice left."""
        return self._end is not None and self._at >= self._end and not self._tables

    def slice(self, view: View, now: Now, limit: int = SLICE, most: int = MOST) -> Victims:
        """Look at up to ``limit`` slots; return up to ``most`` victims.

        They are to be deleted before the next slice; nobody, if the sweep is dry.
        """
        if self._end is None:
            self._end = view.used if self._rows else 0
        if any(rule.reads_rows for rule in self._rows) and self._at < self._end:
            limit = min(limit, max(1, READ // (4 * view.dim)))
        if self._at < self._end:
            victims = self._slice_rows(view, now, min(self._at + limit, self._end), most)
        else:
            victims = self._slice_table(view, now, limit, most)
        for cause, count in zip(*np.unique(victims.causes, return_counts=True), strict=True):
            self.counts[Cause(cause)] += int(count)
        return NOBODY if self._dry else victims

    def _slice_rows(self, view: View, now: Now, stop: int, most: int) -> Victims:
        start = self._at
        causes = np.zeros(stop - start, np.uint8)
        for rule in self._rows:
            rule.mark(view, start, stop, now, causes)
        places = np.flatnonzero(causes)
        self._at = stop
        if len(places) > most and not self._dry:
            places = places[:most]
            self._at = start + int(places[-1]) + 1
        return Victims(places + start, causes[places])

    def _slice_table(self, view: View, now: Now, limit: int, most: int) -> Victims:
        if self._selection is None and self._tables:
            rule = self._tables[0]
            excess = rule.excess(view.rows - (sum(self.counts.values()) if self._dry else 0))
            if not excess or self._dry:
                self.counts[rule.cause] += excess
                del self._tables[0]
                return NOBODY
            self._selection = Selection(rule, view, excess, now)
        if self._selection is None:
            return NOBODY
        victims = self._selection.slice(view, limit, most)
        if self._selection.done:
            self._selection = None
            del self._tables[0]
        return victims


class Evictor:
    """The eviction of one table on one shard: when to sweep, and what to compare rows with.

    Engine thread only. ``tick`` is for the background; for a sweep on demand, and for a dry one,
    take ``sweep`` and call its ``slice`` with ``now`` until it is done.
    """

    def __init__(self, rules: Sequence[Eviction]) -> None:
        require_distinct(rules)
        self._rules = tuple(rules)
        self._step, self._version = FIRST_STEP, 0  # of the table: the largest that was pushed
        self._times = _timeline(rule.seconds for rule in rules if isinstance(rule, TimeTtl))
        self._steps = _timeline(float(rule.steps) for rule in rules if isinstance(rule, StepTtl))
        self._sweep: Sweep | None = None  # in the background
        self._last = Now(FIRST_STEP, 0)  # when that, or the one before it, began

    def pushed(self, version: int, step: int, seconds: float) -> None:
        """There was a push, now or in a log that is replayed.

        seconds  of a clock that goes on while the shard is down: the idle time counts
        """
        self._step, self._version = max(self._step, step), max(self._version, version)
        if self._times is not None:
            self._times.add(version, seconds)
        if self._steps is not None:
            self._steps.add(version, float(step))

    def loaded(self, version: int, step: int) -> None:
        """There are rows of this version and step, pushed nobody knows when."""
        self._step, self._version = max(self._step, step), max(self._version, version)

    def now(self, seconds: float) -> Now:
        """What to compare rows with at a time of that clock."""
        idle = 0 if self._times is None else self._times.version_before(seconds)
        return Now(self._step, self._version, idle)

    @property
    def step(self) -> int:
        """Of the table: the largest that was pushed; FIRST_STEP if none was."""
        return self._step

    def stale(self, seconds: float) -> int:
        """What was last touched at a version up to this one has outlived a TTL; 0: nothing has.

        For counters, which have no steps: a step TTL is kept as closely as Timeline says.
        """
        steps = 0 if self._steps is None else self._steps.version_before(float(self._step))
        return max(steps, self.now(seconds).idle)

    def excess(self, rows: int) -> int:
        """How many of so many rows are too many."""
        tables = (rule for rule in self._rules if isinstance(rule, TableEviction))
        return max((rule.excess(rows) for rule in tables), default=0)

    def due(self, rows: int, seconds: float) -> bool:
        """Whether ``tick`` would do something: a sweep is not done, or one would be worth it."""
        if self._sweep is not None:
            return True
        if not self._rules:
            return False
        now = self.now(seconds)
        return any(rule.due(rows, self._last, now) for rule in self._rules)

    def sweep(self, *, dry: bool = False) -> Sweep:
        """A sweep of all rules that has not begun."""
        return Sweep(self._rules, dry=dry)

    def tick(
        self, view: View, seconds: float, limit: int = SLICE, most: int = MOST
    ) -> dict[Cause, Keys]:
        """Do the next slice of the background; return the keys to delete now, uint64[], by cause.

        limit  slots to look at
        most   keys to return
        """
        if not self.due(view.rows, seconds):
            return {}
        now = self.now(seconds)
        if self._sweep is None:
            self._sweep, self._last = self.sweep(), now
        victims = self._sweep.slice(view, now, limit, most)
        if self._sweep.done:
            self._sweep = None
        return victims.keys(view)

    def again(self) -> None:
        """What the last slice found could not be deleted: begin a new sweep."""
        self._sweep, self._last = None, Now(FIRST_STEP, 0)

    def pack(self) -> bytes:
        """step i64 | version u64 | bytes of times u64 | times | steps, little-endian.

        times, steps   the timelines of the rules; empty where there is no such rule
        """
        times = b"" if self._times is None else self._times.pack()
        steps = b"" if self._steps is None else self._steps.pack()
        return _STATE.pack(self._step, self._version, len(times)) + times + steps

    def load(self, data: bytes) -> None:
        """Take over what ``pack`` returned for the same rules; ValueError if it is not that."""
        if len(data) < _STATE.size:
            raise ValueError(f"{len(data)} bytes are no state of an eviction")
        step, version, size = _STATE.unpack_from(data)
        end = _STATE.size + size
        parts = (self._times, data[_STATE.size : end]), (self._steps, data[end:])
        for timeline, part in parts:
            if bool(part) != (timeline is not None):
                raise ValueError(f"{len(data)} bytes are no state of these eviction rules")
        for timeline, part in parts:
            if timeline is not None:
                timeline.load(part)
        self._step, self._version = step, version


def _timeline(ttls: Iterable[float]) -> Timeline | None:
    return next((Timeline(ttl) for ttl in ttls), None)


def require_distinct(rules: Sequence[Eviction]) -> None:
    """Raise ValueError if two rules evict for the same cause."""
    seen: dict[Cause, Eviction] = {}
    for rule in rules:
        other = seen.setdefault(rule.cause, rule)
        if other is not rule:
            raise ValueError(
                f"evictions {other.name!r} and {rule.name!r} are of one kind; a table takes one"
            )


def make_eviction(name: str, params: Mapping[str, float]) -> Eviction:
    """The eviction rule of that name; parameters left out keep their defaults.

    Raises ValueError naming what is unknown, with what is allowed, or the rule that is broken.
    """
    if name not in EVICTIONS:
        raise ValueError(f"no eviction {name!r}; there are: {', '.join(EVICTIONS)}")
    make: Callable[..., Eviction] = EVICTIONS[name]
    allowed = [field.name for field in fields(EVICTIONS[name])]
    for param in params:
        if param not in allowed:
            has = ", ".join(allowed)
            raise ValueError(f"eviction {name!r} has no parameter {param!r}; it has: {has}")
    return make(**params)


def compile_all() -> None:
    """Run every rule once, so that each kernel is compiled or loaded from the cache."""
    meta = np.ones((2, 3), np.uint64) << np.uint64(16)
    view = View(np.ones((2, 1), np.float32), meta, 2, 2, 1)
    for name in EVICTIONS:
        params = {"max_rows": 1} if issubclass(EVICTIONS[name], Capacity) else {}
        sweep = Sweep([make_eviction(name, params)])
        while not sweep.done:
            sweep.slice(view, Now(1, 1))


EVICTIONS: dict[str, type[Eviction]] = {
    c.name: c for c in (StepTtl, TimeTtl, Norm, CapacityLru, CapacityLfu)
}
