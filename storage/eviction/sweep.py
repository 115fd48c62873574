"""One pass of eviction rules over the rows of a table.

A sweep passes over the slots of a tier in slices, between pushes. First every rule for rows judges
all slots; the first rule that holds for a row is the cause of its eviction. Then each rule for
tables chooses the rows that exceed its limit; see selection.py.

A sweep changes nothing. Its caller deletes the victims of a slice before it asks for the next one,
and writes the deletes and their cause to the log. Slices read metadata in order, 32 bytes per slot.
Only the norm rule reads rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from storage.eviction.contract import Eviction, Now, RowEviction, TableEviction, View
from storage.eviction.rules import EVICTIONS, Capacity, make_eviction
from storage.eviction.selection import NOBODY, Selection, Victims
from storage.records import Cause

SLICE = 1 << 16  # slots per slice
READ = 8 << 20  # bytes of embeddings per slice
MOST = 1 << 13  # victims per slice


class Sweep:
    """One pass of eviction rules over the rows of a table, one slice per call.

    rules   the eviction rules
    counts  number of victims (rows to evict) found so far, by cause
    dry     only count the victims, do not return them
    """

    def __init__(self, rules: Sequence[Eviction], *, dry: bool = False) -> None:
        self.rules = tuple(rules)
        self.counts = {rule.cause: 0 for rule in rules}
        self._dry = dry
        self._rows = [rule for rule in rules if isinstance(rule, RowEviction)]
        self._tables = [rule for rule in rules if isinstance(rule, TableEviction)]  # not done yet
        self._at = 0  # next slot for the rules for rows
        self._end: int | None = None  # number of slots when the sweep began
        self._selection: Selection | None = None  # for the first of ``_tables``

    @property
    def done(self) -> bool:
        """True if the sweep is complete."""
        return self._end is not None and self._at >= self._end and not self._tables

    def slice(self, view: View, now: Now, limit: int = SLICE, most: int = MOST) -> Victims:
        """Scan up to ``limit`` slots, and return up to ``most`` victims; none in a dry sweep.

        view  rows of the table now
        now   values of the table now, for the rules to compare with

        The caller must delete the victims before it asks for the next slice.
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


def compile_all() -> None:
    """Run every rule once, to compile its kernels or load them from the cache."""
    entries = np.ones((2, 4), np.uint64) << np.uint64(16)
    view = View(entries, 2, 2, lambda slots: np.ones(len(slots)), 1)
    for name in EVICTIONS:
        params = {"max_rows": 1} if issubclass(EVICTIONS[name], Capacity) else {}
        sweep = Sweep([make_eviction(name, params)])
        while not sweep.done:
            sweep.slice(view, Now(1, 1))
