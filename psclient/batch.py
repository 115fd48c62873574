"""A batch of keys: its distinct keys, grouped by shard, and sums of their gradients.

batch = Batch(keys, shard_map)        find the distinct keys and group them by shard
batch.sum(gradients, table, dim)      return the sum of the gradients of each distinct key
batch.spread(rows)                    copy the row of each distinct key to all its occurrences
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.arrays import Rows, as_gradients, as_keys
from psclient.errors import InvalidArgument
from psproto import routing


class Batch:
    """A batch of keys and its distinct keys, which are found once for all calls that use the batch.

    keys       64-bit integers of any shape
    shard_map  which shard owns each key

    bounds     ``keys[bounds[s]:bounds[s + 1]]`` of the distinct keys belong to shard s

    Create one by ``Client.batch(keys)``. ``len(batch)`` is the number of keys, duplicates included.
    """

    def __init__(self, keys: Any, shard_map: routing.ShardMap) -> None:
        array = as_keys(keys)
        self.shape = array.shape
        self.split = routing.split(array.reshape(-1), shard_map)
        self.bounds: list[int] = self.split.bounds.tolist()

    def __len__(self) -> int:
        return len(self.split.inverse)

    @property
    def keys(self) -> NDArray[np.uint64]:
        """Return the distinct keys of the batch, uint64[distinct], grouped by shard."""
        return self.split.keys

    def part(self, index: NDArray[np.int64]) -> Batch:
        """Return a Batch of some of the distinct keys, once each.

        index  int64[m], ascending: which of ``keys``
        """
        chosen = Batch.__new__(Batch)
        bounds = np.searchsorted(index, self.split.bounds)
        places = np.arange(len(index), dtype=np.int32)
        chosen.split = routing.Split(
            self.keys[index], np.ones(len(index), np.uint32), places, bounds
        )
        chosen.shape, chosen.bounds = (len(index),), bounds.tolist()
        return chosen

    def sum(self, gradients: Any, table: str, dim: int) -> Rows:
        """Sum the gradients of equal keys.

        gradients  float[*shape of the batch's keys, dim], one gradient per key
        table      name of the table, for errors
        dim        length of the table's embeddings

        Returns float32[distinct, dim]: row i is the sum for the distinct key ``self.keys[i]``.
        Raises InvalidArgument if the shape is wrong or a sum is infinite or NaN.
        """
        flat = as_gradients(gradients, (*self.shape, dim), f"table {table!r}: gradients").reshape(
            -1, dim
        )
        sums = flat  # without duplicates, and with one shard, ``keys`` has the order of the batch
        if len(self.keys) < len(flat):
            sums = np.zeros((len(self.keys), dim), np.float32)
            routing.sum_rows(flat, self.split.inverse, sums)
        elif len(self.bounds) > 2:
            sums = np.empty_like(flat)
            sums[self.split.inverse] = flat
        return self._finite(sums, table)

    def check(self, gradients: Any, table: str, dim: int) -> Rows:
        """Check gradients that are already summed per distinct key; return them as float32.

        gradients  float[distinct, dim], one gradient per distinct key, in the order of ``keys``
        table      name of the table, for errors
        dim        length of the table's embeddings

        Raises InvalidArgument if the shape is wrong or a number is infinite or NaN.
        """
        sums = as_gradients(gradients, (len(self.keys), dim), f"table {table!r}: gradients")
        return self._finite(sums, table)

    def _finite(self, sums: Rows, table: str) -> Rows:
        """Return ``sums``, float32[distinct, dim], after checking that all numbers are finite.

        table  name of the table, for errors
        """
        if not routing.all_finite(sums.reshape(-1).view(np.uint32)):
            row, column = np.argwhere(~np.isfinite(sums))[0]
            raise InvalidArgument(
                f"table {table!r}: the gradient of key {self.keys[row]} is"
                f" {sums[row, column]} at position {column}; all numbers must be finite"
            )
        return sums

    def spread(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Copy the row of each distinct key to all occurrences of the key in the batch.

        rows  [distinct, ...], in the order of ``keys``

        Returns an array [*shape of the batch's keys, ...].
        """
        return rows[self.split.inverse].reshape((*self.shape, *rows.shape[1:]))
