"""Rows of CSV files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.errors import InvalidArgument, PsError
from psclient.rows import FREQUENCIES, STEPS
from psclient.tools import cells, locations
from psclient.tools.incoming import Piece, Rows, Target
from psclient.tools.kinds import Request

BLOCK_BYTES = 4 << 20  # bytes of a file that are parsed at a time


@dataclass(frozen=True, slots=True)
class CsvPiece:
    """The rows of one CSV file, whose first line has the names of the columns.

    columns  {field: name of its column}: key, and if the file has them step and frequency
    numbers  names of the dim columns with the embedding
    rows     number of rows
    state    why the optimizer state is not read; None: the table has none
    """

    location: str
    target: Target
    columns: dict[str, str]
    numbers: list[str]
    rows: int
    state: str | None

    @property
    def label(self) -> str:
        """Location of the file."""
        return self.location

    def read(self, start: int = 0) -> Iterator[Rows]:
        """Yield the rows from row ``start`` on, in batches. Numbers need not be finite."""
        at = 0
        with _opened(self.location) as (arrow, file):
            wanted = [*self.columns.values(), *self.numbers]
            types = {name: arrow.float32() for name in self.numbers}
            for batch in _parsed(file, wanted, types):
                skipped = min(max(start - at, 0), batch.num_rows)
                at += batch.num_rows
                if skipped < batch.num_rows:
                    some = batch.slice(skipped)
                    yield self._rows(arrow, some, at - some.num_rows)

    def _rows(self, arrow: Any, batch: Any, start: int) -> Rows:
        """Check and convert a batch. start: number in the file of the batch's first row."""
        try:
            integers = {}
            for name, bounds in (("step", STEPS), ("frequency", FREQUENCIES)):
                if name in self.columns:
                    column = self.columns[name]
                    cells.require_integers(arrow, column, batch[column].type)
                    integers[name] = cells.to_integers(arrow, column, batch[column], bounds)
            key = self.columns["key"]
            cells.require_keys(arrow, key, batch[key].type)
            return Rows(
                cells.to_keys(arrow, key, batch[key]),
                self._embeddings(batch),
                integers.get("step"),
                integers.get("frequency"),
            )
        except cells.BadColumn as error:
            where = "" if error.row is None else f"{self.place(start + error.row)}: "
            raise InvalidArgument(f"{where}{error}") from error

    def _embeddings(self, batch: Any) -> NDArray[np.float32]:
        """Return the embeddings of a batch, float32[n, dim]."""
        matrix = np.empty((batch.num_rows, len(self.numbers)), np.float32)
        for number, name in enumerate(self.numbers):
            if batch[name].null_count:
                row = int(batch[name].is_null().to_numpy(zero_copy_only=False).argmax())
                raise cells.BadColumn(name, "must not be null", row)
            matrix[:, number] = batch[name].to_numpy(zero_copy_only=False)
        return matrix

    def place(self, row: int) -> str:
        """Return the number of a row, as text."""
        return f"row {row} (counted from 0)"


def csv(request: Request) -> Sequence[Piece]:
    """A CSV file with a line of names: key, embedding_0, embedding_1, ..., step, frequency.

    ``map`` renames key, step and frequency. map["embedding"] is what the names of the columns with
    the numbers of an embedding begin with.
    """
    request.require("key", "embedding", "step", "frequency")
    target = request.target
    prefix = request.map.get("embedding", "embedding_")
    numbers = [f"{prefix}{i}" for i in range(target.dim)]
    rows = 0
    with _opened(request.location) as (_, file):
        names: list[str] = []
        for batch in _parsed(file, [], {}):
            names = batch.schema.names
            rows += batch.num_rows
    found = [name for name in names if name.startswith(prefix) and name[len(prefix) :].isdigit()]
    if sorted(found) != sorted(numbers):
        raise InvalidArgument(
            f"{request.location}: must have the columns {numbers[0]}..{numbers[-1]} (table"
            f" {target.table!r}, dim {target.dim}), got {len(found)} columns that begin with"
            f" {prefix!r}"
        )
    columns = {name: request.map.get(name, name) for name in ("key", "step", "frequency")}
    for name, column in list(columns.items()):
        if names.count(column) != 1:
            if name == "key" or name in request.map or names.count(column) > 1:
                raise InvalidArgument(
                    f"{request.location}: must have exactly one column {column!r}, got"
                    f" {names.count(column)}"
                )
            del columns[name]
    why = None if target.width == target.dim else "CSV files have none"
    return [CsvPiece(request.location, target, columns, numbers, rows, why)]


def _parsed(file: Any, columns: list[str], types: dict[str, Any]) -> Iterator[Any]:
    """Yield the record batches of a CSV file.

    columns  names of the columns to return; []: all
    types    {name: pyarrow type} of columns whose type is not guessed
    """
    from pyarrow import csv as reader

    with reader.open_csv(
        file,
        read_options=reader.ReadOptions(block_size=BLOCK_BYTES, use_threads=False),
        convert_options=reader.ConvertOptions(include_columns=columns, column_types=types),
    ) as batches:
        yield from batches


@contextmanager
def _opened(location: str) -> Iterator[tuple[Any, Any]]:
    """Open a CSV file during a block; yield (the module pyarrow, file).

    Turns an error of pyarrow in the block into InvalidArgument, and prefixes InvalidArgument with
    the location.
    """
    from psclient.tools.arrow import pyarrow

    arrow, _ = pyarrow()
    try:
        with locations.open_file(location) as file:
            yield arrow, file
    except InvalidArgument as error:
        text = str(error)
        raise InvalidArgument(
            text if text.startswith(location) else f"{location}: {text}"
        ) from error
    except PsError:
        raise
    except Exception as error:  # pyarrow may raise anything for a malformed file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidArgument(f"{location}: cannot be read as CSV: {reason}") from error
