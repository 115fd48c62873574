"""Blocking calls with a deadline, on threads that nobody waits for.

A file system that does not answer (a network mount whose server is gone) blocks a system call for
ever, and no signal ends it. The caller gets an error at the deadline, or when it is told to stop.
The thread stays in the call, and ends with the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, wait
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

from storage.errors import StoreFailed

MAX_THREADS = 32  # calls at a time, those that never returned included
IDLE_SECONDS = 30.0  # a thread without work ends after this
T = TypeVar("T")


class _Job(NamedTuple):
    """A call, and where its outcome goes."""

    future: Future[Any]
    function: Callable[[], Any]
    undo: Callable[[Any], None] | None


class Deadlines:
    """Runs calls on daemon threads and waits ``seconds`` for each. Any thread."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()  # of everything below
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
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
        self._submit(where, _Job(future, function, undo))
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

    def _submit(self, where: str, job: _Job) -> None:
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
            self._waiting.add(job.future)
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=IDLE_SECONDS)
            except Empty:
                with self._lock:
                    if self._free:
                        self._free -= 1
                        self._threads -= 1
                        return
                continue  # a job is on its way
            _run(job)
            with self._lock:
                self._free += 1
            del job  # results are large


def _run(job: _Job) -> None:
    """Run a call. If nobody waits any more for its result, undo it."""
    try:
        result = job.function()
        if not _settle(job.future, result=result) and job.undo is not None:
            job.undo(result)
    except BaseException as error:
        _settle(job.future, error=error)


def _settle(future: Future[Any], *, result: Any = None, error: BaseException | None = None) -> bool:
    """Set the outcome of a call. Returns False if it has one."""
    try:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
    except InvalidStateError:
        return False
    return True
