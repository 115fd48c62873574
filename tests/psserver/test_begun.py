"""Coroutines that begin where they are made."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from psserver.begun import Begun


async def steps(seen: list[str], *waits: asyncio.Future[str]) -> str:
    """Wait for each future in turn, and return what they said."""
    said = ""
    for wait in waits:
        seen.append("waits")
        said += await wait
    seen.append("over")
    return said


def run(act: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(act)


def test_what_needs_no_wait_is_over_at_once() -> None:
    seen: list[str] = []
    begun = Begun(steps(seen))
    assert (begun.over, begun.result(), seen) == (True, "", ["over"])


def test_it_waits_for_futures_in_their_order_and_can_be_awaited_for_the_rest() -> None:
    async def act() -> tuple[list[list[str]], str]:
        loop, seen = asyncio.get_running_loop(), list[str]()
        first, second = loop.create_future(), loop.create_future()
        begun, states = Begun(steps(seen, first, second)), [[*seen]]
        first.set_result("a")
        assert not begun.over
        states.append([*seen])
        loop.call_soon(second.set_result, "b")
        return states, await begun

    assert run(act()) == ([["waits"], ["waits", "waits"]], "ab")


def test_it_is_over_without_an_await_once_its_futures_are_done() -> None:
    async def act() -> tuple[bool, bool, str]:
        future = asyncio.get_running_loop().create_future()
        begun = Begun(steps([], future))
        before = begun.over
        future.set_result("done")
        return before, begun.over, begun.result()

    assert run(act()) == (False, True, "done")


@pytest.mark.parametrize("late", [False, True])
def test_its_error_is_raised_where_its_result_is_asked_for(late: bool) -> None:
    async def fail(future: asyncio.Future[str]) -> str:
        if late:
            await future
        raise LookupError("mine")

    async def act() -> None:
        future = asyncio.get_running_loop().create_future()
        begun = Begun(fail(future))
        future.set_result("")
        await begun

    with pytest.raises(LookupError, match=r"^mine$"):
        run(act())


def test_a_cancelled_wait_ends_the_coroutine() -> None:
    ended: list[bool] = []

    async def endless(future: asyncio.Future[str]) -> None:
        try:
            await future
        finally:
            ended.append(True)

    async def act() -> None:
        begun = Begun(endless(asyncio.get_running_loop().create_future()))

        async def wait() -> None:
            await begun

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    run(act())
    assert ended == [True]
