"""Split whole rows into slices that the engine thread copies in much less than a millisecond."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.kernels import Keys, Rows
from storage.schema import TableSchema

SLICE_ROWS, SLICE_BYTES = 2048, 512 << 10  # limits of the rows copied per call of the engine thread
SLICE_STEPS = 16  # maximum number of changes (versions) per call of the engine thread

Slice = tuple[int, Keys, NDArray[Any], Rows]  # step, keys, frequencies, rows


def slices_of(
    keys: Keys, steps: NDArray[Any], frequencies: NDArray[Any], rows: Rows
) -> Iterator[list[Slice]]:
    """Sort rows by training step, and split them into slices. Each slice is written as one change.

    Yields lists of slices: the slices of one list are written in one call of the engine thread. A
    slice is (step, keys, frequencies, rows), and all of its rows have this step.

    keys         uint64[n]
    steps        int64[n]           training step of each row
    frequencies  uint64[n]
    rows         float32[n, width]  embedding and optimizer state
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


def with_state(rows: Rows, schema: TableSchema) -> Rows:
    """Return rows with optimizer state, float32[n, width], for a table with this schema.

    rows  either float32[n, width], which is returned unchanged, or embeddings float32[n, dim], to
          which the initial optimizer state is appended
    """
    if rows.shape[1] == schema.width:
        return rows
    whole = np.empty((len(rows), schema.width), np.float32)
    whole[:, : schema.dim] = rows
    whole[:, schema.dim :] = schema.optimizer.initial_state(schema.dim)
    return whole


def slice_rows(width: int) -> int:
    """Return how many rows the engine thread copies per call: at most 2048, and at most 512 KiB.

    width  float32 numbers per row

    The result is at least 1, even for a larger row.
    """
    return max(1, min(SLICE_ROWS, SLICE_BYTES // (4 * width)))
