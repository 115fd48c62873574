"""Import the rows of Parquet files into an existing table.

    key        integers of any width, or decimal(p, 0); a signed and an unsigned integer with the
               same 64 bits are the same key
    embedding  lists of dim numbers, float16, float32 or float64, of plain, large or fixed-size type
    state      optional: lists of numbers. Used if the file's metadata "ps.schema" names the table's
               optimizer; otherwise rows get the optimizer state of new rows
    step       optional: integers; default: the largest step pushed to the table
    frequency  optional: integers in 0..2^32-1; default: 1

Other columns are ignored. Values that cannot be stored exactly are refused: null, NaN, infinity,
numbers too large for float32, fractions. Existing rows of the same keys are replaced. If a key
occurs several times, its last row counts, in the order of the file names and then of the rows.

An import reads the files twice. The first pass checks everything and writes nothing. The second
pass writes the rows, and ends when they are on disk. If the second pass fails (ImportIncomplete),
the rows written so far stay, perhaps including a part of the current batch. Repeating the same
import writes the same rows again and completes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from psclient.client import Client
from psclient.errors import NoLog, PsError
from psclient.rows import RowBatch, read_rows, write_rows
from psclient.tools.source import Rows, Target, files_of, read, require

Progress = Callable[[int, int], Any]  # called with (rows done, total rows)


class ImportIncomplete(PsError):
    """An import failed while it wrote rows. ``written`` of ``total`` rows were written and stay.

    Repeat the same import to complete it.
    """

    def __init__(self, table: str, written: int, total: int, cause: BaseException) -> None:
        reason = str(cause) or type(cause).__name__
        super().__init__(
            f"import into table {table!r} is incomplete: {written:,} of {total:,} rows were written"
            f" and stay; repeat the same import to complete it. Cause: {reason}"
        )
        self.written = written
        self.total = total


@dataclass(frozen=True, slots=True)
class Checked:
    """Result of ``check_parquet``: files whose rows are valid for a table.

    target  the table
    files   the files, in the order in which they will be written
    rows    number of rows in all files together
    """

    target: Target
    files: list[Path]
    rows: int


def import_parquet(
    client: Client, table: str, path: Path, *, progress: Progress | None = None
) -> int:
    """Import a Parquet file, or a directory of them, into a table; return the number of rows.

    path      file, or directory with *.parquet files
    progress  called with (rows written, total rows)

    Raises the errors of ``check_parquet``, with nothing written, and of ``write_parquet``.
    """
    return write_parquet(client, check_parquet(client, table, path), progress=progress)


def check_parquet(
    client: Client, table: str, path: Path, *, progress: Progress | None = None
) -> Checked:
    """Check every row of a Parquet file, or of a directory of them, for a table; write nothing.

    path      file, or directory with *.parquet files
    progress  called with (rows checked, total rows)

    Raises TableNotFound, and InvalidArgument with the file, the row, the column and the rule.
    """
    target = _target(client, table)
    files = files_of(path)
    total = sum(require(each, target) for each in files)
    for _ in _reporting(_rows_of(files, target), total, progress):
        pass
    return Checked(target, files, total)


def write_parquet(client: Client, source: Checked, *, progress: Progress | None = None) -> int:
    """Write the rows of checked files to their table; return their number once they are on disk.

    progress  called with (rows written, total rows)

    Raises ImportIncomplete on any error and on Ctrl-C; the rows written so far stay.
    """
    target, done = source.target, 0
    try:
        for rows in _reporting(_rows_of(source.files, target), source.rows, progress):
            _write(client, target.table, rows)
            done += len(rows.keys)
        with suppress(NoLog):
            client.wait_durable()
    except (Exception, KeyboardInterrupt) as error:
        raise ImportIncomplete(target.table, done, source.rows, error) from error
    return done


def _target(client: Client, table: str) -> Target:
    """Ask the servers for the dim, row width and optimizer of a table."""
    info = client.describe_table(table)
    messages = read_rows(client, table, shards=[0])
    widths = (each.rows.shape[1] for each in messages if isinstance(each, RowBatch))
    width = next(widths)  # the first batch is empty and shows the width
    messages.close()
    return Target(table, info.dim, width, info.optimizer)


def _rows_of(files: list[Path], target: Target) -> Iterator[Rows]:
    """Yield the rows of all files, checked, in batches."""
    for each in files:
        yield from read(each, target)


def _reporting(batches: Iterator[Rows], total: int, progress: Progress | None) -> Iterator[Rows]:
    """Yield the batches; report progress when the caller asks for the next one.

    total  number of rows in all batches
    """
    done = 0
    for batch in batches:
        yield batch
        done += len(batch.keys)
        if progress is not None:
            progress(done, total)


def _write(client: Client, table: str, batch: Rows) -> None:
    """Write a batch to a table. If a key occurs several times, only its last row is written."""
    _, last = np.unique(batch.keys[::-1], return_index=True)
    chosen = len(batch.keys) - 1 - last
    write_rows(
        client,
        table,
        batch.keys[chosen],
        batch.rows[chosen],
        steps=None if batch.steps is None else batch.steps[chosen],
        frequencies=None if batch.frequencies is None else batch.frequencies[chosen],
    )
