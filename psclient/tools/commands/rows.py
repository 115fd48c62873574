"""psctl export, import: write tables to files and read them back."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from psclient import admin
from psclient.client import Client
from psclient.errors import CheckpointNotFound, InvalidArgument
from psclient.tools import export, importer
from psclient.tools.commands.shell import DEFAULT, Servers, app, bar, connected, summed


class Format(StrEnum):
    """File formats of an export."""

    PARQUET = "parquet"
    SAFETENSORS = "safetensors"


class Keys(StrEnum):
    """Types that the keys in a file can have."""

    UINT64 = "uint64"
    INT64 = "int64"


KeysOption = Annotated[
    Keys,
    typer.Option(
        help="Type of the keys in files: choose the type that the keys have in the data that you"
        " will join the file with."
    ),
]


NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a live table, or of a checkpoint.")
]
OutOption = Annotated[
    Path,
    typer.Option(
        help="File to write; it is replaced if it exists. To export all tables of a checkpoint:"
        " directory in which one file per table is written."
    ),
]
TableOption = Annotated[
    str | None,
    typer.Option(help="Export only this table of the checkpoint NAME. Default: all tables."),
]
FormatOption = Annotated[Format, typer.Option(help="Format of the files.")]
PartsOption = Annotated[
    bool,
    typer.Option(
        "--parts",
        help="Write a directory instead of a file for each table, with one file per shard. The"
        " files are written in parallel.",
    ),
]


@app.command(name="export")
def export_(
    name: NameArgument,
    out: OutOption,
    table: TableOption = None,
    format: FormatOption = Format.PARQUET,
    keys: KeysOption = Keys.UINT64,
    parts: PartsOption = False,
    servers: Servers = DEFAULT,
) -> None:
    """Write tables to Parquet or safetensors files.

    \b
      psctl export user --out user.parquet                   the live table user
      psctl export monday --table user --out user.parquet    table user of a checkpoint
      psctl export monday --out directory                    all tables of a checkpoint

    Changes nothing in the cluster. A file gets its name only once it is complete.

    Use --keys int64 if the file will be joined with data that has int64 keys: pandas, polars and
    DuckDB compare uint64 with int64 by value, so that negative keys would never match.
    """
    with connected(servers) as client:
        suffix = "" if parts else f".{format}"
        for each, stored, path in _exports(client, name, table, out, suffix):
            options = {"checkpoint": stored, "format": format, "keys": keys, "parts": parts}
            _export(client, each, path, **options)


def _export(client: Client, table: str, path: Path, **options: Any) -> None:
    """Export a table with a progress bar, and print its number of rows.

    options  arguments of ``export.export``
    """
    with bar(f"export {table}", unit="rows") as show:
        rows = export.export(client, table, path, progress=summed(show), **options)
    typer.echo(f"{path}: {rows:,} rows")


def _exports(
    client: Client, name: str, table: str | None, out: Path, suffix: str
) -> list[tuple[str, str | None, Path]]:
    """Return (table, checkpoint, path) for each file or directory to write.

    name    live table, or checkpoint
    table   table of the checkpoint; None: all tables
    out     value of --out
    suffix  suffix of the names of files in ``out``

    In the result, the checkpoint is None for a live table.
    """
    if table is not None:
        return [(table, name, out)]
    if any(each.name == name for each in client.list_tables()):
        return [(name, None, out)]
    try:
        tables = admin.describe(client, name).rows
    except CheckpointNotFound:
        raise CheckpointNotFound(f"no table and no checkpoint is named {name!r}") from None
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(f"{out} cannot be created: {error.strerror}") from error
    return [(each, name, out / f"{each.replace('/', '%2F')}{suffix}") for each in tables]


TargetArgument = Annotated[str, typer.Argument(metavar="TABLE", help="Existing table to write to.")]
ParquetOption = Annotated[
    Path,
    typer.Option(
        help="Parquet file to read, or directory: all *.parquet files below it are read, in the"
        " order of their paths."
    ),
]


@app.command(name="import")
def import_(table: TargetArgument, parquet: ParquetOption, servers: Servers = DEFAULT) -> None:
    """Import rows from Parquet files into an existing table.

    Existing rows of the same keys are replaced. Columns of the files (others are ignored):

    \b
      key        integers, or decimals without fraction
      embedding  lists of floats, as many as the table's dim
      state      optional: optimizer state, as written by psctl export
      step       optional: training step of the last push
                 (default: the largest step pushed to the table)
      frequency  optional: number of pushed occurrences, 0..2^32-1 (default: 1)

    All files are checked before the first row is written. Exit status 1: nothing was written. Exit
    status 4: some rows were written and stay; repeat the command to complete the import.
    """
    with connected(servers) as client:
        with bar(f"check {parquet.name}", unit="rows") as checked:
            source = importer.check_parquet(client, table, parquet, progress=checked)
        with bar(f"import {parquet.name}", unit="rows") as written:
            rows = importer.write_parquet(client, source, progress=written)
    typer.echo(f"{table}: {rows:,} rows")
