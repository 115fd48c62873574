"""Which request begins next, and which is refused because it would wait for too long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from psserver.errors import DeadlinePassed, Overloaded
from psserver.turns import (
    ALLOWED,
    BASE,
    INTERVAL,
    LONGEST,
    MEASURED,
    SHORTEST,
    Client,
    Share,
    Turns,
)

RATE = 1000 * BASE  # cost per second in these tests: a request without bytes takes 1 ms


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def with_turns(act: Callable[[Turns, Clock], Any]) -> Any:
    """Run ``await act(turns, clock)`` on a loop."""

    async def run() -> Any:
        clock = Clock()
        return await act(Turns(clock, lambda: 0.5), clock)

    return asyncio.run(run())


def fill(turns: Turns, client: Client, count: int, deadline: float = 1e9) -> list[str]:
    """Let requests wait; return a list that gets a word for each: what became of it."""
    found: list[str] = []
    for number in range(count):
        turns.enter(
            client,
            0,
            deadline,
            lambda n=number: found.append(f"{n}"),
            lambda error, n=number: found.append(f"{n} {type(error).__name__}"),
        )
    return found


def test_requests_may_begin_at_once_until_they_took_their_share_of_a_round() -> None:
    async def act(turns: Turns, _: Clock) -> list[bool]:
        found = [turns.free()]
        turns.spent(1.0)
        found.append(turns.free())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return [*found, turns.free()]

    assert with_turns(act) == [True, False, True]


def test_requests_of_a_client_begin_in_their_order() -> None:
    async def act(turns: Turns, _: Clock) -> list[str]:
        found = fill(turns, Client(), 20)
        while turns.waiting:
            await asyncio.sleep(0)
        return found

    assert with_turns(act) == [str(n) for n in range(20)]


def test_a_client_with_one_request_does_not_wait_for_all_of_another() -> None:
    async def act(turns: Turns, _: Clock) -> list[str]:
        order: list[str] = []

        def enter(client: Client, name: str) -> None:
            turns.enter(client, 0, 1e9, lambda: order.append(name), lambda _: None)

        noisy, quiet = Client(), Client()
        for _ in range(100):
            enter(noisy, "noisy")
        enter(quiet, "quiet")
        while turns.waiting:
            await asyncio.sleep(0)
        return order

    order = with_turns(act)
    assert order.index("quiet") <= 2
    assert len(order) == 101


def test_clients_get_equal_shares_by_cost_not_by_number() -> None:
    """One sends requests that cost four times as much as those of the other."""

    async def act(turns: Turns, _: Clock) -> list[str]:
        order: list[str] = []
        large, small = Client(), Client()
        for _ in range(40):
            turns.enter(large, 3 * BASE, 1e9, lambda: order.append("large"), lambda _: None)
        for _ in range(40):
            turns.enter(small, 0, 1e9, lambda: order.append("small"), lambda _: None)
        while turns.waiting:
            await asyncio.sleep(0)
        return order[:40]

    order = with_turns(act)
    assert 7 <= order.count("large") <= 9


def test_a_principal_with_many_connections_gets_no_more_than_one_with_one_connection() -> None:
    async def act(turns: Turns, _: Clock) -> list[str]:
        order, principal = list[str](), Share()
        many, one = [Client(principal) for _ in range(20)], Client(Share())

        def enter(client: Client, name: str) -> None:
            turns.enter(client, 0, 1e9, lambda: order.append(name), lambda _: None)

        for client in many * 10:
            enter(client, "many")
        for _ in range(10):
            enter(one, "one")
        assert (principal.clients, principal.cost) == (20, 200 * BASE)
        while turns.waiting:
            await asyncio.sleep(0)
        assert (principal.clients, principal.cost) == (0, 0)
        return order

    order = with_turns(act)
    assert order[:20].count("one") >= 9
    assert order.count("many") == 200


def test_connections_of_a_principal_take_turns() -> None:
    async def act(turns: Turns, _: Clock) -> list[str]:
        order, principal = list[str](), Share()
        first, second = Client(principal), Client(principal)
        for client, name in ((first, "first"), (second, "second")):
            for _ in range(10):
                turns.enter(client, 0, 1e9, lambda name=name: order.append(name), lambda _: None)
        while turns.waiting:
            await asyncio.sleep(0)
        return order

    assert with_turns(act)[:10].count("first") == 5


def test_the_wait_depends_on_the_principal_and_on_its_connection() -> None:
    async def act(turns: Turns, _: Clock) -> list[float]:
        principal, other = Share(), Client()
        noisy = [Client(principal) for _ in range(4)]
        turns.rate = RATE
        for client in noisy:
            fill(turns, client, 100)
        clients = (noisy[0], Client(principal), other)
        return [turns.wait_of(client, BASE) for client in clients]

    of_noisy, of_quiet_sibling, of_other = with_turns(act)
    assert of_noisy == pytest.approx(0.4, rel=0.02)
    assert of_quiet_sibling == pytest.approx(0.005, rel=0.02)  # one turn of each connection
    assert of_other == pytest.approx(0.002, rel=0.02)


def test_a_blocked_client_keeps_its_order_and_stops_nobody() -> None:
    async def act(turns: Turns, _: Clock) -> tuple[list[str], list[str], list[str]]:
        blocked, other = Client(), Client()
        work: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        turns.block(blocked, work)
        first, second = fill(turns, blocked, 2), fill(turns, other, 2)
        while turns.waiting > 2:
            await asyncio.sleep(0)
        before = list(first)
        work.set_result(None)
        while turns.waiting:
            await asyncio.sleep(0)
        return before, first, second

    assert with_turns(act) == ([], ["0", "1"], ["0", "1"])


def test_no_more_begins_while_the_engine_has_enough_to_do() -> None:
    async def act(turns: Turns, _: Clock) -> list[int]:
        loop = asyncio.get_running_loop()
        running = [loop.create_future() for _ in range(2)]
        for work in running:
            turns.working(work, 4 << 20)
        found, counts = fill(turns, Client(), 3), []
        for work in (None, *running):
            if work is not None:
                work.set_result(None)
            for _ in range(10):
                await asyncio.sleep(0)
            counts.append(len(found))
        return counts

    assert with_turns(act) == [0, 3, 3]


def test_a_request_whose_deadline_passes_while_it_waits_does_not_begin() -> None:
    async def act(turns: Turns, clock: Clock) -> list[str]:
        found = fill(turns, Client(), 2, deadline=clock.now + 1)
        clock.now += 2
        while turns.waiting:
            await asyncio.sleep(0)
        return found

    assert with_turns(act) == ["0 DeadlinePassed", "1 DeadlinePassed"]


def test_a_request_that_cannot_meet_its_deadline_is_refused_on_arrival() -> None:
    async def act(turns: Turns, clock: Clock) -> None:
        client = Client()
        fill(turns, client, 100)
        turns.rate = RATE  # so that they take 0.1 s
        turns.enter(client, 0, clock.now + 1, lambda: None, lambda _: None)
        with pytest.raises(Overloaded, match="until its deadline has passed; retry later"):
            turns.enter(client, 0, clock.now + 0.05, lambda: None, lambda _: None)
        turns.enter(Client(), 0, clock.now + 0.05, lambda: None, lambda _: None)

    with_turns(act)


def test_a_client_is_refused_only_after_it_was_behind_for_a_while() -> None:
    async def act(turns: Turns, clock: Clock) -> list[bool]:
        noisy, few, found = Client(), Client(), []

        def accepted(client: Client) -> bool:
            try:
                turns.enter(client, 0, 1e9, lambda: None, lambda _: None)
            except Overloaded:
                return False
            return True

        fill(turns, noisy, 1000)
        turns.rate = RATE  # so that they take 1 s
        found.append(accepted(noisy))  # a burst
        clock.now += INTERVAL * 1.1
        found.append(accepted(noisy))
        found += [accepted(few) for _ in range(ALLOWED)]
        return found

    assert with_turns(act) == [True, False] + [True] * ALLOWED


def test_the_time_to_wait_grows_with_the_backlog_within_bounds() -> None:
    async def act(turns: Turns, _: Clock) -> list[float | None]:
        turns.rate = RATE
        found = [turns.overloaded("why").retry_after]
        for count in (300, 300, 10_000):
            turns._behind = 1e9
            fill(turns, Client(), count)
            found.append(turns.overloaded("why").retry_after)
        return found

    shortest, first, second, longest = with_turns(act)
    assert SHORTEST <= shortest < first < second < longest <= LONGEST


def test_the_time_to_wait_differs_between_clients() -> None:
    async def act(_: Turns, clock: Clock) -> set[float | None]:
        draws = iter([0.1, 0.1, 0.9, 0.9])
        turns = Turns(clock, lambda: next(draws))
        return {turns.overloaded("why").retry_after for _ in range(2)}

    assert len(with_turns(act)) == 2


def test_the_rate_is_measured_while_requests_wait() -> None:
    async def act(turns: Turns, clock: Clock) -> float:
        client, work = Client(), [asyncio.get_running_loop().create_future() for _ in range(2)]
        for each in work:
            turns.working(each, 4 << 20)
        fill(turns, client, 10)
        await asyncio.sleep(0)
        clock.now += 1.01 * MEASURED
        work[0].set_result(None)
        while turns.waiting:
            await asyncio.sleep(0)
        return turns.rate

    assert with_turns(act) == pytest.approx(10 * BASE / MEASURED, rel=0.02)


def test_a_unary_call_that_is_cancelled_while_it_waits_takes_no_turn() -> None:
    async def act(turns: Turns, clock: Clock) -> tuple[int, int]:
        client = Client()
        waits = asyncio.ensure_future(turns.turn(client, 0, 1e9))
        await asyncio.sleep(0)
        waits.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        over = await turns.turn(client, 0, 1e9)
        begun = turns._begun
        over.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(DeadlinePassed):
            await turns.turn(client, 0, clock.now - 1)
        return begun, turns._begun

    assert with_turns(act) == (1, 0)
