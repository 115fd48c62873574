"""Rows of Parquet files into a table that exists.

    key        integers of any width, or decimal(p, 0); of signed and unsigned keys with the same
               bits, both mean the same key
    embedding  lists of dim float16, float32 or float64: plain, large or of a fixed size
    state      optional: lists of numbers; used if the file says, under "ps.schema", that it is of
               the table's optimizer, otherwise rows get the state of new rows
    step       optional: integers; otherwise the largest step that was pushed to the table
    frequency  optional: integers of 0..2^32-1; otherwise 1

Other columns are ignored. A value that cannot be stored as it is is refused: null, NaN, infinity,
a number beyond float32, a fraction. Rows of these keys are replaced. If a key occurs several times,
its last row counts, by the order of the files' names and then of their rows.

An import reads the files twice. The first pass checks everything and writes nothing. The second
pass writes the rows, and ends when they are on disk. If the second pass fails, the rows written
until then stay, perhaps with a part of the current batch (ImportIncomplete). The same import may be
repeated: it writes the same rows and completes the work.
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

Progress = Callable[[int, int], Any]  # rows done, rows in all


class ImportIncomplete(PsError):
    """An import ended while it wrote; ``written`` of ``total`` rows stay. Repeat it to complete."""

    def __init__(self, table: str, written: int, total: int, cause: BaseException) -> None:
        reason = str(cause) or type(cause).__name__
        super().__init__(
            f"import into {table!r} is incomplete: {written:,} of {total:,} rows are written and"
            f" stay; repeat the same import to complete it. Cause: {reason}"
        )
        self.written = written
        self.total = total


@dataclass(frozen=True, slots=True)
class Checked:
    """Files whose rows may be written to a table."""

    target: Target
    files: list[Path]
    rows: int


def import_parquet(
    client: Client, table: str, path: Path, *, progress: Progress | None = None
) -> int:
    """Write the rows of a Parquet file, or of a directory of them, into a table; return how many.

    progress  called while rows are written

    Raises what ``check_parquet`` and ``write_parquet`` raise.
    """
    return write_parquet(client, check_parquet(client, table, path), progress=progress)


def check_parquet(
    client: Client, table: str, path: Path, *, progress: Progress | None = None
) -> Checked:
    """Check that a Parquet file, or a directory of them, can be written to a table as it is.

    Raises TableNotFound, and InvalidArgument with the file, the row, the column and the rule.
    """
    target = _target(client, table)
    files = files_of(path)
    total = sum(require(each, target) for each in files)
    for _ in _told(_all(files, target), total, progress):
        pass
    return Checked(target, files, total)


def write_parquet(client: Client, source: Checked, *, progress: Progress | None = None) -> int:
    """Write the rows of checked files into their table; return how many. They are on disk then.

    Raises ImportIncomplete on any error, and on Ctrl-C: the rows written until then stay.
    """
    target, done = source.target, 0
    try:
        for rows in _told(_all(source.files, target), source.rows, progress):
            _write(client, target.table, rows)
            done += len(rows.keys)
        with suppress(NoLog):
            client.wait_durable()
    except (Exception, KeyboardInterrupt) as error:
        raise ImportIncomplete(target.table, done, source.rows, error) from error
    return done


def _target(client: Client, table: str) -> Target:
    info = client.describe_table(table)
    messages = read_rows(client, table, shards=[0])
    widths = (each.rows.shape[1] for each in messages if isinstance(each, RowBatch))
    width = next(widths)  # the first batch is empty and shows the width
    messages.close()
    return Target(table, info.dim, width, info.optimizer)


def _all(files: list[Path], target: Target) -> Iterator[Rows]:
    for each in files:
        yield from read(each, target)


def _told(batches: Iterator[Rows], total: int, progress: Progress | None) -> Iterator[Rows]:
    """Yield batches; report each once the next one is asked for."""
    done = 0
    for batch in batches:
        yield batch
        done += len(batch.keys)
        if progress is not None:
            progress(done, total)


def _write(client: Client, table: str, batch: Rows) -> None:
    """Write a batch; of equal keys the last row."""
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
