"""Import the rows of files into an existing table.

    parquet      columns key, embedding, state, step, frequency; a file, or a directory of files
    csv          columns key, embedding_0, embedding_1 and so on, step, frequency
    npy, npz     arrays of NumPy
    safetensors  tensors keys, embeddings, states, steps, frequencies, or one matrix
    torch        a file of torch.save: a tensor, or a state dict
    torchrec     the state dict of a model of TorchRec: a file, or a distributed checkpoint
    hps          a directory of HugeCTR
    tfra         a directory of TensorFlow Recommenders Addons
    dynamicemb   a directory of NVIDIA's DynamicEmb
    deeprec      a checkpoint of DeepRec

docs/models.md describes each kind. In a file without keys, the key of a row is its number plus an
offset. Optimizer state is read where the file names the table's optimizer or ``map`` names the
array; otherwise rows get the optimizer state of new rows, and ``Source.notes`` says why.

Values that cannot be stored exactly are refused: null, NaN, infinity, numbers too large for
float32, fractions. Existing rows of the same keys are replaced. If a key occurs several times, its
last row counts, in the order of the file names and then of the rows.

An import reads the files twice. The first pass checks everything and writes nothing. The second
pass writes the rows, and ends when they are on disk. If the second pass fails (ImportIncomplete),
the rows written so far stay, perhaps including a part of the current batch. Repeating the same
import completes it. With a journal it continues where the last one stopped, even if that was
killed; the first pass is then skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from psclient.calls import links
from psclient.client import Client
from psclient.errors import InvalidArgument, NoLog, PsError
from psclient.rows import RowBatch, read_rows, write_rows
from psclient.tools import kinds, locations
from psclient.tools.csvsource import csv
from psclient.tools.deeprec import deeprec
from psclient.tools.duplicates import Duplicates
from psclient.tools.incoming import Piece, Rows, Target, not_finite, refusal
from psclient.tools.journal import Journal, journal_of
from psclient.tools.kinds import Reader, Request
from psclient.tools.source import files_of, piece
from psclient.tools.torchfiles import torch, torchrec

Progress = Callable[[int, int], Any]  # called with (rows done, total rows)
Batch = tuple[int, int, Rows]  # (number of the piece, number in it of the first row, rows)
SAVE_ROWS = 1 << 20  # rows after which the journal is saved
SAVE_SECONDS = 10.0  # seconds after which it is saved, even if fewer rows were written
PROBED = 4096  # keys that are looked up before an import continues


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
class Source:
    """Files that fit a table by their names, dtypes and shapes. Their rows are not read yet.

    target  the table
    pieces  the files or arrays, in the order in which they will be written
    rows    number of rows in all pieces together
    notes   what will not be read, and why: one sentence each
    id      everything by which this import differs from others, for its journal
    """

    target: Target
    pieces: Sequence[Piece]
    rows: int
    notes: tuple[str, ...]
    id: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Result of ``count``: what an import would find. Nothing was written."""

    rows: int
    dim: int
    duplicates: int  # rows whose key occurred before
    first_duplicate: str | None  # where the first of them is
    not_finite: int  # rows with NaN, an infinity, or a number too large for float32
    first_not_finite: str | None  # where the first of them is


def open_source(
    client: Client,
    table: str,
    location: str | Path,
    *,
    kind: str | None = None,
    map: Mapping[str, str] | None = None,
    offset: int = 0,
) -> Source:
    """Find the rows to import, and check names, dtypes and shapes, without reading rows.

    location  file or directory: a local path, or a URL that fsspec understands
    kind      one of KINDS; None: by the end of the file's name
    map       {field: name in the file}, where the names in the file are not the expected ones
    offset    key of the first row of a file without keys

    Raises TableNotFound, and InvalidArgument with the file, the field and the rule.
    """
    location = str(location)
    kind = kind or _kind_of(location)
    if kind not in KINDS:
        raise InvalidArgument(f"'kind' must be one of {', '.join(KINDS)}, got {kind!r}")
    if not -(1 << 63) <= offset < 1 << 63:
        raise InvalidArgument(f"'offset' must be in -2^63..2^63-1, got {offset}")
    target = _target(client, table)
    request = Request(location, target, dict(map or {}), offset)
    pieces = KINDS[kind](request)
    why = sorted({each.state for each in pieces if each.state})
    notes = tuple(f"optimizer state is not imported: {each}" for each in why)
    files = [locations.identity(each) for each in locations.files_below(location)]
    files += [
        locations.identity(each)
        for name in request.map.values()
        if locations.is_file(each := locations.joined(locations.parent_of(location), name))
    ]
    servers = [each.where for each in links(client)]
    settings = (servers, table, target.dim, target.width, target.optimizer, kind, offset)
    return Source(
        target,
        pieces,
        sum(each.rows for each in pieces),
        notes,
        (*settings, sorted(request.map.items()), files),
    )


