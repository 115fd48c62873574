"""Threads for what blocks: short calls, calls that wait for the store, checks, long work.

Each kind has threads of its own, so that none waits for another. Long work is refused with Busy
beyond its few threads. The threads are daemons: one that hangs in a file operation does not keep
the process from ending.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from psserver.errors import Busy, DeadlinePassed
from psserver.limits import Reservation
from psserver.loops import post

SHORT = 4  # threads for calls of milliseconds
STORE = 4  # threads for calls that read a few files of the checkpoint store
CHECKS = 2  # threads for messages that are too expensive for the event loop
LONG = 8  # pieces of work that take as long as they take
CLOSE_SECONDS = 10.0  # at a stop, for work that is under way

Result = TypeVar("Result")
_Job = tuple["Future[Any]", Callable[[], Any]]


class Pool(Executor):
    """Up to ``threads`` daemon threads that run calls, oldest first."""

    def __init__(self, name: str, threads: int) -> None:
        self._name = name
        self._most = threads
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """Run a call on a thread; called on the event loop alone."""
        if len(self._threads) < self._most:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._threads.append(thread)
            thread.start()
        future: Future[Result] = Future()
        self._jobs.put((future, partial(fn, *args, **kwargs)))
        return future

    def close(self, seconds: float) -> None:
        """End the threads; those that are still at work after ``seconds`` are left behind."""
        end = time.monotonic() + seconds
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, call = job
            if future.set_running_or_notify_cancel():
                _settle(future, call)
            del job, future, call  # requests are large; idle may be long


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        result = call()
    except StopIteration as error:  # no future of asyncio can have it
        future.set_exception(RuntimeError(f"unexpected end of an iterator: {error}"))
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


class Workers:
    """The threads of one server, by kind of work. Used on the event loop."""

    def __init__(self) -> None:
        self.short = Pool("short", SHORT)
        self.store = Pool("store", STORE)
        self.checks = Pool("checks", CHECKS)
        self._long = Pool("long", LONG)
        self._slots = LONG

    def close(self) -> None:
        """Wait for work that is under way, for a while."""
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
        """Run a call on a thread of ``pool``; DeadlinePassed if it could not begin in time.

        A caller that is cancelled returns ``reservation`` only when the call has ended.
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
        """Take one of the few slots for long work; Busy if there is none."""
        self._take_slot()
        try:
            yield self._long
        finally:
            self._slots += 1

    def start_long(self, call: Callable[..., Result], *args: Any) -> asyncio.Future[Result]:
        """Run a call on a slot for long work, which stays taken until the call ends; Busy if none
        is free.
        """
        self._take_slot()
        loop = asyncio.get_running_loop()
        job = self._long.submit(call, *args)
        job.add_done_callback(lambda _: post(loop, self._return_slot))
        return asyncio.wrap_future(job)

    def _take_slot(self) -> None:
        if not self._slots:
            raise Busy(f"{LONG} pieces of long work are under way, the limit; retry later")
        self._slots -= 1

    def _return_slot(self) -> None:
        self._slots += 1


def _punctual(call: Callable[[], Result], deadline: float) -> Result:
    if time.monotonic() > deadline:
        raise DeadlinePassed("the deadline passed before the work began")
    return call()
