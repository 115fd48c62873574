"""The engine: one thread that runs all functions that read or write rows of a shard.

Calls run one after the other, in the order of arrival, so that the shard needs no locks. To hand a
small call to the thread, and its result back, takes longer than the call itself. Therefore, while
the engine is idle, the event loop may run a call itself. During the call it holds a lock that the
engine thread also takes for each call, so that order and mutual exclusion stay the same.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import structlog

from psserver.busypoll import BusyPoll
from psserver.errors import DeadlinePassed
from psserver.loops import post
from storage.histogram import Histogram
from storage.threads import Background

LOG_SECONDS = 60.0  # least time between two log lines about posted calls that failed

log = structlog.get_logger()

Result = TypeVar("Result")
# A submitted call: function, deadline, time of its submission (both in monotonic seconds), future
_Job = tuple[Callable[[], Any], float, float, "asyncio.Future[Any] | None"]


class Runner(Protocol):
    """Runs calls on the shard, one after the other, for other threads."""

    def run(self, call: Callable[[], Result]) -> Result:
        """Run ``call``, wait for it, and return its result or raise its error."""
        ...


class Inline:
    """Runs calls on the caller's thread, for a shard that only this thread uses."""

    def run(self, call: Callable[[], Result]) -> Result:
        """Return the result of ``call``, or raise its error."""
        return call()


class Engine:
    """One thread that runs calls on the shard, on behalf of an event loop and of worker threads.

    failures      number of posted calls that failed
    busy_seconds  seconds for which calls have run, since the start
    queue_wait    seconds from the submission of each call to its start
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._counting = threading.Lock()
        self._unfinished = 0  # calls submitted and not finished
        self._turn = threading.Lock()  # held by the thread that runs a call
        self.failures, self._logged = 0, -LOG_SECONDS
        self.busy_seconds, self.queue_wait = 0.0, Histogram()
        self._thread = Background("engine", self._run)

    def open(self, loop: asyncio.AbstractEventLoop, busy_poll: float = 0.0) -> None:
        """Start the thread.

        loop       event loop that calls ``submit`` and gets the results
        busy_poll  seconds for which the loop polls for work after each ``submit`` before it sleeps
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
        """Run ``call`` on the engine thread. Returns a future for its result.

        Must be called on the event loop.

        deadline  monotonic seconds; a call that has not started by then is not run, but raises
                  DeadlinePassed
        at_once   if the engine is idle, run the call on the event loop itself before returning
        """
        future: asyncio.Future[Result] = self._loop.create_future()
        if at_once and self._take_turn():
            try:
                result, error = self._execute(call, deadline, time.monotonic())
            finally:
                self._turn.release()
                self._over()
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        else:
            self._put((call, deadline, time.monotonic(), future))
        self._poll.stay()
        return future

    def run(self, call: Callable[[], Result]) -> Result:
        """Run ``call`` on the engine thread, wait for it, and return its result or raise its error.

        Must be called on a thread other than the event loop's and the engine's.
        """
        done: Future[Result] = Future()

        def job() -> None:
            try:
                done.set_result(call())
            except BaseException as error:
                done.set_exception(error)

        self._put((job, float("inf"), time.monotonic(), None))
        return done.result()

    def is_here(self) -> bool:
        """Return whether the caller runs on the engine thread."""
        return threading.get_ident() == self._thread.ident

    def post(self, call: Callable[[], Any]) -> None:
        """Run ``call`` on the engine thread later; its result is ignored, its error is logged.

        Any thread may call this, the engine's too.
        """
        self._put((partial(self._alone, call), float("inf"), time.monotonic(), None))

    def _alone(self, call: Callable[[], Any]) -> None:
        """Run a posted call. Nobody waits for it, so an error is counted, and logged now and then.

        Such calls move rows, or prepare to read them. Requests go on without them.
        """
        try:
            call()
        except Exception:
            self.failures += 1
            if time.monotonic() - self._logged >= LOG_SECONDS:
                self._logged = time.monotonic()
                log.exception("work between requests failed", failures=self.failures)

    def _put(self, job: _Job) -> None:
        with self._counting:
            self._unfinished += 1
            self._jobs.put(job)

    def _take_turn(self) -> bool:
        """If the engine is idle, lock it for this thread and return True; else return False."""
        with self._counting:
            if self._unfinished:
                return False
            self._unfinished = 1
            self._turn.acquire()
            return True

    def _over(self) -> None:
        """Count one call as finished."""
        with self._counting:
            self._unfinished -= 1

    def _execute(
        self, call: Callable[[], Any], deadline: float, since: float
    ) -> tuple[Any, Exception | None]:
        """Run ``call`` as ``_outcome`` does, and count its wait and its duration.

        The caller holds ``_turn``.

        deadline  monotonic seconds
        since     monotonic seconds at which the call was submitted
        """
        start = time.monotonic()
        self.queue_wait.add(start - since)
        outcome = _outcome(call, deadline, start)
        self.busy_seconds += time.monotonic() - start
        return outcome

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            call, deadline, since, future = job
            with self._turn:
                result, error = self._execute(call, deadline, since)
            self._over()
            if future is not None and not post(self._loop, _settle, future, result, error):
                return
            # release the request and its result now: the next call may come much later
            del job, call, future, result, error


def _outcome(call: Callable[[], Any], deadline: float, now: float) -> tuple[Any, Exception | None]:
    """Run ``call``. Returns (its result, None), or (None, the error that it raised).

    deadline  monotonic seconds; after it the call is not run, and the error is DeadlinePassed
    now       present monotonic seconds

    The error has no traceback, because its frames would keep the request in memory.
    """
    try:
        if now > deadline:
            raise DeadlinePassed("the deadline passed before the work began")
        return call(), None
    except Exception as error:
        return None, error.with_traceback(None)


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    """Complete ``future`` with ``error``, or with ``result`` if ``error`` is None.

    Does nothing if the future was cancelled.
    """
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
