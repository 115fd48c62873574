"""One table of a client: pull, push, exchange and delete its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.alteration import Alteration
from psclient.arrays import Rows
from psclient.batch import Batch, pool
from psclient.choices import Durability, Mode, Wire
from psclient.pending import Pending
from psclient.rowclient import RowClient
from psclient.schema import TableInfo


@dataclass(frozen=True, slots=True)
class PulledRows:
    """Embeddings, with the metadata of each key's row. Metadata is 0 for keys without a row."""

    embeddings: Rows  # float32[*shape, dim]
    found: NDArray[np.bool_]  # [*shape]: whether the key has a row
    versions: NDArray[np.uint64]  # [*shape] version of the shard after the row's last change
    steps: NDArray[np.int64]  # [*shape] training step of the row's last push
    frequencies: NDArray[np.uint64]  # [*shape] number of pushed occurrences of the key


class Table:
    """One table of a client. A method does what Client's method of the same name does, for this
    table.

    client  the Client that created it
    name    name of the table
    dim     length of the embeddings. If the table is dropped and created anew with a different dim,
            calls raise SchemaMismatch: get a new Table by ``client.table(name)``
    """

    def __init__(self, client: RowClient, name: str, dim: int) -> None:
        self.client = client
        self.name = name
        self.dim = dim

    def pull(self, keys: Any, *, mode: Mode = "train", wire: Wire | None = None) -> Rows:
        """Return embeddings float32[*shape, dim] of integer keys[*shape]. See Client.pull."""
        return self.client.pull({self.name: keys}, mode=mode, wire=wire)[self.name]

    def start_pull(self, keys: Any, *, mode: Mode = "train", wire: Wire | None = None) -> Pending:
        """Start a ``pull`` and return at once; ``result()`` of the Pending returns the
        embeddings.
        """
        pending = self.client.start_pull({self.name: keys}, mode=mode, wire=wire)
        return pending.then(lambda rows: rows[self.name])

    def pull_rows(
        self, keys: Any, *, mode: Mode = "train", min_version: Sequence[int] = ()
    ) -> PulledRows:
        """Return embeddings of integer keys[*shape], with the metadata of each key's row.

        mode         see Client.pull
        min_version  smallest version of each shard to read from, as in ``describe().versions``; ():
                     any

        Raises VersionInFuture if a shard has not reached its version, LogDiverged if a restore
        undid it.
        """
        part = self.client._pull_rows(self.name, keys, mode, min_version)
        versions, steps, frequencies = (part.batch.spread(column) for column in part.history)
        return PulledRows(part.shaped(), versions > 0, versions, steps.view(np.int64), frequencies)

    def pull_distinct(
        self, keys: Any, *, mode: Mode = "train", wire: Wire | None = None
    ) -> tuple[Batch, Rows]:
        """Return (batch, rows): the Batch of ``keys``, and float32[distinct, dim], one row per key
        of it.

        ``batch.spread(rows)`` returns the embeddings of all ``keys``. Client.push_distinct pushes
        gradients of the distinct rows.
        """
        batch = self.client.batch(keys)
        rows = self.client.pull_distinct({self.name: batch}, mode=mode, wire=wire)
        return batch, rows[self.name]

    def pull_pooled(
        self,
        keys: Any,
        offsets: Any,
        *,
        pooling: str = "sum",
        weights: Any = None,
        mode: Mode = "train",
        wire: Wire | None = None,
    ) -> Rows:
        """Return one combined embedding for each bag of keys: float32[bags, dim].

        keys     int[n], the keys of all bags
        offsets  int[bags + 1]; bag b has ``keys[offsets[b]:offsets[b + 1]]``; an empty bag gives
                 zeros
        pooling  "sum"; "mean", divided by the sum of the weights; "sqrtn", divided by the square
                 root of the sum of their squares
        weights  float[n], a factor for each key's row; None: all are 1

        See Client.pull for ``mode`` and ``wire``.
        """
        batch, rows = self.pull_distinct(keys, mode=mode, wire=wire)
        return pool(rows, batch, offsets, weights, pooling)

    def push(
        self,
        keys: Any,
        gradients: Any,
        *,
        step: int = 0,
        lr: float | None = None,
        wire: Wire | None = None,
        durability: Durability | None = None,
    ) -> None:
        """Apply gradients float[*shape, dim] to the rows of keys[*shape]. See Client.push."""
        self.client.push(
            {self.name: (keys, gradients)}, step=step, lr=lr, wire=wire, durability=durability
        )

    def exchange(
        self,
        keys: Any,
        push: tuple[Any, Any],
        *,
        step: int = 0,
        lr: float | None = None,
        mode: Mode = "train",
        wire: Wire | None = None,
        durability: Durability | None = None,
    ) -> Rows:
        """Push (keys, gradients) and then pull ``keys``, in one round trip; return embeddings.

        keys  integers[*shape] to pull
        push  (keys, gradients float[*shape of these keys, dim])

        See Client.exchange.
        """
        tables = self.client.exchange(
            {self.name: push},
            {self.name: keys},
            step=step,
            lr=lr,
            mode=mode,
            wire=wire,
            durability=durability,
        )
        return tables[self.name]

    def delete(self, keys: Any, *, durability: Durability | None = None) -> int:
        """Delete the rows of keys, with optimizer state and counters; ignore keys without a row.

        keys        integers of any shape
        durability  see Client.push

        Returns the number of rows deleted; it may be too low if a reply was lost and the request
        was repeated. Each message is applied whole or not at all.
        """
        return self.client._delete(self.name, keys, durability)

    def alter(self, **settings: Any) -> Alteration:
        """Change settings of the table. See Client.alter_table for the arguments."""
        return self.client.alter_table(self.name, **settings)

    def describe(self) -> TableInfo:
        """Return the schema of the table, and its size over all shards.

        See Client.describe_table.
        """
        return self.client.describe_table(self.name)

    def __repr__(self) -> str:
        return f"Table({self.name!r}, dim={self.dim})"
