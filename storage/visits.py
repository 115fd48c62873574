"""Remember which rows a scan has read, although rows move between tiers while it runs.

There is one bit per place of a row. A row that moves takes its bit with it. A new row counts as
read, because it did not exist when the scan began. A row that moves before it was read may move to
a place that the scan has passed: such places are listed, so that the scan can return to them.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.index import PLACE_BITS, Locations
from storage.kernels import jit

LISTED = 1 << 20  # listed places at which those read meanwhile are taken from the list
_PLACE = np.uint64((1 << PLACE_BITS) - 1)


@jit
def _read_bits(words: Any, at: Any, out: Any) -> None:
    """Write bit at[i] of ``words``, uint64[], to out[i]; False after the end of the array."""
    for i in range(at.shape[0]):
        word = at[i] >> 6
        out[i] = word < words.shape[0] and (words[word] >> np.uint64(at[i] & 63)) & np.uint64(1)


@jit
def _write_bits(words: Any, at: Any, values: Any) -> None:
    """Set bit at[i] of ``words``, uint64[], to values[i]."""
    for i in range(at.shape[0]):
        mask = np.uint64(1) << np.uint64(at[i] & 63)
        if values[i]:
            words[at[i] >> 6] |= mask
        else:
            words[at[i] >> 6] &= ~mask


class Visits:
    """Which rows one scan has read. Use it on the engine thread only.

    strides  code of a tier -> maximum number of rows in an extent. Only for tiers whose places are
             ``extent << 16 | position``; the places of other tiers are the numbers of their bits
    """

    def __init__(self, strides: dict[int, int]) -> None:
        self._strides = strides
        self._words: dict[int, NDArray[np.uint64]] = {}  # bits by code of the tier
        self._listed: list[Locations] = []  # rows that moved before they were read
        self._count = 0  # entries in ``_listed``

    def visit(self, locations: Locations) -> NDArray[np.bool_]:
        """Mark rows as read. Returns which of them were not read before, bool[n]."""
        fresh = ~self._bits(locations)
        self._set(locations, np.ones(len(locations), np.bool_))
        return fresh

    def moved(self, old: Locations | None, new: Locations) -> None:
        """Note that rows moved. ``old`` None: they are new rows."""
        read = np.ones(len(new), np.bool_)
        if old is not None:
            read = ~self.visit(old)  # nothing is left there to be read
        self._set(new, read)
        if not read.all():
            self._list(new[~read])

    def strays(self) -> Locations:
        """Return the places of rows that moved before they were read, and forget the list.

        Ascending and distinct. Some rows may be gone by now. Pass those that are
        not read at once to ``keep``.
        """
        found = np.unique(np.concatenate([np.empty(0, np.uint64), *self._listed]))
        self._listed, self._count = [], 0
        return found[~self._bits(found)]

    def keep(self, locations: Locations) -> None:
        """List places again that ``strays`` returned."""
        self._list(locations)

    def _list(self, locations: Locations) -> None:
        self._listed.append(locations)
        self._count += len(locations)
        if self._count > LISTED:
            self._listed = [self.strays()]
            self._count = len(self._listed[0]) // 2  # so that this stays rare

    def _split(self, locations: Locations) -> list[tuple[int, NDArray[np.int64], NDArray[Any]]]:
        """Return (code of a tier, indices of its locations, number of the bit of each) per tier."""
        codes, parts = locations >> np.uint64(PLACE_BITS), []
        for code in np.unique(codes).tolist():
            chosen = np.flatnonzero(codes == code)
            at = (locations[chosen] & _PLACE).view(np.int64)
            if stride := self._strides.get(code):
                at = (at >> 16) * stride + (at & 0xFFFF)
            parts.append((code, chosen, at))
        return parts

    def _bits(self, locations: Locations) -> NDArray[np.bool_]:
        """Return which rows were read, bool[n]."""
        read = np.empty(len(locations), np.bool_)
        for code, chosen, at in self._split(locations):
            out = np.empty(len(at), np.bool_)
            _read_bits(self._words.get(code, np.empty(0, np.uint64)), at, out)
            read[chosen] = out
        return read

    def _set(self, locations: Locations, read: NDArray[np.bool_]) -> None:
        """Set the bits of rows to ``read``, bool[n]."""
        for code, chosen, at in self._split(locations):
            words = self._words.get(code, np.empty(0, np.uint64))
            needed = int(at.max()) // 64 + 1
            if needed > len(words):
                more = np.zeros(max(needed, 2 * len(words)), np.uint64)
                more[: len(words)] = words
                words = self._words[code] = more
            _write_bits(words, at, read[chosen])


class Watch:
    """The exact scans of one table that are in progress, which must know of every move of a row."""

    def __init__(self) -> None:
        self._scans: weakref.WeakSet[Visits] = weakref.WeakSet()

    def begin(self, strides: dict[int, int]) -> Visits:
        """Begin a scan, which ends when nobody refers to the result; see Visits."""
        visits = Visits(strides)
        self._scans.add(visits)
        return visits

    def moved(self, old: Locations | None, new: Locations) -> None:
        """Note that rows moved. ``old`` None: they are new rows."""
        if self._scans and len(new):
            for visits in self._scans:
                visits.moved(old, new)
