"""The eviction of one table: when to sweep, and the table's step."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from storage.eviction.contract import (
    FIRST_STEP,
    LAST_STEP,
    Contents,
    Eviction,
    Now,
    TableEviction,
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
    """The state of an evictor, without its rules."""

    step: int  # the table's step: the largest step pushed to it
    version: int  # log version of the table's last push
    times: Timeline | None  # None without a time TTL
    steps: Timeline | None  # None without a step TTL

    def pack(self) -> bytes:
        """Return the state as bytes for ``Evictor.load``.

        Format, little-endian: step i64 | version u64 | length of times in bytes u64 | times |
        steps. times is a packed Timeline, or empty if the table has no time TTL. steps is a packed
        Timeline, or empty if the table has no step TTL.
        """
        times = b"" if self.times is None else self.times.pack()
        steps = b"" if self.steps is None else self.steps.pack()
        return _STATE.pack(self.step, self.version, len(times)) + times + steps


class Evictor:
    """The eviction of one table on one shard. Use it on the engine thread only.

    Call ``tick`` for background eviction. For a sweep on demand, or a dry run, call ``sweep``, then
    ``slice`` of the result with ``now()`` until the sweep is done.
    """

    def __init__(self, rules: Sequence[Eviction]) -> None:
        require_distinct(rules)
        self._rules = tuple(rules)
        self._step, self._version = FIRST_STEP, 0  # largest ones pushed to the table
        self._times = _timeline(rule.seconds for rule in rules if isinstance(rule, TimeTtl))
        self._steps = _timeline(float(rule.steps) for rule in rules if isinstance(rule, StepTtl))
        self._sweep: Sweep | None = None  # background sweep in progress
        self._last = Now(FIRST_STEP, 0)  # when the latest background sweep began

    @property
    def rules(self) -> tuple[Eviction, ...]:
        """The rules as this shard applies them."""
        return self._rules

    def altered(self, rules: Sequence[Eviction], version: int, seconds: float) -> Evictor:
        """Return an evictor with new rules, and with the step and the times of this evictor.

        version  log version of the alteration
        seconds  time of the alteration

        Rows do not record times. So if the table had no time TTL before, all rows count as pushed
        at the alteration.
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

        The age of a row is measured from the table's step, the largest step pushed so far. One push
        with a wrong step (milliseconds since 1970, for example) would make all other rows idle, and
        no row would ever become idle again. Hence these rules:

        * A table without pushes is at step 0. Its first push is bounded like any other.
        * All pushes of an exchange are compared with the table's step before the exchange. Each
          shard has its own step of a table.
        * Steps may go back by any amount. A trainer that starts again, or the slower one of two,
          does not move the table's step, and its rows get the table's step instead of its own. Rows
          age again when a trainer has passed the table's step.
        * The bound applies to all tables, with or without a step TTL. The norm rule and LFU use
          steps, too, and an alteration may add a rule later.
        * Rows that are imported, loaded or restored keep their own steps, and do not move the
          table's step. The table's step survives restarts and comes with a restored checkpoint.
        * A push that was applied before is answered as a duplicate, whatever its step.
        """
        return max(self._step, 0) + ahead if ahead else LAST_STEP

    def written(self, version: int, seconds: float) -> None:
        """Record a write of whole rows, which does not change the table's step.

        version  log version of the write
        seconds  time of the write
        """
        self._version = max(self._version, version)
        if self._times is not None:
            self._times.add(version, seconds)

    def pushed(self, version: int, step: int, seconds: float) -> None:
        """Record a push, applied now or replayed from the log.

        version  log version of the push
        step     step that the push has from its trainer
        seconds  time of the push, by a clock that continues while the shard is down, so that rows
                 become idle during that time, too
        """
        self._step, self._version = max(self._step, step), max(self._version, version)
        if self._times is not None:
            self._times.add(version, seconds)
        if self._steps is not None:
            self._steps.add(version, float(step))

    def loaded(self, version: int, step: int) -> None:
        """Record that rows were loaded whose times of push are unknown.

        version  a version that none of these rows exceeds
        step     largest step of these rows, or of their table when they were stored
        """
        self._step, self._version = max(self._step, step), max(self._version, version)

    def now(self, seconds: float) -> Now:
        """Return the values that rules compare rows with, at time ``seconds``."""
        idle = 0 if self._times is None else self._times.version_before(seconds)
        return Now(self._step, self._version, idle)

    @property
    def step(self) -> int:
        """The table's step: the largest step that was pushed; FIRST_STEP before the first push."""
        return self._step

    def stale(self, seconds: float) -> int:
        """Return the newest log version that is older than a TTL at time ``seconds``; 0 if none is.

        Used to expire admission counters, which record a version but no step.
        """
        steps = 0 if self._steps is None else self._steps.version_before(float(self._step))
        return max(steps, self.now(seconds).idle)

    def excess(self, rows: int) -> int:
        """Return how many rows must be evicted from a table with ``rows`` rows."""
        tables = (rule for rule in self._rules if isinstance(rule, TableEviction))
        return max((rule.excess(rows) for rule in tables), default=0)

    def due(self, rows: int, seconds: float) -> bool:
        """Return whether ``tick`` has work: a sweep is in progress, or one is due."""
        if self._sweep is not None:
            return True
        if not self._rules:
            return False
        now = self.now(seconds)
        return any(rule.due(rows, self._last, now) for rule in self._rules)

    def sweep(self, *, dry: bool = False) -> Sweep:
        """Return a new sweep by all rules. A dry sweep only counts the rows to evict."""
        return Sweep(self._rules, dry=dry)

    def tick(
        self, contents: Contents, seconds: float, limit: int = SLICE, most: int = MOST
    ) -> dict[Cause, Keys]:
        """Scan the next slice of the background sweep; return the keys to evict, by cause.

        contents  rows of the table now
        seconds   the time now
        limit     maximum number of slots to scan
        most      maximum number of keys to return

        Begins a sweep if one is due. The caller must delete the keys (uint64[]) before the next
        call, or call ``again``.
        """
        if not self.due(contents.rows, seconds):
            return {}
        now = self.now(seconds)
        if self._sweep is None:
            self._sweep, self._last = self.sweep(), now
        victims = self._sweep.slice(contents, now, limit, most)
        if self._sweep.done:
            self._sweep = None
        return victims.by_cause()

    @property
    def wanted(self) -> Callable[[], None] | None:
        """Function that another thread should call before the next ``tick``; see ``Sweep``."""
        return None if self._sweep is None else self._sweep.wanted

    def again(self) -> None:
        """Begin a new sweep, because the keys of the last slice could not be deleted."""
        self._sweep, self._last = None, Now(FIRST_STEP, 0)

    def snapshot(self) -> EvictorState:
        """Return a copy of the state, which any thread can pack later."""
        times = None if self._times is None else self._times.copy()
        steps = None if self._steps is None else self._steps.copy()
        return EvictorState(self._step, self._version, times, steps)

    def pack(self) -> bytes:
        """Return the state as bytes for ``load``; see EvictorState."""
        return self.snapshot().pack()

    def load(self, data: bytes) -> None:
        """Replace the state by ``data``, which ``pack`` of some evictor returned.

        Raises ValueError if ``data`` is malformed, or does not fit the rules of this evictor: it
        must have times exactly if there is a time TTL, and steps exactly if there is a step TTL.
        """
        if len(data) < _STATE.size:
            raise ValueError(
                f"cannot load eviction state: expected at least {_STATE.size} bytes, got"
                f" {len(data)}"
            )
        step, version, size = _STATE.unpack_from(data)
        end = _STATE.size + size
        parts = (self._times, data[_STATE.size : end]), (self._steps, data[end:])
        for timeline, part in parts:
            if bool(part) != (timeline is not None):
                raise ValueError(
                    f"cannot load eviction state ({len(data)} bytes): it was saved with different"
                    " TTL rules"
                )
        for timeline, part in parts:
            if timeline is not None:
                timeline.load(part)
        self._step, self._version = step, version


def _timeline(ttls: Iterable[float]) -> Timeline | None:
    return next((Timeline(ttl) for ttl in ttls), None)
