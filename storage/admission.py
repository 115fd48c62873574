"""Which keys may have a row: rules of a table's schema, and the gates that count for them.

A gate counts the occurrences of keys that have no row. A key that is admitted, evicted or deleted
is forgotten: if it comes back without a row, it starts again from zero.

A push is whole or nothing, so asking and counting are two calls: ``weigh`` changes nothing, rows
are made for what it admits, which may find no memory, and ``settle`` counts. A count travels with
the log as what it became (``put``), never as what was added, so a record may be replayed again.
A record or checkpoint may bring back a counter that was dropped for age or room since; its count
is true, so it does no harm. One that makes rows is replayed with ``forget``.

To add one: write the rule and its gate, add the rule to ADMISSIONS. Nothing else changes; the tests
run over the dict.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from storage.arena import Arena, Budget
from storage.index import SEGMENT, Index
from storage.kernels import Keys, inline, jit, mix64, prefetch

COUNT_BITS = 24  # of an exact counter; the 40 above hold its version
MOST = (1 << COUNT_BITS) - 1
LAST_VERSION = (1 << 64 - COUNT_BITS) - 1  # later versions count as this one; 35 years at 1000/s
LARGEST = (1 << 32) - 1  # a total stops counting there, as frequencies do
PLANNED = 30 / 64  # share of a sketch's cells in use when the expected keys wait
FULL = 31 / 64  # share at which it ages
SMALLEST = 1 << 12  # cells; in fewer, the share in use depends on luck
HALVED = 1 << 18  # cells halved at a time, or 64 for each cell counted if that is more
AHEAD = 8  # keys whose cells are asked for before they are needed
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd

Admitted = NDArray[np.bool_]
Counts = NDArray[np.uint32]
Versions = NDArray[np.uint64]


class Gate(ABC):
    """The counters of one table on one shard; engine thread only.

    Calls take keys without a row, uint64[n], distinct within a call.
    """

    counting: ClassVar[bool] = False  # whether keys that wait have counters
    cap: int = 0  # keys that it is made to count at a time
    dropped: int = 0  # counters that went for age or for room, so far
    edits: int = 0  # grows whenever ``cells`` change

    @property
    def forgets(self) -> str:
        """How a key may have been pushed that has neither row nor counter; empty: it was not."""
        return ""

    @abstractmethod
    def weigh(self, keys: Keys, counts: Counts, version: int) -> tuple[Admitted, Counts]:
        """Which keys of a push are to have a row; changes nothing.

        counts   uint32[n]  occurrences in this push
        version  of this push

        Returns bool[n], and uint32[n]: the occurrences so far with those of this push, which is
        an admitted key's first frequency, and the counter's next value for any other.
        """

    def settle(
        self, keys: Keys, counts: Counts, admitted: Admitted, totals: Counts, version: int
    ) -> None:
        """Count what ``weigh`` said of the same push; all or, with OutOfMemory, nothing.

        No other call may have changed the gate in between.
        """
        return  # unless a gate counts

    def admit(self, keys: Keys, counts: Counts, version: int) -> tuple[Admitted, Counts]:
        """``weigh`` and ``settle``, for callers that need nothing in between."""
        admitted, totals = self.weigh(keys, counts, version)
        self.settle(keys, counts, admitted, totals, version)
        return admitted, totals

    def waiting(self, keys: Keys) -> Counts:
        """Occurrences so far, uint32[n]; changes nothing."""
        return np.zeros(len(keys), np.uint32)

    def forget(self, keys: Keys) -> None:
        """Start keys again from zero, those without a counter included."""
        return  # unless a gate counts

    def expire(self, before: int, limit: int = SEGMENT) -> None:
        """Let go of counters last touched before a version; each call looks at the next ones.

        limit  places looked at, about; calls with the same ``before`` see all of them in turn
        """
        return  # unless a gate counts

    def put(self, keys: Keys, totals: Counts, versions: Versions) -> None:
        """Write counters as a record or a block has them; newer ones stay.

        All of it happens or, with OutOfMemory, nothing.
        """
        return  # unless a gate counts

    def changed(self, after: int) -> Iterator[tuple[Keys, Counts, Versions]]:
        """Counters of versions above ``after``, a slice at a time; pushes may go on in between.

        Every counter that stays comes at least once. Sketches have ``cells`` instead.
        """
        return iter(())

    def cells(self) -> NDArray[Any]:
        """All of a sketch, a read-only view that the next push changes; empty for other gates.

        Parts that are read at different versions are one good copy as soon as what was pushed
        meanwhile was ``put``.
        """
        return np.empty(0, np.uint8)

    def load_cells(self, start: int, data: NDArray[np.uint8]) -> None:
        """Take over the bytes from ``start`` on of what ``cells`` of an equal gate returned.

        All parts, each a whole number of cells, make an equal gate. Raises ValueError if it cannot
        have been the same rule.
        """
        size = self.cells().nbytes
        if start < 0 or start + len(data) > size:
            raise ValueError(
                f"a sketch of {size} bytes has no bytes {start}..{start + len(data) - 1}"
            )

    def begin(self, version: int) -> None:
        """All that was stored is loaded, and pushes go on behind this version.

        Raises ValueError if only a part of a sketch was loaded.
        """
        return  # unless a gate ages

    @property
    def entries(self) -> int:
        """Keys waiting; for a sketch, estimated."""
        return 0

    @property
    def bytes(self) -> int:
        """Bytes taken from the budget."""
        return 0

    def close(self) -> None:
        """Return the memory."""
        return  # unless a gate has any


def _sum(before: Counts, counts: Counts) -> Counts:
    """Totals, which stop counting at LARGEST."""
    return np.minimum(np.add(before, counts, dtype=np.uint64), LARGEST).astype(np.uint32)


# ---- always


class AlwaysGate(Gate):
    """Keeps no counters."""

    def weigh(self, keys: Keys, counts: Counts, version: int) -> tuple[Admitted, Counts]:
        return np.ones(len(keys), np.bool_), counts.astype(np.uint32)


# ---- counter


@jit
def _used(entries: Any, start: int, stop: int, keys: Any, counters: Any) -> Any:
    """Copy the entries in use of start..stop-1 to the front of two arrays; return how many."""
    used = np.uint64(0)
    for i in range(np.uint64(start), np.uint64(stop)):
        keys[used] = entries[i, 0]
        counters[used] = entries[i, 1]
        used += np.uint64(entries[i, 1] != 0)
    return used


class Counters(Index):
    """An index whose locations are counters: version << COUNT_BITS | count."""

    @property
    def segments(self) -> int:
        """Segments, of up to SEGMENT keys each; a split adds one at the end. None once closed."""
        return len(self._depths) if self.bytes else 0

    def segment(self, number: int) -> tuple[Keys, NDArray[np.uint64]]:
        """Keys and counters of one segment, as copies."""
        keys, counters = np.empty(SEGMENT, np.uint64), np.empty(SEGMENT, np.uint64)
        start = number * SEGMENT
        used = int(_used(self._entries.array, start, start + SEGMENT, keys, counters))
        return keys[:used], counters[:used]


class CountingGate(Gate):
    """Admits a key once its occurrences reach a threshold."""

    counting: ClassVar[bool] = True
    _threshold: int

    def weigh(self, keys: Keys, counts: Counts, version: int) -> tuple[Admitted, Counts]:
        totals = _sum(self.waiting(keys), counts)
        return totals >= self._threshold, totals


class CounterGate(CountingGate):
    """Exact counters in a hash table.

    Above the cap the stalest go, by (version, count): the hash spreads keys evenly over the
    segments of the index, so the stalest sixteenth of one segment is a fair sample of the stalest
    sixteenth of all. Segments take turns; with only one, the choice is exact. A push that adds n
    counters makes about n go, and looks at one segment for every thousand or so of them.
    """

    def __init__(self, threshold: int, cap: int, budget: Budget) -> None:
        self.cap = cap
        self._threshold = threshold
        self._counters = Counters(budget)
        self._next_full = 0  # segment to take from when there are too many
        self._next_old = 0  # segment to look through for old ones

    @property
    def forgets(self) -> str:
        return f"{self.dropped} counters were dropped for age or room" if self.dropped else ""

    @property
    def entries(self) -> int:
        return len(self._counters)

    @property
    def bytes(self) -> int:
        return self._counters.bytes

    def settle(
        self, keys: Keys, counts: Counts, admitted: Admitted, totals: Counts, version: int
    ) -> None:
        added = ~admitted & (totals == counts) & (totals > 0)
        known = ~admitted & (totals > counts)
        counters = _pack(totals, np.uint64(version))
        self._counters.insert(keys[added], counters[added])  # first: it is what may fail
        self._counters.assign(keys[known], counters[known])
        self._counters.remove(keys[admitted])
        self._trim()

    def waiting(self, keys: Keys) -> Counts:
        return _count_of(self._counters.find(keys)[0])

    def forget(self, keys: Keys) -> None:
        self._counters.remove(keys)

    def expire(self, before: int, limit: int = SEGMENT) -> None:
        for _ in range(min(max(1, limit // SEGMENT), self._counters.segments)):
            keys, counters = self._counters.segment(self._next_old)
            self._drop(keys[_version_of(counters) < before])
            self._next_old = (self._next_old + 1) % self._counters.segments

    def put(self, keys: Keys, totals: Counts, versions: Versions) -> None:
        counters = _pack(totals, versions)
        held, _ = self._counters.find(keys)
        added = (held == 0) & (totals > 0)
        newer = (held != 0) & (counters > held)
        self._counters.insert(keys[added], counters[added])
        self._counters.assign(keys[newer], counters[newer])
        self._trim()

    def changed(self, after: int) -> Iterator[tuple[Keys, Counts, Versions]]:
        number = 0
        while number < self._counters.segments:  # what a split takes out of reach comes later
            keys, counters = self._counters.segment(number)
            new = _version_of(counters) > min(after, LAST_VERSION - 1)
            if new.any():
                yield keys[new], _count_of(counters[new]), _version_of(counters[new])
            number += 1

    def close(self) -> None:
        self._counters.close()

    def _trim(self) -> None:
        """Drop stale counters until no more than the cap are left."""
        while (excess := len(self._counters) - self.cap) > 0:
            segments = self._counters.segments
            keys, counters = self._counters.segment(self._next_full)
            self._next_full = (self._next_full + 1) % segments
            count = min(len(keys), max(1, len(keys) // 16, excess // segments))
            if count:
                self._drop(keys[np.argpartition(counters, count - 1)[:count]])

    def _drop(self, keys: Keys) -> None:
        self.dropped += self._counters.remove(keys)


def _pack(totals: Counts, versions: Any) -> NDArray[np.uint64]:
    """Counters of counts and versions."""
    stamps = np.minimum(versions, np.uint64(LAST_VERSION)) << np.uint64(COUNT_BITS)
    counters: NDArray[np.uint64] = stamps | np.minimum(totals, MOST).astype(np.uint64)
    return counters


def _count_of(counters: NDArray[np.uint64]) -> Counts:
    return (counters & np.uint64(MOST)).astype(np.uint32)


def _version_of(counters: NDArray[np.uint64]) -> Versions:
    return counters >> np.uint64(COUNT_BITS)


# ---- sketch
#
# cells   uint8[m] or uint16[m]   a key's count is in each of its k cells, with those of others
# keys    uint64[n]
#
# Cell i of a key is at (h + i s) m / 2^64, with s odd: two hashes do for k (Kirsch and
# Mitzenmacher, "Less hashing, same performance: building a better Bloom filter", ESA 2006).


@inline
def _stride(hashed: Any) -> Any:
    return mix64(hashed + np.uint64(GOLDEN)) | np.uint64(1)


@inline
def _cell(hashed: Any, m: Any) -> Any:
    """A hash's cell, for m up to 2^32: the product of its upper half with m, halved again."""
    return ((hashed >> np.uint64(32)) * np.uint64(m)) >> np.uint64(32)


