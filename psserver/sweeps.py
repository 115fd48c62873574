"""Evict rows on the engine thread, one slice per call."""

from __future__ import annotations

from collections.abc import Callable

from psserver.errors import Overloaded
from psserver.sequencer import RECORD, Sequencer
from psserver.tables import TableEntry, Tables
from storage.eviction.sweep import Sweep
from storage.kernels import Keys
from storage.records import Cause

SWEEPING = 0.03  # share of the engine's time for eviction
URGENT = 0.5  # the same while a table exceeds its row limit by more than 1/16
LOOKED = 64  # maximum number of tables that one ``tick`` checks for work


class Sweeps:
    """Sweeps the tables of one shard: finds the rows that eviction rules select, and deletes them.

    All methods must run on the engine thread.

    delete  called with (table, keys uint64[n], cause) to delete rows as the next version; returns
            how many existed
    wanted  function that another thread should call before the next ``tick``, because it reads rows
            from the disk that a sweep needs; None: there is none
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
        self.wanted: Callable[[], None] | None = None
        self._swept = self._expired = 0  # index in tables.ruled of the table handled last

    def tick(self) -> float:
        """Run the next slice of background eviction. The calls take the tables in turn.

        Also drops expired admission counters of one table. Returns the share of the engine's time
        that eviction should get, or 0 if no table has anything to evict. Raises the errors of
        ``Sequencer.reserve``; then no row was evicted, and a later call tries again.
        """
        seconds, ruled, self.wanted = self._sequencer.now(), self._tables.ruled, None
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
                    self._evict(entry, evictor.tick(table.contents(), seconds))
                except BaseException:
                    evictor.again()
                    raise
                self.wanted = evictor.wanted
                return URGENT if evictor.excess(len(table)) * 16 > len(table) else SWEEPING
        return 0.0

    def begin(self, name: str, dry: bool) -> tuple[int, Sweep]:
        """Begin a sweep of a table by all its rules. Return (number of the table, the sweep); pass
        both to ``take_slice`` until ``sweep.done``.

        name  name of the table
        dry   only count the rows that would be evicted
        """
        entry = self._tables.get(name)
        return entry.number, entry.table.evictor.sweep(dry=dry)

    def take_slice(self, number: int, sweep: Sweep) -> None:
        """Run the next slice of a sweep that ``begin`` returned. Another thread should call
        ``sweep.wanted``, if it is not None, before the next slice.

        Raises UnknownTable if the table was dropped, Overloaded if its rules were altered, and the
        errors of ``Sequencer.reserve``.
        """
        entry = self._tables.require_number(number)
        if sweep.rules != entry.table.evictor.rules:
            raise Overloaded(
                f"the rules of table {entry.schema.name!r} were altered during the sweep: start the"
                " sweep again"
            )
        now = entry.table.evictor.now(self._sequencer.now())
        self._evict(entry, sweep.slice(entry.table.contents(), now).by_cause())

    def _evict(self, entry: TableEntry, victims: dict[Cause, Keys]) -> None:
        """Delete the rows that a slice of a sweep selected. Raises the errors of
        ``Sequencer.reserve``, before any row is deleted.

        victims  keys uint64[n] to delete, by the rule that selected them
        """
        self._sequencer.reserve([RECORD + 8 * len(keys) for keys in victims.values()])
        evicted = entry.table.tally.evicted
        for cause, keys in victims.items():
            evicted[cause] = evicted.get(cause, 0) + self._delete(entry, keys, cause)
