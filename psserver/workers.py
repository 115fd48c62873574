"""Thread pools for blocking work.

There are separate pools for short calls, for reads of the checkpoint store, for checks of large
messages and for long operations, so that no kind of work waits for another. If all threads for long
operations are busy, further ones are refused with Busy. The threads are daemons: a thread that
hangs in a file operation does not keep the process from exiting.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from psserver.errors import Busy, DeadlinePassed
from psserver.limits import Reservation
from psserver.loops import post
from psserver.pool import Pool

SHORT = 4  # threads for calls that take milliseconds
STORE = 4  # threads for calls that read a few files of the checkpoint store
CHECKS = 2  # threads for checks of messages that would block the event loop for too long
LONG = 8  # threads for operations that can take minutes or hours
CLOSE_SECONDS = 10.0  # seconds to wait for running work at a stop

Result = TypeVar("Result")


class Workers:
    """The thread pools of one server. Only the event loop may use them."""

    def __init__(self) -> None:
        self.short = Pool("short", SHORT)
        self.store = Pool("store", STORE)
        self.checks = Pool("checks", CHECKS)
        self._long = Pool("long", LONG)
        self._slots = LONG

    def close(self) -> None:
        """End all threads; wait at most CLOSE_SECONDS for running work."""
        end = time.monotonic() + CLOSE_SECONDS
        for pool in (self.short, self.store, self.checks, self._long):
            pool.close(max(end - time.monotonic(), 0))

    async def run(
        self,
        pool: Pool,
        call: Callable[[], Result],
        deadline: float = math.inf,
        reservation: Reservation | None = None,
    ) -> Result:
        """Run ``call`` on a thread of ``pool``, and return its result.

        deadline     monotonic seconds; raises DeadlinePassed if the call has not begun by then
        reservation  memory reserved for the request; if this coroutine is canceled while ``call``
                     runs, the memory is released only when ``call`` has ended
        """
        job = pool.submit(_punctual, call, deadline)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            if reservation is not None and not job.cancelled():
                reservation.hand_over()
                loop = asyncio.get_running_loop()
                job.add_done_callback(lambda _: post(loop, reservation.end))
            raise

    @contextmanager
    def slot(self) -> Iterator[Pool]:
        """Return a context manager that reserves one of the threads for long operations during its
        block, and yields the pool of these threads.

        Raises Busy if none is free.
        """
        self._take_slot()
        try:
            yield self._long
        finally:
            self._slots += 1

    def start_long(self, call: Callable[..., Result], *args: Any) -> asyncio.Future[Result]:
        """Start ``call(*args)`` on a thread for long operations; return the future of its result.

        Raises Busy if no thread is free. Canceling the future does not end the call.
        """
        self._take_slot()
        loop = asyncio.get_running_loop()
        job = self._long.submit(call, *args)
        job.add_done_callback(lambda _: post(loop, self._return_slot))
        return asyncio.wrap_future(job)

    def _take_slot(self) -> None:
        if not self._slots:
            raise Busy(f"this shard already runs {LONG} long operations, its limit; retry later")
        self._slots -= 1

    def _return_slot(self) -> None:
        self._slots += 1


def _punctual(call: Callable[[], Result], deadline: float) -> Result:
    """Run ``call`` and return its result.

    deadline  monotonic seconds; if it has passed, raises DeadlinePassed and does not run ``call``
    """
    if time.monotonic() > deadline:
        raise DeadlinePassed("the deadline passed before the work began")
    return call()
