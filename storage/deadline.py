"""Blocking calls with a deadline, on threads that nobody waits for.

A file system that does not answer (a network mount whose server is gone) blocks a system call for
ever, and no signal ends it. The caller gets an error at the deadline, or when it is told to stop.
The thread stays in the call, and ends with the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from storage.errors import StoreFailed

MAX_THREADS = 32  # calls at a time, those that never returned included
IDLE_SECONDS = 30.0  # a thread without work ends after this
T = TypeVar("T")


class Deadlines:
    """Runs calls on daemon threads and waits ``seconds`` for each. Any thread."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()  # of everything below
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._free = 0  # threads that wait for a job that nobody submitted yet
        self._threads = 0
        self._waiting: set[Future[Any]] = set()
        self._stopped = False

    def call(
        self, where: str, function: Callable[[], T], undo: Callable[[T], None] | None = None
    ) -> T:
        """Return what ``function`` returns, or raise what it raises.

        where  what is used, for errors
        undo   called with a result that arrives after the deadline

        Raises StoreFailed at the deadline, when ``stop`` is called, and if MAX_THREADS calls are
        running.
        """
        future: Future[T] = Future()

        def run() -> T:
            result = function()
            if undo is not None and future.done():  # nobody waits any more
                undo(result)
            return result

        self._submit(where, future, run)
        try:
            wait([future], self._seconds)
            _settle(future, error=StoreFailed(where, f"no answer within {self._seconds:g} s"))
            return future.result()
        finally:
            with self._lock:
                self._waiting.discard(future)

    def stop(self) -> None:
        """Let all waiting and all later calls fail at once."""
        with self._lock:
            self._stopped = True
            waiting = list(self._waiting)
        for future in waiting:
            _settle(future, error=StoreFailed("store", "the server is stopping"))

    def _submit(self, where: str, future: Future[Any], run: Callable[[], Any]) -> None:
        with self._lock:
            if self._stopped:
                raise StoreFailed(where, "the server is stopping")
            if self._free:
                self._free -= 1
            elif self._threads == MAX_THREADS:
                raise StoreFailed(where, f"{MAX_THREADS} earlier file operations have no answer")
            else:
                self._threads += 1
                threading.Thread(target=self._work, name="store", daemon=True).start()
            self._waiting.add(future)
        self._jobs.put((future, run))

    def _work(self) -> None:
        while True:
            try:
                future, run = self._jobs.get(timeout=IDLE_SECONDS)
            except Empty:
                with self._lock:
                    if self._free:
                        self._free -= 1
                        self._threads -= 1
                        return
                continue  # a job is on its way
            try:
                _settle(future, result=run())
            except BaseException as error:
                _settle(future, error=error)
            with self._lock:
                self._free += 1
            del future, run  # results are large


def _settle(future: Future[Any], *, result: Any = None, error: BaseException | None = None) -> None:
    """Set the outcome of a call that has none yet."""
    with suppress(InvalidStateError):
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
