"""psctl export, import: rows as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from psclient import admin
from psclient.tools import export, importer
from psclient.tools.commands.shell import DEFAULT, Servers, app, bar, connected, summed


@app.command(name="export")
def export_(
    name: Annotated[str, typer.Argument(help="a table, or a checkpoint")],
    out: Annotated[
        Path, typer.Option(help="file; of a checkpoint without --table a directory of files")
    ],
    table: Annotated[str | None, typer.Option(help="of the checkpoint NAME")] = None,
    format: Annotated[str, typer.Option(help="parquet or safetensors")] = "parquet",
    servers: Servers = DEFAULT,
) -> None:
    """Write a table, or the tables of a checkpoint, to files that other programs read."""
    with connected(servers) as client:
        work: list[tuple[str, str | None, Path]]
        if table is not None:
            work = [(table, name, out)]
        elif any(each.name == name for each in client.list_tables()):
            work = [(name, None, out)]
        else:
            out.mkdir(parents=True, exist_ok=True)
            tables = admin.describe(client, name).rows
            work = [(t, name, out / f"{t.replace('/', '%2F')}.{format}") for t in tables]
        for each, stored, path in work:
            with bar(f"export {each}", unit="rows") as tell:
                rows = export.export(
                    client, each, path, checkpoint=stored, format=format, progress=summed(tell)
                )
            typer.echo(f"{path}: {rows:,} rows")


@app.command(name="import")
def import_(
    table: Annotated[str, typer.Argument(help="that exists")],
    parquet: Annotated[Path, typer.Option(help="with the columns key and embedding")],
    servers: Servers = DEFAULT,
) -> None:
    """Write the rows of a Parquet file into a table, over those that are there."""
    with connected(servers) as client, bar(f"import {parquet.name}", unit="rows") as tell:
        rows = importer.import_parquet(client, table, parquet, progress=summed(tell))
    typer.echo(f"{table}: {rows:,} rows")