@jit
def _prefetch_cells(cells: Any, salt: Any, k: int, key: Any) -> None:
    hashed = mix64(key ^ salt)
    stride = _stride(hashed)
    for _ in range(k):
        prefetch(cells, np.int64(_cell(hashed, cells.shape[0])), 0)
        hashed += stride


@jit
def _estimate(cells: Any, salt: Any, k: int, keys: Any, out: Any) -> None:
    """out[i], uint32: the least of the cells of keys[i], which is its count unless all are shared.

    Prefetches some keys ahead: k random cells are k cache misses, and in a batch they can overlap.
    """
    n = keys.shape[0]
    for i in range(min(AHEAD, n)):
        _prefetch_cells(cells, salt, k, keys[i])
    for i in range(n):
        if i + AHEAD < n:
            _prefetch_cells(cells, salt, k, keys[i + AHEAD])
        hashed = mix64(keys[i] ^ salt)
        stride = _stride(hashed)
        least = np.uint32(0xFFFFFFFF)
        for _ in range(k):
            least = min(least, np.uint32(cells[_cell(hashed, cells.shape[0])]))
            hashed += stride
        out[i] = least


@jit
def _add(cells: Any, salt: Any, k: int, most: int, keys: Any, amounts: Any) -> Any:
    """Add to the cells of every key; return how many more cells are in use.

    most     what a cell counts to; one that has reached it no longer knows what it holds, so
             nothing is taken from it
    amounts  int64[n]  negative to take out
    """
    n = keys.shape[0]
    more = 0
    for i in range(min(AHEAD, n)):
        _prefetch_cells(cells, salt, k, keys[i])
    for i in range(n):
        if i + AHEAD < n:
            _prefetch_cells(cells, salt, k, keys[i + AHEAD])
        hashed = mix64(keys[i] ^ salt)
        stride = _stride(hashed)
        for _ in range(k):
            at = _cell(hashed, cells.shape[0])
            hashed += stride
            held = np.int64(cells[at])
            if held == most and amounts[i] < 0:
                continue
            new = min(max(held + amounts[i], np.int64(0)), np.int64(most))
            more += int(new > 0) - int(held > 0)
            cells[at] = new
    return more


