"""One table of a client."""

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
    """Embeddings with what the servers know about each key, in the order of the keys."""

    embeddings: Rows  # float32[*shape, dim]
    found: NDArray[np.bool_]  # [*shape]: whether the key has a row
    versions: NDArray[np.uint64]  # of the row's last push, on its shard
    steps: NDArray[np.int64]  # of the row's last push
    frequencies: NDArray[np.uint64]  # occurrences pushed


class Table:
    """One table of a client. Its methods are those of the client for one table.

    dim  of its embeddings when this was made; SchemaMismatch tells that the table was created anew
         with another one: then ask the client for it again
    """

    def __init__(self, client: RowClient, name: str, dim: int) -> None:
        self.client = client
        self.name = name
        self.dim = dim

    def pull(self, keys: Any, *, mode: Mode = "train", wire: Wire | None = None) -> Rows:
        """Embeddings float32[*shape, dim] of keys[*shape]. See Client.pull."""
        return self.client.pull({self.name: keys}, mode=mode, wire=wire)[self.name]

    def start_pull(self, keys: Any, *, mode: Mode = "train", wire: Wire | None = None) -> Pending:
        """``pull``, started now and awaited later by ``result()``."""
        pending = self.client.start_pull({self.name: keys}, mode=mode, wire=wire)
        return pending.then(lambda rows: rows[self.name])

    def pull_rows(
        self, keys: Any, *, mode: Mode = "train", min_version: Sequence[int] = ()
    ) -> PulledRows:
        """Embeddings of keys with what the servers know about them.

        min_version  by shard: refuse (VersionInFuture) to read from an older state; as given by
                     describe_table().versions
        """
        part = self.client._pull_rows(self.name, keys, mode, min_version)
        versions, steps, frequencies = (part.batch.spread(column) for column in part.history)
        return PulledRows(part.shaped(), versions > 0, versions, steps.view(np.int64), frequencies)

    def pull_distinct(
        self, keys: Any, *, mode: Mode = "train", wire: Wire | None = None
    ) -> tuple[Batch, Rows]:
        """The batch of ``keys`` and one embedding for each of its distinct keys.

        rows[batch.split.inverse] are the embeddings of ``keys``; gradients of the distinct rows go
        back by push_distinct.
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
        """One combined embedding for each bag of keys: float32[bags, dim].

        keys     int[n]
        offsets  int[bags + 1]: bag b is keys[offsets[b]:offsets[b + 1]]; an empty bag is 0
        pooling  "sum"; "mean", by the sum of the weights; "sqrtn", by the root of the sum of
                 their squares
        weights  float[n]; ones where None
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
        """Push (keys, gradients) of the last step and pull ``keys`` of the next in one message."""
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
        """Delete the rows of keys, state and history too; keys without a row are left alone.

        Returns how many rows went, or fewer if a reply was lost on the way. A shard deletes all of
        its part or nothing.
        """
        return self.client._delete(self.name, keys, durability)

    def alter(self, **settings: Any) -> Alteration:
        """Change settings of the table; see ``Client.alter_table``."""
        return self.client.alter_table(self.name, **settings)

    def describe(self) -> TableInfo:
        """Schema and size over all shards."""
        return self.client.describe_table(self.name)

    def __repr__(self) -> str:
        return f"Table({self.name!r}, dim={self.dim})"
