"""Requests in flight."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from psclient.cluster import Cluster
from psclient.errors import InvalidArgument, PsError, SchemaMismatch, TableNotFound, WrongShard
from psclient.link import Link
from psclient.moved import resend
from psclient.request import Range, take
from psclient.session import Call
from psproto import codec


@dataclass(slots=True)
class Sent:
    """A message to one shard, and which distinct keys its pulls are for."""

    link: Link
    call: Call
    pulls: list[Range]
    moved: bool = False  # its keys belong to other shards, and it was sent to them


@dataclass(slots=True, kw_only=True)
class Request:
    """The messages of one request, from the first one sent to the last answer.

    owner     the client, which must not be closed as forgotten meanwhile
    dims      of tables, as the client knows them
    timeout   seconds that an operation may take
    deadline  monotonic seconds
    late      the caller need not wait before the deadline, so what it sends later has a new one
    sent      messages that were sent
    later     pulls to send once all pushes are answered
    """

    owner: object
    dims: dict[str, int]
    timeout: float
    cluster: Cluster
    tables: tuple[str, ...]
    deadline: float
    late: bool
    sent: list[Sent] = field(default_factory=list)
    later: list[Sent] = field(default_factory=list)

    def submit(self, item: Sent, *, background: bool = False) -> None:
        """Send a message."""
        self.sent.append(item)  # first: a signal may come at any time
        item.link.submit(item.call, background=background)

    def wait(self) -> None:
        """Take all answers; raise the first error once all have arrived."""
        self._take_answers()
        if self.later:
            self.sent, later = [], self.later
            self.later = []
            for item in later:
                item.call.deadline = self._until()
                self.submit(item)
            self._take_answers()

    def abandon(self) -> None:
        """Give up every message after an interruption; none is sent again."""
        for item in self.sent:
            item.link.abandon(item.call)
        self.later = []

    def _take_answers(self) -> None:
        failure = None
        for item in self.sent:
            try:
                take(self._answer(item), item.pulls, item.link.where)
            except PsError as error:
                failure = failure or error
                self._note(error)
        if failure is not None:
            raise failure

    def _answer(self, item: Sent) -> codec.Exchanged:
        try:
            return item.link.wait(item.call)
        except WrongShard:
            if item.moved:
                raise
            item.moved = True
            return self._resend(item)

    def _note(self, error: PsError) -> None:
        """Forget the dims of tables that were dropped, and perhaps created anew."""
        if isinstance(error, SchemaMismatch | TableNotFound):
            for name in self.tables:
                self.dims.pop(name, None)

    def _resend(self, item: Sent) -> codec.Exchanged:
        """Send what a shard refused to those that the newest shard map names."""
        deadline = self._until()
        self.cluster.refresh(deadline)
        least = [part.min_version for part, _, _ in item.pulls]
        return resend(
            self.cluster.links, self.cluster.shard_map, item.call.exchange, least, deadline
        )

    def _until(self) -> float:
        if self.late:
            return max(self.deadline, time.monotonic() + self.timeout)
        return self.deadline


class Pending:
    """A request in flight. Call ``result()`` once or often, from any thread of the process that
    started it.
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
        """Wait; return what the blocking method of the same name returns, or raise its error.

        If a signal interrupts it, the request is given up: its push takes effect once or not at
        all, and another result() raises Unavailable.
        """
        if self._process != os.getpid():
            raise InvalidArgument("the request was started by another process, before a fork")
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
        """Return the same request with the result ``change(result)``."""
        assert self._request is not None
        finish = self._finish
        self._finish = lambda: change(finish())
        return self
