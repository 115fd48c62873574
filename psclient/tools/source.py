"""Read and check the rows of Parquet files, for one table.

``files_of`` lists the files, ``require`` checks a file by its footer, without reading rows, and
``read`` checks and returns the rows. Errors are InvalidArgument with the file, the row, the column
and the rule.

Memory is bounded, whatever a file contains. The lengths of lists are compared with the table's dim
before the lists are read: for fixed-size lists by their type, for others by the count of numbers in
the footer. Batches are limited in bytes. A row group that is large in memory must also be large in
the file, so that a small file cannot expand without limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from psclient.errors import InvalidArgument, PsError
from psclient.rows import FREQUENCIES, STEPS
from psclient.tools import cells, locations
from psclient.tools.arrow import GROUP_ROWS, optimizer_of, pyarrow
from psclient.tools.incoming import BATCH_BYTES, Rows, Target

BUFFER_BYTES = 1 << 20  # bytes of a column that are read from the file at a time
SMALL_GROUP = 256 << 20  # up to this size in memory, a row group is read to find an invalid row
LARGE_GROUP = 1 << 30  # above this size in memory, EXPANSION limits a column of a row group
EXPANSION = 100  # maximum ratio of size in memory to size in the file
NUMBER_BYTES = 8  # maximum size in memory of a number in a list


def files_of(path: Path) -> list[Path]:
    """Return the files to read: the file ``path``, or all *.parquet files below the directory
    ``path``, sorted by name.

    Files and directories whose names start with "." or "_" are skipped, because other programs keep
    their own files under such names. Raises InvalidArgument if there is no file.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InvalidArgument(
            f"{path} is not a file or a directory" if path.exists() else f"{path} does not exist"
        )
    found = sorted(
        each
        for each in path.rglob("*.parquet")
        if each.is_file() and not any(p[0] in "._" for p in each.relative_to(path).parts)
    )
    if not found:
        raise InvalidArgument(f"{path} contains no *.parquet file")
    return found


@dataclass(frozen=True, slots=True)
class ParquetPiece:
    """The rows of one Parquet file.

    location  path or URL of the file
    target    the table
    rows      number of rows
    state     why the optimizer state is not read; None: it is read, or the table has none
    """

    location: str
    target: Target
    rows: int
    state: str | None

    @property
    def label(self) -> str:
        """Location of the file."""
        return self.location

    def read(self, start: int = 0) -> Iterator[Rows]:
        """Yield the rows from row ``start`` on, in batches. Numbers need not be finite."""
        return read(self.location, self.target, start=start, finite=False)

    def place(self, row: int) -> str:
        """Return the number of a row, as text."""
        return f"row {row} (counted from 0)"


def piece(location: str, target: Target) -> ParquetPiece:
    """Return the rows of a file, after checking it as ``require`` does."""
    rows = require(location, target)
    with _opened(location) as (arrow, file):
        has_state = "state" in _lists(file, target, arrow)
    if has_state or target.width == target.dim:
        return ParquetPiece(location, target, rows, None)
    why = f"the file has none that fits the optimizer {target.optimizer!r}"
    return ParquetPiece(location, target, rows, why)


def require(path: Path | str, target: Target) -> int:
    """Check that a file can be imported, by its footer, without reading rows.

    Returns its number of rows. Raises InvalidArgument if the type of a column is wrong, or if lists
    have the wrong length in a large row group.
    """
    with _opened(path) as (arrow, file):
        for name, length in _lists(file, target, arrow).items():
            _require_counts(file.metadata, name, length)
        return int(file.metadata.num_rows)


def read(
    path: Path | str, target: Target, *, start: int = 0, finite: bool = True
) -> Iterator[Rows]:
    """Yield the rows of a file in batches of limited size.

    start   number of the first row to yield
    finite  refuse NaN and infinities

    Checks each batch before it is yielded. Raises InvalidArgument for the first invalid row.
    """
    with _opened(path) as (arrow, file):
        lists = _lists(file, target, arrow)
        columns = ["key", *lists, *(set(file.schema_arrow.names) & {"step", "frequency"})]
        most = BATCH_BYTES // (NUMBER_BYTES * sum(lists.values()) + 24)
        size = max(1, min(GROUP_ROWS, most))
        groups, at = _groups_from(file.metadata, start)
        for batch in file.iter_batches(batch_size=size, columns=columns, row_groups=groups):
            skipped = min(max(start - at, 0), batch.num_rows)
            at += batch.num_rows
            if skipped < batch.num_rows or not batch.num_rows:
                some = batch.slice(skipped)
                yield _rows(arrow, some, lists, at - some.num_rows, finite=finite)
        if at != file.metadata.num_rows:
            raise InvalidArgument(
                f"the file has {at:,} rows, but its footer says {file.metadata.num_rows:,}"
            )


