"""Gradients of pulled rows: how backward passes collect them, and how they are pushed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from psclient import checked
from psclient.batch import Batch
from psclient.rowclient import RowClient
from psclient.table import Table
from psproto import routing

Ranks = Literal["mean", "sum"]
RANKS = {"mean": 1, "sum": 0}  # whether to divide by the number of ranks

DISCARDED = "the gradients of this step were discarded: the next step does not contain them"


@dataclass(slots=True)
class Rows:
    """Rows that one forward pass pulled from one table, one per distinct key.

    batch  keys of the forward pass
    leaf   float32[distinct, dim], the rows of ``batch.keys``; backward passes add the gradients to
           its ``grad``
    """

    table: Table
    batch: Batch
    leaf: Tensor


class Gradients:
    """Gradients of one module that backward passes computed, and that were not pushed yet.

    rows  rows of the forward passes that a backward pass has reached

    A forward pass only registers a hook on its leaf, so what no backward pass reaches is freed with
    the output. A copy is empty, and so is what is loaded from a pickle.
    """

    def __init__(self) -> None:
        self.rows: list[Rows] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def watch(self, table: Table, batch: Batch, leaf: Tensor) -> None:
        """Add the rows of a forward pass to ``rows`` as soon as a backward pass reaches ``leaf``.

        table, batch, leaf  see Rows; ``leaf`` requires a gradient
        """
        owner = weakref.ref(
            self
        )  # the hook lives as long as the graph, which may outlive the module

        def reached(leaf: Tensor) -> None:
            mine = owner()
            if mine is not None and all(leaf is not rows.leaf for rows in mine.rows):
                mine.rows.append(Rows(table, batch, leaf))

        leaf.register_post_accumulate_grad_hook(reached)  # type: ignore[no-untyped-call]

    def discard(self) -> None:
        """Forget all gradients."""
        for rows in self.rows:
            rows.leaf.grad = None  # a later backward pass through the same graph begins anew
        self.rows = []


def gather(parts: Sequence[Gradients]) -> list[Rows]:
    """Sum the gradients of several forward passes over the same table; return the Rows, by table.

    parts  gradients of modules of one client

    The sums replace what they were computed from: afterwards each table occurs once in ``parts``.
    Infinite and NaN gradients are summed, too.
    """
    by_table: dict[str, list[tuple[Gradients, Rows]]] = {}
    for part in parts:
        for rows in part.rows:
            if rows.leaf.grad is not None:  # None: the caller has set it
                by_table.setdefault(rows.table.name, []).append((part, rows))
    for part in parts:
        part.rows = []
    gathered = []
    for found in by_table.values():
        rows = _merge([rows for _, rows in found]) if len(found) > 1 else found[0][1]
        found[0][0].rows.append(rows)
        gathered.append(rows)
    return gathered


def push(
    client: RowClient, parts: Iterable[Gradients], step: int, lr: float | None, ranks: Ranks
) -> None:
    """Push the gradients of modules, summed per table, in one request, and forget them.

    client  client of all tables
    parts   gradients of the modules
    step    training step
    lr      learning rate; None: that of each table
    ranks   with torch.distributed, "mean": divide by the number of ranks; "sum": do not

    They are forgotten even if the push fails, because some shards may have applied it. The error
    then has a note that says so.
    """
    count = _world() if checked.one_of("ranks", ranks, RANKS) else 1
    parts = list(parts)
    gradients = {}
    for rows in gather(parts):
        assert rows.leaf.grad is not None
        summed = rows.leaf.grad.detach()
        summed = summed if count == 1 else summed / count
        gradients[rows.table.name] = (rows.batch, summed.numpy())
    for part in parts:
        part.discard()
    try:
        client.push_distinct(gradients, step=step, lr=lr)
    except BaseException as error:
        if gradients:
            error.add_note(DISCARDED)
        raise


def _world() -> int:
    """Return the number of ranks of torch.distributed; 1 if it is not used."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def _merge(passes: Sequence[Rows]) -> Rows:
    """Sum the gradients of several forward passes over one table, and take them from the passes.

    passes  at least two, each with gradients

    Returns the Rows of all their distinct keys. Row values are those of one of the passes.
    """
    table = passes[0].table
    batch = table.client.batch(np.concatenate([rows.batch.keys for rows in passes]))
    inverse, shape = batch.split.inverse, (len(batch.keys), table.dim)
    sums, values = np.zeros(shape, np.float32), np.empty(shape, np.float32)
    gradients = [rows.leaf.grad.detach().numpy() for rows in passes if rows.leaf.grad is not None]
    routing.sum_rows(np.concatenate(gradients), inverse, sums)
    values[inverse] = np.concatenate([rows.leaf.detach().numpy() for rows in passes])
    counts = np.concatenate([rows.batch.split.counts for rows in passes])
    total = np.bincount(inverse, weights=counts, minlength=len(batch.keys)).astype(np.uint32)
    batch.split = replace(batch.split, counts=total)
    for rows in passes:
        rows.leaf.grad = None
    leaf = torch.from_numpy(values).requires_grad_()
    leaf.grad = torch.from_numpy(sums)
    return Rows(table, batch, leaf)
