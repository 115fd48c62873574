"""Requests of a Pipeline in progress, which are waited for in the order in which they were sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from psclient.errors import PsError, PushFailed, Unavailable
from psclient.inflight import Request
from psclient.request import Header, PullPart, PushPart
from psclient.rowclient import RowClient


@dataclass(slots=True, eq=False)
class Sent:
    """A request in progress.

    number  counts the requests of the pipeline, from 0 on
    pushes  the push to each table; empty: the request only pulls
    step    training step of the push
    """

    number: int
    request: Request
    pushes: list[PushPart]
    step: int


class Outstanding:
    """The requests of a Pipeline in progress.

    client    sends the requests
    repeated  called with a request that carried a push and was sent more than once, after it was
              answered: requests that were sent after it may have been applied before it

    next      number of the next request
    failure   the first error; once there is one, nothing more should be sent
    versions  per shard the version of the newest push that was answered; []: none was
    """

    def __init__(self, client: RowClient, repeated: Callable[[Sent], None]) -> None:
        self._client = client
        self._repeated = repeated
        self._sent: deque[Sent] = deque()
        self.next = 0
        self.failure: PsError | None = None
        self.versions: list[int] = []

    def send(
        self, step: int, header: Header, pushes: list[PushPart], pulls: list[PullPart]
    ) -> None:
        """Send a request without waiting for its answer.

        step    training step of the push
        header  options of the pushes

        Over connections that do not keep the order of requests, waits for all earlier requests
        first.
        """
        deadline = self._client._deadline()
        cluster = self._client._connect(deadline)
        if not all(link.ordered for link in cluster.links):
            self.settle_all()
            self.raise_failure()
        number, self.next = self.next, self.next + 1
        try:
            request = self._client._send(cluster, header, pushes, pulls, deadline, background=True)
        except BaseException as error:
            self.fail(step, [part.table for part in pushes], error)
            if not isinstance(error, PsError):
                raise
            self.raise_failure()
            return
        self._sent.append(Sent(number, request, pushes, step))

    def settle(self) -> None:
        """Wait for the oldest request. If it failed, keep its error for ``raise_failure``."""
        sent = self._sent.popleft()
        try:
            sent.request.complete()
        except BaseException as error:
            self.fail(sent.step, [part.table for part in sent.pushes], error)
            if not isinstance(error, PsError):
                raise
            return
        if sent.pushes:
            self._note_versions(sent.request)
            if sent.request.repeated:
                self._repeated(sent)

    def settle_all(self) -> None:
        """Wait for all requests."""
        while self._sent:
            self.settle()

    def settle_until(self, number: int) -> None:
        """Wait for the requests up to number ``number``, or until one has failed."""
        while self.failure is None and self._sent and self._sent[0].number <= number:
            self.settle()

    def settle_pushes(self, most: int) -> None:
        """Wait until at most ``most`` pushes are unanswered."""
        while sum(bool(sent.pushes) for sent in self._sent) > most:
            self.settle()

    def drop_pulls(self) -> None:
        """Forget the requests that only pull. Their rows are not written any more."""
        self._sent = deque(sent for sent in self._sent if sent.pushes)
        for sent in self._sent:
            later = sent.request.later
            sent.request.later = [item for item in later if item.call.exchange.pushes]

    def raise_failure(self) -> None:
        """Raise the error of the first request that failed, if one did."""
        if self.failure is not None:
            raise self.failure.with_traceback(None)

    def _note_versions(self, request: Request) -> None:
        """Note the version of each shard after the push that a request carried."""
        links = request.cluster.links
        self.versions = self.versions or [0] * len(links)
        for item in request.sent:
            if item.call.answer is not None:
                shard = links.index(item.link)
                for pushed in item.call.answer.pushes:
                    self.versions[shard] = max(self.versions[shard], pushed.version)

    def fail(self, step: int, tables: list[str], error: BaseException) -> None:
        """Keep the first error of a request, for ``raise_failure``.

        step    training step of the push
        tables  tables that it pushed to; []: it only pulled
        """
        if self.failure is not None:
            return
        if tables:
            self.failure = PushFailed(step, tables, error)
        elif isinstance(error, PsError):
            self.failure = error
            return
        else:
            self.failure = Unavailable(f"the wait for rows was interrupted: {error!r}")
        self.failure.__cause__ = error
