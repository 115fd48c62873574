"""Pending: the result of a request that may still be in progress."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from psclient.errors import InvalidArgument, PsError
from psclient.inflight import Request


class Pending:
    """A pull or exchange that was started by start_pull or start_exchange, and perhaps finished.

    ``result()`` waits for it. It may be called repeatedly, from any thread of the process that
    started the request.
    """

    def __init__(self, request: Request, finish: Callable[[], Any]) -> None:
        self._process = os.getpid()
        self._request: Request | None = request
        self._finish = finish
        self._lock = threading.Lock()
        self._result: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a request in flight cannot be pickled or copied: pass on its result()")

    def result(self) -> Any:
        """Wait for the answers; return what ``pull`` or ``exchange`` would have returned.

        Raises the PsError that ``pull`` or ``exchange`` would raise, and InvalidArgument in a
        forked child. If a signal handler raises during the wait, the request is given up: its push
        takes effect once or not at all, and further calls of result() raise Unavailable.
        """
        if self._process != os.getpid():
            raise InvalidArgument(
                "the request was started before a fork, in the parent process; call result() there"
            )
        with self._lock:
            if self._request is not None:
                try:
                    self._request.wait()
                    self._result = self._finish()
                    self._request = None
                except PsError:
                    raise
                except BaseException:
                    if self._request is not None:
                        self._request.abandon()
                    raise
            return self._result

    def then(self, change: Callable[[Any], Any]) -> Pending:
        """Make ``result()`` return ``change(r)``, where r is what it would return; return self.

        Must be called before ``result()``.
        """
        assert self._request is not None
        finish = self._finish
        self._finish = lambda: change(finish())
        return self
