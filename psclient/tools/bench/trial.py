"""A whole load test: one run, or a sweep that finds the knee and measures the recommended rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from psclient.client import Client
from psclient.tools.bench.fleet import Fleet, OnSecond
from psclient.tools.bench.knee import SAFETY, Knee, Point, knee_of, problem, sweep
from psclient.tools.bench.plan import Plan
from psclient.tools.bench.result import Result, Second
from psclient.tools.bench.shards import Host, ShardUse, Watch, host
from psclient.tools.bench.sizing import Cost, Sizing, cost_of
from psproto import RELEASE

FIRST = 1 / 8  # rate of a sweep's first step / rate of the closed loop
SMALLER = 4  # the run that shows what keys cost has this many times fewer
LIMITED = 0.7  # cores that a shard uses at the knee if it is what limits the rate
LEAST_KEYS = 8  # per request and table; with fewer, costs are not measured

OnRun = Callable[[str, float], Any]  # called with (what begins, requests per second; 0: closed)

OnEnd = Callable[[Result], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a rate must keep, and how to plan with the highest such rate."""

    p99: float = 0.02  # longest p99 latency, in seconds
    safety: float = SAFETY  # recommended rate / highest rate
    wanted: float = 0.0  # rate that the cluster must carry, in requests per second; 0: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Durations of runs, in seconds."""

    seconds: float = 10.0  # of a single run, and of the run at the recommended rate
    warmup: float = 2.0  # before each run
    step: float = 5.0  # of each rate of a sweep


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """All that a load test measured.

    result  of the single run, or of the run at the recommended rate; of the last run if Ctrl-C
            ended the test early
    uses    what the shards used during that run; []: not known
    busy    share of the processors of the load generator's machine that were busy meanwhile
    closed  of the closed loop before a sweep; None: there was none
    knee    of the sweep; None: there was none
    cost    of a request, measured after a sweep; None: it was not measured
    interrupted  whether Ctrl-C ended the test early
    """

    plan: Plan
    objective: Objective
    times: Times
    shards: int
    row_bytes: float  # memory per row
    result: Result
    uses: Sequence[ShardUse]
    busy: float
    closed: Result | None = None
    knee: Knee | None = None
    cost: Cost | None = None
    interrupted: bool = False
    time: float = field(default_factory=time.time)  # seconds since 1970
    release: str = RELEASE
    host: Host = field(default_factory=host)

    @property
    def sizing(self) -> Sizing | None:
        """Return what to size a cluster with; None: there was no sweep, or it did not end."""
        if self.knee is None or self.interrupted:
            return None
        return Sizing(
            shards=self.shards,
            keys=self.plan.batch * self.plan.tables,
            recommended=self.knee.recommended,
            cost=self.cost,
            row_bytes=self.row_bytes,
            limited=self.knee_cores == 0.0 or self.knee_cores >= LIMITED,
        )

    @property
    def knee_cores(self) -> float:
        """Return how many cores the busiest shard used at the knee; 0.0: not known.

        Of the highest rate that passed and the next one, the rate at which it used more.
        """
        if self.knee is None:
            return 0.0
        return max((each.shard for each in (self.knee.at, self.knee.above) if each), default=0.0)

    @property
    def held(self) -> bool:
        """Return whether the run at the recommended rate kept the objective."""
        return not problem(point_of(self.result), self.objective.p99)

    def as_json(self) -> dict[str, Any]:
        """Return everything; durations are in seconds, rates per second."""
        return {
            "release": self.release,
            "time": self.time,
            "interrupted": self.interrupted,
            "host": asdict(self.host),
            "plan": self.plan.as_json(),
            "objective": asdict(self.objective),
            "times": asdict(self.times),
            "shards": self.shards,
            "row_bytes": self.row_bytes,
            "shard_use": [asdict(each) for each in self.uses],
            "machine_busy": self.busy,
            "result": self.result.as_json(),
            "closed": self.closed.as_json() if self.closed else None,
            "knee": asdict(self.knee) if self.knee else None,
            "cost": asdict(self.cost) if self.cost else None,
        }


@dataclass(frozen=True, slots=True)
class _Run:
    """One run: its result, what the shards used, how busy this machine was, after the warm-up."""

    result: Result
    uses: Sequence[ShardUse]
    busy: float


