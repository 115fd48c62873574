"""A whole load test: one run, or a sweep that finds the knee and measures the recommended rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from psclient.client import Client
from psclient.tools.bench.fleet import Fleet, OnSecond
from psclient.tools.bench.knee import SAFETY, Knee, Point, sweep
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

    result  of the single run, or of the run at the recommended rate
    uses    what the shards used during that run; []: not known
    busy    share of the processors of the load generator's machine that were busy meanwhile
    closed  of the closed loop before a sweep; None: there was none
    knee    of the sweep; None: there was none
    cost    of a request, measured after a sweep; None: it was not measured
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
    time: float = field(default_factory=time.time)  # seconds since 1970
    release: str = RELEASE
    host: Host = field(default_factory=host)

    @property
    def sizing(self) -> Sizing | None:
        """Return what to size a cluster with; None: there was no sweep."""
        if self.knee is None:
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
        """Return how many cores the busiest shard uses at the knee, estimated; 0.0: not known."""
        if self.knee is None or self.knee.at is None or not self.result.achieved:
            return 0.0
        most = max((each.cores for each in self.uses), default=0.0)
        return most * self.knee.at.rate / self.result.achieved

    def as_json(self) -> dict[str, Any]:
        """Return everything; durations are in seconds, rates per second."""
        return {
            "release": self.release,
            "time": self.time,
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


class Runner:
    """Runs load tests of one fleet.

    client     asks the shards what they use
    on_run     called before each run
    on_second  called after each second of a run
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
    ) -> None:
        self._fleet, self._client = fleet, client
        self._objective, self._times = objective, times
        self._on_run, self._on_second = on_run, on_second
        self._shards = client._shards()

    def single(self, rate: float) -> Trial:
        """Run at one rate; 0: a closed loop."""
        return self._trial(self._run("run", rate, self._times.seconds))

    def sweep(self, first: float = 0.0) -> Trial:
        """Find the knee, measure the cost of requests, and run at the recommended rate.

        first  rate of the first step; 0: a share of the rate of a closed loop, which is run first
        """
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
        """Run once."""
        if self._on_run is not None:
            self._on_run(what, rate)
        watches: list[Watch] = []

        def ended(second: Second) -> None:
            if second.second == 0:
                watches.append(Watch(self._client))
            if self._on_second is not None:
                self._on_second(second)

        result = self._fleet.run(
            rate, seconds, warmup=self._times.warmup, on_second=ended, batch=batch
        )
        if not watches:
            return _Run(result, [], 0.0)
        return _Run(result, watches[0].shards(), watches[0].machine())

    def _measure(self, rate: float) -> Point:
        """Run one step of the sweep."""
        return point_of(self._run("sweep", rate, self._times.step).result)

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


def point_of(result: Result) -> Point:
    """Return a run as a point of a sweep."""
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
    )
