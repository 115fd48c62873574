"""Rows that a forward pass pulled, and the push of their gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psclient.batch import Batch
from psclient.rowclient import RowClient
from psclient.table import Table


class Rows:
    """Rows that one forward pass pulled from one table, one per distinct key.

    batch       keys of the forward pass
    embeddings  float32[distinct, dim], the rows of ``batch.keys``
    collect     whether to collect gradients
    leaf        ``embeddings`` as a tensor; backward passes add the gradients to its ``grad``
    """

    def __init__(self, table: Table, batch: Batch, embeddings: Any, collect: bool) -> None:
        self.table = table
        self.batch = batch
        self.leaf = torch.from_numpy(embeddings).requires_grad_(collect)

    def places(self) -> Tensor:
        """Return the index in ``leaf`` of the row of each key of the batch, int64[n]."""
        return torch.from_numpy(self.batch.split.inverse.astype(np.int64))


def push(client: RowClient, collected: Iterable[list[Rows]], step: int, lr: float | None) -> None:
    """Push the gradients of pulled rows, summed per table, in one request; then clear the lists.

    client     client of all tables
    collected  lists of the rows of forward passes
    step       training step
    lr         learning rate; None: that of each table
    """
    by_table: dict[str, list[Rows]] = {}
    lists = list(collected)
    for rows in (rows for each in lists for rows in each):
        if rows.leaf.grad is not None:  # None: no backward pass reached these rows
            by_table.setdefault(rows.table.name, []).append(rows)
    client.push_distinct(
        {name: _merge(client, rows) for name, rows in by_table.items()}, step=step, lr=lr
    )
    for each in lists:
        each.clear()


def _merge(client: RowClient, passes: list[Rows]) -> tuple[Batch, Any]:
    """Sum the gradients of several forward passes over one table.

    passes  rows of each forward pass, with their gradients

    Returns (batch of all keys, gradients float32[distinct, dim] of its distinct keys).
    """
    gradients = [rows.leaf.grad.numpy() for rows in passes if rows.leaf.grad is not None]
    if len(passes) == 1:
        return passes[0].batch, gradients[0]
    table = passes[0].table
    batch = client.batch(np.concatenate([rows.batch.keys for rows in passes]))
    sums = batch.sum(np.concatenate(gradients), table.name, table.dim)
    counts = np.concatenate([rows.batch.split.counts for rows in passes])
    total = np.bincount(batch.split.inverse, weights=counts).astype(np.uint32)
    batch.split = replace(batch.split, counts=total)
    return batch, sums
