"""The rows of a table by columns, as every format of an export has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.admin import RowBatch
from psclient.tools.arrow import GROUP_ROWS
from psproto import ps_pb2 as pb

Tell = Callable[[int], Any]  # is told how many more rows are done


def columns(batch: RowBatch, dim: int) -> dict[str, NDArray[Any]]:
    """Columns of some rows, by name."""
    columns: dict[str, NDArray[Any]] = {"key": batch.keys, "embedding": batch.rows[:, :dim]}
    if batch.rows.shape[1] > dim:
        columns["state"] = batch.rows[:, dim:]
    return columns | {
        "version": batch.versions,
        "step": batch.steps,
        "frequency": batch.frequencies,
    }


def grouped(messages: Iterator[pb.TableSchema | RowBatch]) -> Iterator[RowBatch]:
    """Fewer, larger batches."""
    held: list[RowBatch] = []
    rows = 0
    for batch in messages:
        assert isinstance(batch, RowBatch)
        held.append(batch)
        rows += len(batch.keys)
        if rows >= GROUP_ROWS:
            yield _joined(held)
            held, rows = [], 0
    if held:
        yield _joined(held)


def _joined(held: list[RowBatch]) -> RowBatch:
    return RowBatch(
        *(
            np.concatenate([getattr(each, field) for each in held])
            for field in ("keys", "versions", "steps", "frequencies", "rows")
        )
    )
