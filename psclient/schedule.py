"""Schedule: which rows a Pipeline requests when, and what it has done so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from psclient.choices import MODES
from psclient.outputs import Output
from psclient.outstanding import Outstanding, Sent
from psclient.request import NO_HEADER, Header, PullPart, PushPart
from psclient.rowclient import RowClient
from psclient.ticket import (
    REQUESTED,
    Index,
    KeySet,
    Ring,
    Ticket,
    Wanted,
    counted,
    due,
    plan,
    wait_for,
)
from psclient.versions import NO_VERSIONS

KeysOf = Callable[[Any], Mapping[str, Any]]
_END = object()  # returned by a loader that has no more batches


@dataclass(slots=True)
class Stats:
    """What a Pipeline has done so far.

    batches         batches handed out
    pushes          pushes sent
    skipped         batches without a push
    rows            rows pulled
    fused_rows      rows pulled by a request that also carried a push
    stale_rows      rows handed out that lack pushes to their keys, as ``staleness`` allows
    repeated_rows   rows pulled a second time, because a push before them had to be sent again
    waited_seconds  time for which the loop waited for rows
    """

    batches: int = 0
    pushes: int = 0
    skipped: int = 0
    rows: int = 0
    fused_rows: int = 0
    stale_rows: int = 0
    repeated_rows: int = 0
    waited_seconds: float = 0.0


class Schedule:
    """The batches of a Pipeline that are on their way, and the requests for their rows.

    client     the client of all tables
    tables     {feature: name of its table}
    lookahead  number of batches whose rows are pulled while a batch is computed
    staleness  number of pushes just before a batch that its rows may lack
    step       training step of the next batch that is handed out
    dtype      dtype on the wire, a number in ps.proto
    ring       makes the buffers of a table from the length of its rows
    gpu        number of the GPU that needs the rows; None: they are needed in host memory

    stats      counters
    requests   requests in progress
    unsent     tickets that were handed out, and whose push was not sent yet, oldest first
    """

    def __init__(
        self,
        client: RowClient,
        tables: Mapping[str, str],
        *,
        lookahead: int,
        staleness: int,
        step: int,
        dtype: int,
        ring: Callable[[int], Ring],
        gpu: int | None,
    ) -> None:
        self._client = client
        self._tables = tables
        self._lookahead, self._staleness = lookahead, staleness
        self.step = step
        self._dtype = dtype
        self._ring, self._gpu = ring, gpu
        self.stats = Stats()
        self.requests = Outstanding(client, self._repair)
        self.unsent: deque[Ticket] = deque()
        self._held: deque[Ticket] = deque()  # tickets that hold rows, after those handed out
        self._planned: deque[Ticket] = deque()  # tickets without rows, after ``_held``
        self._rings: dict[str, Ring] = {}
        self._keys_of: KeysOf = lambda batch: batch
        self._source: Iterator[Any] | None = None
        self._read: deque[tuple[Any, Any]] = deque()  # (batch, its keys), before ``_planned``
        self._source_error: BaseException | None = None  # to raise when its batch is due
        self._ended = False  # whether that batch was read, but its keys are wrong
        self._pushed: deque[tuple[int, dict[str, KeySet]]] = deque(maxlen=staleness)

    @property
    def reading(self) -> bool:
        """Whether there is a source of batches."""
        return self._source is not None

    def reads(self, source: Iterator[Any]) -> bool:
        """Return whether ``source`` is that of the loop in progress."""
        return self._source is source

    def begin(self, source: Iterator[Any], keys_of: KeysOf) -> None:
        """Read batches from ``source`` from now on; ``keys_of`` returns {feature: keys} of each."""
        self._source, self._keys_of, self._source_error = source, keys_of, None
        self._ended = False

    def end(self, unseen: Iterable[Ticket] = ()) -> None:
        """Forget the source, the batches that were not handed out, and the pulls of their rows.

        unseen  tickets that were handed out, but the loop did not see
        """
        for ticket in unseen:
            self.unsent.remove(ticket)
            self.step = min(self.step, ticket.step)
        self._source = None
        self._read.clear()
        self._held.clear()
        self._planned.clear()
        self.requests.drop_pulls()

    def hand_out(self, *, read: bool = True) -> Ticket | None:
        """Return the ticket of the next batch once its rows are there; None: there is none.

        read  whether to read further batches

        Raises the error of the source, or of a request that failed.
        """
        self.requests.raise_failure()
        self._hold(1, read=read)
        if not self._held:
            if self._source_error is not None:
                raise self._source_error
            return None
        ticket = self._held[0]
        self._request(NO_HEADER, [], only=ticket)
        self._arrive(ticket)
        self._held.popleft()
        self.unsent.append(ticket)
        self.step = ticket.step + 1
        self._hold(self._lookahead + 1 - len(self.unsent), read=read)
        self._request(NO_HEADER, [])
        if self._lookahead <= self._staleness:  # the rows of the batch after those come with a push
            self.plan(read=read)
        self._count(ticket)
        return ticket

    def prepare(self, most: int) -> Ticket | None:
        """Hand out the next ticket ahead of its turn; None: it is too early, or there is none.

        most  maximum number of unsent tickets afterwards

        Reads no batches, so it may be called by any thread.
        """
        last = self.unsent[0].step - 1 if self.unsent else self.step - 1  # was sent
        early = last < self.step - 1 - self._staleness or len(self.unsent) >= most
        if early or self.requests.failure is not None:
            return None
        self._hold(1, read=False)
        return self.hand_out(read=False) if self._held else None

    def send(self, ticket: Ticket, header: Header, parts: list[PushPart]) -> None:
        """Send the push of the oldest unsent ticket, and pull the rows that waited for it.

        header  options of the push
        parts   the push to each table; []: the batch is skipped

        Does not read batches, so it may be called by any thread.
        """
        self.requests.settle_pushes(self._staleness)
        self.requests.raise_failure()
        self._overtaken(ticket, parts)
        oldest = self.unsent.popleft()
        assert oldest is ticket, "tickets are sent in the order in which they were handed out"
        if self._lookahead <= self._staleness:  # else its rows wait for pushes of later batches
            self._hold(self._lookahead + 1 - len(self.unsent), read=False)
        if parts:
            self.stats.pushes += 1
            if self._staleness:
                sets = {part.table: _set_of(ticket, part) for part in parts}
                self._pushed.append((ticket.step, sets))
        else:
            self.stats.skipped += 1
        self._request(header, parts)

    def read(self) -> None:
        """Read the next batch, unless enough are read already. For the thread of the loop."""
        if self._read or self._source is None or self._source_error is not None:
            return
        try:
            batch = next(self._source, _END)
            if batch is not _END:
                self._read.append((batch, self._keys_of(batch)))
        except Exception as error:
            self._source_error = error

    def plan(self, *, read: bool = True) -> None:
        """Find the distinct keys of the next batch, unless a batch is planned already.

        read  whether to read a batch if none is read
        """
        if self._planned or self._ended:  # the loop's thread may still read the batch after it
            return
        if read:
            self.read()
        if not self._read:
            return
        step = self.step + len(self._held)
        batch, keys = self._read.popleft()
        try:
            ticket = plan(step, batch, keys, self._tables, self._client.batch)
        except Exception as error:
            self._source_error, self._ended = error, True
            self._read.clear()
            return
        wait_for(ticket, [*self.unsent, *self._held], step - 1 - self._staleness)
        self._planned.append(ticket)

    def _arrive(self, ticket: Ticket) -> None:
        """Wait for the rows of a ticket."""
        self.requests.settle_until(ticket.last)
        self.requests.raise_failure()
        if ticket.again:
            parts = []
            for table, some in ticket.again.items():
                index = np.unique(np.concatenate(some))
                self.stats.repeated_rows += len(index)
                parts.append(self._pull_part(table, ticket.wanted[table], index))
            self.requests.send(ticket.step, NO_HEADER, [], parts)
            self.requests.settle_all()
            self.requests.raise_failure()

    def _count(self, ticket: Ticket) -> None:
        """Count a ticket that is handed out, and its rows that lack pushes."""
        self.stats.batches += 1
        unsent = [each for each in self.unsent if each is not ticket]
        for table, wanted in ticket.wanted.items():
            pushes = [(step, sets[table]) for step, sets in self._pushed if table in sets]
            pushes += [(each.step, each.wanted[table].keys) for each in unsent]
            self.stats.stale_rows += counted(wanted, pushes)

    def _hold(self, count: int, *, read: bool = True) -> None:
        """Let the next batches hold rows, until ``count`` do or there are no more batches.

        read  whether to read further batches
        """
        while len(self._held) < count:
            self.plan(read=read)
            if not self._planned:
                return
            ticket = self._planned.popleft()
            for table, wanted in ticket.wanted.items():
                if table not in self._rings:
                    dim = self._client._dim(table, self._client._deadline())
                    self._rings[table] = self._ring(dim)
                wanted.rows = ticket.rows[table] = self._rings[table].take(len(wanted.after))
                if self._gpu is not None:
                    wanted.output = Output(wanted.rows, None, device=self._gpu)
            self._held.append(ticket)

    def _overtaken(self, ticket: Ticket, parts: list[PushPart]) -> None:
        """Mark rows that were requested too early to contain a push of keys of other batches."""
        for part in parts:
            if part.batch is ticket.keys[part.table]:
                continue
            pushed = KeySet(part.batch.keys)
            for each in self._held:
                if each.step - 1 - self._staleness >= ticket.step:
                    wanted = each.wanted[part.table]
                    early = pushed.has(wanted.batch.keys) & wanted.requested
                    wanted.after[early] = ticket.step

    def _request(
        self, header: Header, pushes: list[PushPart], *, only: Ticket | None = None
    ) -> None:
        """Send pushes, and pull the rows that need not wait for later pushes, in one request.

        header  options of the pushes
        only    the ticket whose rows to pull; None: all that hold rows
        """
        step = (self.unsent[0].step if self.unsent else self.step) - 1  # sent, with this push
        pulls: list[PullPart] = []
        for ticket in [only] if only else self._held:
            for table, wanted in ticket.wanted.items():
                index = due(wanted, step)
                if len(index):
                    pulls.append(self._pull_part(table, wanted, index))
                    wanted.after[index] = REQUESTED + step
                    ticket.last = self.requests.next
        self.stats.fused_rows += sum(len(part.batch.keys) for part in pulls) if pushes else 0
        if pushes or pulls:
            self.requests.send(step, header, pushes, pulls)

    def _pull_part(self, table: str, wanted: Wanted, index: Index) -> PullPart:
        """Return the pull of some of the rows that a ticket needs; ``index`` says which."""
        assert wanted.rows is not None
        whole = len(index) == len(wanted.after)
        self.stats.rows += len(index)
        return PullPart(
            table=table,
            dim=wanted.rows.shape[1],
            batch=wanted.batch if whole else wanted.batch.part(index),
            dtype=self._dtype,
            mode=MODES["train"],
            metadata=False,
            distinct=True,
            min_version=NO_VERSIONS,
            out=wanted.rows,
            history=np.empty((3, 0), np.uint64),
            output=wanted.output,
            at=None if whole else index,
        )

    def _repair(self, sent: Sent) -> None:
        """Note which rows to pull again, because a later request may have overtaken a push.

        sent  the request with the push, which was sent more than once
        """
        for part in sent.pushes:
            pushed = KeySet(part.batch.keys)
            for ticket in self._held:
                if ticket.last > sent.number and ticket.step - 1 - self._staleness >= sent.step:
                    found = np.flatnonzero(pushed.has(ticket.wanted[part.table].batch.keys))
                    if len(found):
                        ticket.again.setdefault(part.table, []).append(found)


def _set_of(ticket: Ticket, part: PushPart) -> KeySet:
    """Return the keys of a push as a set."""
    wanted = ticket.wanted[part.table]
    return wanted.keys if part.batch is wanted.batch else KeySet(part.batch.keys)
