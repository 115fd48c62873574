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
request that carries the push of batch t pulls batch ``t + 1 + s``. A worker thread sends it and
waits for it while batches are computed. docs/trainers.md explains which staleness to choose.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np

from psclient import checked
from psclient.arguments import by_table, push_header
from psclient.arrays import Rows
from psclient.batch import Batch
from psclient.choices import WIRES, Durability, Wire
from psclient.errors import InvalidArgument
from psclient.request import NO_HEADER, Header, PushPart
from psclient.rowclient import RowClient
from psclient.schedule import KeysOf, Schedule, Stats
from psclient.table import Table
from psclient.ticket import Ring, Ticket

MOST = 1024  # largest lookahead and staleness
STEPS = 1 << 47  # a training step is in -STEPS..STEPS - 1
Given = Mapping[str, PushPart | Callable[[], Any] | None]  # by table; a function returns gradients


class Pipeline:
    """Pulls rows ahead and pushes gradients in the background. The module explains how.

    client      the client of all tables
    features    {name of a feature: its Table, or the table's name}; features may share a table
    lookahead   number of batches whose rows are pulled while a batch is computed; None: as many as
                ``staleness``, but at least 1
    staleness   number of pushes, those of the batches just before it, that the rows of a batch may
                lack. A number larger than ``lookahead`` has the effect of ``lookahead``
    step        training step of the first batch; each batch adds 1
    wire        dtype of rows and gradients on the wire; None: the client's
    durability  when a push counts as answered, see Client.push; None: each table's
    empty       allocates the buffers that rows are written to: ``empty(shape)`` returns a float32
                array
    gpu         number of the GPU that needs the rows. Those that the same-host lane can bring to
                its memory are then there, and not in ``ticket.rows``; the caller copies both to
                where it needs them (psclient.torch.transfer). None: all are in ``ticket.rows``
    unpushed    number of batches that may be at hand at the same time, in 1..staleness + 1: the
                turn of a batch may begin before the batches before it are pushed

    At most ``lookahead + unpushed`` batches hold rows, and at most ``staleness + 1`` pushes are
    unanswered: then the loop waits. No push is dropped.
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
        gpu: int | None = None,
        unpushed: int = 1,
    ) -> None:
        self._client = client
        self._process = os.getpid()
        self.staleness = checked.integer("staleness", staleness, 0, MOST)
        given = max(1, self.staleness) if lookahead is None else lookahead
        self.lookahead = checked.integer("lookahead", given, 0, MOST)
        self._unpushed = checked.integer("unpushed", unpushed, 1, self.staleness + 2)
        push_header(0, None, durability)
        self._durability = durability
        self._dtype = client._dtype if wire is None else checked.one_of("wire", wire, WIRES)
        make = empty or (lambda shape: np.empty(shape, np.float32))
        buffers = self.lookahead + 1 + self._unpushed
        self._schedule = Schedule(
            client,
            _tables(client, features),
            lookahead=self.lookahead,
            staleness=self.staleness,
            step=checked.integer("step", step, -STEPS, STEPS),
            dtype=self._dtype,
            ring=lambda dim: Ring(dim, buffers, make),
            gpu=gpu,
        )
        self._open: deque[Ticket] = deque()  # at hand: neither pushed nor skipped
        self._lock = threading.RLock()  # held by whoever uses ``_schedule``
        self._ahead = self.lookahead > 0 and self._unpushed <= self.staleness
        self._worker: ThreadPoolExecutor | None = None
        self._jobs: deque[tuple[int, Future[None]]] = deque()  # (step, push by the worker)
        self._ready: deque[Ticket] = deque()  # handed out by the worker, not seen by the loop
        self._changed = threading.Condition()  # notified when ``_ready`` grows or a job ends

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("cannot pickle a pipeline: it has requests in flight; make one per process")

    @property
    def step(self) -> int:
        """Training step of the next batch that is handed out."""
        with self._changed:
            return self._ready[0].step if self._ready else self._schedule.step

    @property
    def stats(self) -> Stats:
        """Counts of what the pipeline has done so far."""
        return self._schedule.stats

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for all pushes, and drop rows that were pulled ahead.

        If the block raised an error, that of a push that fails does not replace it: it becomes a
        note.
        """
        if error is None:
            self._finish()
            self._schedule.requests.raise_failure()
            return
        before = self._schedule.requests.failure
        self._finish()
        after = self._schedule.requests.failure
        if before is None and after is not None:
            error.add_note(f"after that, {after}")

    def close(self) -> None:
        """Wait for all pushes, and drop rows that were pulled ahead. Raises no error of a push."""
        self._finish()

    def over(self, keys_of: KeysOf, batches: Iterable[Any]) -> Iterator[Ticket]:
        """Yield a Ticket for each batch, with the rows of its keys.

        keys_of  function that returns {feature: keys} of a batch; keys are integers of any shape,
                 or a psclient Batch, or a function that returns one of these, which another thread
                 may call
        batches  any iterable, such as a DataLoader. It is read ``lookahead + 2`` batches ahead

        Call ``push`` or ``skip`` with each ticket before the next turn, which raises
        InvalidArgument otherwise, and PushFailed if an earlier push failed. An error of ``batches``
        or ``keys_of`` is raised in the turn of its batch. When the loop ends, the last pushes may
        still be unanswered: ``flush`` waits for them.
        """
        self._require_process()
        if self._schedule.reading:
            raise InvalidArgument("over: this pipeline is in a loop already; end that loop first")
        source = iter(batches)
        self._schedule.begin(source, keys_of)
        try:
            while (ticket := self._turn()) is not None:
                yield ticket
        finally:
            if self._schedule.reads(source):  # else the loop was ended before, maybe by ``close``
                self._end()

    def push(
        self,
        ticket: Ticket,
        gradients: Mapping[str, Any],
        *,
        lr: float | None = None,
        step: int | None = None,
    ) -> None:
        """Send the gradients of a batch, and return at once.

        ticket     the ticket of the batch at hand
        gradients  {table: float[distinct, dim]}, for every table of the pipeline: row i is the
                   gradient of ``ticket.keys[table].keys[i]``. None: no gradients. Or (Batch, float
                   array): gradients of the distinct keys of that Batch, for example sums over
                   several tickets. Or a function that returns one of these: a worker thread calls
                   it, so that the loop need not wait for an accelerator
        lr         learning rate of this push; None: the tables'
        step       training step of this push; None: that of the ticket

        Arrays are copied. Raises InvalidArgument, and sends nothing, if gradients have a wrong
        shape or are infinite or NaN; the ticket then waits for another ``push`` or ``skip``. The
        errors of a function, and of its gradients, are raised as PushFailed by a later turn.
        """
        self._require_open(ticket)
        given = by_table("gradients", gradients)
        if set(given) != set(ticket.keys):
            raise InvalidArgument(
                f"gradients of step {ticket.step} must have the tables {sorted(ticket.keys)},"
                f" got {sorted(map(str, given))}; None: no gradients"
            )
        header = push_header(ticket.step if step is None else step, lr, self._durability)
        parts = {
            table: each if callable(each) else self._part(ticket, table, each)
            for table, each in given.items()
        }
        self._send(ticket, header, parts)

    def skip(self, ticket: Ticket) -> None:
        """End the turn of a batch without a push.

        Its gradients are dropped, or the caller adds them to those of a later ticket, whose
        ``push`` then gets (Batch, gradients).
        """
        self._require_open(ticket)
        self._send(ticket, NO_HEADER, {})

    def flush(self) -> None:
        """Wait until all pushes are answered. Raises the error of the first push that failed.

        May be called anywhere, also within the loop: rows that were pulled ahead stay valid.
        """
        self._require_process()
        self._await_jobs()
        with self._lock:
            self._schedule.requests.settle_all()
            self._schedule.requests.raise_failure()

    def state(self) -> dict[str, Any]:
        """Return what identifies this trainer's pushes. Call ``flush`` first.

        step      training step of the first batch that was neither pushed nor skipped
        sessions  per shard {"client_id", "incarnation", "sequence"}: the numbers of its last push
        versions  per shard the version of the newest push that was answered; 0: none
        """
        links = self._client._connect(self._client._deadline()).links
        return {
            "step": self._open[0].step if self._open else self.step,
            "sessions": [link.session.state() for link in links],
            "versions": self._schedule.requests.versions or [0] * len(links),
        }

    # ---- turns

    def _turn(self) -> Ticket | None:
        """Return the ticket of the next batch, whose rows are there; None: there is none."""
        if len(self._open) >= self._unpushed:
            raise self._unfinished()
        begin = time.perf_counter()
        ticket = self._await_ready()
        self._schedule.requests.raise_failure()
        if ticket is None:
            unsent = min(self.staleness, self.lookahead + self._unpushed)  # their rows may be read
            self._await_jobs(self._schedule.step - 1 - unsent)
            with self._lock:
                ticket = self._schedule.hand_out()
        self.stats.waited_seconds += time.perf_counter() - begin
        if ticket is not None:
            self._open.append(ticket)
        return ticket

    def _await_ready(self) -> Ticket | None:
        """Return the ticket that the worker has handed out; None: it will hand out none."""
        with self._changed:
            while self._ahead and not self._ready and any(not job.done() for _, job in self._jobs):
                self._changed.wait()
            return self._ready.popleft() if self._ready else None

    def _unfinished(self) -> InvalidArgument:
        """Return the error about the oldest batch at hand."""
        return InvalidArgument(
            f"the batch of step {self._open[0].step} was neither pushed nor skipped: call"
            " push(ticket, gradients) or skip(ticket) before the next batch"
        )

    def _require_open(self, ticket: Ticket) -> None:
        """Raise InvalidArgument unless ``ticket`` is the oldest one at hand."""
        self._require_process()
        self._schedule.requests.raise_failure()
        if not self._open or ticket is not self._open[0]:
            step = getattr(ticket, "step", ticket)
            hand = f"the batch of step {self._open[0].step} is" if self._open else "no batch is"
            raise InvalidArgument(
                f"ticket of step {step}: each ticket is pushed or skipped once, in the order of the"
                f" batches; {hand} at hand"
            )

    def _require_process(self) -> None:
        """Raise InvalidArgument in a forked child."""
        if self._process != os.getpid():
            raise InvalidArgument(
                "the pipeline was made before a fork, in the parent process; make one in the child"
            )

    def _part(self, ticket: Ticket, table: str, values: Any) -> PushPart | None:
        """Check the gradients of a table, and copy them; return its push, None if there are none.

        values  an argument of ``push``, or what a function has returned
        """
        if values is None:
            return None
        batch = ticket.keys[table]
        if isinstance(values, tuple) and len(values) == 2 and isinstance(values[0], Batch):
            batch, values = values
        deadline = self._client._deadline()
        part = self._client._push_part(table, batch, values, self._dtype, True, deadline)
        part.gradients = part.gradients.copy()  # the message may have to be sent again
        return part

    def _parts(self, ticket: Ticket, given: Given) -> list[PushPart]:
        """Call the functions among the gradients of a batch; return the push to each table."""
        found = [
            self._part(ticket, table, each()) if callable(each) else each
            for table, each in given.items()
        ]
        return [part for part in found if part is not None]

    # ---- sending

    def _send(self, ticket: Ticket, header: Header, given: Given) -> None:
        """End the turn of a ticket: send its push, or none if ``given`` is empty."""
        if self._ahead or self._jobs or any(map(callable, given.values())):
            self._submit(ticket, header, given)
            return
        self._close(ticket)
        with self._lock:
            self._schedule.send(ticket, header, self._parts(ticket, given))
            self._schedule.plan()

    def _close(self, ticket: Ticket) -> None:
        """Take the rows from a ticket that is pushed or skipped: their buffers are used again."""
        self._open.popleft()
        ticket.rows.clear()

    def _submit(self, ticket: Ticket, header: Header, given: Given) -> None:
        """Let the worker thread send a push, after those that it was given before."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "psclient pipeline")
        self._close(ticket)
        self._schedule.read()
        job = self._worker.submit(self._work, ticket, header, given)
        job.add_done_callback(self._notify)
        self._jobs.append((ticket.step, job))

    def _work(self, ticket: Ticket, header: Header, given: Given) -> None:
        """Send a push, and hand out tickets ahead of their turns. The worker thread runs this.

        Errors are kept for the next turn.
        """
        requests = self._schedule.requests
        if requests.failure is not None:
            return
        try:
            parts = self._parts(ticket, given)
            with self._lock:
                self._schedule.send(ticket, header, parts)
                self._schedule.plan(read=False)
                while self._ahead:
                    ready = self._schedule.prepare(self._unpushed + 1)
                    if ready is None:
                        break
                    with self._changed:
                        self._ready.append(ready)
                        self._changed.notify_all()
        except BaseException as error:
            with self._lock:
                requests.fail(ticket.step, list(ticket.keys), error)

    def _notify(self, job: object) -> None:
        """Wake the loop: a job has ended."""
        with self._changed:
            self._changed.notify_all()

    def _await_jobs(self, last: int = STEPS) -> None:
        """Wait until the worker thread has sent all pushes up to that of step ``last``."""
        while self._jobs and (self._jobs[0][0] <= last or self._jobs[0][1].done()):
            self._jobs[0][1].result()
            self._jobs.popleft()

    def _end(self) -> None:
        """End a loop: drop the tickets that it did not see."""
        self._await_jobs()
        with self._lock, self._changed:
            self._schedule.end(self._ready)
            self._ready.clear()

    def _finish(self) -> None:
        """Wait for all pushes; drop tickets; end the worker thread. A forked child does nothing."""
        if self._process != os.getpid():
            return
        self._end()
        with self._lock:
            self._open.clear()
            self._schedule.unsent.clear()
            self._schedule.requests.settle_all()
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None


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
