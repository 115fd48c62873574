"""psctl checkpoint, checkpoints, restore, delete, prune: take and use checkpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from psclient import admin
from psclient.client import Client
from psclient.tools import figures
from psclient.tools.commands import completion
from psclient.tools.commands.output import Output, plain
from psclient.tools.commands.progress import bar
from psclient.tools.commands.shell import Session, command
from psclient.tools.listing import listing, print_listing

NewName = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Name of the checkpoint.")]
IncrementalOption = Annotated[
    str | None,
    typer.Option(
        help="Name of an earlier checkpoint: store only the changes since then. The new checkpoint"
        " builds on the earlier one and cannot be restored without it.",
        autocompletion=completion.checkpoints,
    ),
]
BarrierOption = Annotated[
    str | None,
    typer.Option(
        help="Name of a barrier: on all shards, the checkpoint then has exactly the changes before"
        " the next barrier of this name. A trainer places it (Client.barrier) after this command"
        " has reported that all shards wait for it."
    ),
]
BarrierTimeoutOption = Annotated[
    float,
    typer.Option(
        help="Seconds that the shards wait for --until-barrier. The command then fails, and no"
        " checkpoint is taken."
    ),
]
KeepOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of newest checkpoints to keep: afterwards delete all older ones, except those"
        " that a kept one builds on (see psctl prune).",
    ),
]


@command()
def checkpoint(
    session: Session,
    name: NewName,
    incremental_from: IncrementalOption = None,
    until_barrier: BarrierOption = None,
    barrier_timeout: BarrierTimeoutOption = 600.0,
    keep: KeepOption = None,
) -> None:
    """Take a checkpoint of all tables while training continues.

    \b
      psctl checkpoint monday                             each shard at a moment of its own
      psctl checkpoint monday --until-barrier epoch-3     all shards at the barrier epoch-3

    The servers store it under the URL in the field checkpoint_url of their configuration.
    """
    if incremental_from == "":
        raise typer.BadParameter(
            "--incremental-from must be the name of a checkpoint, got an empty name"
        )
    with session.client() as client, bar(f"checkpoint {name}") as show:
        done = admin.checkpoint(
            client,
            name,
            parent=incremental_from,
            until_barrier=until_barrier,
            barrier_timeout=barrier_timeout,
            on_ready=lambda: session.note(
                f"all shards wait for barrier {until_barrier}, at most {barrier_timeout:g} s"
            ),
            progress=show,
        )
        if session.output is Output.TEXT:  # at once: it is there even if the others stay
            typer.echo(f"{name}: {sum(done.rows.values()):,} rows, {done.bytes:,} bytes")
        deleted = [] if keep is None else admin.prune(client, keep)
    shown = plain(done) | {"deleted": deleted}
    session.show(shown, lambda: None if keep is None else _print_deleted(deleted, dry_run=False))


@command()
def checkpoints(session: Session) -> None:
    """List all checkpoints.

    If a checkpoint cannot be restored, the reason is printed below the list.
    """
    with session.client() as client:
        found = admin.checkpoints(client)
    session.show(found, lambda: _print_checkpoints(found))


def _print_checkpoints(found: Sequence[admin.CheckpointInfo]) -> None:
    """Print checkpoints as a list, and below it why some cannot be restored."""
    lines = [
        (
            escape(each.name),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.time)) if each.time else "-",
            escape(each.parent or "-"),
            str(each.shards or "-"),
            f"{sum(each.rows.values()):,}" if each.shards else "-",
            figures.size(each.bytes) if each.shards else "-",
        )
        for each in found
    ]
    console = Console(highlight=False)
    columns = ("checkpoint<", "taken<", "parent<", "shards", "rows", "size")
    print_listing(listing(*columns), lines)
    for each in found:
        if each.problem:
            problem = f"{escape(each.name)} cannot be restored: {escape(each.problem)}"
            console.print(problem, soft_wrap=True)


OptionalName = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Name of the checkpoint.",
        show_default=False,
        autocompletion=completion.checkpoints,
    ),
]
ReplaceOption = Annotated[
    bool,
    typer.Option(
        "--replace",
        help="Overwrite: existing tables are deleted. With --into, only the table --into is"
        " overwritten.",
    ),
]
AbortOption = Annotated[
    bool,
    typer.Option(
        "--abort",
        help="Undo an interrupted restore: bring back the tables as they were before it. Use"
        " --abort without CHECKPOINT.",
    ),
]
TableOption = Annotated[
    str | None,
    typer.Option(help="Restore only this table of the checkpoint. Requires --into."),
]
IntoOption = Annotated[
    str | None,
    typer.Option(
        help="Name of the table that receives the rows of --table. It is created if it does not"
        " exist. Other tables do not change."
    ),
]


@command()
def restore(
    session: Session,
    name: OptionalName = "",
    replace: ReplaceOption = False,
    abort: AbortOption = False,
    table: TableOption = None,
    into: IntoOption = None,
) -> None:
    """Restore all tables, or one table, from a checkpoint.

    \b
      psctl restore monday                          into a cluster without tables
      psctl restore monday --replace                delete all existing tables first
      psctl restore monday --table user --into new  only table user, into table new
      psctl restore --abort                         undo an interrupted restore

    A restore of all tables succeeds on all shards or on none. If it is interrupted, repeat the
    command, or undo it with --abort.
    """
    if (table is None) != (into is None) or bool(name) == abort:
        raise typer.BadParameter(
            "expected CHECKPOINT, or CHECKPOINT --table TABLE --into TABLE, or only --abort"
        )
    with session.client() as client:
        if abort:
            admin.abort_restore(client)
            session.show({"checkpoint": None, "table": None, "rows": None}, lambda: None)
            return
        rows = _restore(client, name, table, into, replace=replace)
    shown = {"checkpoint": name, "table": into, "rows": rows}
    session.show(shown, lambda: typer.echo(f"{name}: {rows:,} rows"))


def _restore(
    client: Client, name: str, table: str | None, into: str | None, *, replace: bool
) -> int:
    """Restore all tables of a checkpoint, or ``table`` into the table ``into``.

    replace  delete what is overwritten

    Returns the number of rows restored.
    """
    with bar(f"restore {name}") as show:
        if table is not None and into is not None:
            return admin.warm_start(client, name, table, into, replace=replace, progress=show)
        return admin.restore(client, name, replace=replace, progress=show)


DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Delete nothing; print what would be deleted.")
]


@command()
def delete(
    session: Session,
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Names of the checkpoints.",
            autocompletion=completion.checkpoints,
        ),
    ],
    dry_run: DryRun = False,
) -> None:
    """Delete the named checkpoints.

    Fails, and deletes nothing, if a checkpoint that is not named builds on one of them, or if one
    of them is being taken, verified, restored, analyzed or exported.
    """
    with session.client() as client:
        gone = admin.delete(client, *names, dry_run=dry_run)
    shown = {"deleted": gone, "dry_run": dry_run}
    session.show(shown, lambda: _print_deleted(gone, dry_run=dry_run))


@command()
def prune(
    session: Session,
    keep: Annotated[int, typer.Option(min=1, help="Number of newest checkpoints to keep.")],
    dry_run: DryRun = False,
) -> None:
    """Delete all checkpoints except the newest ones.

    Keeps the newest checkpoints, as many as --keep says, and the checkpoints that these build on.
    Incomplete and damaged checkpoints are not counted and not deleted.
    """
    with session.client() as client:
        gone = admin.prune(client, keep, dry_run=dry_run)
    shown = {"deleted": gone, "dry_run": dry_run}
    session.show(shown, lambda: _print_deleted(gone, dry_run=dry_run))


def _print_deleted(names: list[str], *, dry_run: bool) -> None:
    """Print the names of the checkpoints that were deleted, or with ``dry_run`` would be."""
    for name in names:
        typer.echo(f"{name}: {'would be deleted' if dry_run else 'deleted'}")
    if not names:
        typer.echo("nothing to delete")
