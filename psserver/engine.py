"""The thread that owns the shard.

Everything that touches rows runs here, in the order of arrival, so that nothing else needs a lock.
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

Result = TypeVar("Result")
_Job = tuple[Callable[[], Any], float, "asyncio.Future[Any] | None"]


class Engine:
    """One thread that runs calls for an event loop."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; results go to ``loop``."""
        self._loop = loop
        self._thread.start()

    def close(self) -> None:
        """Finish what was submitted, then stop the thread."""
        self._jobs.put(None)
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Calls submitted and not begun."""
        return self._jobs.qsize()

    def submit(
        self, call: Callable[[], Result], deadline: float = float("inf")
    ) -> asyncio.Future[Result]:
        """Run ``call`` on the engine thread; called on the loop, which gets the result.

        deadline  monotonic seconds; a call not begun by then fails with DeadlinePassed
        """
        future: asyncio.Future[Result] = self._loop.create_future()
        self._jobs.put((call, deadline, future))
        return future

    def run(self, call: Callable[[], Result]) -> Result:
        """Run ``call`` on the engine thread and wait for it; called on any other thread."""
        done: Future[Result] = Future()

        def job() -> None:
            try:
                done.set_result(call())
            except BaseException as error:
                done.set_exception(error)

        self._jobs.put((job, float("inf"), None))
        return done.result()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            call, deadline, future = job
            result, error = None, None
            try:
                if time.monotonic() > deadline:
                    raise DeadlinePassed("the deadline passed before the work began")
                result = call()
            except Exception as raised:
                error = raised
            if future is None:
                continue
            try:
                self._loop.call_soon_threadsafe(_settle, future, result, error)
            except RuntimeError:  # the loop is gone, and with it who asked
                return


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
