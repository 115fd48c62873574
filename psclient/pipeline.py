"""Pipeline: pulls the rows of later batches, and pushes gradients, while a batch is computed.

    pipe = Pipeline(client, {"user": users, "item": items}, staleness=1)
    with pipe:
        for ticket in pipe.over(keys_of, loader):  # keys_of(batch): {"user": keys, "item": keys}
            gradients = compute(ticket.batch, ticket.rows, ticket.places)
            pipe.push(ticket, gradients)           # returns at once

The rows of batch t contain every push of this trainer up to that of batch ``t - 1 - staleness``.

With staleness 0, training computes bit for bit what a loop of ``pull_distinct`` and
``push_distinct`` does. Rows of keys that are not in the batch at hand are pulled while it is
computed. The others come back in the request that carries its push. With staleness s >= 1, the
request that carries the push of batch t pulls batch ``t + 1 + s``, and nobody waits for it while
batches are computed. docs/trainers.md explains which staleness to choose.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from psclient import checked
from psclient.arguments import by_table, push_header
from psclient.arrays import Rows
from psclient.choices import MODES, WIRES, Durability, Wire
from psclient.errors import InvalidArgument
from psclient.outstanding import Outstanding, Sent
from psclient.request import NO_HEADER, Header, PullPart, PushPart
from psclient.rowclient import RowClient
from psclient.table import Table
from psclient.ticket import (
    REQUESTED,
    Index,
    KeySet,
    Ring,
    Ticket,
    Wanted,
    counted,
    due,
    gradients_of,
    plan,
    wait_for,
)
from psclient.versions import NO_VERSIONS

MOST = 1024  # largest lookahead and staleness
STEPS = 1 << 47  # a training step is in -STEPS..STEPS - 1
_END = object()  # returned by a loader that has no more batches

KeysOf = Callable[[Any], Mapping[str, Any]]


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


class Pipeline:
    """Pulls rows ahead and pushes gradients in the background. The module explains how.

    client      the client of all tables
    features    {name of a feature: its Table, or the table's name}; features may share a table
    lookahead   number of batches whose rows are pulled while a batch is computed; None: as many as
                ``staleness``, but at least 1
    staleness   the rows of a batch may lack the pushes of so many batches just before it. More than
                ``lookahead`` has no further effect
    step        training step of the first batch; each batch adds 1
    wire        dtype of rows and gradients on the wire; None: the client's
    durability  when a push counts as answered, see Client.push; None: each table's
    empty       allocates the buffers that rows are written to: ``empty(shape)`` returns a float32
                array

    At most ``lookahead + 1`` batches hold rows, and at most ``staleness + 1`` pushes are
    unanswered: then the loop waits. No push is dropped. All calls must come from one thread at a
    time. ``stats`` counts; ``step`` is the training step of the next batch that is handed out.
    """

    def __init__(
        self,
        client: RowClient,
        features: Mapping[str, Table | str],
        *,
        lookahead: int | None = None,
        staleness: int = 0,
        step: int = 0,
        wire: Wire | None = None,
        durability: Durability | None = None,
        empty: Callable[[tuple[int, int]], Rows] | None = None,
    ) -> None:
        self._client = client
        self._tables = _tables(client, features)
        self.staleness = checked.integer("staleness", staleness, 0, MOST)
        given = max(1, self.staleness) if lookahead is None else lookahead
        self.lookahead = checked.integer("lookahead", given, 0, MOST)
        self.step = checked.integer("step", step, -STEPS, STEPS)
        self.stats = Stats()
        self._wire = None if wire is None else checked.one_of("wire", wire, WIRES)
        push_header(0, None, durability)
        self._durability = durability
        self._empty = empty or (lambda shape: np.empty(shape, np.float32))
        self._rings: dict[str, Ring] = {}
        self._keys_of: KeysOf = lambda batch: batch
        self._source: Iterator[Any] | None = None  # the batches of ``over``; None: not in ``over``
        self._source_error: BaseException | None = None  # to raise when its batch is due
        self._open: Ticket | None = None  # handed out, neither pushed nor skipped
        self._held: deque[Ticket] = deque()  # tickets that hold rows, after ``_open``
        self._planned: deque[Ticket] = deque()  # tickets without rows, after ``_held``
        self._requests = Outstanding(client, self._repair)
        self._pushed: deque[tuple[int, dict[str, KeySet]]] = deque(maxlen=self.staleness)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for all pushes; drop rows that were pulled ahead.

        If the block raised an error, a push that fails does not replace it: it becomes a note.
        """
        self._drop()
        self._open = None
        if error is None:
            self.flush()
            return
        before = self._requests.failure
        self._requests.settle_all()
        if before is None and self._requests.failure is not None:
            error.add_note(f"after that, {self._requests.failure}")

    def over(self, keys_of: KeysOf, batches: Iterable[Any]) -> Iterator[Ticket]:
        """Yield a Ticket for each batch, with the rows of its keys.

        keys_of  function that returns {feature: keys} of a batch; keys are integers of any shape,
                 or a psclient Batch
        batches  any iterable, such as a DataLoader. It is read ``lookahead + 2`` batches ahead

        Call ``push`` or ``skip`` with each ticket before the next turn, which raises
        InvalidArgument otherwise, and PushFailed if an earlier push failed. An error of ``batches``
        or ``keys_of`` is raised in the turn of its batch. When the loop ends, the last pushes may
        still be unanswered: ``flush`` waits for them.
        """
        if self._source is not None:
            raise InvalidArgument("over: this pipeline is in a loop already; end that loop first")
        self._source, self._keys_of, self._source_error = iter(batches), keys_of, None
        try:
            while (ticket := self._turn()) is not None:
                yield ticket
        finally:
            self._source = None
            self._drop()

    def push(
        self, ticket: Ticket, gradients: Mapping[str, Any], *, lr: float | None = None
    ) -> None:
        """Send the gradients of a batch, and return at once.

        ticket     the ticket of the batch at hand
        gradients  {table: float[distinct, dim]}, for every table of the pipeline: row i is the
                   gradient of ``ticket.keys[table].keys[i]``. None: no gradients. Or (Batch, float
                   array): gradients of the distinct keys of that Batch, for example sums over
                   several tickets
        lr         learning rate of this push; None: the tables'

        The arrays are copied. Raises InvalidArgument, and sends nothing, if gradients have a wrong
        shape or are infinite or NaN; the ticket then waits for another ``push`` or ``skip``.
        """
        self._require_open(ticket)
        self._requests.raise_failure()
        parts = self._push_parts(ticket, gradients)
        header = push_header(ticket.step, lr, self._durability)
        self._requests.settle_pushes(self.staleness)
        self._requests.raise_failure()
        self._overtaken(ticket, parts)
        self._close(ticket)
        self.stats.pushes += 1
        if self.staleness:
            sets = {part.table: _set_of(ticket, part) for part in parts}
            self._pushed.append((ticket.step, sets))
        self._request(ticket.step, header, parts)
        self._plan()

    def skip(self, ticket: Ticket) -> None:
        """End the turn of a batch without a push.

        Its gradients are dropped, or the caller adds them to those of a later ticket, whose
        ``push`` then gets (Batch, gradients).
        """
        self._require_open(ticket)
        self._requests.raise_failure()
        self._close(ticket)
        self.stats.skipped += 1
        self._request(ticket.step, NO_HEADER, [])
        self._plan()

    def flush(self) -> None:
        """Wait until all pushes are answered. Raises the error of the first push that failed.

        May be called anywhere, also within the loop: rows that were pulled ahead stay valid.
        """
        self._requests.settle_all()
        self._requests.raise_failure()

    def state(self) -> dict[str, Any]:
        """Return what identifies this trainer's pushes. Call ``flush`` first.

        step      training step of the first batch that was neither pushed nor skipped
        sessions  per shard {"client_id", "incarnation", "sequence"}: the numbers of its last push
        versions  per shard the version of the newest push that was answered; 0: none
        """
        cluster = self._client._connect(self._client._deadline())
        return {
            "step": self.step if self._open is None else self._open.step,
            "sessions": [link.session.state() for link in cluster.links],
            "versions": self._requests.versions or [0] * len(cluster.links),
        }

    # ---- turns

    def _turn(self) -> Ticket | None:
        """Return the ticket of the next batch, whose rows are there; None: there is none."""
        if self._open is not None:
            raise InvalidArgument(
                f"the batch of step {self._open.step} was neither pushed nor skipped: call"
                " push(ticket, gradients) or skip(ticket) before the next batch"
            )
        self._requests.raise_failure()
        self._hold(1)
        if not self._held:
            error, self._source_error = self._source_error, None
            if error is not None:
                raise error
            return None
        ticket = self._held[0]
        self._request(ticket.step - 1, NO_HEADER, [], only=ticket)
        self._arrive(ticket)
        self._held.popleft()
        self._open, self.step = ticket, ticket.step + 1
        self._hold(self.lookahead)
        self._request(ticket.step - 1, NO_HEADER, [])
        self._count(ticket)
        return ticket

    def _arrive(self, ticket: Ticket) -> None:
        """Wait for the rows of a ticket."""
        begin = time.perf_counter()
        self._requests.settle_until(ticket.last)
        self._requests.raise_failure()
        if ticket.again:
            parts = []
            for table, some in ticket.again.items():
                index = np.unique(np.concatenate(some))
                self.stats.repeated_rows += len(index)
                parts.append(self._pull_part(table, ticket.wanted[table], index))
            self._requests.send(ticket.step, NO_HEADER, [], parts)
            self._requests.settle_all()
            self._requests.raise_failure()
        self.stats.waited_seconds += time.perf_counter() - begin

    def _count(self, ticket: Ticket) -> None:
        """Count a ticket that is handed out, and its rows that lack pushes."""
        self.stats.batches += 1
        lacking = min(self.staleness, self.lookahead)
        missing = [sets for step, sets in self._pushed if step >= ticket.step - lacking]
        for table, wanted in ticket.wanted.items():
            sets = [each[table] for each in missing if table in each]
            self.stats.stale_rows += counted(wanted, sets)

    def _hold(self, count: int) -> None:
        """Let the next batches hold rows, until ``count`` do or there are no more batches."""
        while len(self._held) < count:
            if not self._planned:
                self._plan()
                if not self._planned:
                    return
            ticket = self._planned.popleft()
            for table, wanted in ticket.wanted.items():
                if table not in self._rings:
                    dim = self._client._dim(table, self._client._deadline())
                    self._rings[table] = Ring(dim, self.lookahead + 2, self._empty)
                wanted.rows = ticket.rows[table] = self._rings[table].take(len(wanted.after))
            self._held.append(ticket)

    def _plan(self) -> None:
        """Read the next batch and find its distinct keys, unless a batch is planned already."""
        if self._planned or self._source is None or self._source_error is not None:
            return
        step = self.step + len(self._held)
        try:
            batch = next(self._source, _END)
            if batch is _END:
                return
            keys = self._keys_of(batch)
            self._check_features(keys)
            ticket = plan(step, batch, keys, self._tables, self._client.batch)
        except Exception as error:
            self._source_error = error
            return
        earlier = [*([self._open] if self._open else []), *self._held]
        wait_for(ticket, earlier, step - 1 - self.staleness)
        self._planned.append(ticket)

    def _check_features(self, keys: Any) -> None:
        """Raise InvalidArgument unless ``keys`` maps exactly the features of the pipeline."""
        if not isinstance(keys, Mapping) or set(keys) != set(self._tables):
            got = sorted(keys) if isinstance(keys, Mapping) else type(keys).__name__
            raise InvalidArgument(
                f"keys_of(batch) must return a mapping with the features {sorted(self._tables)},"
                f" got {got}"
            )

    def _require_open(self, ticket: Ticket) -> None:
        """Raise InvalidArgument unless ``ticket`` is the one at hand."""
        if ticket is not self._open:
            step = getattr(ticket, "step", ticket)
            hand = (
                "no batch is" if self._open is None else f"the batch of step {self._open.step} is"
            )
            raise InvalidArgument(
                f"ticket of step {step}: each ticket is pushed or skipped once, before the next"
                f" batch; {hand} at hand"
            )

    def _close(self, ticket: Ticket) -> None:
        """Take the rows of a ticket that is pushed or skipped: their buffers are used again."""
        self._open = None
        ticket.rows.clear()
        if self.lookahead <= self.staleness:  # else its rows wait for pushes of later batches
            self._hold(self.lookahead + 1)

    def _drop(self) -> None:
        """Drop the tickets that were not handed out, and the pulls of their rows."""
        self._held.clear()
        self._planned.clear()
        self._requests.drop_pulls()

    # ---- requests

    def _push_parts(self, ticket: Ticket, gradients: Mapping[str, Any]) -> list[PushPart]:
        """Check the gradients of a batch, and copy them; return the push to each table."""
        given = by_table("gradients", gradients)
        if set(given) != set(ticket.keys):
            raise InvalidArgument(
                f"gradients of step {ticket.step} must have the tables {sorted(ticket.keys)},"
                f" got {sorted(map(str, given))}; None: no gradients"
            )
        deadline, parts = self._client._deadline(), []
        for table, each in given.items():
            if each is None:
                continue
            batch, values = gradients_of(ticket, table, each)
            part = self._client._push_part(table, batch, values, self._dtype(), True, deadline)
            part.gradients = part.gradients.copy()  # the message may have to be sent again
            parts.append(part)
        return parts

    def _overtaken(self, ticket: Ticket, parts: list[PushPart]) -> None:
        """Mark rows that were requested too early to contain a push of keys of other batches."""
        for part in parts:
            if part.batch is ticket.keys[part.table]:
                continue
            pushed = KeySet(part.batch.keys)
            for each in self._held:
                if each.step - 1 - self.staleness >= ticket.step:
                    wanted = each.wanted[part.table]
                    early = pushed.has(wanted.batch.keys) & (wanted.after == REQUESTED)
                    wanted.after[early] = ticket.step

    def _request(
        self, step: int, header: Header, pushes: list[PushPart], *, only: Ticket | None = None
    ) -> None:
        """Send pushes, and pull the rows that need not wait for later pushes, in one request.

        step    step of the last batch that was pushed or skipped, including this push
        header  options of the pushes
        only    the ticket whose rows to pull; None: all that hold rows
        """
        pulls: list[PullPart] = []
        for ticket in [only] if only else self._held:
            for table, wanted in ticket.wanted.items():
                index = due(wanted, step)
                if len(index):
                    pulls.append(self._pull_part(table, wanted, index))
                    wanted.after[index] = REQUESTED
                    ticket.last = self._requests.next
        self.stats.fused_rows += sum(len(part.batch.keys) for part in pulls) if pushes else 0
        if pushes or pulls:
            self._requests.send(step, header, pushes, pulls)

    def _pull_part(self, table: str, wanted: Wanted, index: Index) -> PullPart:
        """Return the pull of some of the rows that a ticket needs; ``index`` says which."""
        assert wanted.rows is not None
        whole = len(index) == len(wanted.after)
        self.stats.rows += len(index)
        return PullPart(
            table=table,
            dim=wanted.rows.shape[1],
            batch=wanted.batch if whole else wanted.batch.part(index),
            dtype=self._dtype(),
            mode=MODES["train"],
            metadata=False,
            distinct=True,
            min_version=NO_VERSIONS,
            out=wanted.rows,
            history=np.empty((3, 0), np.uint64),
            at=None if whole else index,
        )

    def _repair(self, sent: Sent) -> None:
        """Note which rows to pull again, because a later request may have overtaken a push.

        sent  the request with the push, which was sent more than once
        """
        for part in sent.pushes:
            pushed = KeySet(part.batch.keys)
            for ticket in self._held:
                if ticket.last > sent.number and ticket.step - 1 - self.staleness >= sent.step:
                    found = np.flatnonzero(pushed.has(ticket.wanted[part.table].batch.keys))
                    if len(found):
                        ticket.again.setdefault(part.table, []).append(found)

    def _dtype(self) -> int:
        """Return the number in ps.proto of the dtype on the wire."""
        return self._client._dtype if self._wire is None else self._wire


def _tables(client: RowClient, features: Mapping[str, Table | str]) -> dict[str, str]:
    """Check the argument ``features`` of a Pipeline; return {feature: name of its table}."""
    if not isinstance(features, Mapping) or not features:
        raise InvalidArgument(
            f"features must be a mapping {{feature: table}} that is not empty, got {features!r}"
        )
    for name, table in features.items():
        if isinstance(table, Table) and table.client is not client:
            raise InvalidArgument(
                f"feature {name!r}: table {table.name!r} must belong to the client of the pipeline"
            )
    return {
        name: table.name if isinstance(table, Table) else checked.text("name of a table", table)
        for name, table in features.items()
    }


def _set_of(ticket: Ticket, part: PushPart) -> KeySet:
    """Return the keys of a push as a set."""
    wanted = ticket.wanted[part.table]
    return wanted.keys if part.batch is wanted.batch else KeySet(part.batch.keys)
