"""Thread pools for blocking work.

Short calls, calls that read the checkpoint store, checks of large messages and long operations have
separate pools, so that none waits for another. Long operations beyond the size of their pool are
refused with Busy. The threads are daemons: one that hangs in a file operation does not keep the
process from ending.
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

SHORT = 4  # threads for calls that take milliseconds
STORE = 4  # threads for calls that read a few files of the checkpoint store
CHECKS = 2  # threads for messages that are too expensive for the event loop
LONG = 8  # operations that can take minutes or hours
CLOSE_SECONDS = 10.0  # to wait for running work at a stop

Result = TypeVar("Result")
_Job = tuple["Future[Any]", Callable[[], Any]]


class Pool(Executor):
    """An executor of daemon threads."""

    def __init__(self, name: str, threads: int) -> None:
        self._name = name
        self._most = threads
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """Run a call on a thread. Only the event loop may call this."""
        if len(self._threads) < self._most:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._threads.append(thread)
            thread.start()
        future: Future[Result] = Future()
        self._jobs.put((future, partial(fn, *args, **kwargs)))
        return future

    def close(self, seconds: float) -> None:
        """End the threads. Those that are still running after ``seconds`` are abandoned."""
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
            del job, future, call  # do not keep large requests while idle


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
    """The thread pools of one server. Only the event loop may use them."""

    def __init__(self) -> None:
        self.short = Pool("short", SHORT)
        self.store = Pool("store", STORE)
        self.checks = Pool("checks", CHECKS)
        self._long = Pool("long", LONG)
        self._slots = LONG

    def close(self) -> None:
        """Wait up to CLOSE_SECONDS for running work."""
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
        """Run a call on a thread of ``pool``. Raises DeadlinePassed if it could not begin in time.

        If the caller is cancelled, ``reservation`` is released when the call has ended.
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
        """Occupy a slot for a long operation. Raises Busy if none is free."""
        self._take_slot()
        try:
            yield self._long
        finally:
            self._slots += 1

    def start_long(self, call: Callable[..., Result], *args: Any) -> asyncio.Future[Result]:
        """Run a long operation. Its slot is occupied until it ends. Raises Busy if none is free."""
        self._take_slot()
        loop = asyncio.get_running_loop()
        job = self._long.submit(call, *args)
        job.add_done_callback(lambda _: post(loop, self._return_slot))
        return asyncio.wrap_future(job)

    def _take_slot(self) -> None:
        if not self._slots:
            raise Busy(f"{LONG} long operations are running, the limit; retry later")
        self._slots -= 1

    def _return_slot(self) -> None:
        self._slots += 1


def _punctual(call: Callable[[], Result], deadline: float) -> Result:
    if time.monotonic() > deadline:
        raise DeadlinePassed("the deadline passed before the work began")
    return call()
