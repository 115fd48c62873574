"""psctl evict: the tables of a cluster."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from psclient.tools.commands.shell import DEFAULT, Servers, app, connected


@app.command()
def evict(
    table: str,
    dry_run: Annotated[bool, typer.Option(help="only count the rows that would leave")] = False,
    servers: Servers = DEFAULT,
) -> None:
    """Evict the rows of a table that are to leave by its rules, now."""
    with connected(servers) as client:
        held = client.describe_table(table)
        evicted = client.evict(table, dry_run=dry_run)
    if not held.eviction:
        typer.echo(f"{table}: no rule for eviction, {held.rows:,} rows stay")
        return
    shown = Table("cause", "rows that would leave" if dry_run else "rows evicted", "share")
    for column in shown.columns[1:]:
        column.justify = "right"
    gone = sum(evicted.values())
    for cause, rows in sorted(evicted.items()):
        shown.add_row(cause, f"{rows:,}", f"{rows / max(held.rows, 1):.1%}")
    shown.add_section()
    shown.add_row("together", f"{gone:,}", f"{gone / max(held.rows, 1):.1%}")
    shown.add_row("of rows", f"{held.rows:,}", "")
    Console().print(shown)