def _groups_from(metadata: Any, start: int) -> tuple[list[int], int]:
    """Return (the row groups that have row ``start`` and later rows, number of their first row).

    metadata  footer of the Parquet file
    """
    first, at = 0, 0
    while first < metadata.num_row_groups and at + metadata.row_group(first).num_rows <= start:
        at += metadata.row_group(first).num_rows
        first += 1
    return list(range(first, metadata.num_row_groups)), at


def _rows(arrow: Any, batch: Any, lists: dict[str, int], start: int, *, finite: bool) -> Rows:
    """Check and convert a batch of a Parquet file. Raises InvalidArgument for an invalid row.

    arrow   the module pyarrow
    batch   pyarrow record batch
    lists   {name: length} of the columns of lists
    start   index in the file of the batch's first row
    finite  refuse NaN and infinities
    """
    names = batch.schema.names
    try:
        matrices = [
            cells.to_matrix(name, batch[name], n, finite=finite) for name, n in lists.items()
        ]
        integers = {
            name: cells.to_integers(arrow, name, batch[name], bounds)
            for name, bounds in (("step", STEPS), ("frequency", FREQUENCIES))
            if name in names
        }
        return Rows(
            cells.to_keys(arrow, "key", batch["key"]),
            matrices[0] if len(matrices) == 1 else np.concatenate(matrices, axis=1),
            integers.get("step"),
            integers.get("frequency"),
        )
    except cells.BadColumn as error:
        where = "" if error.row is None else f"row {start + error.row} (counted from 0): "
        raise InvalidArgument(f"{where}{error}") from error


def _lists(file: Any, target: Target, arrow: Any) -> dict[str, int]:
    """Check the types of the columns; return {name: length} of the columns of lists to read.

    The columns are "embedding" and, if the file has state of the table's optimizer, "state".
    Raises InvalidArgument if a column is missing, repeated or of a wrong type.

    file   ParquetFile
    arrow  the module pyarrow
    """
    schema = file.schema_arrow
    for name in ("key", "embedding", "state", "step", "frequency"):
        count = schema.names.count(name)
        if count > 1 or (count == 0 and name in ("key", "embedding")):
            raise InvalidArgument(f"must have exactly one column {name!r}, got {count}")
    lists = {"embedding": target.dim}
    state = target.width - target.dim
    if state and "state" in schema.names and optimizer_of(schema.metadata) == target.optimizer:
        lists["state"] = state
    try:
        cells.require_keys(arrow, "key", schema.field("key").type)
        for name, length in lists.items():
            cells.require_lists(arrow, name, schema.field(name).type, length)
        for name in {"step", "frequency"} & set(schema.names):
            cells.require_integers(arrow, name, schema.field(name).type)
    except cells.BadColumn as error:
        raise InvalidArgument(f"{error} (table {target.table!r}, dim {target.dim})") from error
    return lists


def _require_counts(metadata: Any, name: str, length: int) -> None:
    """Check by the footer that each large row group has ``length`` numbers per row.

    metadata  footer of the Parquet file
    name      name of the column of lists

    Small row groups are not checked here: ``read`` finds a wrong length and can report its row.
    """
    [leaf] = [
        i
        for i in range(metadata.num_columns)
        if metadata.schema.column(i).path.split(".")[0] == name
        and metadata.schema.column(i).max_repetition_level == 1
    ]
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunk, rows = group.column(leaf), group.num_rows
        size = NUMBER_BYTES * max(chunk.num_values, rows * length)
        where = f"row group {number}: column {name!r}"
        if size > SMALL_GROUP and chunk.num_values != rows * length:
            raise InvalidArgument(
                f"{where} must contain {length} numbers per row, got"
                f" {chunk.num_values:,} numbers in {rows:,} rows"
            )
        if size > LARGE_GROUP and size > EXPANSION * chunk.total_uncompressed_size:
            raise InvalidArgument(
                f"{where} expands from {chunk.total_uncompressed_size:,} to {size:,} bytes;"
                " write the file with smaller row groups"
            )


@contextmanager
def _opened(path: Path | str) -> Iterator[tuple[Any, Any]]:
    """Open a Parquet file during a block; yield (the module pyarrow, ParquetFile).

    path  local path, or URL

    Turns an error of pyarrow in the block into InvalidArgument, and prefixes InvalidArgument with
    the path. A different PsError is not changed.
    """
    arrow, parquet = pyarrow()
    source = locations.open_file(str(path)) if locations.is_url(str(path)) else path
    try:
        with parquet.ParquetFile(
            source, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        ) as file:
            yield arrow, file
    except InvalidArgument as error:
        raise InvalidArgument(f"{path}: {error}") from error
    except PsError:
        raise
    except Exception as error:  # pyarrow may raise anything for a malformed file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidArgument(f"{path}: cannot be read as Parquet: {reason}") from error
