"""The eviction of one table: when to sweep, and what to compare rows with."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from storage.eviction.contract import (
    FIRST_STEP,
    LAST_STEP,
    Eviction,
    Now,
    TableEviction,
    View,
    require_distinct,
)
from storage.eviction.rules import StepTtl, TimeTtl
from storage.eviction.sweep import MOST, SLICE, Sweep
from storage.eviction.timeline import Timeline
from storage.kernels import Keys
from storage.records import Cause

_STATE = struct.Struct("<qQQ")  # step version bytes-of-times


@dataclass(frozen=True, slots=True)
class EvictorState:
    """What an evictor knows besides its rules."""

    step: int  # of the table
    version: int  # of the last push
    times: Timeline | None  # of the time TTL
    steps: Timeline | None  # of the step TTL

    def pack(self) -> bytes:
        """step i64 | version u64 | bytes of times u64 | times | steps, little-endian.

        times, steps   the timelines of the rules; empty where there is no such rule
        """
        times = b"" if self.times is None else self.times.pack()
        steps = b"" if self.steps is None else self.steps.pack()
        return _STATE.pack(self.step, self.version, len(times)) + times + steps


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

    @property
    def rules(self) -> tuple[Eviction, ...]:
        """The rules, as this shard applies them."""
        return self._rules

    def altered(self, rules: Sequence[Eviction], version: int, seconds: float) -> Evictor:
        """Return an evictor of other rules that goes on from the same step and the same times.

        version  of the alteration, at ``seconds``

        Rows know no time. So under a time TTL that the table did not have before, rows that were
        pushed before the alteration count as pushed at the alteration.
        """
        other = Evictor(rules)
        other._step, other._version = self._step, self._version
        if other._times is not None:
            if self._times is not None:
                other._times = self._times.with_ttl(other._times.ttl)
            else:
                other._times.add(version, seconds)
        if other._steps is not None:
            if self._steps is not None:
                other._steps = self._steps.with_ttl(other._steps.ttl)
            else:
                other._steps.add(version, float(self._step))
        return other

    def last_step(self, ahead: int) -> int:
        """Return the largest step that a push may have; see ``TableSchema.max_step_ahead``.

        ahead  steps that a push may be ahead of the table; 0: no bound

        Rows are as old as the table's step, the largest step pushed so far, says. So one push whose
        step is wrong, milliseconds since 1970 say, would make every other row idle, and then keep
        the rules from ever holding again. Therefore:

        * A table that no push has reached yet is at step 0. A first push is bounded like any other.
        * Steps may go back without a bound. A trainer that starts again, or the slower of two, does
          not move the table's step, and its rows take the table's step instead of its own. Rows
          become idle again once a trainer has passed the table's step.
        * All tables have the bound, with a step TTL or without: steps also mean something to the
          norm rule, to LFU, and to rules that a table gets later.
        * Rows that are imported, loaded or restored keep their own steps, and move no table's step.
          The step of a table survives restarts and comes with a restored checkpoint.
        * A push that was applied before is answered as a duplicate, whatever its step.
        """
        return max(self._step, 0) + ahead if ahead else LAST_STEP

    def written(self, version: int, seconds: float) -> None:
        """Record that whole rows were written, which have steps of their own."""
        self._version = max(self._version, version)
        if self._times is not None:
            self._times.add(version, seconds)

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

    def snapshot(self) -> EvictorState:
        """Return the state as it is now, to be packed later on any thread."""
        times = None if self._times is None else self._times.copy()
        steps = None if self._steps is None else self._steps.copy()
        return EvictorState(self._step, self._version, times, steps)

    def pack(self) -> bytes:
        """Return the state as ``load`` takes it; see EvictorState."""
        return self.snapshot().pack()

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
