"""Write the rows that an analysis read to a Parquet file."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from psclient.errors import InvalidArgument
from psclient.tools.arrow import GROUP_ROWS, array, key_type, pyarrow, writer
from psclient.tools.staged import staged_file
from psclient.tools.summary import RowColumns


class ParquetSink:
    """Writes the rows of an analysis to a Parquet file, which gets its name once it is complete.

        with ParquetSink(path) as sink:
            analyze(client, "user", sink=sink)

    Columns: key uint64 or int64 | frequency uint64 | step int64 | version uint64 | norm float64
    | tier string | embedding float32[dim]

    The column ``embedding`` exists only if the analysis reads embeddings. The memory used does not
    grow with the table.

    path  file to write; an existing file is replaced
    keys  type of the column of keys, "uint64" or "int64"
    """

    def __init__(self, path: Path, *, keys: str = "uint64") -> None:
        """Check the arguments; ``with`` creates the file.

        Raises InvalidArgument if pyarrow is missing, and in ``with`` if the file cannot be written.
        """
        self.rows = 0
        self._keys = key_type(keys)
        self._arrow, self._parquet = pyarrow()
        self._path = path
        self._writer: Any = None
        self._batches: list[Any] = []  # record batches that are not written yet
        self._waiting = 0  # number of rows in them
        self._stack = ExitStack()

    def __call__(self, columns: RowColumns) -> None:
        """Add rows. Once GROUP_ROWS rows were added, write them as a row group.

        Not thread-safe.
        """
        arrow = self._arrow
        arrays = {
            "key": arrow.array(columns.keys.view(self._keys)),
            "frequency": arrow.array(columns.frequencies),
            "step": arrow.array(columns.steps),
            "version": arrow.array(columns.versions),
            "norm": arrow.array(columns.norms),
            "tier": arrow.array([columns.tier] * len(columns.keys), arrow.string()),
        }
        if columns.embeddings is not None:
            arrays["embedding"] = array(arrow, columns.embeddings)
        self._batches.append(arrow.record_batch(list(arrays.values()), names=list(arrays)))
        self._waiting += len(columns.keys)
        if self._waiting >= GROUP_ROWS:
            self._write()

    def __enter__(self) -> Self:
        self._temporary = self._stack.enter_context(staged_file(self._path))
        self._stack.callback(self._close)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: Any) -> None:
        with self._stack:
            if error is not None:
                raise error
            self._write()
            if self._writer is None:
                raise InvalidArgument(
                    f"{self._path} was not written: no rows were passed to the sink"
                )

    def _close(self) -> None:
        """Close the Parquet file if it was opened."""
        if self._writer is not None:
            self._writer.close()

    def _write(self) -> None:
        """Write the rows that were added since the last row group as a row group."""
        if not self._batches:
            return
        table = self._arrow.Table.from_batches(self._batches)
        if self._writer is None:
            self._writer = writer(self._parquet, self._temporary, table.schema)
        self._writer.write_table(table)
        self.rows += self._waiting
        self._batches, self._waiting = [], 0
