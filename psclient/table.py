"""Table: one table of a client, with methods that pull, push, exchange and delete its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.alteration import Alteration
from psclient.arrays import Rows
from psclient.batch import Batch
from psclient.choices import Durability, Mode, Wire
from psclient.pending import Pending
from psclient.pooling import pool
from psclient.rowclient import RowClient
from psclient.schema import TableInfo


@dataclass(frozen=True, slots=True)
class PulledRows:
    """Embeddings of keys[*shape], with metadata of each key's row; 0 for keys without a row."""

    embeddings: Rows  # float32[*shape, dim]
    found: NDArray[np.bool_]  # [*shape]: whether the key has a row
    versions: NDArray[np.uint64]  # [*shape] version of the shard after the row's last change
    steps: NDArray[np.int64]  # [*shape] training step of the row's last push
    frequencies: NDArray[np.uint64]  # [*shape] number of pushed occurrences of the key


class Table:
    """One table of a client.

    client  the client through which its methods send requests
    name    name of the table
    dim     length of the embeddings. If the table is dropped and created anew with a different dim,
            calls raise SchemaMismatch: get a new Table by ``client.table(name)``

    Each method does what the Client's method of the same name does, for this one table. The
    Client's method explains the common arguments and the errors.
    """

    def __init__(self, client: RowClient, name: str, dim: int) -> None:
        self.client = client
        self.name = name
        self.dim = dim

    def pull(
        self, keys: Any, *, mode: Mode = "train", wire: Wire | None = None, out: Any = None
    ) -> Rows:
        """Return the embeddings float32[*shape, dim] of integer keys[*shape], or of a Batch.

        mode  embedding of a key without a row: "train": the initial one; "serve": serving_default
        wire  dtype of the embeddings on the wire; None: the client's
        out   float32[*shape, dim] that the embeddings are written to, see Client.pull
        """
        given = self._out(out)
        return self.client.pull({self.name: keys}, mode=mode, wire=wire, out=given)[self.name]

    def start_pull(
        self, keys: Any, *, mode: Mode = "train", wire: Wire | None = None, out: Any = None
    ) -> Pending:
        """Start a ``pull`` with these arguments and return at once.

        ``result()`` of the returned Pending waits for the embeddings and returns them.
        """
        given = self._out(out)
        pending = self.client.start_pull({self.name: keys}, mode=mode, wire=wire, out=given)
        return pending.then(lambda rows: rows[self.name])

    def prefetch(self, keys: Any) -> Pending:
        """Ask the shards to read the rows of keys from disk into memory; return at once.

        keys  integers of any shape, or a Batch

        Call it some time before a pull or push of these keys. Client.prefetch explains the result,
        which need not be waited for.
        """
        return self.client.prefetch({self.name: keys})

    def pull_rows(
        self, keys: Any, *, mode: Mode = "train", min_version: Sequence[int] = ()
    ) -> PulledRows:
        """Return the embeddings of integer keys[*shape], with the metadata of each key's row.

        mode         embedding of a key without a row: "train" or "serve", see Client.pull
        min_version  version of each shard that it must have reached, as returned by ``barrier`` or
                     ``describe().versions``; (): any

        Raises VersionInFuture if a shard has not reached its version, and LogDiverged if a restore
        undid that version.
        """
        part = self.client._pull_rows(self.name, keys, mode, min_version)
        versions, steps, frequencies = (part.batch.spread(column) for column in part.history)
        return PulledRows(part.shaped(), versions > 0, versions, steps.view(np.int64), frequencies)

    def pull_distinct(
        self, keys: Any, *, mode: Mode = "train", wire: Wire | None = None, out: Any = None
    ) -> tuple[Batch, Rows]:
        """Return one embedding for each distinct key, as (batch, float32[distinct, dim]).

        keys  integers of any shape, and ``batch`` is a Batch of them; or a Batch
        out   float32[distinct, dim] that the rows are written to, see Client.pull

        Row i belongs to ``batch.keys[i]``. ``batch.spread(rows)`` returns the embeddings of all
        ``keys``. Client.push_distinct pushes gradients of the distinct rows. Client.pull explains
        ``mode`` and ``wire``.
        """
        batch = self.client.batch(keys)
        given = self._out(out)
        rows = self.client.pull_distinct({self.name: batch}, mode=mode, wire=wire, out=given)
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

        Client.pull explains ``mode`` and ``wire``.
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
        """Apply gradients to the rows of keys. Client.push explains the other arguments.

        keys       integers[*shape], or a Batch of this shape
        gradients  float[*shape, dim]; gradients of equal keys are summed
        """
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
        out: Any = None,
    ) -> Rows:
        """Push gradients and then pull ``keys``, in one round trip; return the embeddings.

        keys  integers[*shape] to pull, or a Batch
        push  (keys to push to, gradients float[*shape of these keys, dim])

        Returns float32[*shape, dim]. Client.exchange explains the other arguments.
        """
        tables = self.client.exchange(
            {self.name: push},
            {self.name: keys},
            step=step,
            lr=lr,
            mode=mode,
            wire=wire,
            durability=durability,
            out=self._out(out),
        )
        return tables[self.name]

    def _out(self, out: Any) -> dict[str, Any] | None:
        """Return the argument ``out`` of a method of this class as that of the client's method."""
        return None if out is None else {self.name: out}

    def delete(self, keys: Any, *, durability: Durability | None = None) -> int:
        """Delete the rows of keys, with optimizer state and counters; ignore keys without a row.

        keys        integers of any shape, or a Batch
        durability  when to return: "applied", "log" or "fsync", see Client.push; None: the table's

        Returns the number of rows deleted; it may be too small if a reply was lost and the request
        was repeated. Each message to a shard is applied whole or not at all.
        """
        return self.client._delete(self.name, keys, durability)

    def alter(self, **settings: Any) -> Alteration:
        """Change settings of the table. ``settings`` are the arguments of Client.alter_table."""
        return self.client.alter_table(self.name, **settings)

    def describe(self) -> TableInfo:
        """Return the settings of the table, and its size over all shards.

        Raises TableNotFound, or SchemaMismatch if the settings differ between two shards.
        """
        return self.client.describe_table(self.name)

    def __repr__(self) -> str:
        return f"Table({self.name!r}, dim={self.dim})"
