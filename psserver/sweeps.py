"""Eviction on the engine thread, one slice at a time."""

from __future__ import annotations

from collections.abc import Callable

from psserver.errors import Overloaded
from psserver.sequencer import RECORD, Sequencer
from psserver.tables import TableEntry, Tables
from storage.eviction.sweep import Sweep
from storage.kernels import Keys
from storage.records import Cause

SWEEPING, URGENT = 0.03, 0.5  # shares of the engine's time for eviction
LOOKED = 64  # tables that a tick asks whether a sweep is due


class Sweeps:
    """Slices of sweeps over the tables of one shard.

    delete  deletes rows of a table as the next version; returns how many there were
    """

    def __init__(
        self,
        tables: Tables,
        sequencer: Sequencer,
        delete: Callable[[TableEntry, Keys, Cause], int],
    ) -> None:
        self._tables = tables
        self._sequencer = sequencer
        self._delete = delete
        self._swept = self._expired = 0  # positions in tables.ruled that were served last

    def tick(self) -> float:
        """Take the next slice of background eviction, of one table after the other.

        Returns the share of the engine's time that eviction should have; 0: nothing is due.
        Raises what ``Sequencer.reserve`` raises; the rows stay then.
        """
        seconds, ruled = self._sequencer.now(), self._tables.ruled
        if not ruled:
            return 0.0
        self._expired = (self._expired + 1) % len(ruled)
        table = self._tables.require_number(ruled[self._expired]).table
        if stale := table.evictor.stale(seconds):
            table.gate.expire(stale + 1)
        for _ in ruled[:LOOKED]:
            self._swept = (self._swept + 1) % len(ruled)
            entry = self._tables.require_number(ruled[self._swept])
            table, evictor = entry.table, entry.table.evictor
            if evictor.due(len(table), seconds):
                try:
                    self._evict(entry, evictor.tick(table.view(), seconds))
                except BaseException:
                    evictor.again()
                    raise
                return URGENT if evictor.excess(len(table)) * 16 > len(table) else SWEEPING
        return 0.0

    def begin(self, name: str, dry: bool) -> tuple[int, Sweep]:
        """Return the number of a table, and a sweep by all its rules for ``take_slice``.

        dry  only count
        """
        entry = self._tables.get(name)
        return entry.number, entry.table.evictor.sweep(dry=dry)

    def take_slice(self, number: int, sweep: Sweep) -> None:
        """Take the next slice of a sweep.

        Raises UnknownTable once the table is dropped, Overloaded once its rules were altered.
        """
        entry = self._tables.require_number(number)
        if sweep.rules != entry.table.evictor.rules:
            raise Overloaded(f"table {entry.schema.name!r} was altered during the sweep: repeat it")
        view = entry.table.view()
        victims = sweep.slice(view, entry.table.evictor.now(self._sequencer.now()))
        self._evict(entry, victims.keys(view))

    def _evict(self, entry: TableEntry, victims: dict[Cause, Keys]) -> None:
        """Evict the rows that a slice chose: all or, where the log has no room, none."""
        self._sequencer.reserve([RECORD + 8 * len(keys) for keys in victims.values()])
        evicted = entry.table.tally.evicted
        for cause, keys in victims.items():
            evicted[cause] = evicted.get(cause, 0) + self._delete(entry, keys, cause)
