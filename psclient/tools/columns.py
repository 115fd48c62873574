"""Columns of an exported table, for every file format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.rows import RowBatch
from psclient.tools.arrow import GROUP_ROWS, KeyType
from psproto import ps_pb2 as pb

OnProgress = Callable[[int], Any]  # called with the number of rows written since the last call


@dataclass(frozen=True, slots=True)
class Part:
    """Rows to write to one file.

    path     the file; a directory if the format has several files
    schema   schema of the table
    keys     type of the column of keys: np.uint64 or np.int64
    batches  the rows; at least one batch, which may be empty
    options  {name: value} of options that only some formats have
    """

    path: Path
    schema: pb.TableSchema
    keys: KeyType
    batches: Iterator[RowBatch]
    options: Mapping[str, str | int] = field(default_factory=dict)

    def columns(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield the columns by name, in groups of at least GROUP_ROWS rows, except the last group.

        key KeyType[n], embedding float32[n, dim], state float32[n, width - dim] if the optimizer
        has a state, version uint64[n], step int64[n], frequency uint64[n]
        """
        dim = self.schema.dim
        for batch in _grouped(self.batches):
            columns: dict[str, NDArray[Any]] = {
                "key": batch.keys.view(self.keys),
                "embedding": batch.rows[:, :dim],
            }
            if batch.rows.shape[1] > dim:
                columns["state"] = batch.rows[:, dim:]
            yield columns | {
                "version": batch.versions,
                "step": batch.steps,
                "frequency": batch.frequencies,
            }


def _grouped(batches: Iterator[RowBatch]) -> Iterator[RowBatch]:
    """Join batches into larger ones, of at least GROUP_ROWS rows except the last one."""
    waiting: list[RowBatch] = []
    rows = 0
    for batch in batches:
        waiting.append(batch)
        rows += len(batch.keys)
        if rows >= GROUP_ROWS:
            yield _joined(waiting)
            waiting, rows = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(batches: list[RowBatch]) -> RowBatch:
    """Concatenate batches into one."""
    return RowBatch(
        *(
            np.concatenate([getattr(each, field) for each in batches])
            for field in ("keys", "versions", "steps", "frequencies", "rows")
        )
    )
