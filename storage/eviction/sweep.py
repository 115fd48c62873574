"""One pass of eviction rules over the rows of a table.

A sweep passes over the rows of a table in slices, between pushes; see passes.py. First every rule
for rows judges all rows; the first rule that holds for a row is the cause of its eviction. Then
each rule for tables chooses the rows that exceed its limit; see selection.py.

A sweep changes nothing. Its caller deletes the victims of a slice before it asks for the next one,
and writes the deletes and their cause to the log. Slices read metadata in order, 32 bytes per row.
Only the norm rule reads embeddings, and only those of rows in memory: blocks on disk have norms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from storage.eviction.contract import (
    Bounds,
    Contents,
    Eviction,
    Now,
    RowEviction,
    TableEviction,
    View,
)
from storage.eviction.passes import Pass
from storage.eviction.rules import EVICTIONS, Capacity, make_eviction
from storage.eviction.selection import NOBODY, Selection, Victims, victims_of
from storage.records import Cause

SLICE = 1 << 16  # slots per slice
READ = 8 << 20  # bytes of embeddings per slice
MOST = 1 << 13  # victims per slice


class Sweep:
    """One pass of eviction rules over the rows of a table, one slice per call.

    rules   the eviction rules
    counts  number of victims (rows to evict) found so far, by cause
    wanted  function that another thread should call before the next slice, because it reads a block
            from the disk that the slice needs; None: there is none
    dry     only count the victims, do not return them
    """

    def __init__(self, rules: Sequence[Eviction], *, dry: bool = False) -> None:
        self.rules = tuple(rules)
        self.counts = {rule.cause: 0 for rule in rules}
        self.wanted: Callable[[], None] | None = None
        self._dry = dry
        self._rows = [rule for rule in rules if isinstance(rule, RowEviction)]
        self._norms = any(rule.reads_norms for rule in self._rows)
        self._tables = [rule for rule in rules if isinstance(rule, TableEviction)]  # not done yet
        self._pass: Pass | None = None  # of the rules for rows; None: not begun
        self._now = Now(0, 0)  # values of the table now
        self._selection: Selection | None = None  # for the first of ``_tables``

    @property
    def done(self) -> bool:
        """True if the sweep is complete."""
        return self._pass is not None and self._pass.done and not self._tables

    def slice(self, contents: Contents, now: Now, limit: int = SLICE, most: int = MOST) -> Victims:
        """Scan up to ``limit`` slots or one block; return up to ``most`` victims, none if dry.

        contents  rows of the table now
        now       values of the table now, for the rules to compare with

        The caller must delete the victims before it asks for the next slice, and may call
        ``wanted`` on another thread in between.
        """
        self._now = now
        if self._pass is None:
            self._pass = Pass(contents if self._rows else None, self._choose, self._norms)
        if not self._pass.done:
            victims = self._slice_rows(contents, self._pass, limit, most)
        else:
            victims = self._slice_table(contents, limit, most)
        for cause, count in zip(*np.unique(victims.causes, return_counts=True), strict=True):
            self.counts[Cause(cause)] += int(count)
        return NOBODY if self._dry else victims

    def _slice_rows(self, contents: Contents, of_rows: Pass, limit: int, most: int) -> Victims:
        if self._norms:
            limit = min(limit, max(1, READ // (4 * contents.host.dim)))
        portion = of_rows.next(contents, limit)
        self.wanted = of_rows.wanted
        if portion is None:
            return NOBODY
        view, start, stop = portion
        causes = self._causes(view, start, stop)
        places = np.flatnonzero(causes)
        if len(places) > most and not self._dry:
            places = places[:most]
            of_rows.resume(portion, start + int(places[-1]) + 1)
        return victims_of(view, places + start, causes[places])

    def _causes(self, view: View, start: int, stop: int) -> NDArray[np.uint8]:
        """Return for each slot in start..stop-1 why its row is evicted; 0: it stays."""
        causes = np.zeros(stop - start, np.uint8)
        for rule in self._rows:
            rule.mark(view, start, stop, self._now, causes)
        return causes

    def _choose(self, bounds: Bounds) -> NDArray[np.bool_]:
        """Return which blocks may have victims of the rules for rows, bool[m]."""
        found: NDArray[np.bool_] = self._causes(bounds.least, 0, len(bounds.rows)) != 0
        return found

    def _slice_table(self, contents: Contents, limit: int, most: int) -> Victims:
        self.wanted = None
        if self._selection is None and self._tables:
            rule = self._tables[0]
            excess = rule.excess(contents.rows - (sum(self.counts.values()) if self._dry else 0))
            if not excess or self._dry:
                self.counts[rule.cause] += excess
                del self._tables[0]
                return NOBODY
            self._selection = Selection(rule, contents, excess, self._now)
        if self._selection is None:
            return NOBODY
        victims = self._selection.slice(contents, limit, most)
        self.wanted = self._selection.wanted
        if self._selection.done:
            self._selection = None
            del self._tables[0]
        return victims


def compile_all() -> None:
    """Run every rule once, to compile its kernels or load them from the cache."""
    entries = np.ones((2, 4), np.uint64) << np.uint64(16)
    contents = Contents(2, View(entries, 2, lambda slots: np.ones(len(slots)), 1))
    for name in EVICTIONS:
        params = {"max_rows": 1} if issubclass(EVICTIONS[name], Capacity) else {}
        sweep = Sweep([make_eviction(name, params)])
        while not sweep.done:
            sweep.slice(contents, Now(1, 1))
