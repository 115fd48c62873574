"""Split whole rows into portions that the engine thread writes in much less than a millisecond."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psserver.stored import slice_rows
from storage.kernels import Keys, Rows

SLICE_STEPS = 16  # maximum number of changes (versions) per call of the engine thread

Slice = tuple[int, Keys, NDArray[Any], Rows]  # step, keys, frequencies, rows


def slices_of(
    keys: Keys, steps: NDArray[Any], frequencies: NDArray[Any], rows: Rows
) -> Iterator[list[Slice]]:
    """Yield lists of slices; each list is for one call of the engine thread.

    A slice is (step, keys, frequencies, rows) of rows with one step, and is written as one change.

    keys         uint64[n]
    steps        int64[n]          training steps
    frequencies  uint64[n]
    rows         float32[n, width]
    """
    order = np.argsort(steps, kind="stable")
    most = slice_rows(rows.shape[1])
    batch: list[Slice] = []
    size = 0
    edges = np.flatnonzero(np.diff(steps[order])) + 1
    for run in np.split(order, edges) if len(order) else []:
        for at in range(0, len(run), most):
            chosen = run[at : at + most]
            batch.append((int(steps[run[0]]), keys[chosen], frequencies[chosen], rows[chosen]))
            size += len(chosen)
            if size >= most or len(batch) == SLICE_STEPS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
