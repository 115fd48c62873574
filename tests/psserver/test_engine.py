"""The engine thread: order, results, deadlines, and an orderly end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from psserver.busypoll import BusyPoll
from psserver.engine import Engine
from psserver.errors import DeadlinePassed


def with_engine(act: Callable[[Engine], Any]) -> Any:
    """Run ``await act(engine)`` on a loop, the engine open."""

    async def run() -> Any:
        engine = Engine()
        engine.open(asyncio.get_running_loop())
        try:
            return await act(engine)
        finally:
            await asyncio.to_thread(engine.close)

    return asyncio.run(run())


def test_calls_run_one_after_another_in_the_order_in_which_they_were_submitted() -> None:
    seen: list[tuple[str, int]] = []

    def call(number: int) -> int:
        seen.append(("begin", number))
        time.sleep(0.001 * (number % 3 == 0))
        seen.append(("end", number))
        return number

    async def act(engine: Engine) -> list[int]:
        return await asyncio.gather(*(engine.submit(lambda n=n: call(n)) for n in range(50)))

    assert with_engine(act) == list(range(50))
    assert seen == [(what, n) for n in range(50) for what in ("begin", "end")]


def test_calls_run_on_the_thread_named_engine_and_no_other() -> None:
    async def act(engine: Engine) -> set[str]:
        names = [engine.submit(lambda: threading.current_thread().name) for _ in range(5)]
        return set(await asyncio.gather(*names))

    assert with_engine(act) == {"engine"}


def test_a_posted_call_that_fails_is_counted_and_logged_and_others_go_on() -> None:
    async def act(engine: Engine) -> int:
        for _ in range(3):
            engine.post(lambda: 1 // 0)
        return await engine.submit(lambda: engine.failures)

    with capture_logs() as logged:
        assert with_engine(act) == 3
    (line,) = logged  # not one for each request
    assert (line["event"], line["log_level"]) == ("work between requests failed", "error")
    assert line["exc_info"]


def test_results_are_delivered_on_the_loop() -> None:
    async def act(engine: Engine) -> str:
        done: list[str] = []
        future = engine.submit(lambda: None)
        future.add_done_callback(lambda _: done.append(threading.current_thread().name))
        await future
        return done[0]

    assert with_engine(act) == threading.current_thread().name


def test_an_error_reaches_its_caller_alone_and_work_goes_on() -> None:
    async def act(engine: Engine) -> list[Any]:
        error = LookupError("mine")

        def fail() -> None:
            raise error

        futures = [engine.submit(call) for call in (lambda: 1, fail, lambda: 3)]
        answers = await asyncio.gather(*futures, return_exceptions=True)
        return [answer if answer is not error else "mine" for answer in answers]

    assert with_engine(act) == [1, "mine", 3]


@pytest.mark.parametrize(("ahead", "runs"), [(-1.0, False), (60.0, True), (float("inf"), True)])
def test_a_call_past_its_deadline_is_not_begun(ahead: float, runs: bool) -> None:
    begun: list[bool] = []

    async def act(engine: Engine) -> Any:
        return await engine.submit(lambda: begun.append(True), time.monotonic() + ahead)

    if runs:
        with_engine(act)
    else:
        with pytest.raises(DeadlinePassed, match=r"^the deadline passed before the work began$"):
            with_engine(act)
    assert begun == [True] * runs


def test_a_deadline_that_passes_in_the_queue_counts_when_the_call_is_due() -> None:
    async def act(engine: Engine) -> list[Any]:
        gate = threading.Event()
        first = engine.submit(gate.wait, time.monotonic() + 0.05)  # begun in time, then slow
        late = engine.submit(lambda: "late", time.monotonic() + 0.05)
        after = engine.submit(lambda: "after")
        await asyncio.sleep(0.1)
        gate.set()
        return await asyncio.gather(first, late, after, return_exceptions=True)

    first, late, after = with_engine(act)
    assert (first, after) == (True, "after")
    assert isinstance(late, DeadlinePassed)


def test_waiting_counts_the_calls_that_were_not_begun() -> None:
    async def act(engine: Engine) -> tuple[int, int]:
        started, gate = threading.Event(), threading.Event()
        futures = [engine.submit(lambda: (started.set(), gate.wait()))]
        await asyncio.to_thread(started.wait)
        futures += [engine.submit(lambda: None) for _ in range(3)]
        during = engine.waiting
        gate.set()
        await asyncio.gather(*futures)
        return during, engine.waiting

    assert with_engine(act) == (3, 0)


def test_a_caller_that_went_away_stops_nobody() -> None:
    ran: list[int] = []

    async def act(engine: Engine) -> Any:
        gate = threading.Event()
        engine.submit(gate.wait)
        gone = engine.submit(lambda: ran.append(1))
        gone.cancel()
        gate.set()
        return await engine.submit(lambda: "next")

    assert with_engine(act) == "next"
    assert ran == [1]  # a call once submitted is not taken back


def test_close_finishes_what_was_submitted_and_ends_the_thread() -> None:
    ran: list[int] = []

    async def run() -> list[int]:
        engine = Engine()
        engine.open(asyncio.get_running_loop())
        futures = []
        for number in range(20):
            call = lambda n=number: (time.sleep(0.002), ran.append(n), n)[2]  # noqa: E731
            futures.append(engine.submit(call))
        engine.close()
        assert ran == list(range(20))
        assert not engine._thread.is_alive()
        return list(await asyncio.gather(*futures))

    assert asyncio.run(run()) == list(range(20))


def test_a_loop_that_is_gone_ends_the_thread_quietly() -> None:
    engine, gate = Engine(), threading.Event()

    async def run() -> None:
        engine.open(asyncio.get_running_loop())
        engine.submit(gate.wait)

    asyncio.run(run())
    gate.set()
    engine.close()
    assert not engine._thread.is_alive()


def test_an_idle_engine_has_a_small_call_done_where_it_is_submitted() -> None:
    async def act(engine: Engine) -> tuple[bool, str]:
        future = engine.submit(lambda: threading.current_thread().name, at_once=True)
        return future.done(), await future

    assert with_engine(act) == (True, threading.current_thread().name)


def test_a_busy_engine_keeps_the_order_whether_or_not_a_call_may_be_done_at_once() -> None:
    seen: list[int] = []

    async def act(engine: Engine) -> list[bool]:
        gate = threading.Event()
        futures = [engine.submit(gate.wait)]
        for n in range(6):
            futures.append(engine.submit(lambda n=n: seen.append(n), at_once=n % 2 == 0))
        done = [future.done() for future in futures]
        gate.set()
        await asyncio.gather(*futures)
        return done

    assert with_engine(act) == [False] * 7
    assert seen == list(range(6))


def test_the_engine_waits_for_a_call_that_is_done_at_once() -> None:
    seen: list[str] = []

    async def act(engine: Engine) -> None:
        other = threading.Thread(target=lambda: engine.run(lambda: seen.append("thread")))

        def call() -> None:
            other.start()
            time.sleep(0.02)
            seen.append("loop")

        engine.submit(call, at_once=True)
        await asyncio.to_thread(other.join)

    with_engine(act)
    assert seen == ["loop", "thread"]


def test_what_is_done_at_once_fails_like_any_other_call() -> None:
    async def act(engine: Engine) -> list[Any]:
        def fail() -> None:
            raise LookupError("mine")

        futures = [engine.submit(fail, at_once=True)]
        futures.append(engine.submit(lambda: None, time.monotonic() - 1, at_once=True))
        futures.append(engine.submit(lambda: "after", at_once=True))
        return [
            type(each) if isinstance(each, Exception) else each
            for each in await asyncio.gather(*futures, return_exceptions=True)
        ]

    assert with_engine(act) == [LookupError, DeadlinePassed, "after"]


# ---- busy polling


class Clock:
    """What BusyPoll needs of a loop; a round of it calls what was called for soon."""

    def __init__(self) -> None:
        self.now = 0.0
        self.soon: list[Callable[[], None]] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, call: Callable[[], None]) -> None:
        self.soon.append(call)

    def round(self, seconds: float) -> int:
        """Let time pass, then make a round; how many calls it had."""
        self.now += seconds
        calls, self.soon = self.soon, []
        for call in calls:
            call()
        return len(calls)


def test_a_loop_is_kept_awake_for_as_long_as_was_set_after_the_last_request() -> None:
    clock = Clock()
    poll = BusyPoll(clock, 0.002)  # type: ignore[arg-type]
    assert clock.round(0.001) == 0
    poll.stay()
    assert [clock.round(0.001) for _ in range(4)] == [1, 1, 0, 0]
    poll.stay()
    rounds = [clock.round(0.001)]
    poll.stay()  # one call a round, however many requests there are
    poll.stay()
    assert rounds + [clock.round(0.001) for _ in range(4)] == [1, 1, 1, 0, 0]


def test_a_loop_that_may_sleep_is_left_alone() -> None:
    clock = Clock()
    BusyPoll(clock, 0.0).stay()  # type: ignore[arg-type]
    assert clock.round(0.0) == 0


def test_an_engine_keeps_its_loop_awake_after_a_call() -> None:
    async def run() -> int:
        engine, loop = Engine(), asyncio.get_running_loop()
        selector: Any = loop._selector  # type: ignore[attr-defined]
        select, rounds = selector.select, []
        engine.open(loop, 0.2)
        try:
            await engine.submit(lambda: None)
            selector.select = lambda timeout=None: rounds.append(timeout) or select(timeout)
            await asyncio.sleep(0.1)
            return len(rounds)
        finally:
            await asyncio.to_thread(engine.close)

    assert asyncio.run(run()) > 20  # one or two if it sleeps


def test_busy_time_and_waits_of_all_calls_are_measured() -> None:
    pause = threading.Event()

    async def act(engine: Engine) -> None:
        await engine.submit(lambda: None, at_once=True)  # runs on this loop, without a wait
        assert engine.queue_wait.sum < 0.05
        long, waiting = engine.submit(lambda: pause.wait(0.1)), engine.submit(lambda: None)
        engine.post(lambda: None)
        await asyncio.gather(long, waiting)
        await asyncio.to_thread(engine.run, lambda: None)
        assert engine.queue_wait.total == 5
        assert engine.queue_wait.sum >= 0.2  # of the second and the posted call
        assert engine.busy_seconds >= 0.1

    with_engine(act)
