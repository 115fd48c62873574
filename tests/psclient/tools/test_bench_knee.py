"""The knee of a sweep, on synthetic servers and curves, and how many shards a rate needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from psclient.errors import InvalidArgument
from psclient.tools.bench.knee import Knee, Point, knee_of, problem, sweep
from psclient.tools.bench.sizing import Cost, Sizing, cost_of, sentences, table

GOAL = 0.02  # p99, seconds


def point(rate: float, p99: float = 0.005, achieved: float = 1.0, failed: float = 0.0) -> Point:
    return Point(
        rate=rate, seconds=5.0, offered=rate, achieved=achieved * rate, failed=failed,
        p50=p99 / 4, p99=p99, p999=2 * p99, longest=3 * p99,
    )  # fmt: skip


def queue(capacity: float, seed: int | None = None) -> Callable[[float], Point]:
    """A server with one queue and service times that are exponential (M/M/1).

    seed  simulate 5 s of it; None: compute the exact percentiles of a queue without an end
    """
    rng = None if seed is None else np.random.default_rng(seed)

    def exact(rate: float) -> Point:
        if rate >= capacity:
            return point(rate, p99=5.0, achieved=capacity / rate)
        return point(rate, p99=math.log(100) / (capacity - rate))

    def simulated(rate: float) -> Point:
        assert rng is not None
        arrivals = np.cumsum(rng.exponential(1 / rate, int(rate * 10)))
        arrivals = arrivals[arrivals < 5]
        free, latencies = 0.0, []
        for due, work in zip(arrivals, rng.exponential(1 / capacity, len(arrivals)), strict=True):
            free = max(free, due) + work
            latencies.append(free - due)
        ended = np.array(latencies) + arrivals
        p50, p99, p999 = np.percentile(latencies, [50, 99, 99.9])
        return Point(
            rate=rate, seconds=5.0, offered=len(arrivals) / 5, achieved=(ended < 5).sum() / 5,
            failed=0.0, p50=p50, p99=p99, p999=p999, longest=max(latencies),
        )  # fmt: skip

    return exact if rng is None else simulated


def find(measure: Callable[[float], Point], **more: float) -> Knee:
    return sweep(measure, **{"first": 100.0, "p99": GOAL, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("capacity", [500, 1000, 5000, 20_000])
def test_the_knee_of_a_queue_is_where_its_p99_meets_the_objective(capacity: float) -> None:
    """Exact: p99 = ln(100) / (capacity - rate)."""
    truth = capacity - math.log(100) / GOAL
    knee = find(queue(capacity), refine=5)
    assert knee.at is not None
    assert knee.above is not None
    assert knee.at.rate <= truth < knee.above.rate
    assert knee.above.rate / knee.at.rate < 1.02
    assert knee.recommended == pytest.approx(0.7 * knee.at.rate)
    assert "p99" in knee.why or "answered" in knee.why


def test_the_knee_of_a_simulated_queue() -> None:
    for seed in range(5):
        knee = find(queue(1000, seed), refine=4)
        assert knee.at is not None
        assert 500 < knee.at.rate < 1000  # exact: 770


def test_a_server_that_refuses_has_its_knee_where_refusals_begin() -> None:
    def measure(rate: float) -> Point:
        good = min(rate, 700.0)
        return point(rate, achieved=good / rate, failed=1 - good / rate)

    knee = find(measure, refine=6)
    assert knee.at is not None
    assert 680 < knee.at.rate <= 700.7
    assert "failed" in knee.why


def test_a_first_rate_that_is_too_high_is_lowered() -> None:
    knee = find(queue(1000), first=5000.0)
    assert knee.at is not None
    assert 600 < knee.at.rate < 770


def test_no_rate_passes() -> None:
    knee = find(lambda rate: point(rate, p99=1.0))
    assert (knee.at, knee.recommended) == (None, 0.0)
    assert knee.above is knee.points[0]
    assert "p99 latency of 1e+03 ms exceeds 20 ms" in knee.why


def test_no_rate_fails() -> None:
    knee = find(point, most=1000.0)
    assert knee.at is not None
    assert (knee.at.rate, knee.above, knee.why) == (1000.0, None, "")


def test_one_disturbed_step_does_not_end_the_sweep() -> None:
    disturbed = iter([False, True, *[False] * 100])

    def measure(rate: float) -> Point:
        return point(rate, p99=9.0) if next(disturbed) else queue(1000)(rate)

    knee, calm = find(measure), find(queue(1000))
    assert knee == calm


def test_a_higher_rate_that_passes_by_luck_is_not_the_knee() -> None:
    points = [point(100), point(200, p99=1.0), point(300)]
    knee = knee_of(points, p99=GOAL)
    assert knee.at is points[0]
    assert knee.above is points[1]


@pytest.mark.parametrize(
    ("measured", "why"),
    [
        (point(100, p99=0.02), ""),
        (point(100, p99=0.0201), "the p99 latency of 20.1 ms exceeds 20 ms"),
        (point(1000, achieved=0.969), ""),  # 3 % and 5 requests
        (point(1000, achieved=0.968), "only 968 of 1,000 requests per second were answered"),
        (point(10, achieved=0.9), ""),  # 5 of 50 requests: they may be in flight at the end
        (point(100, failed=0.002), "0.2 % of the requests failed"),
        (replace(point(100, failed=0.2), refused=0.2), "20 % of the requests were refused"),
        (point(1, achieved=0.0), "no request succeeded"),
    ],
)
def test_what_a_rate_must_keep(measured: Point, why: str) -> None:
    assert problem(measured, GOAL) == why


def test_a_sweep_refuses_bad_arguments() -> None:
    with pytest.raises(InvalidArgument, match="got first=0"):
        find(point, first=0.0)
    with pytest.raises(InvalidArgument, match="growth=1"):
        find(point, growth=1.0)


# ---- sizes


def sizing(cost: Cost | None, shards: int = 2) -> Sizing:
    return Sizing(shards=shards, keys=1000, recommended=400.0, cost=cost, row_bytes=300.0)


def test_costs_are_found_again() -> None:
    truth = Cost(100e-6, 0.3e-6)
    found = cost_of([(keys, truth.of(keys)) for keys in (250, 500, 1000)])
    assert found is not None
    assert found.message == pytest.approx(truth.message)
    assert found.key == pytest.approx(truth.key)
    assert cost_of([(1000, 1e-3)]) is None
    assert cost_of([(1000, 1e-3), (250, 2e-3)]) is None  # fewer keys cost more: noise


def test_shards_for_a_rate_are_the_fewest_that_carry_it() -> None:
    size = sizing(Cost(100e-6, 0.8e-6))
    assert size.rate(2) == 400
    assert size.rate(4) == pytest.approx(400 * 500 / 300)
    assert size.shards_for(1) == 1
    for wanted in (250, 400, 401, 1000, 1500):
        shards = size.shards_for(wanted)
        assert shards is not None
        assert size.rate(shards) >= wanted
        assert shards == 1 or size.rate(shards - 1) < wanted
    assert size.shards_for(2001) is None  # 400 * 500 / 100: messages alone
    assert sizing(None).shards_for(2001) == 11


def test_sentences_name_what_to_do() -> None:
    said = " ".join(sentences(sizing(Cost(100e-6, 0.8e-6)), wanted=1000))
    assert "500 us of processor time: 100 us for its messages and 400 us for its 500 keys" in said
    assert "twice as many shards carry about 667 requests" in said
    assert "no number of shards carries more than 2,000" in said
    assert "For 1,000 requests per second, start 8 shards" in said
    assert "3,580,000 rows" in said
    assert "No number of shards carries 3,000" in " ".join(
        sentences(sizing(Cost(100e-6, 0.8e-6)), wanted=3000)
    )
    nothing = Sizing(shards=2, keys=1000, recommended=0.0, cost=None, row_bytes=300.0)
    assert "No rate kept the objective" in sentences(nothing)[0]
    assert not table(nothing)
    assert table(sizing(Cost(100e-6, 0.8e-6)))[1] == ("2", "500", "400")


def test_nothing_is_said_of_other_clusters_if_the_shards_were_idle() -> None:
    idle = replace(sizing(Cost(100e-6, 0.8e-6)), limited=False)
    said = " ".join(sentences(idle, wanted=1000))
    assert "The shards were not busy at the knee" in said
    assert "start" not in said
    assert "cannot say" in said
    assert "2 shards suffice" in " ".join(sentences(idle, wanted=399))
    assert not table(idle)
