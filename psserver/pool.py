"""Thread pool whose threads do not keep the process from exiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from storage.threads import Background

Result = TypeVar("Result")
_Job = tuple["Future[Any]", Callable[[], Any]]


class Pool(Executor):
    """Executor with daemon threads, which do not keep the process from exiting.

    name     name of the threads
    threads  maximum number of threads; each call of ``submit`` starts one until it is reached
    """

    def __init__(self, name: str, threads: int) -> None:
        self._name = name
        self._most = threads
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()
        self._closed = False

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """Queue a call for a thread; return the future of its result. Any thread may call this.

        After ``close`` the call is not run, and the future is cancelled.
        """
        future: Future[Result] = Future()
        with self._starting:
            if self._closed:
                future.cancel()
                return future
            if len(self._threads) < self._most:
                thread = Background(self._name, self._run)
                self._threads.append(thread)
                thread.start()
            self._jobs.put((future, partial(fn, *args, **kwargs)))
        return future

    def close(self, seconds: float) -> None:
        """Run the queued calls, then end the threads. Threads that need more than ``seconds`` are
        left running.
        """
        end = time.monotonic() + seconds
        with self._starting:
            self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0))

    def _run(self) -> None:
        """Run queued calls until ``close`` is called. Each thread runs this method."""
        while (job := self._jobs.get()) is not None:
            future, call = job
            if future.set_running_or_notify_cancel():
                _settle(future, call)
            del job, future, call  # do not keep large requests while idle


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    """Run ``call``, and set its result or exception on ``future``."""
    try:
        result = call()
    except StopIteration as error:  # asyncio futures refuse StopIteration
        future.set_exception(RuntimeError(f"unexpected end of an iterator: {error}"))
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
