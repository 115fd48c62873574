"""psctl checkpoint, checkpoints, verify, restore."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from psclient import admin
from psclient.tools.commands.shell import DEFAULT, Servers, app, bar, connected


@app.command()
def checkpoint(
    name: Annotated[str, typer.Argument(help="of the new checkpoint")],
    incremental_from: Annotated[
        str | None, typer.Option(help="store only what changed since this one, and need it")
    ] = None,
    servers: Servers = DEFAULT,
) -> None:
    """Take a checkpoint of all tables, while trainers go on."""
    with connected(servers) as client, bar(f"checkpoint {name}") as tell:
        done = admin.checkpoint(client, name, parent=incremental_from, progress=tell)
    typer.echo(f"{name}: {sum(done.rows.values()):,} rows, {done.bytes:,} bytes")


@app.command()
def checkpoints(servers: Servers = DEFAULT) -> None:
    """List the checkpoints."""
    with connected(servers) as client:
        found = admin.checkpoints(client)
    table = Table("name", "taken", "builds on", "shards", "rows", "bytes", "problem")
    for each in found:
        table.add_row(
            each.name,
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.time)) if each.time else "",
            each.parent or "",
            str(each.shards or ""),
            f"{sum(each.rows.values()):,}" if each.shards else "",
            f"{each.bytes:,}" if each.shards else "",
            each.problem or "",
        )
    Console().print(table)


@app.command()
def verify(name: str, servers: Servers = DEFAULT) -> None:
    """Read every byte of a checkpoint, and of what it builds on."""
    with connected(servers) as client, bar(f"verify {name}") as tell:
        size = admin.verify(client, name, progress=tell)
    typer.echo(f"{name}: {size:,} bytes are as they were written")


@app.command()
def restore(
    name: Annotated[str, typer.Argument(help="of the checkpoint", show_default=False)] = "",
    replace: Annotated[bool, typer.Option(help="let go what is there")] = False,
    abort: Annotated[bool, typer.Option(help="give up a restore that was cut off")] = False,
    table: Annotated[str | None, typer.Option(help="only this table, as another one")] = None,
    into: Annotated[str | None, typer.Option(help="the other table")] = None,
    servers: Servers = DEFAULT,
) -> None:
    """Make the cluster what a checkpoint holds; or fill one table from a table in it."""
    if (table is None) != (into is None) or bool(name) == abort:
        raise typer.BadParameter("NAME, NAME --table T --into T2, or --abort")
    with connected(servers) as client:
        if abort:
            admin.abort_restore(client)
            return
        with bar(f"restore {name}") as tell:
            if table is not None and into is not None:
                rows = admin.warm_start(client, name, table, into, replace=replace, progress=tell)
            else:
                rows = admin.restore(client, name, replace=replace, progress=tell)
    typer.echo(f"{name}: {rows:,} rows")
