"""What a run of one process counts, on a clock that the test moves: exact, on any machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from psclient.errors import DeadlineExceeded, PsError, ResourceExhausted
from psclient.tools.bench import worker
from psclient.tools.bench.arrivals import Arrivals
from psclient.tools.bench.latencies import Latencies
from psclient.tools.bench.mixes import Mix
from psclient.tools.bench.plan import Plan
from psclient.tools.bench.worker import UNSENT, Run, Totals

WORK = 0.001  # seconds of a request
RATE, SECONDS = 200.0, 10.0
STALL = 4.0, 5.0  # from, to
PLAN = Plan(mix="C", keys=100, dim=1, batch=8)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float, /) -> None:
        self.now += seconds


class Server:
    """Answers each request after WORK seconds, but nothing during STALL.

    errors  raised by the requests of these numbers
    """

    def __init__(self, clock: Clock, errors: dict[int, PsError] | None = None) -> None:
        self._clock = clock
        self._errors = errors or {}
        self.requests = 0

    def send(self, request: Any) -> tuple[int, int]:
        clock, (first, last) = self._clock, STALL
        self.requests += 1
        clock.now += WORK
        if first <= clock.now < last:
            clock.now = last
        if self.requests in self._errors:
            raise self._errors[self.requests]
        return 8, 96


def ran(rate: float, server: Server, clock: Clock) -> dict[str, Any]:
    """Run one client on one thread, the test's; return what the process reports."""
    task = {
        "rate": rate, "start": 0.0, "warmup": 0.0, "seconds": SECONDS, "round": 1, "batch": 8,
    }  # fmt: skip
    sender: Any = server
    run = Run(task, [sender], 1, Mix(PLAN, 0, (0,)), 0, clock)
    run._work(sender)
    totals = Totals(0.0)
    totals.add(list(run._sent), list(run._offered), SECONDS)
    return totals.as_json()


def merged(found: dict[str, str]) -> Latencies:
    return Latencies.merged(found.values())


def test_a_stall_of_1_s_is_in_p99_9_of_an_open_loop() -> None:
    """A queue with one server, computed anew from the arrivals."""
    clock = Clock()
    found = ran(RATE, Server(clock), clock)
    arrivals, due = Arrivals(RATE, SECONDS, (0, 1, 1)), []
    while (at := arrivals.next()) is not None:
        due.append(at)
    free, latencies = 0.0, []
    for at in due:
        free = max(free, at) + WORK
        if STALL[0] <= free < STALL[1]:
            free = STALL[1]
        latencies.append(free - at)
    true = merged(found["latency"])
    assert len(true) == len(due) == found["offered"]
    ordered = np.sort(latencies)
    for percent in (50, 90, 99, 99.9):
        rank = round(percent / 100 * len(due)) - 1  # or a neighbour: definitions differ
        low, high = ordered[rank - 1], ordered[rank + 1]
        assert low * 0.998 <= true.percentile(percent) <= high * 1.002
    assert true.percentile(99.9) > 0.97
    assert true.longest == pytest.approx(max(latencies), rel=2e-3)


def test_the_stall_is_hidden_in_the_time_from_the_actual_start_and_in_a_closed_loop() -> None:
    """Only one request sees it. So these figures alone would mislead."""
    clock = Clock()
    found = ran(RATE, Server(clock), clock)
    naive = Latencies.merged([found["service"]])
    assert naive.percentile(99.9) == pytest.approx(WORK, rel=2e-3)
    assert 0.97 < naive.longest < 1.01
    clock = Clock()
    closed = merged(ran(0.0, Server(clock), clock)["latency"])
    assert closed.percentile(99.9) == pytest.approx(WORK, rel=2e-3)


def test_refused_requests_are_counted_apart_from_failed_ones() -> None:
    clock, busy = Clock(), ResourceExhausted("busy")
    busy.reason, busy.retry_after = "OVERLOADED", 0.5
    full = ResourceExhausted("full")
    full.reason = "OUT_OF_MEMORY"
    found = ran(RATE, Server(clock, {3: busy, 7: busy, 8: full}), clock)
    errors = {code: len(Latencies.merged([each])) for code, each in found["errors"].items()}
    assert errors == {"OVERLOADED": 2, "OUT_OF_MEMORY": 1}
    assert found["refused"] == 2
    assert found["offered"] == len(merged(found["latency"])) + 3
    assert clock.now < SECONDS + 1  # an open loop does not pause


def test_a_client_of_a_closed_loop_pauses_as_long_as_the_server_asks() -> None:
    clock, busy = Clock(), ResourceExhausted("busy")
    busy.reason, busy.retry_after = "OVERLOADED", 2.0
    server = Server(clock, {1: busy})
    found = ran(0.0, server, clock)
    assert found["refused"] == 1
    assert server.requests == pytest.approx((SECONDS - 3.0) / WORK, abs=5)  # 2 s, and the stall


def test_requests_that_are_due_and_cannot_be_sent_are_counted() -> None:
    """1000 requests per second are possible without the stall, 900 in 10 s with it."""
    clock = Clock()
    found = ran(2000.0, Server(clock), clock)
    sent = len(merged(found["latency"]))
    assert sent == pytest.approx(9000, abs=3)
    assert found["offered"] == sent + len(Latencies.merged([found["errors"][UNSENT]]))


def test_a_run_that_is_stopped_counts_nothing_that_is_due_later() -> None:
    clock = Clock()
    server = Server(clock)
    task = {
        "rate": RATE, "start": 0.0, "warmup": 0.0, "seconds": SECONDS, "round": 1, "batch": 8,
    }  # fmt: skip
    sender: Any = server
    run = Run(task, [sender], 1, Mix(PLAN, 0, (0,)), 0, clock)
    run._end = 3.0
    run._work(sender)
    totals = Totals(0.0)
    totals.add(list(run._sent), list(run._offered), run._end)
    found = totals.as_json()
    assert clock.now < 3.1
    assert found["offered"] == server.requests == len(merged(found["latency"]))
    assert found["offered"] == pytest.approx(600, abs=75)  # sqrt(600) = 24
    assert not found["errors"]


@pytest.mark.parametrize("error", [DeadlineExceeded("late"), ResourceExhausted("busy")])
def test_the_first_pull_of_a_client_may_take_longer_than_a_timeout(
    error: PsError, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Connecting:
        def __init__(self) -> None:
            self.failures = 2

        def pull(self, _: Any) -> None:
            self.failures -= 1
            if self.failures >= 0:
                raise error

    client: Any = Connecting()
    worker._pull_once(client, PLAN)
    assert client.failures == -1
    monkeypatch.setattr(worker, "CONNECT_SECONDS", 0.0)
    never: Any = Connecting()
    with pytest.raises(type(error)):
        worker._pull_once(never, PLAN)