class SketchGate(CountingGate):
    """A counting Bloom filter.

    Fan, Cao, Almeida and Broder, "Summary cache: a scalable wide-area web cache sharing protocol",
    IEEE/ACM Transactions on Networking 8 (2000). A cell holds the sum of the counts of its keys.
    (Conservative update would raise only a key's least cells. A cell then holds a maximum, from
    which no key can be taken out again: the keys that share cells with an admitted one lose their
    counts, and in streams of Zipf's law more than a tenth of admissions come late.)

    Early: a key is admitted before its time only if every one of its k cells is shared. As the
    sketch ages, at most half the cells are in use, so at most 2^-k <= error_rate of keys: a push is
    weighed before it counts, and ages the sketch behind it, 64 cells for each that it counted.

    Late: by nothing, but for these.
    - Ageing halves all counts, rounding down, a slice with every push, when FULL of the cells are
      in use (more keys wait than were expected), and once in a TTL through ``expire``. What is
      counted while it goes on may be halved too. A push of more new keys than were expected is
      halved at once, until no more than FULL of the cells are in use.
    - A key whose own estimate was too high takes out more than it had brought in. Those that share
      cells with it, k ln 2 of them on average, lose up to their whole count, so each is late by
      less than the threshold. It takes a key of the rare kind that is admitted early.
    - A cell that reached its maximum is not taken from until ageing halves it, which loses what it
      could not count. That takes some 8 keys close to the threshold in one cell.
    """

    def __init__(self, rule: Sketch, budget: Budget, seed: int) -> None:
        self.cap = rule.expected_keys
        self._threshold = rule.threshold
        self._k = rule.hashes
        self._salt = np.uint64(mix64(np.uint64(seed)))
        self._arena = Arena(1, rule.dtype, budget)
        self._arena.grow(rule.cells)
        self._cells = self._arena.array.reshape(-1)[: rule.cells]
        self._most = int(np.iinfo(rule.dtype).max)
        self._used = 0  # cells above 0
        self._halved = rule.cells  # cells up to here were halved since ageing began
        self._version = 0  # of the last push
        self._aged = 0  # the version at which it last began to age
        self._loaded = 0  # bytes of cells that were stored

    @property
    def forgets(self) -> str:
        return "a sketch loses counts as it ages"

    @property
    def entries(self) -> int:
        """From the share of cells in use: Swamidass and Baldi, J. Chem. Inf. Model. 47 (2007)."""
        m = len(self._cells)
        if not m:  # closed
            return 0
        return round(-m / self._k * math.log1p(-min(self._used, m - 1) / m))

    @property
    def bytes(self) -> int:
        return self._arena.bytes

    def settle(
        self, keys: Keys, counts: Counts, admitted: Admitted, totals: Counts, version: int
    ) -> None:
        self._version = max(self._version, version)
        self.forget(keys[admitted])
        self._add(keys[~admitted], counts[~admitted].astype(np.int64))
        self._keep_up(len(keys))

    def waiting(self, keys: Keys) -> Counts:
        out = np.empty(len(keys), np.uint32)
        _estimate(self._cells, self._salt, self._k, _readonly(keys), out)
        return out

    def forget(self, keys: Keys) -> None:
        self._add(keys, -self.waiting(keys).astype(np.int64))

    def expire(self, before: int, limit: int = SEGMENT) -> None:
        if before > self._aged and self._used:
            self._age()
        self._halve(limit)

    def put(self, keys: Keys, totals: Counts, versions: Versions) -> None:
        """Here counts have no versions: what a key lacks is added, so that nothing is lowered."""
        self._version = max(self._version, int(versions.max(initial=0)))
        lacking = totals.astype(np.int64) - self.waiting(keys)
        self._add(keys, np.maximum(lacking, 0))
        self._keep_up(len(keys))

    def cells(self) -> NDArray[Any]:
        cells: NDArray[Any] = _readonly(self._cells)
        return cells

    def load_cells(self, start: int, data: NDArray[np.uint8]) -> None:
        super().load_cells(start, data)
        size = self._cells.itemsize
        held, cells = (
            self._cells[start // size :][: len(data) // size],
            data.view(self._cells.dtype),
        )
        self._used += int(np.count_nonzero(cells)) - int(np.count_nonzero(held))
        held[:] = cells
        self._halved = len(self._cells)
        self._loaded += len(data)

    def begin(self, version: int) -> None:
        size = self._cells.nbytes
        if self._loaded not in (0, size):
            raise ValueError(f"{self._loaded} bytes are no sketch of {size} bytes")
        self._version = self._aged = version

    def close(self) -> None:
        self._cells = self._cells[:0].copy()
        self._arena.close()

    def _add(self, keys: Keys, amounts: NDArray[np.int64]) -> None:
        arrays = _readonly(keys), _readonly(amounts)
        self._used += _add(self._cells, self._salt, self._k, self._most, *arrays)
        self.edits += len(keys)

    def _keep_up(self, keys: int) -> None:
        """So many keys were counted: age while too many cells are in use, but not for long."""
        left = max(HALVED, 64 * self._k * keys)
        while left > 0:
            if self._used > FULL * len(self._cells):
                self._age()
            if not (done := self._halve(left)):
                return
            left -= done

    def _age(self) -> None:
        """Begin to halve all cells, unless that is still going on."""
        if self._halved == len(self._cells):
            self._halved = 0
            self._aged = max(self._version, self._aged)

    def _halve(self, limit: int) -> int:
        """Halve up to ``limit`` of the next cells, if the sketch ages; how many they were."""
        cells = self._cells[self._halved : self._halved + limit]
        self._used -= int(np.count_nonzero(cells == 1))
        cells >>= 1
        self._halved += len(cells)
        self.edits += len(cells)
        return len(cells)


# ---- probability


@jit
def _draw(keys: Any, counts: Any, seed: Any, version: Any, p: float, out: Any) -> None:
    """out[i] = whether one of counts[i] draws of probability p succeeds, by a single number.

    That number is output ``version`` of the key's own stream, as in initializers.py: the same
    whatever the batch. The seed is mixed first, so that the streams are not those of the initial
    values.
    """
    start = mix64(seed + np.uint64(GOLDEN))
    position = (version + np.uint64(1)) * np.uint64(GOLDEN)
    failure = np.log1p(-p)  # -inf for p = 1
    for i in range(keys.shape[0]):
        bits = mix64(mix64(keys[i] ^ start) + position)
        chance = -np.expm1(np.float64(counts[i]) * failure)
        out[i] = counts[i] > 0 and np.float64(bits >> np.uint64(11)) * 2.0**-53 < chance


class ProbabilityGate(Gate):
    """Keeps no counters: what happened before does not matter."""

    def __init__(self, p: float, seed: int) -> None:
        self._p = p
        self._seed = np.uint64(seed)

    @property
    def forgets(self) -> str:
        return "keys that were pushed and not drawn are not remembered"

    def weigh(self, keys: Keys, counts: Counts, version: int) -> tuple[Admitted, Counts]:
        admitted = np.empty(len(keys), np.bool_)
        arrays = _readonly(keys), _readonly(counts)
        _draw(*arrays, self._seed, np.uint64(version), self._p, admitted)
        return admitted, counts.astype(np.uint32)


# ---- the rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission(ABC):
    """When a key may have a row. Parameters are checked at birth."""

    name: ClassVar[str]

    def on(self, share: float) -> Self:
        """The rule for a shard that has this share of the keys, 0..1."""
        return self  # unless a parameter is of the whole table

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int":
                value = getattr(self, field.name)
                whole = isinstance(value, Real) and float(value).is_integer()
                self._require(field.name, whole, "a whole number")
                object.__setattr__(self, field.name, int(value))
        self._check()

    def _check(self) -> None:
        """Refuse numbers that make no sense."""
        return  # there are none, unless a rule says otherwise

    def _require(self, field: str, holds: bool, rule: str) -> None:
        if not holds:
            value = getattr(self, field)
            raise ValueError(f"admission {self.name!r}: {field} must be {rule}, got {value!r}")

    @abstractmethod
    def gate(self, budget: Budget, seed: int) -> Gate:
        """A gate without counters; OutOfMemory if the budget does not allow it.

        seed  what table_seed returned
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Always(Admission):
    """At the first push."""

    name: ClassVar[str] = "always"

    def gate(self, budget: Budget, seed: int) -> Gate:
        return AlwaysGate()


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter(Admission):
    """At the push with its ``threshold``-th occurrence, exactly.

    20 to 51 bytes for each waiting key, 27 on average. Exact as long as no more than ``max_keys``
    wait; then the stalest start again.
    """

    name: ClassVar[str] = "counter"

    threshold: int = 2  # occurrences
    max_keys: int = 10_000_000  # waiting, over all shards

    def _check(self) -> None:
        self._require("threshold", 1 <= self.threshold <= MOST, f"in 1..{MOST}")
        self._require("max_keys", 1 <= self.max_keys <= 1 << 36, "in 1..2^36")

    def on(self, share: float) -> Self:
        return replace(self, max_keys=math.ceil(self.max_keys * share))

    def gate(self, budget: Budget, seed: int) -> Gate:
        return CounterGate(self.threshold, self.max_keys, budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch(Admission):
    """As Counter, from a sketch of fixed size: early for a few keys, 11 bytes a key at 1 %.

    The size is that of a Bloom filter (Bloom, "Space/time trade-offs in hash coding with allowable
    errors", CACM 13, 1970): for n keys, k = log2(1 / error_rate) cells each, rounded up, and
    m = n k / -ln(1 - PLANNED) cells in all, so that n keys leave 1 - PLANNED of them empty. That
    is a little below the half which is best; the rest is for luck, and for what is counted while
    the sketch ages.
    """

    name: ClassVar[str] = "sketch"

    threshold: int = 2  # occurrences
    expected_keys: int = 1_000_000  # waiting, over all shards
    error_rate: float = 0.01  # of keys that may be admitted early

    def _check(self) -> None:
        self._require("threshold", 1 <= self.threshold <= 1 << 13, "in 1..8192")
        self._require("expected_keys", 1 <= self.expected_keys <= 1 << 32, "in 1..2^32")
        rate = isinstance(self.error_rate, Real) and 1e-6 <= self.error_rate <= 0.5
        self._require("error_rate", rate, "in 1e-6..0.5")
        object.__setattr__(self, "error_rate", float(self.error_rate))
        rule = f"such that 2^32 cells are enough, not {self.cells}"
        self._require("expected_keys", self.cells <= 1 << 32, rule)

    def on(self, share: float) -> Self:
        return replace(self, expected_keys=math.ceil(self.expected_keys * share))

    @property
    def hashes(self) -> int:
        """Cells of a key."""
        return max(1, math.ceil(-math.log2(self.error_rate)))

    @property
    def cells(self) -> int:
        """Cells in all."""
        wanted = math.ceil(self.expected_keys * self.hashes / -math.log1p(-PLANNED))
        return max(SMALLEST, wanted)

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """Of a cell: room for the counts of eight keys that are about to be admitted."""
        return np.uint8 if self.threshold <= 32 else np.uint16

    @property
    def bytes(self) -> int:
        """What a gate takes, but for rounding up."""
        return self.cells * np.dtype(self.dtype).itemsize

    def gate(self, budget: Budget, seed: int) -> Gate:
        return SketchGate(self, budget, seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probability(Admission):
    """At each occurrence with probability ``p``, by a draw from (seed, key, version)."""

    name: ClassVar[str] = "probability"

    p: float = 0.1

    def _check(self) -> None:
        self._require("p", isinstance(self.p, Real) and 0 < self.p <= 1, "above 0 and at most 1")
        object.__setattr__(self, "p", float(self.p))

    def gate(self, budget: Budget, seed: int) -> Gate:
        return ProbabilityGate(self.p, seed)


def make_admission(name: str, params: Mapping[str, float]) -> Admission:
    """The admission rule of that name; parameters left out keep their defaults.

    Raises ValueError naming what is unknown, with what is allowed, or the rule that is broken.
    """
    if name not in ADMISSIONS:
        raise ValueError(f"no admission {name!r}; there are: {', '.join(ADMISSIONS)}")
    make: Callable[..., Admission] = ADMISSIONS[name]
    allowed = [field.name for field in fields(ADMISSIONS[name])]
    for param in params:
        if param not in allowed:
            has = ", ".join(allowed) or "none"
            raise ValueError(f"admission {name!r} has no parameter {param!r}; it has: {has}")
    return make(**params)


def compile_all() -> None:
    """Run every gate once, so that each kernel is compiled or loaded from the cache."""
    small = Sketch(expected_keys=1)
    every = [make_admission(name, {}) for name in ADMISSIONS if name != small.name]
    for rule in (*every, small, Sketch(threshold=100, expected_keys=1)):
        gate = rule.gate(Budget(1 << 30), 0)
        keys, ones = np.arange(2, dtype=np.uint64), np.ones(2, np.uint32)
        gate.admit(keys, ones, 1)
        gate.put(keys, ones, ones.astype(np.uint64))
        gate.forget(keys)
        gate.expire(1)
        gate.close()


def _readonly(array: Any) -> Any:
    """A view that cannot be written: decoded arrays are such, and each kernel has one signature."""
    view = array.view()
    view.flags.writeable = False
    return view


ADMISSIONS: dict[str, type[Admission]] = {c.name: c for c in (Always, Counter, Sketch, Probability)}
