"""The thread that owns the shard.

Everything that touches rows runs here, one call after another in the order of arrival, so that
nothing else needs a lock. Handing a call to the thread and its result back takes longer than a
small call itself. While the engine is idle, the event loop may therefore run a call itself. It
holds the engine's turn meanwhile, so that order and mutual exclusion are the same.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from psserver.errors import DeadlinePassed
from psserver.loops import post

Result = TypeVar("Result")
_Job = tuple[Callable[[], Any], float, "asyncio.Future[Any] | None"]


class Engine:
    """One thread that runs calls for an event loop."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._counting = threading.Lock()
        self._unfinished = 0  # calls submitted and not finished
        self._turn = threading.Lock()  # held by the thread that runs a call
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def open(self, loop: asyncio.AbstractEventLoop, busy_poll: float = 0.0) -> None:
        """Start the thread.

        loop       event loop that gets the results
        busy_poll  seconds to keep the loop awake after each call
        """
        self._loop = loop
        self._poll = BusyPoll(loop, busy_poll)
        self._thread.start()

    def close(self) -> None:
        """Finish the submitted calls, then stop the thread."""
        self._jobs.put(None)
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Number of calls that are submitted and not started."""
        return self._jobs.qsize()

    def submit(
        self,
        call: Callable[[], Result],
        deadline: float = float("inf"),
        *,
        at_once: bool = False,
    ) -> asyncio.Future[Result]:
        """Run ``call`` on the engine thread; called on the loop, which gets the result.

        deadline  monotonic seconds; a call that has not started by then raises DeadlinePassed
        at_once   if the engine is idle, run the call on the loop, which waits for it
        """
        future: asyncio.Future[Result] = self._loop.create_future()
        if at_once and self._take_turn():
            try:
                _settle(future, *_outcome(call, deadline))
            finally:
                self._turn.release()
                self._over()
        else:
            self._put((call, deadline, future))
        self._poll.stay()
        return future

    def run(self, call: Callable[[], Result]) -> Result:
        """Run ``call`` on the engine thread and wait for it; called on any other thread."""
        done: Future[Result] = Future()

        def job() -> None:
            try:
                done.set_result(call())
            except BaseException as error:
                done.set_exception(error)

        self._put((job, float("inf"), None))
        return done.result()

    def _put(self, job: _Job) -> None:
        with self._counting:
            self._unfinished += 1
            self._jobs.put(job)

    def _take_turn(self) -> bool:
        """Take the engine's turn and return True, if the engine is idle."""
        with self._counting:
            if self._unfinished:
                return False
            self._unfinished = 1
            self._turn.acquire()
            return True

    def _over(self) -> None:
        with self._counting:
            self._unfinished -= 1

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            call, deadline, future = job
            with self._turn:
                result, error = _outcome(call, deadline)
            self._over()
            if future is not None and not post(self._loop, _settle, future, result, error):
                return
            del (
                job,
                call,
                future,
                result,
                error,
            )  # they are large; the next call may be far off


class BusyPoll:
    """Keeps a loop awake for a while after each request.

    A core that sleeps adds latency: an interrupt must wake it, its clock is slow, and its caches
    are cold. If the next request comes soon, polling for it avoids that, at the cost of one core.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        self._end = 0.0  # of polling, on the clock of the loop
        self._polling = False

    def stay(self) -> None:
        """Poll from now on, for the seconds that were set."""
        if self._seconds:
            self._end = self._loop.time() + self._seconds
            if not self._polling:
                self._polling = True
                self._poll()

    def _poll(self) -> None:
        self._polling = self._loop.time() < self._end
        if self._polling:
            self._loop.call_soon(self._poll)  # a loop with something to call does not sleep


def _outcome(call: Callable[[], Any], deadline: float) -> tuple[Any, Exception | None]:
    """Return result and error of a call. The error has no frames, which refer to the request."""
    try:
        if time.monotonic() > deadline:
            raise DeadlinePassed("the deadline passed before the work began")
        return call(), None
    except Exception as error:
        return None, error.with_traceback(None)


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
