"""psctl verify, repair: find damage of stored rows, and replace rows that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from psclient import admin
from psclient.client import Client
from psclient.tools.commands import completion
from psclient.tools.commands.completion import TableName
from psclient.tools.commands.exits import Exit
from psclient.tools.commands.output import plain
from psclient.tools.commands.progress import bar
from psclient.tools.commands.shell import Session, command
from psclient.tools.listing import listing, print_listing

OptionalName = Annotated[
    str,
    typer.Argument(
        metavar="[CHECKPOINT]",
        help="Name of the checkpoint. Default: verify the live rows on disk.",
        show_default=False,
        autocompletion=completion.checkpoints,
    ),
]


@command()
def verify(session: Session, name: OptionalName = "") -> None:
    """Check a checkpoint, or the live rows on disk, for damage.

    \b
      psctl verify monday   the checkpoint monday, and the checkpoints that it builds on
      psctl verify          all rows of all tables that are on the disks of the shards

    Reads every byte and compares all checksums. Changes nothing. If live rows are damaged, lists
    the damaged blocks (pieces of the file base/data.mdb); the exit status is then 1.
    """
    with session.client() as client:
        if not name:
            _verify_live(session, client)
            return
        with bar(f"verify {name}") as show:
            size = admin.verify(client, name, progress=show)
    session.show(
        {"checkpoint": name, "bytes": size, "damaged": []},
        lambda: typer.echo(f"{name}: complete and undamaged, {size:,} bytes"),
    )


def _verify_live(session: Session, client: Client) -> None:
    """Verify the rows of all tables on disk; print damaged blocks, and exit with 1 if any."""
    damaged: list[admin.DamagedBlock] = []
    for each in client.list_tables():
        with bar(f"verify {each.name}") as show:
            damaged += admin.verify_rows(client, each.name, progress=show)
    shown = [_place(each) for each in damaged]
    live = {"checkpoint": None, "bytes": None, "damaged": shown}
    session.show(live, lambda: _print_damaged(damaged))
    if damaged:
        raise typer.Exit(Exit.FAILED)


def _place(block: admin.DamagedBlock) -> dict[str, Any]:
    """Return which block is damaged, and how many of its rows are lost, for JSON."""
    found: dict[str, Any] = plain(block)
    del found["keys"]  # not asked for
    return found


def _print_damaged(damaged: Sequence[admin.DamagedBlock]) -> None:
    """Print damaged blocks as a list."""
    if not damaged:
        typer.echo("all rows on disk are undamaged")
        return
    columns = ("table<", "shard", "block", "rows", "lost rows", "problem<")
    lines = [
        (
            each.table,
            str(each.shard),
            str(each.number),
            f"{each.rows:,}",
            f"{each.lost_rows:,}",
            each.problem,
        )
        for each in damaged
    ]
    print_listing(listing(*columns), lines)


@command()
def repair(
    session: Session,
    table: TableName,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Checkpoint from which to take the rows that cannot be read.",
            autocompletion=completion.checkpoints,
        ),
    ] = None,
    delete_missing: Annotated[
        bool,
        typer.Option(
            "--delete-missing",
            help="Delete the rows that cannot be read and are not in the checkpoint.",
        ),
    ] = False,
) -> None:
    """Replace the rows of a table that are damaged on disk.

    \b
      psctl repair user --from monday                    take them from a checkpoint
      psctl repair user --from monday --delete-missing   and delete those that it does not have
      psctl repair user --delete-missing                 delete all of them

    Other rows do not change, and trainers go on. Rows from the checkpoint are as they were then. A
    deleted row begins anew with its next push. Exit status 4: some rows still cannot be read.
    """
    if checkpoint is None and not delete_missing:
        raise typer.BadParameter("expected --from CHECKPOINT, --delete-missing, or both")
    with session.client() as client, bar(f"repair {table}") as show:
        done = admin.repair(
            client, table, checkpoint=checkpoint, delete=delete_missing, progress=show
        )
    session.show(
        {"table": table} | plain(done) | {"left": done.left},
        lambda: typer.echo(
            f"{table}: {done.lost:,} rows could not be read; {done.restored:,} restored,"
            f" {done.deleted:,} deleted, {done.left:,} left"
        ),
    )
    if done.left:
        raise typer.Exit(Exit.INCOMPLETE)
