"""The rows of a table by columns, as every format of an export has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.rows import RowBatch
from psclient.tools.arrow import GROUP_ROWS, KeyType
from psproto import ps_pb2 as pb

OnProgress = Callable[[int], Any]  # is called with how many more rows are done


@dataclass(frozen=True, slots=True)
class Part:
    """What a format writes to one file."""

    path: Path
    schema: pb.TableSchema
    keys: KeyType  # dtype of the column of keys
    batches: Iterator[RowBatch]  # at least one, which may be empty

    def columns(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield the columns of the rows by name, for some ten thousand rows at a time."""
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
    """Yield the rows in fewer, larger batches."""
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
    return RowBatch(
        *(
            np.concatenate([getattr(each, field) for each in batches])
            for field in ("keys", "versions", "steps", "frequencies", "rows")
        )
    )
