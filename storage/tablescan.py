"""Read all rows of a table in slices while pushes continue: those in memory, then those in blocks.

    TableScan  rows of some versions, for subscribers: a row that moves may be found twice
    ExactScan  all rows, for exports and analyses: each exactly once, wherever it moves

The engine thread copies rows in memory, because pushes change them. Blocks never change, so another
thread reads them from the disk; the scan keeps the block that it is reading from being deleted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.index import PLACE_BITS, Locations, locations_of, places
from storage.kernels import Rows, Slots
from storage.slots import LOOK, VERSION, Meta
from storage.tiers.base import Scan, Writable
from storage.tiers.lmdb import Blocks
from storage.tierstats import by_tier
from storage.visits import Watch

ALL = (1 << 48) - 1  # the largest version
_PLACE = (1 << PLACE_BITS) - 1


class TableScan:
    """A scan of all rows of a table. See Scan for the contract.

    ``start`` of ``find`` is the index of a tier << 56 | ``start`` of the tier's scan. A place is a
    location, an int64. All rows that one call of ``find`` returns are in one tier.

    A row that moves during the scan may be found more than once, with the same version. No row is
    missed that exists and keeps its version throughout.
    """

    def __init__(self, host: Writable, blocks: Blocks | None) -> None:
        """Begin a scan of rows in memory, and then of the cold rows of blocks."""
        self._scans: list[tuple[int, Scan]] = [(host.code, host.look())]
        if blocks is not None:
            self._scans.append((blocks.code, blocks.scan()))
        self._by_code = dict(self._scans)
        self._changing = host.code

    def changes(self, places: Slots) -> bool:
        """Return whether pushes may change rows from ``find``: the engine must copy them then."""
        return bool(len(places)) and int(places[0]) >> PLACE_BITS == self._changing

    def find(
        self, start: int, after: int, upto: int, limit: int, look: int = LOOK
    ) -> tuple[Slots, int | None]:
        at = start >> PLACE_BITS
        if at >= len(self._scans):
            return np.empty(0, np.int64), None
        code, scan = self._scans[at]
        places, following = scan.find(start & _PLACE, after, upto, limit, look)
        if following is not None:
            following |= at << PLACE_BITS
        elif at + 1 < len(self._scans):
            following = at + 1 << PLACE_BITS
        return places | np.int64(code << PLACE_BITS), following

    def copy(self, places: Slots, frequencies: NDArray[Any], rows: Rows) -> Meta:
        if not len(places):
            return np.empty((0, 4), np.uint64)
        return self._scan_of(places).copy(places & _PLACE, frequencies, rows)

    def measure(self, places: Slots, norms: NDArray[Any]) -> Meta:
        if not len(places):
            return np.empty((0, 4), np.uint64)
        return self._scan_of(places).measure(places & _PLACE, norms)

    def read(self, places: Slots, out: Rows) -> None:
        if len(places):
            self._scan_of(places).read(places & _PLACE, out)

    def _scan_of(self, places: Slots) -> Scan:
        return self._by_code[int(places[0]) >> PLACE_BITS]


@dataclass(frozen=True, slots=True)
class Part:
    """Copies of some rows of one tier."""

    tier: str  # name of the tier
    meta: Meta  # uint64[n, 4]
    frequencies: NDArray[np.uint64]  # [n]
    rows: Rows  # float32[n, k]  the first k numbers of each row
    norms: NDArray[np.float64]  # [n]  L2 norms of the embeddings; empty if not wanted


class ExactScan:
    """A scan that reads every row of a table exactly once, although rows move between tiers.

    A row is read as it is at that moment. Rows that are created or deleted meanwhile may be read or
    not.

    done  True when all rows were read
    """

    def __init__(self, host: Writable, blocks: Blocks | None, watch: Watch) -> None:
        """Begin a scan of rows in memory, and then of the cold rows of blocks.

        watch  tells the scan when rows move
        """
        self.done = False
        self._host, self._slots = host, host.look()
        self._blocks = blocks
        self._cold = None if blocks is None else blocks.scan()
        self._visits = watch.begin({} if blocks is None else {blocks.code: blocks.records.most})
        self._read: list[Callable[[], Part]] = []  # rows that were copied but not returned yet
        self._slot: int | None = 0  # next slot in memory; None: all were visited
        self._start: int | None = 0 if blocks else None  # next row in blocks; None: all visited

    def next(self, limit: int, width: int, norms: bool = False) -> Callable[[], Part]:
        """Choose the next rows, at most ``limit``. Only the engine thread may call this.

        width  how many numbers of each row to copy
        norms  also compute the norms of the embeddings

        Returns a function that returns the rows; another thread must call it before the next call
        of ``next``. It raises Corrupt if a row on disk is damaged.
        """
        wanted = _Wanted(width, norms)
        if self._read:
            return self._read.pop()
        if self._slot is not None:
            found, self._slot = self._slots.find(self._slot, 0, ALL, limit)
            return self._take_slots(found, wanted)
        if self._cold is not None and self._blocks is not None:
            if self._start is not None:
                found, self._start = self._cold.cold_places(self._start, limit)
                fresh = self._visits.visit(locations_of(found, self._blocks.code))
                return wanted.later(self._blocks.name, self._cold, found[fresh])
            strays = self._visits.strays()
            if len(strays):
                return self._take_strays(self._blocks, strays, limit, wanted)
        self.done = True
        return wanted.later(self._host.name, self._slots, np.empty(0, np.int64))

    def _take_slots(self, slots: Slots, wanted: _Wanted) -> Callable[[], Part]:
        """Copy rows in memory that were not read yet."""
        slots = slots[self._visits.visit(locations_of(slots, self._host.code))]
        every = np.arange(len(slots))
        parts = [each for each in by_tier(self._host, every, slots) if len(each[1])]
        for tier, at in parts or [(self._host.name, every)]:
            part = wanted.read(tier, self._slots, slots[at])
            self._read.append(partial(_identity, part))
        return self._read.pop()

    def _take_strays(
        self, blocks: Blocks, strays: Locations, limit: int, wanted: _Wanted
    ) -> Callable[[], Part]:
        """Read some rows that moved before they were read: rows in memory, or rows of one block."""
        slots, others = places(strays, self._host.code)
        slots = slots[slots >= 0]
        if len(slots):
            self._visits.keep(strays[len(slots) :] if others else strays[:0])
            self._visits.keep(locations_of(slots[limit:], self._host.code))
            slots = slots[:limit]
            there = self._host.meta(slots)[:, VERSION] != 0
            return self._take_slots(slots[there], wanted)
        cold = places(strays, blocks.code)[0]
        extent = int(cold[0]) >> 16
        chosen = cold[: int(np.searchsorted(cold, extent + 1 << 16))][:limit]
        self._visits.keep(strays[len(chosen) :])
        self._visits.visit(strays[: len(chosen)])
        assert self._cold is not None
        found = self._cold.hold(chosen)
        return wanted.later(blocks.name, self._cold, found)


def _identity(part: Part) -> Part:
    return part


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What to read of each row; see ``ExactScan.next``."""

    width: int
    norms: bool

    def read(self, tier: str, scan: Scan, places: Slots) -> Part:
        """Copy rows of the tier with the name ``tier``."""
        n = len(places)
        frequencies, norms = np.empty(n, np.uint64), np.empty(n if self.norms else 0, np.float64)
        rows = np.empty((n, self.width), np.float32)
        meta = np.empty((n, 4), np.uint64)
        if n and self.norms:
            meta = scan.measure(places, norms)
            frequencies[:] = meta[:, 3]
            if self.width:
                scan.read(places, rows)
        elif n:
            meta = scan.copy(places, frequencies, rows)
        return Part(tier, meta, frequencies, rows, norms)

    def later(self, tier: str, scan: Scan, places: Slots) -> Callable[[], Part]:
        """Return a function that copies rows of the tier with the name ``tier``."""
        return lambda: self.read(tier, scan, places)
