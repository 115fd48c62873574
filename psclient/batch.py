"""A batch of keys: its distinct keys, grouped by shard; sums of gradients; pooled rows.

batch = Batch(keys, shard_map)        find the distinct keys and group them by shard
batch.sum(gradients, table, dim)      return the sum of the gradients of each distinct key
batch.spread(rows)                    copy the row of each distinct key to all its occurrences
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from psclient.arrays import Rows, as_array, as_gradients, as_keys
from psclient.errors import InvalidArgument
from psproto import routing

POOLINGS = ("sum", "mean", "sqrtn")


class Batch:
    """A batch of keys and its distinct keys, which are found once for all calls that use the batch.

    keys       64-bit integers of any shape
    shard_map  which shard owns each key

    Create one by ``Client.batch(keys)``. ``len(batch)`` is the number of keys, duplicates included.
    """

    def __init__(self, keys: Any, shard_map: routing.ShardMap) -> None:
        array = as_keys(keys)
        self.shape = array.shape
        self.split = routing.split(array.reshape(-1), shard_map)

    def __len__(self) -> int:
        return len(self.split.inverse)

    @property
    def keys(self) -> NDArray[np.uint64]:
        """Return the distinct keys of the batch, uint64[distinct], grouped by shard."""
        return self.split.keys

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
        elif len(self.split.bounds) > 2:
            sums = np.empty_like(flat)
            sums[self.split.inverse] = flat
        return self.check(sums, table, dim)

    def check(self, gradients: Any, table: str, dim: int) -> Rows:
        """Check gradients that are already summed per distinct key; return them as float32.

        gradients  float[distinct, dim], one gradient per distinct key, in the order of ``keys``
        table      name of the table, for errors
        dim        length of the table's embeddings

        Raises InvalidArgument if the shape is wrong or a number is infinite or NaN.
        """
        sums = as_gradients(gradients, (len(self.keys), dim), f"table {table!r}: gradients")
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


@njit(nogil=True, cache=True, error_model="numpy")
def _pool(rows: Any, inverse: Any, offsets: Any, weights: Any, mode: int, out: Any) -> None:
    """Combine the rows of each bag: ``out[b] = sum of rows[inverse[i]] * weights[i]``, i in bag b.

    rows     float32[u, dim]     rows of distinct keys
    inverse  int32[n]            index in ``rows`` of each key of the batch
    offsets  int64[bags + 1]     bag b has the keys ``offsets[b] <= i < offsets[b + 1]``
    weights  float32[n], or float32[0]: all weights are 1
    mode     0: sum; 1: mean, divided by the sum of weights; 2: sqrtn, divided by the square root of
             the sum of squared weights
    out      float32[bags, dim]  written; must be zero before
    """
    dim = rows.shape[1]
    for b in range(out.shape[0]):
        total = np.float32(0)
        for i in range(offsets[b], offsets[b + 1]):
            w = weights[i] if weights.shape[0] else np.float32(1)
            total += w * w if mode == 2 else w
            u = inverse[i]
            for j in range(dim):
                out[b, j] += w * rows[u, j]
        if mode and total != 0:
            by = np.float32(1) / (np.sqrt(total) if mode == 2 else total)
            for j in range(dim):
                out[b, j] *= by


def pool(rows: Rows, batch: Batch, offsets: Any, weights: Any, mode: str) -> Rows:
    """Combine the rows of each bag of keys into one row. Returns float32[bags, dim].

    rows     float32[distinct, dim], in the order of ``batch.keys``
    batch    a Batch of keys[n]
    offsets  int[bags + 1], ascending from 0 to n; bag b has the keys
             ``offsets[b] <= i < offsets[b + 1]``
    weights  float[n], a factor for each key; None: all are 1
    mode     "sum"; "mean", divided by the sum of the weights; "sqrtn", divided by the square root
             of the sum of their squares (as in TensorFlow's embedding_lookup_sparse)

    The row of an empty bag is zero. Raises InvalidArgument if an argument breaks these rules.
    """
    if mode not in POOLINGS:
        raise InvalidArgument(f"mode must be one of {', '.join(POOLINGS)}, got {mode!r}")
    bounds = _bounds(offsets, len(batch))
    factors = np.empty(0, np.float32) if weights is None else _factors(weights, len(batch))
    out = np.zeros((len(bounds) - 1, rows.shape[1]), np.float32)
    _pool(rows, batch.split.inverse, bounds, factors, POOLINGS.index(mode), out)
    return out


def _bounds(offsets: Any, n: int) -> NDArray[np.int64]:
    """Return ``offsets`` as int64. Raises InvalidArgument unless they ascend from 0 to ``n``."""
    given = as_array(offsets, "offsets")
    if given.size and given.dtype.kind not in "iu":
        raise InvalidArgument(f"offsets must be integers, got dtype {given.dtype}")
    bounds = given.astype(np.int64)
    ascending = bounds.ndim == 1 and bounds.size and not (np.diff(bounds) < 0).any()
    if not ascending or bounds[0] != 0 or bounds[-1] != n:
        shown = np.array2string(bounds, threshold=8)
        raise InvalidArgument(f"offsets must ascend from 0 to {n}, the number of keys; got {shown}")
    return bounds


def _factors(weights: Any, n: int) -> Rows:
    """Return ``weights`` as float32[n]. Raises InvalidArgument unless they are ``n`` numbers."""
    given = as_array(weights, "weights")
    if given.dtype.kind not in "fiu":
        raise InvalidArgument(f"weights must be numbers, got dtype {given.dtype}")
    factors = np.ascontiguousarray(given, np.float32)
    if factors.shape != (n,):
        raise InvalidArgument(f"weights must have shape [{n}], got {list(factors.shape)}")
    return factors
