"""psctl export, import: rows as files."""

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
    """Formats of files."""

    PARQUET = "parquet"
    SAFETENSORS = "safetensors"


class Keys(StrEnum):
    """Types of the column of keys."""

    UINT64 = "uint64"
    INT64 = "int64"


KeysOption = Annotated[
    Keys,
    typer.Option(help="Type of the keys: that of the column that the file is joined with."),
]


@app.command(name="export")
def export_(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Table, or checkpoint whose tables are exported.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="File to write. For a checkpoint without --table, a directory of one file per"
            " table. An existing file is replaced."
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
            help="Write one file per shard, in parallel, into a new directory for each table.",
        ),
    ] = False,
    servers: Servers = DEFAULT,
) -> None:
    """Write tables to Parquet or safetensors files.

    NAME is a table, or a checkpoint whose tables are all written unless --table names one. Nothing
    in the cluster changes. Files appear under their names when they are complete.

    Keys are 64 bits wide. Use --keys int64 if the data that the file is joined with has int64 keys:
    pandas, polars and DuckDB compare uint64 with int64 by value, so that negative keys never match.
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
    """Return what to export: table, checkpoint or None, path."""
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
    table: Annotated[
        str, typer.Argument(metavar="TABLE", help="Table to write to; it must exist.")
    ],
    parquet: Annotated[
        Path,
        typer.Option(help="Parquet file, or directory of *.parquet files that are read by name."),
    ],
    servers: Servers = DEFAULT,
) -> None:
    """Write the rows of Parquet files into a table. Rows of the same keys are overwritten.

    \b
    Columns (others are ignored):
      key        integers or decimal(p, 0)
      embedding  lists of floats, as long as the table's dim
      state      optional: optimizer state of an export
      step       optional: step of the last push (default: the table's step)
      frequency  optional: occurrences, 0..2^32-1 (default: 1)

    All files are checked before the first row is written. Exit status 1: nothing was written. Exit
    status 4: some rows are written and stay; repeat the command to complete the import.
    """
    with connected(servers) as client:
        with bar(f"check {parquet.name}", unit="rows") as checked:
            source = importer.check_parquet(client, table, parquet, progress=checked)
        with bar(f"import {parquet.name}", unit="rows") as written:
            rows = importer.write_parquet(client, source, progress=written)
    typer.echo(f"{table}: {rows:,} rows")
