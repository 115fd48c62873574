"""A client of an overloaded shard: how many requests it has in flight, and when it tries again."""

from __future__ import annotations

import pytest

from psclient.errors import ResourceExhausted
from psclient.patience import BURST, EARNED, JITTER, PER_SECOND, Patience
from psclient.window import LEAST_REQUESTS, MOST_BYTES, MOST_REQUESTS, SLOW, Window


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def refusal(reason: str = "OVERLOADED", seconds: float | None = 0.5) -> ResourceExhausted:
    error = ResourceExhausted("not now")
    error.reason, error.retry_after = reason, seconds
    return error


class TestWindow:
    def test_grows_while_answers_are_quick_and_shrinks_while_they_are_slow(self) -> None:
        clock, id = Clock(), 0
        window: Window[int] = Window(clock)

        def in_flight(seconds: float) -> int:
            """Send as many as the window takes; answer all, after so many seconds."""
            nonlocal id
            first = id
            while window.enter(id):
                window.sent(id, 100)
                id += 1
            clock.now += seconds
            last = id
            for each in range(first, last):
                for waiting in window.answered(each):
                    assert waiting == last  # the one that found no room
            id += 1
            return last - first

        sizes = [in_flight(0.001) for _ in range(5)]
        assert (sizes[0], sizes[-1]) == (LEAST_REQUESTS, MOST_REQUESTS)
        sizes = [in_flight(2 * SLOW) for _ in range(12)]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] == LEAST_REQUESTS

    def test_limits_bytes_but_not_of_a_few_requests(self) -> None:
        window: Window[int] = Window(Clock())
        for id in range(LEAST_REQUESTS):
            assert window.enter(id)
            window.sent(id, MOST_BYTES)
        assert not window.enter(LEAST_REQUESTS)
        assert list(window.answered(0)) == [LEAST_REQUESTS]

    def test_keeps_the_order(self) -> None:
        window: Window[int] = Window(Clock())
        for id in range(LEAST_REQUESTS):
            window.enter(id)
            window.sent(id, 1)
        for id in range(100, 103):
            assert not window.enter(id)
        sent = []
        for id in range(3):
            for each in window.answered(id):
                window.sent(each, 1)
                sent.append(each)
        assert sent == [100, 101, 102]

    def test_knows_when_a_request_that_waits_would_be_answered(self) -> None:
        clock = Clock()
        window: Window[int] = Window(clock)
        for id in range(LEAST_REQUESTS):
            window.enter(id)
            window.sent(id, 1)
        assert window.delay() == 0.0
        for id in range(100, 400):
            window.enter(id)
        for id in [*range(LEAST_REQUESTS), *range(100, 200)]:
            clock.now += 0.01
            for each in window.answered(id):
                window.sent(each, 1)
        waiting, sent = len(window._waiting), len(window._sent)
        assert waiting > 100
        assert sent > LEAST_REQUESTS
        assert window.delay() == pytest.approx((waiting + sent) * 0.01, rel=0.1)


class TestPatience:
    def test_new_requests_wait_as_long_as_the_shard_asked(self) -> None:
        clock = Clock()
        patience = Patience(clock)
        assert patience.holds() is None
        patience.refused(refusal())
        clock.now += 0.2
        held = patience.holds()
        assert isinstance(held, ResourceExhausted)
        assert (str(held), held.reason) == ("not now", "OVERLOADED")
        assert held.retry_after == pytest.approx(0.3)
        clock.now += 0.31
        assert patience.holds() is None

    @pytest.mark.parametrize("reason", ["DISK_FULL", "BUDGET_EXCEEDED", "OUT_OF_MEMORY"])
    def test_other_errors_stop_only_their_own_request(self, reason: str) -> None:
        patience = Patience(Clock())
        patience.refused(refusal(reason))
        assert patience.holds() is None

    def test_pauses_are_never_shorter_than_asked_and_differ(self) -> None:
        draws = iter([0.0, 0.5, 1.0])
        patience = Patience(Clock(), lambda: next(draws))
        pauses = [patience.pause(1.0) for _ in range(3)]
        assert pauses == [1.0, 1.0 + JITTER / 2, 1.0 + JITTER]

    def test_the_budget_bounds_what_is_sent_again(self) -> None:
        clock = Clock()
        patience = Patience(clock)

        def repeated() -> int:
            return sum(patience.may_repeat() for _ in range(1000))

        assert repeated() == BURST
        clock.now += 1
        assert repeated() == PER_SECOND
        for _ in range(10):
            patience.answered()
        assert repeated() == int(10 * EARNED)
