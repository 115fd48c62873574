"""The rows of an analysis as a Parquet file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

from psclient.tools.arrow import GROUP_ROWS, array, pyarrow
from psclient.tools.staged import beside
from psclient.tools.summary import RowColumns


class ParquetSink:
    """Rows of an analysis as a Parquet file, which is whole, or not there under its name.

    key uint64 | frequency uint64 | step int64 | version uint64 | norm float64 | tier string
    | embedding float32[dim]

    ``embedding`` only where the analysis has it. Memory does not grow with the table.
    """

    def __init__(self, path: Path) -> None:
        """InvalidArgument if pyarrow is missing; and from ``with``, if no file can be there."""
        self.rows = 0
        self._arrow, self._parquet = pyarrow()
        self._path = path
        self._writer: Any = None
        self._held: list[Any] = []  # record batches
        self._waiting = 0  # rows in them

    def __call__(self, columns: RowColumns) -> None:
        """Take rows."""
        arrow = self._arrow
        arrays = {
            "key": arrow.array(columns.keys),
            "frequency": arrow.array(columns.frequencies),
            "step": arrow.array(columns.steps),
            "version": arrow.array(columns.versions),
            "norm": arrow.array(columns.norms),
            "tier": arrow.array([columns.tier] * len(columns.keys), arrow.string()),
        }
        if columns.embeddings is not None:
            arrays["embedding"] = array(arrow, columns.embeddings)
        self._held.append(arrow.record_batch(list(arrays.values()), names=list(arrays)))
        self._waiting += len(columns.keys)
        if self._waiting >= GROUP_ROWS:
            self._write()

    def __enter__(self) -> Self:
        self._beside = beside(self._path)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._write()
            if self._writer is not None:
                self._writer.close()
                if kind is None:
                    os.replace(self._beside, self._path)
        finally:
            self._beside.unlink(missing_ok=True)

    def _write(self) -> None:
        """Write what waits as a row group."""
        if not self._held:
            return
        table = self._arrow.Table.from_batches(self._held)
        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self._beside, table.schema)
        self._writer.write_table(table)
        self.rows += self._waiting
        self._held, self._waiting = [], 0