class _Interrupted(Exception):
    """Ctrl-C ended a run early. ``run``: the run before it, or what itself has measured."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.run = run


class Runner:
    """Runs load tests of one fleet.

    client     asks the shards what they use
    on_run     called before each run
    on_second  called after each second of a run
    on_end     called with the result of each run
    """

    def __init__(
        self,
        fleet: Fleet,
        client: Client,
        *,
        objective: Objective,
        times: Times,
        on_run: OnRun | None = None,
        on_second: OnSecond | None = None,
        on_end: OnEnd | None = None,
    ) -> None:
        self._on_end = on_end
        self._fleet, self._client = fleet, client
        self._objective, self._times = objective, times
        self._on_run, self._on_second = on_run, on_second
        self._shards = client._shards()
        self._points: dict[float, Point] = {}  # steps of a sweep that ended, by rate
        self._last: _Run | None = None  # run that ended last

    def single(self, rate: float) -> Trial:
        """Run at one rate; 0: a closed loop."""
        self._last = None
        try:
            return self._trial(self._run("run", rate, self._times.seconds))
        except _Interrupted as early:
            return self._trial(early.run, interrupted=True)

    def sweep(self, first: float = 0.0) -> Trial:
        """Find the knee, measure the cost of requests, and run at the recommended rate.

        first  rate of the first step; 0: a share of the rate of a closed loop, which is run first

        If Ctrl-C ends a run, the trial has the steps that ended before.
        """
        self._points, self._last = {}, None
        try:
            return self._sweep(first)
        except (_Interrupted, KeyboardInterrupt) as early:  # the latter between two runs
            run = early.run if isinstance(early, _Interrupted) else self._last
            if run is None:
                raise
            goal, points = self._objective, list(self._points.values())
            knee = knee_of(points, p99=goal.p99, safety=goal.safety) if points else None
            return self._trial(run, knee=knee, interrupted=True)

    def _sweep(self, first: float) -> Trial:
        """Sweep. Raises _Interrupted."""
        closed = None
        if not first:
            closed = self._run("closed loop", 0.0, self._times.step).result
            first = max(closed.achieved * FIRST, 1.0)
        knee = sweep(
            self._measure,
            first=first,
            p99=self._objective.p99,
            safety=self._objective.safety,
        )
        if not knee.recommended:
            run = self._run("lowest rate", knee.points[0].rate, self._times.seconds)
            return self._trial(run, closed=closed, knee=knee)
        run = self._run("recommended rate", knee.recommended, self._times.seconds)
        return self._trial(run, closed=closed, knee=knee, cost=self._cost(run))

    def _trial(self, run: _Run, **found: Any) -> Trial:
        return Trial(
            plan=self._fleet.plan,
            objective=self._objective,
            times=self._times,
            shards=self._shards,
            row_bytes=self._fleet.row_bytes,
            result=run.result,
            uses=run.uses,
            busy=run.busy,
            **found,
        )

    def _run(self, what: str, rate: float, seconds: float, batch: int | None = None) -> _Run:
        """Run once. Raises _Interrupted if Ctrl-C ends the run."""
        if self._on_run is not None:
            self._on_run(what, rate)
        watches: list[Watch] = []

        def ended(second: Second) -> None:
            if second.second == 0:
                watches.append(Watch(self._client))
            if self._on_second is not None:
                self._on_second(second)

        try:
            result = self._fleet.run(
                rate, seconds, warmup=self._times.warmup, on_second=ended, batch=batch
            )
        except KeyboardInterrupt:
            if self._last is None:
                raise
            raise _Interrupted(self._last) from None
        if self._on_end is not None:
            self._on_end(result)
        run = _Run(result, [], 0.0)
        if watches:
            run = _Run(result, watches[0].shards(), watches[0].machine())
        if self._fleet.interrupted:
            raise _Interrupted(self._last or run)
        self._last = run
        return run

    def _measure(self, rate: float) -> Point:
        """Run one step of the sweep."""
        run = self._run("sweep", rate, self._times.step)
        point = point_of(run.result, run.uses)
        before = self._points.setdefault(rate, point)
        self._points[rate] = min(before, point, key=lambda each: (each.failed, each.p99))
        return point

    def _cost(self, whole: _Run) -> Cost | None:
        """Return the processor time of the shards per request; run once more, with fewer keys.

        whole  run with all keys
        """
        plan = self._fleet.plan
        fewer = plan.batch // SMALLER
        if fewer < LEAST_KEYS:
            return None
        rate = whole.result.rate
        part = self._run("fewer keys per request", rate, self._times.seconds, fewer)
        measured = []
        for batch, run in ((plan.batch, whole), (fewer, part)):
            if not run.uses or not run.result.achieved:
                return None
            cores = sum(each.cores for each in run.uses) / len(run.uses)
            measured.append((batch * plan.tables / self._shards, cores / run.result.achieved))
        return cost_of(measured)


def point_of(result: Result, uses: Sequence[ShardUse] = ()) -> Point:
    """Return a run as a point of a sweep.

    uses  what the shards used; empty: not known
    """
    p50, p99, p999 = result.latency.percentiles([50, 99, 99.9])
    return Point(
        rate=result.rate,
        seconds=result.seconds,
        offered=result.offered,
        achieved=result.achieved,
        failed=result.failed_share,
        p50=p50,
        p99=p99,
        p999=p999,
        longest=result.latency.longest,
        refused=result.refused_share,
        generator=max(result.cores, default=0.0),
        shard=max((each.cores for each in uses), default=0.0),
        doubts=tuple(result.doubts()),
    )
