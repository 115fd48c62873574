"""Run blocking calls with a deadline, each on a separate thread.

A file system that does not answer (a network mount whose server is gone) blocks a system call for
ever, and no signal ends it. So the call runs on a daemon thread. Its caller gets an error at the
deadline, or when ``Deadlines.stop`` is called. The blocked thread ends with the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, wait
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

from storage.errors import StoreFailed

MAX_THREADS = 32  # maximum number of calls at a time, including calls that never returned
IDLE_SECONDS = 30.0  # a thread without work ends after this
T = TypeVar("T")


class _Job(NamedTuple):
    """A call that waits for a thread to run it."""

    future: Future[Any]  # gets the result or error
    function: Callable[[], Any]
    undo: Callable[[Any], None] | None  # called with a result that comes too late


class Deadlines:
    """Runs calls on daemon threads and waits ``seconds`` for each. Any thread may use it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()  # protects all fields below
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._free = 0  # threads that wait for a job, minus the jobs in the queue
        self._threads = 0
        self._waiting: set[Future[Any]] = set()
        self._stopped = False

    def call(
        self, where: str, function: Callable[[], T], undo: Callable[[T], None] | None = None
    ) -> T:
        """Call ``function`` on a daemon thread; return its result, or raise its error.

        where  name of the file, for errors
        undo   called with the result if that arrives after the deadline, for example to close a
               file that nobody will use

        Raises StoreFailed at the deadline, if ``stop`` is called, or if 32 calls (MAX_THREADS) are
        running already.
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
        """Make every call fail at once with StoreFailed: those in progress, and all later ones."""
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
                raise StoreFailed(
                    where,
                    f"{MAX_THREADS} earlier file operations have not returned, and no more are"
                    " started",
                )
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
    """Run a call and set its result or error. If the result comes after the deadline, undo it."""
    try:
        result = job.function()
        if not _settle(job.future, result=result) and job.undo is not None:
            job.undo(result)
    except BaseException as error:
        _settle(job.future, error=error)


def _settle(future: Future[Any], *, result: Any = None, error: BaseException | None = None) -> bool:
    """Set the result or error of a call. Returns False if it has one already, or was timed out."""
    try:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
    except InvalidStateError:
        return False
    return True
