"""Names of tables and checkpoints, for the completion of a shell.

The shell runs psctl when the user presses Tab. psctl then asks the cluster that --servers or
PSCTL_SERVERS names. If the cluster does not answer soon, there are no completions, and no error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Annotated, Any

import typer

from psclient import admin
from psclient.client import Client
from psclient.errors import PsError
from psclient.tools.commands.shell import SHARED, Session

SECONDS = 2.0  # time to wait for the cluster


def _completing(names: Callable[[Client], Iterable[str]]) -> Callable[..., list[str]]:
    """Return a function for ``autocompletion`` of typer: it returns names from the cluster.

    names  returns all names that a cluster has
    """

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        with suppress(Exception), _session(ctx).client(timeout=SECONDS) as client:
            return sorted(each for each in names(client) if each.startswith(incomplete))
        return []

    return complete


def _session(ctx: typer.Context) -> Session:
    """Return a session with the options that were typed before the word to complete."""
    typed: dict[str, Any] = {}
    for field, (annotation, default) in SHARED.items():
        variable = annotation.__metadata__[0].envvar
        typed[field] = ctx.params.get(field) or os.environ.get(variable or "") or default
    return Session(**typed)


tables = _completing(lambda client: [each.name for each in client.list_tables()])
checkpoints = _completing(lambda client: [each.name for each in admin.checkpoints(client)])


def _both(client: Client) -> list[str]:
    """Return the names of all tables and, if the servers store checkpoints, of all checkpoints."""
    names = [each.name for each in client.list_tables()]
    with suppress(PsError):
        names += [each.name for each in admin.checkpoints(client)]
    return names


both = _completing(_both)

TableName = Annotated[
    str, typer.Argument(metavar="TABLE", help="Name of the table.", autocompletion=tables)
]
