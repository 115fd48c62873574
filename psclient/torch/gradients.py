"""Gradients of pulled rows: how backward passes collect them, and how they are pushed."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from psclient import checked
from psclient.arguments import push_header
from psclient.arrays import Rows
from psclient.batch import Batch
from psclient.errors import InvalidArgument
from psclient.pipeline import Pipeline
from psclient.rowclient import RowClient
from psclient.table import Table
from psclient.torch.ranks import Job, Sum, Turn
from psproto import routing

Ranks = Literal["mean", "sum"]
RANKS = {"mean": 1, "sum": 0}  # whether to divide by the number of ranks

DISCARDED = "the gradients of this step were discarded: the next step does not contain them"
FEW = 8  # passes that a module keeps before it sums their gradients
FORGOTTEN = 1000  # backward passes without step or zero_grad after which a warning is shown


@dataclass(slots=True)
class Pass:
    """Rows that one forward pass of a module pulled from its table, one per distinct key.

    batch  keys of the forward pass
    leaf   float32[distinct, dim], the rows of ``batch.keys``; backward passes add the gradients to
           its ``grad``
    """

    table: Table
    batch: Batch
    leaf: Tensor


class Route(Protocol):
    """What pushes gradients in place of the client: the pipeline of a group, while it runs."""

    pipe: Pipeline

    def push_sums(self, sums: Mapping[str, tuple[Batch, Tensor]], turn: Turn) -> None:
        """Push {table: (keys, float32[distinct, dim])} as the gradients of the batch at hand."""

    def pushed(self) -> None:
        """End the turn of the batch at hand, whose gradients were pushed by the client."""


class Gradients:
    """Gradients of one module that backward passes computed, and that were not pushed yet.

    trainable  whether backward passes add gradients
    route      the pipeline that pushes the gradients while it runs; None: ``push`` does
    passes     {id of the leaf: forward pass that a backward pass has reached}
    reached    number of backward passes since the last step or zero_grad

    A forward pass only registers a hook on its leaf, so what no backward pass reaches is freed with
    the output. A copy has no passes, and neither has what is loaded from a pickle.
    """

    def __init__(self, trainable: bool = True) -> None:
        self.trainable = trainable
        self.route: Route | None = None  # where to push; None: to the client
        self.passes: dict[int, Pass] = {}
        self.reached = 0
        self._rows = self._summed = 0  # number of rows in passes, and in the last sum of passes

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.trainable,)

    def watch(self, table: Table, batch: Batch, leaf: Tensor) -> None:
        """Add a forward pass to ``passes`` as soon as a backward pass reaches ``leaf``.

        table, batch, leaf  see Pass; ``leaf`` requires a gradient
        """
        owner = weakref.ref(self)  # the hook lives as long as the graph: longer than the module

        def hook(leaf: Tensor) -> None:
            if (mine := owner()) is None:
                return
            if mine.trainable:
                mine._reach(Pass(table, batch, leaf))
            else:  # frozen after the forward pass
                leaf.grad = None

        leaf.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def _reach(self, each: Pass) -> None:
        """Add a pass that a backward pass has reached. Sum the passes if they are many."""
        self.reached += 1
        if self.reached == FORGOTTEN:
            warnings.warn(
                f"table {each.table.name!r}: {FORGOTTEN} backward passes without a step or"
                " zero_grad; the next step pushes the sum of all their gradients",
                stacklevel=2,
            )
        self.keep(each)
        if len(self.passes) > FEW and self._rows > 2 * self._summed:  # bounds memory and time
            for summed in _sums(self.take()):
                self.keep(summed)
            self._summed = self._rows

    def keep(self, each: Pass) -> None:
        """Add a pass that has gradients."""
        if id(each.leaf) not in self.passes:
            self.passes[id(each.leaf)] = each
            self._rows += len(each.leaf)

    def take(self) -> list[Pass]:
        """Remove all passes and return them."""
        taken, self.passes = self.passes, {}
        self._rows = self._summed = 0
        return list(taken.values())

    def discard(self) -> None:
        """Forget all gradients."""
        self.reached = 0
        for each in self.take():
            each.leaf.grad = None  # a later backward pass through the same graph begins anew


def gather(parts: Iterable[Gradients]) -> list[Pass]:
    """Sum the gradients of several modules per table; return a Pass for each table.

    parts  gradients of modules of one client

    The sums replace what they were computed from: they belong to the first module that uses the
    table. Infinite and NaN gradients are summed, too.
    """
    taken = [(part, part.take()) for part in parts]
    owners = {each.table.name: part for part, some in reversed(taken) for each in some}
    gathered = _sums(each for _, some in taken for each in some)
    for each in gathered:
        owners[each.table.name].keep(each)
    return gathered


def push(
    client: RowClient,
    parts: Iterable[Gradients],
    turn: Turn,
    ranks: Ranks,
    job: Job | None = None,
) -> Turn:
    """Push the gradients of modules, summed per table, in one request, and forget them.

    client  client of all tables
    parts   gradients of the modules
    turn    training step, and learning rate
    ranks   with torch.distributed, "mean": divide by the number of ranks; "sum": do not
    job     all ranks, which push together; None: this rank pushes on its own

    Returns ``turn``, or that of the other ranks if this one has no batch. The gradients are
    forgotten even if an argument is invalid or the push fails, because some shards may have applied
    it. The error then has a note that says so.
    """
    taken, parts = [], list(parts)
    for part in parts:
        taken += part.take()
        part.reached = 0
    try:
        count = _world(job) if checked.one_of("ranks", ranks, RANKS) else 1
        sums = {each.table.name: _divided(each, count) for each in _sums(taken)}
        route = _route(parts, job)
        if job is None:
            _push_sums(client, route, sums, turn)
            return turn
        return _push_together(client, route, sums, turn, job)
    except BaseException as error:
        if taken:
            error.add_note(DISCARDED)
        raise
    finally:
        for each in taken:
            each.leaf.grad = None


def _divided(each: Pass, count: int) -> tuple[Batch, Tensor]:
    """Return the keys and gradients of a Pass; the gradients are divided by ``count``."""
    assert each.leaf.grad is not None
    summed = each.leaf.grad.detach()
    return each.batch, summed if count == 1 else summed / count


def _route(parts: Sequence[Gradients], job: Job | None) -> Route | None:
    """Return the pipeline that pushes the gradients of these modules; None: the client does.

    Raises InvalidArgument if only some of the modules are in a pipeline, or if the ranks of the job
    wait for each other's pushes.
    """
    routes = {id(part.route): part.route for part in parts}
    if len(routes) > 1:
        raise InvalidArgument(
            "while the pipeline of a group runs, an optimizer must have modules of this group only:"
            " make one optimizer for the group, and another for other modules"
        )
    (route,) = routes.values() or (None,)
    if route is not None and job is not None and job.sync and route.pipe.lookahead:
        raise InvalidArgument(
            "with sync=True, a pipeline must have lookahead=0, so that it pulls no rows before all"
            f" ranks have pushed; got {route.pipe.lookahead}"
        )
    return route


def _push_sums(
    client: RowClient, route: Route | None, sums: Mapping[str, tuple[Batch, Tensor]], turn: Turn
) -> None:
    """Push gradients through ``route``; if it is None, in one request that is waited for.

    sums  {table: (keys, gradients)}
    """
    if route is None:
        given = {name: (batch, each.cpu().numpy()) for name, (batch, each) in sums.items()}
        client.push_distinct(given, step=turn.step, lr=turn.lr)
    else:
        route.push_sums(sums, turn)


def _push_together(
    client: RowClient,
    route: Route | None,
    sums: Mapping[str, tuple[Batch, Tensor]],
    turn: Turn,
    job: Job,
) -> Turn:
    """Push as one rank of a job: wait for the other ranks as the job requires it.

    sums  {table: (keys, gradients)} of this rank

    If ranks wait for each other, and an argument is invalid on one of them, or a gradient is
    infinite or NaN, no rank pushes. ``push`` explains the result.
    """
    problem, given = None, {}
    try:
        push_header(turn.step, turn.lr, None)
        for name, (batch, gradients) in sums.items():
            checked_sums = batch.check(gradients.cpu(), name, gradients.shape[1])
            given[name] = Sum(batch.keys, batch.split.counts, checked_sums)
    except InvalidArgument as error:
        problem, turn = error, Turn(0, None)
    turn, parts = job.reduce(turn, given, problem)
    try:
        if job.sums:
            summed = {name: added(client, some) for name, some in parts.items()}
            sums = {
                name: (batch, torch.from_numpy(rows))
                for name, (batch, rows) in summed.items()
                if len(batch.keys)
            }
        _push_sums(client, None if job.sync else route, sums, turn)
    except Exception as error:
        job.settle(turn, error)
        raise
    job.settle(turn, None)
    if route is not None and job.sync:  # all ranks have pushed: pull the rows of the next batch
        route.pushed()
    return turn


def added(client: RowClient, parts: Sequence[Sum]) -> tuple[Batch, Rows]:
    """Add gradients of one table: return (Batch, float32[distinct, dim] per key of the Batch).

    parts  at least one; those of the same key are added in this order
    """
    batch = client.batch(np.concatenate([each.keys for each in parts]))
    inverse, distinct = batch.split.inverse, len(batch.keys)
    gradients = np.concatenate([each.gradients for each in parts])
    sums = np.zeros((distinct, gradients.shape[1]), np.float32)
    routing.sum_rows(gradients, inverse, sums)
    counts = np.concatenate([each.counts for each in parts])
    total = np.bincount(inverse, weights=counts, minlength=distinct).astype(np.uint32)
    batch.split = replace(batch.split, counts=total)
    return batch, sums


def _world(job: Job | None) -> int:
    """Return the number of ranks: of a job, or of torch.distributed; 1 if it is not used."""
    if job is not None:
        return job.size
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def _sums(passes: Iterable[Pass]) -> list[Pass]:
    """Sum gradients per table: return a Pass for each table.

    Passes whose ``grad`` the caller has set to None are left out.
    """
    by_table: dict[str, list[Pass]] = {}
    for each in passes:
        if each.leaf.grad is not None:
            by_table.setdefault(each.table.name, []).append(each)
    return [some[0] if len(some) == 1 else _merge(some) for some in by_table.values()]


def _merge(passes: Sequence[Pass]) -> Pass:
    """Sum the gradients of several forward passes over one table, and take them from the passes.

    passes  at least two, each with gradients

    Returns the Pass of all their distinct keys. Row values are those of one of the passes.
    """
    table = passes[0].table
    batch, sums = added(
        table.client,
        [
            Sum(each.batch.keys, each.batch.split.counts, each.leaf.grad.detach().cpu().numpy())
            for each in passes
            if each.leaf.grad is not None
        ],
    )
    values = np.empty_like(sums)
    values[batch.split.inverse] = np.concatenate(
        [each.leaf.detach().cpu().numpy() for each in passes]
    )
    for each in passes:
        each.leaf.grad = None
    leaf = torch.from_numpy(values).requires_grad_()
    leaf.grad = torch.from_numpy(sums)
    return Pass(table, batch, leaf)
