"""The knee of a cluster: the highest rate at which it still keeps its objective.

``sweep`` raises the rate step by step until a step fails, then narrows the interval between the
last rate that passed and the first that failed. A rate passes if, at this rate,

* the p99 latency is at most that of the objective,
* requests succeed as fast as they arrive, and
* hardly any request fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from psclient.errors import InvalidArgument

SAFETY = 0.7  # recommended rate / rate of the knee
DROPPED = 0.03  # share of the offered requests that may be missing from the achieved ones
SLACK = 5  # requests more that may be missing: they are in flight at the end of a short step
FAILED = 0.001  # share of requests that may fail
DOWN = 6  # steps to lower rates, if the first rate fails


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What was measured at one rate. Rates are requests per second, durations are seconds."""

    rate: float  # that was asked for
    seconds: float
    offered: float
    achieved: float
    failed: float  # share of requests that failed, refused ones included
    p50: float
    p99: float
    p999: float
    longest: float
    refused: float = 0.0  # share of requests that a server refused for now; part of ``failed``
    generator: float = 0.0  # cores that the busiest process of the load generator used
    shard: float = 0.0  # cores that the busiest shard used; 0.0: not known
    doubts: tuple[str, ...] = ()  # why the load generator itself may have been the limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Knee:
    """Result of a sweep.

    points       one per rate, ascending; of a rate measured twice, the better point
    at           the point of the highest rate that passed with all lower ones; None: none did
    above        the point of the next higher rate; None: no rate failed
    why          why ``above`` failed; "": no rate failed
    recommended  rate to plan with: a share of the rate of ``at``; 0.0: none passed
    """

    points: Sequence[Point]
    at: Point | None
    above: Point | None
    why: str
    recommended: float


def problem(point: Point, p99: float) -> str:
    """Return why a rate fails; "": it passes.

    p99  objective: longest p99 latency, in seconds
    """
    if point.failed > FAILED:
        refused, failed = (f"{100 * each:.3g} %" for each in (point.refused, point.failed))
        if point.refused < point.failed / 2:
            return f"{failed} of the requests failed"
        return f"{refused} of the requests were refused"
    missing = (point.offered - point.achieved) * point.seconds
    if missing > DROPPED * point.offered * point.seconds + SLACK:
        return (
            f"only {point.achieved:,.4g} of {point.offered:,.4g} requests per second were answered"
        )
    if not point.achieved:
        return "no request succeeded"
    if point.p99 > p99:
        return f"the p99 latency of {point.p99 * 1e3:.3g} ms exceeds {p99 * 1e3:.3g} ms"
    return ""


def sweep(
    measure: Callable[[float], Point],
    *,
    first: float,
    p99: float,
    growth: float = 1.5,
    refine: int = 3,
    safety: float = SAFETY,
    most: float = math.inf,
) -> Knee:
    """Measure at rising rates until one fails, then between the last two; return the knee.

    measure  measures at a rate
    first    rate of the first step. If it fails, lower rates are tried
    p99      objective: longest p99 latency, in seconds
    growth   each step has this many times the rate of the last one
    refine   number of steps between the last rate that passed and the first that failed
    safety   share of the knee's rate that is recommended
    most     no rate is higher

    A step that fails is measured again, and its better point counts: another program on the
    machine may have disturbed the first one.
    """
    if not (first > 0 and growth > 1 and 0 < safety <= 1 and p99 > 0):
        raise InvalidArgument(
            f"a sweep needs first > 0, growth > 1, 0 < safety <= 1 and p99 > 0, got first={first},"
            f" growth={growth}, safety={safety}, p99={p99}"
        )
    points: dict[float, Point] = {}

    def passes(rate: float) -> bool:
        points[rate] = measure(rate)
        if problem(points[rate], p99):
            again = measure(rate)
            if not problem(again, p99) or again.p99 < points[rate].p99:
                points[rate] = again
        return not problem(points[rate], p99)

    good, bad = _bracket(passes, first, growth, most)
    for _ in range(refine if good and bad else 0):
        middle = math.sqrt(good * bad)
        good, bad = (middle, bad) if passes(middle) else (good, middle)
    return knee_of(list(points.values()), p99=p99, safety=safety)


def _bracket(
    passes: Callable[[float], bool], first: float, growth: float, most: float
) -> tuple[float, float]:
    """Return (highest rate that passed, lowest that failed); 0.0 if there is none."""
    rate, good = min(first, most), 0.0
    while passes(rate):
        good = rate
        if rate >= most:
            return good, 0.0
        rate = min(rate * growth, most)
    if good:
        return good, rate
    bad = rate
    for _ in range(DOWN):
        rate = bad / growth
        if passes(rate):
            return rate, bad
        bad = rate
    return 0.0, bad


def knee_of(points: Sequence[Point], *, p99: float, safety: float = SAFETY) -> Knee:
    """Return the knee of points that were measured; ``sweep`` explains the arguments."""
    ordered = sorted(points, key=lambda each: each.rate)
    passed = 0
    while passed < len(ordered) and not problem(ordered[passed], p99):
        passed += 1
    at = ordered[passed - 1] if passed else None
    above = ordered[passed] if passed < len(ordered) else None
    return Knee(
        points=ordered,
        at=at,
        above=above,
        why=problem(above, p99) if above else "",
        recommended=safety * at.rate if at else 0.0,
    )
