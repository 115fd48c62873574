"""Request: a pull, push or exchange in progress, from the first message to the last answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from psclient.cluster import Cluster
from psclient.errors import PsError, SchemaMismatch, TableNotFound, WrongShard
from psclient.link import Link
from psclient.moved import resend
from psclient.request import Header, PullPart, PushPart, Range, messages, take
from psclient.session import Call
from psproto import codec


@dataclass(slots=True)
class Sent:
    """One message to one shard, and where the answer goes."""

    link: Link  # connection to the shard
    call: Call  # the message and its outcome
    pulls: list[Range]  # for each pull in the message: which distinct keys its rows belong to
    moved: bool = False  # whether the shard refused the keys, and they were sent to their owners


@dataclass(slots=True, kw_only=True)
class Request:
    """A pull, push or exchange in progress: all messages to all shards.

    owner     the client; this reference keeps it from being garbage-collected and closed
    dims      the client's cache of dims by table; outdated entries are removed from it
    timeout   the client's timeout in seconds
    cluster   connections to the shards
    deadline  monotonic seconds
    late      whether ``wait`` may be called after the deadline, as for a prefetch; messages sent
              so late get a new deadline
    sent      messages that were sent
    later     messages with pulls, which are sent after all pushes have been answered
    """

    owner: object
    dims: dict[str, int]
    timeout: float
    cluster: Cluster
    deadline: float
    late: bool
    sent: list[Sent] = field(default_factory=list)
    later: list[Sent] = field(default_factory=list)

    def send(self, header: Header, pushes: Sequence[PushPart], pulls: Sequence[PullPart]) -> None:
        """Send the messages of the request to all shards, without waiting for answers.

        header  options of the pushes

        If a shard needs several messages, those with pulls are kept in ``later``.
        """
        try:
            for shard, link in enumerate(self.cluster.links):
                built = messages(self.cluster, shard, pushes, pulls, header)
                for exchange, ranges in built:
                    item = Sent(link, Call(exchange, self.deadline), ranges)
                    if pushes and len(built) > 1 and not exchange.pushes:
                        self.later.append(item)  # not before all pushes have succeeded
                    else:
                        self.submit(item, background=self.late)
        except BaseException:
            self.abandon()
            raise

    def submit(self, item: Sent, *, background: bool = False) -> None:
        """Send a message.

        background  whether a background thread reads the reply, even if nobody calls ``wait``
        """
        self.sent.append(item)  # before sending, so that ``abandon`` sees it after a signal
        item.link.submit(item.call, background=background)

    def wait(self) -> None:
        """Wait for all answers and write the pulled rows into the arrays of the PullParts.

        Raises the first PsError once all messages have been answered.
        """
        self._take_answers()
        if self.later:
            self.sent, later = [], self.later
            self.later = []
            for item in later:
                item.call.deadline = self._until()
                self.submit(item)
            self._take_answers()

    def complete(self) -> None:
        """Do the same as ``wait``, but give the request up if a signal handler interrupts that."""
        try:
            self.wait()
        except PsError:
            raise
        except BaseException:
            self.abandon()
            raise

    @property
    def repeated(self) -> bool:
        """Whether a message was sent late or more than once: others may have overtaken it."""
        return any(
            item.moved or item.call.renewed or item.call.held or item.call.attempts > 1
            for item in self.sent
        )

    def abandon(self) -> None:
        """Give up every message after an interruption, so that none is sent again."""
        for item in self.sent:
            item.link.abandon(item.call)
        self.later = []

    def _take_answers(self) -> None:
        """Wait for the answers to the messages in ``sent``; then raise the first error, if any."""
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
        """Wait for the answer to a message and return it.

        If the shard refuses the message because it does not own a key, sends the keys to their
        owners and returns the combined answer.
        """
        try:
            return item.link.wait(item.call)
        except WrongShard:
            if item.moved:
                raise
            item.moved = True
            return self._resend(item)

    def _note(self, error: PsError) -> None:
        """Remove the request's tables from ``dims`` if ``error`` shows that a dim is outdated."""
        if isinstance(error, SchemaMismatch | TableNotFound):
            for item in (*self.sent, *self.later):
                exchange = item.call.exchange
                names = [each.header.table for each in exchange.pushes]
                names += [each.header.table for each in exchange.pulls]
                for name in names:
                    self.dims.pop(name, None)

    def _resend(self, item: Sent) -> codec.Exchanged:
        """Fetch the newest shard map, and send the keys of a refused message to their owners."""
        deadline = self._until()
        self.cluster.refresh(deadline)
        least = [part.min_version for part, _, _ in item.pulls]
        return resend(
            self.cluster.links, self.cluster.shard_map, item.call.exchange, least, deadline
        )

    def _until(self) -> float:
        """Return the deadline for a message that is sent now, in monotonic seconds."""
        if self.late:
            return max(self.deadline, time.monotonic() + self.timeout)
        return self.deadline
