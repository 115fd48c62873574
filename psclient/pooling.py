"""Pooling: combine the rows of each bag of keys into one row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from psclient.arrays import Rows, as_array
from psclient.batch import Batch
from psclient.errors import InvalidArgument

POOLINGS = ("sum", "mean", "sqrtn")


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