def import_rows(
    client: Client,
    table: str,
    location: str | Path,
    *,
    kind: str | None = None,
    map: Mapping[str, str] | None = None,
    offset: int = 0,
    progress: Progress | None = None,
    journal: Path | None = None,
) -> int:
    """Check files and import their rows into a table; return the number of rows.

    progress  called with (rows written, total rows)
    journal   directory for the file that lets a repeated import continue; None: the default one

    The other arguments are those of ``open_source``. Raises its errors; InvalidArgument for the
    first invalid row, with nothing written; and ImportIncomplete.
    """
    source = open_source(client, table, location, kind=kind, map=map, offset=offset)
    record = journal_of(journal, source.id)
    begun = resumed(client, source, record)
    if begun is None:
        check(source)
    return write(client, source, progress=progress, journal=record, begin=begun or (0, 0))


def check(source: Source, *, progress: Progress | None = None) -> None:
    """Read all rows and check them; write nothing. Raises InvalidArgument for the first bad one.

    progress  called with (rows checked, total rows)
    """
    for at, start, rows in _reporting(_batches(source), source.rows, progress):
        for row in not_finite(rows)[:1].tolist():
            raise refusal(source.pieces[at], start, rows, row)


def count(source: Source, *, progress: Progress | None = None) -> Report:
    """Read all rows and count those that an import would refuse or overwrite; write nothing.

    progress  called with (rows read, total rows)

    Raises InvalidArgument if a file has an error other than a number that is not finite.
    """
    total, bad, first = 0, 0, None
    with Duplicates() as seen:
        for at, start, rows in _reporting(_batches(source), source.rows, progress):
            seen.add(rows.keys)
            found = not_finite(rows)
            if first is None and len(found):
                first = str(refusal(source.pieces[at], start, rows, int(found[0])))
            bad += len(found)
            total += len(rows.keys)
        duplicates, again = seen.count()
    where = None if again is None else f"{_place(source, again[1])}: key {again[0]} occurs again"
    return Report(total, source.target.dim, duplicates, where, bad, first)


def resumed(client: Client, source: Source, journal: Journal) -> tuple[int, int] | None:
    """Return (piece, row) at which an earlier run of the same import stopped, or None.

    Looks up rows that the earlier run wrote last. If the servers lack one of them, or none of them
    is still as it was written, returns None, so that the import begins anew: the table was dropped
    and created anew, or servers without a data directory were restarted.
    """
    begun = journal.position()
    if begun is None or begun == (0, 0):
        return begun
    number, row = begun
    if number >= len(source.pieces) or row > source.pieces[number].rows:
        return None
    while row == 0 and number > 0:
        number -= 1
        row = source.pieces[number].rows
    last = next(source.pieces[number].read(max(0, row - PROBED)), None)
    if last is None or not len(last.keys):
        return None
    wanted = last.rows[: min(row, PROBED), : source.target.dim]
    found = client.table(source.target.table).pull_rows(last.keys[: len(wanted)])
    same = (found.embeddings == wanted).all(axis=1)
    return begun if bool(found.found.all() and same.any()) else None


def write(
    client: Client,
    source: Source,
    *,
    progress: Progress | None = None,
    journal: Journal | None = None,
    begin: tuple[int, int] = (0, 0),
) -> int:
    """Write the rows of a source to its table; return their number once they are on disk.

    progress  called with (rows written, total rows)
    journal   saved as rows are written, and removed at the end
    begin     (piece, row) at which to begin, as ``resumed`` returns it

    Raises ImportIncomplete on any error and on Ctrl-C; the rows written so far stay.
    """
    target = source.target
    done = sum(each.rows for each in source.pieces[: begin[0]]) + begin[1]
    saver = _Saver(client, journal, begin)
    try:
        for at, start, rows in _reporting(_batches(source, begin), source.rows, progress, done):
            for row in not_finite(rows)[:1].tolist():
                raise refusal(source.pieces[at], start, rows, row)
            _write(client, target.table, rows)
            done += len(rows.keys)
            saver.wrote(at, start + len(rows.keys), len(rows.keys))
        with suppress(NoLog):
            client.wait_durable()
    except (Exception, KeyboardInterrupt) as error:
        raise ImportIncomplete(target.table, done, source.rows, error) from error
    if journal is not None:
        journal.remove()
    return done


