"""psctl doctor: find out what is wrong with a cluster, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from psclient.tools.commands.exits import Exit
from psclient.tools.commands.output import Output
from psclient.tools.commands.shell import Session, command
from psclient.tools.doctor import Finding, examine

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


@command()
def doctor(
    session: Session,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --output json.")] = False,
    timeout: Annotated[
        float, typer.Option(min=0.01, help="Maximum time to wait for each shard, in seconds.")
    ] = 10.0,
) -> None:
    """Find out what is wrong with the cluster, and what to do.

    Checks the names of the servers and how long their look-up takes, the state of each shard, the
    releases and the clocks; whether a limit is nearly reached, subscribers lag, a flush is overdue,
    or a certificate expires soon. Each shard checks its own memory limit, open files, processor,
    compiled kernels, data directory, disk, and how long a sync to disk takes.

    A warning means that something works, but not well. Exit status: 0 if there is no error, 3 if a
    shard is unreachable, 5 if you have no right to ask it, otherwise 1.
    """
    if as_json:
        session.output = Output.JSON
    found = examine(session.addresses, timeout=timeout, access=session.access)
    session.show(found, lambda: _show(found))
    wrong = [each for each in found if each.state == "error"]
    if any(each.found.startswith("unreachable: ") for each in wrong):
        raise typer.Exit(Exit.UNREACHABLE)
    if any(each.found.startswith("forbidden: ") for each in wrong):
        raise typer.Exit(Exit.NOT_PERMITTED)
    if wrong:
        raise typer.Exit(Exit.FAILED)


def _show(found: Sequence[Finding]) -> None:
    """Print the findings, errors first. Shards that found the same share a line."""
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    for column in ("state", "where", "check"):
        table.add_column(column, no_wrap=True)
    table.add_column("found", overflow="fold")
    checks, states = list(dict.fromkeys(each.check for each in found)), list(STYLES)[::-1]
    shards: dict[Finding, list[int | None]] = {}
    for each in sorted(found, key=lambda f: (states.index(f.state), checks.index(f.check))):
        shards.setdefault(replace(each, shard=None), []).append(each.shard)
    for each, numbers in shards.items():
        where = "cluster" if None in numbers else f"shard {', '.join(map(str, numbers))}"
        text = Text(each.found)
        if each.advice:
            text.append(f"\nWhat to do: {each.advice}", style="bold")
        table.add_row(Text(each.state, style=STYLES.get(each.state, "")), where, each.check, text)
    console.print(table)
    counts = {state: sum(each.state == state for each in found) for state in STYLES}
    total = f"{counts['error']} errors, {counts['warning']} warnings, {counts['ok']} checks are ok"
    console.print(Text(total, style="bold"))
