"""psctl export, import: write tables to files and read them back."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

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
    """Types of the column of keys in a file."""

    UINT64 = "uint64"
    INT64 = "int64"


KeysOption = Annotated[
    Keys,
    typer.Option(
        help="Type of the keys in the file. Choose the type of the column that the file will be"
        " joined with."
    ),
]


@app.command(name="export")
def export_(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of a live table, or of a checkpoint.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="File to write; it is replaced if it exists. For a checkpoint without --table:"
            " directory to write one file per table to."
        ),
    ],
    table: Annotated[
        str | None, typer.Option(help="Export only this table of the checkpoint NAME.")
    ] = None,
    format: Annotated[Format, typer.Option(help="Format of the files.")] = Format.PARQUET,
    keys: KeysOption = Keys.UINT64,
    parts: Annotated[
        bool,
        typer.Option(
            "--parts",
            help="Write one file per shard, in parallel, to a new directory for each table.",
        ),
    ] = False,
    servers: Servers = DEFAULT,
) -> None:
    """Write tables to Parquet or safetensors files.

    NAME is a live table or a checkpoint. All tables of the checkpoint are written, or only the one
    that --table names. Changes nothing in the cluster. A file gets its name once it is complete.

    Use --keys int64 if the file will be joined with data that has int64 keys: pandas, polars and
    DuckDB compare uint64 with int64 by value, so that negative keys would never match.
    """
    with connected(servers) as client:
        suffix = "" if parts else f".{format}"
        for each, stored, path in _exports(client, name, table, out, suffix):
            with bar(f"export {each}", unit="rows") as show:
                rows = export.export(
                    client,
                    each,
                    path,
                    checkpoint=stored,
                    format=format,
                    keys=keys,
                    parts=parts,
                    progress=summed(show),
                )
            typer.echo(f"{path}: {rows:,} rows")


def _exports(
    client: Client, name: str, table: str | None, out: Path, suffix: str
) -> list[tuple[str, str | None, Path]]:
    """Return (table, checkpoint or None, path) for each file or directory to write."""
    if table is not None:
        return [(table, name, out)]
    if any(each.name == name for each in client.list_tables()):
        return [(name, None, out)]
    try:
        tables = admin.describe(client, name).rows
    except CheckpointNotFound:
        raise CheckpointNotFound(f"no table and no checkpoint {name!r}") from None
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(f"{out} cannot be created: {error.strerror}") from error
    return [(each, name, out / f"{each.replace('/', '%2F')}{suffix}") for each in tables]


@app.command(name="import")
def import_(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="Existing table to write to.")],
    parquet: Annotated[
        Path,
        typer.Option(
            help="Parquet file, or directory with *.parquet files, which are read in the order of"
            " their names."
        ),
    ],
    servers: Servers = DEFAULT,
) -> None:
    """Write rows from Parquet files, overwriting rows of equal keys.

    \b
    Columns (others are ignored):
      key        integers or decimal(p, 0)
      embedding  lists of dim floats, where dim is the table's
      state      optional: optimizer state, as written by psctl export
      step       optional: step of the last push (default: the table's largest step)
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