class _Saver:
    """Saves the journal of a running import from time to time."""

    def __init__(self, client: Client, journal: Journal | None, begin: tuple[int, int]) -> None:
        """Save ``begin``, the position (piece, row) at which the import begins."""
        self._client = client
        self._journal = journal
        self._rows, self._time = 0, time.monotonic()
        if journal is not None:
            journal.save(*begin)

    def wrote(self, number: int, row: int, rows: int) -> None:
        """Save the position (piece ``number``, ``row``) if many rows were written, or long ago.

        rows  number of rows that were written since the last call

        Before, waits until the rows written so far are on the servers' disks.
        """
        self._rows += rows
        due = self._rows >= SAVE_ROWS or time.monotonic() - self._time >= SAVE_SECONDS
        if self._journal is not None and due:
            with suppress(NoLog):
                self._client.wait_durable()
            self._journal.save(number, row)
            self._rows, self._time = 0, time.monotonic()


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
) -> Source:
    """Check every row of a Parquet file, or of a directory of them, for a table; write nothing.

    path      file, or directory with *.parquet files
    progress  called with (rows checked, total rows)

    Raises TableNotFound, and InvalidArgument with the file, the row, the column and the rule.
    """
    source = open_source(client, table, path, kind="parquet")
    check(source, progress=progress)
    return source


def write_parquet(client: Client, source: Source, *, progress: Progress | None = None) -> int:
    """Write the rows of checked files to their table; return their number once they are on disk.

    progress  called with (rows written, total rows)

    Raises ImportIncomplete on any error and on Ctrl-C; the rows written so far stay.
    """
    return write(client, source, progress=progress)


def parquet(request: Request) -> Sequence[Piece]:
    """A Parquet file, or a directory with *.parquet files."""
    request.require()
    if locations.is_url(request.location):
        found = [
            each for each in locations.files_below(request.location) if each.endswith(".parquet")
        ]
        files = found or [request.location]
    else:
        files = [str(each) for each in files_of(Path(request.location))]
    return [piece(each, request.target) for each in files]


def _kind_of(location: str) -> str:
    """Return the kind of a file by the end of its name. Raises InvalidArgument if it is unknown."""
    name = location.rstrip("/").rsplit("/", 1)[-1]
    suffix = name.rsplit(".", 1)[-1].lower() if "." in name else ""
    kind = {"pt": "torch", "pth": "torch"}.get(suffix, suffix)
    if kind not in KINDS:
        raise InvalidArgument(
            f"{location}: the name does not tell the kind of the files: say --from with one of"
            f" {', '.join(KINDS)}"
        )
    return kind


def _target(client: Client, table: str) -> Target:
    """Ask the servers for the dim, row width and optimizer of a table."""
    info = client.describe_table(table)
    messages = read_rows(client, table, shards=[0])
    widths = (each.rows.shape[1] for each in messages if isinstance(each, RowBatch))
    width = next(widths)  # the first batch is empty and shows the width
    messages.close()
    return Target(table, info.dim, width, info.optimizer)


def _place(source: Source, row: int) -> str:
    """Return where a row is. row: its number, counted over all pieces."""
    for each in source.pieces:
        if row < each.rows:
            return f"{each.label}: {each.place(row)}"
        row -= each.rows
    return f"row {row}"


def _batches(source: Source, begin: tuple[int, int] = (0, 0)) -> Iterator[Batch]:
    """Yield all rows in batches. begin: (piece, row) at which to begin."""
    for number in range(begin[0], len(source.pieces)):
        start = begin[1] if number == begin[0] else 0
        for rows in source.pieces[number].read(start):
            yield number, start, rows
            start += len(rows.keys)


def _reporting(
    batches: Iterator[Batch], total: int, progress: Progress | None, done: int = 0
) -> Iterator[Batch]:
    """Yield the batches; report progress when the caller asks for the next one.

    total  number of rows in all batches
    done   number of rows that were done before
    """
    for batch in batches:
        yield batch
        done += len(batch[2].keys)
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


KINDS: dict[str, Reader] = {
    "parquet": parquet,
    "csv": csv,
    "npy": kinds.npy,
    "npz": kinds.npz,
    "safetensors": kinds.safetensors,
    "torch": torch,
    "torchrec": torchrec,
    "hps": kinds.hps,
    "tfra": kinds.tfra,
    "dynamicemb": kinds.dynamicemb,
    "deeprec": deeprec,
}
