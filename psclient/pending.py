"""Requests under way."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from typing import Any

from psclient.cluster import Cluster
from psclient.errors import InvalidArgument, SchemaMismatch, TableNotFound, WrongShard
from psclient.moved import resend
from psclient.request import PullPart, take
from psclient.session import Call
from psclient.stream import Link
from psclient.unary import UnaryLink
from psproto import codec


@dataclass(slots=True)
class Sent:
    """A call under way, and which distinct keys its pulls are about."""

    link: Link | UnaryLink
    call: Call
    pulls: list[tuple[PullPart, int, int]]  # part, first and last + 1 distinct key
    moved: bool = False  # its keys, and they were sent again


@dataclass(slots=True)
class Rest:
    """What a request under way may have to do besides waiting."""

    dims: dict[str, int]  # of tables, as the client knows them
    timeout: float  # seconds that an operation may take
    cluster: Cluster
    tables: tuple[str, ...]
    deadline: float  # monotonic seconds
    late: bool  # nobody need wait before the deadline
    later: list[Sent]  # pulls that leave once all pushes are answered

    def submit(self) -> list[Sent]:
        """Send what was to wait."""
        for item in self.later:
            item.call.deadline = self._until()
            item.link.submit(item.call)
        sent, self.later = self.later, []
        return sent

    def note(self, error: Exception) -> None:
        """Forget the dims of tables that were dropped, and perhaps created anew."""
        if isinstance(error, SchemaMismatch | TableNotFound):
            for name in self.tables:
                self.dims.pop(name, None)

    def resend(self, item: Sent) -> codec.Exchanged:
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
    """A request under way. ``result()`` waits for it; call it once or often, from any thread of the
    process that started it.
    """

    def __init__(self, sent: list[Sent], finish: Any, rest: Rest | None = None) -> None:
        self._process = os.getpid()
        self._sent = sent
        self._finish = finish
        self._rest = rest
        self._lock = threading.Lock()
        self._result: Any = None

    def result(self) -> Any:
        """What the blocking method of the same name returns, or its error."""
        if self._process != os.getpid():
            raise InvalidArgument("the request was started by another process, before a fork")
        with self._lock:
            if self._sent is not None:
                self._wait()
                if self._rest is not None and self._rest.later:
                    self._sent = self._rest.submit()
                    self._wait()
                self._result = self._finish()
                self._sent = None  # type: ignore[assignment]
            return self._result

    def _wait(self) -> None:
        """Take all answers; raise the first error once all are there."""
        failure = None
        for item in self._sent:
            try:
                take(self._answer(item), item.pulls, item.link.where)
            except Exception as error:
                failure = failure or error
                if self._rest is not None:
                    self._rest.note(error)
        if failure is not None:
            raise failure

    def _answer(self, item: Sent) -> codec.Exchanged:
        try:
            return item.link.wait(item.call)
        except WrongShard:
            if self._rest is None or item.moved:
                raise
            item.moved = True
            return self._rest.resend(item)
