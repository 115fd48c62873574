"""Options, connection, exit statuses and progress bar of all psctl commands.

To add a command: decorate a function with ``app.command()`` in the file of its group. Run its body
inside ``connected``, which turns errors into one line on stderr and an exit status. The first line
of its docstring appears in the list of commands of ``psctl --help``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum, StrEnum
from typing import Annotated, NoReturn

import typer
from rich import filesize
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from psclient.addresses import checked_where, is_name
from psclient.client import Client
from psclient.errors import DeadlineExceeded, InvalidArgument, PsError, Unavailable
from psclient.tools.importer import ImportIncomplete
from psclient.tools.status import status

DEFAULT = "127.0.0.1:7000"
Servers = Annotated[
    str,
    typer.Option(
        envvar="PSCTL_SERVERS",
        help="Addresses of all shards, in the order of their numbers: HOST:PORT,HOST:PORT,... Or"
        " one NAME:PORT, if the DNS name has the addresses of all shards.",
    ),
]


class Output(StrEnum):
    """Formats in which a command can print its results."""

    TABLE = "table"
    JSON = "json"


OutputOption = Annotated[
    Output, typer.Option(help="Format of the output: a table to read, or JSON.")
]


class Exit(IntEnum):
    """Exit statuses, documented in ``psctl --help``."""

    OK = 0
    FAILED = 1
    USAGE = 2  # set by click
    UNREACHABLE = 3
    INCOMPLETE = 4
    INTERRUPTED = 130


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _group() -> None:
    """Operate a parameter-server cluster: tables, checkpoints, files, analyses.

    \b
    Exit status:
      0    success
      1    refused or failed; one line on stderr gives the reason
      2    invalid arguments
      3    a server is unreachable, or did not answer in time
      4    incomplete: part of the work was done and stays; repeat the command
      130  interrupted by Ctrl-C
    """


@contextmanager
def connected(servers: str) -> Iterator[Client]:
    """Connect to the shards and yield a client. Report errors in the block as ``reported`` does.

    servers  value of --servers

    If a shard is unreachable at the start, the command fails within seconds. If it becomes
    unreachable later, the client retries until its timeout, because a restore restarts the shards.
    """
    try:
        shards = checked_where(addresses(servers))
    except InvalidArgument as error:
        raise typer.BadParameter(str(error), param_hint="--servers") from None
    for each in status(shards):
        if each.state == "unreachable":
            fail(f"shard {each.shard} is unreachable: {each.problem}", Exit.UNREACHABLE)
    with reported(), Client(shards) as client:
        yield client


def addresses(servers: str) -> str | list[str]:
    """Return the value of --servers as ``Client`` takes it: one name, or a list of addresses."""
    listed = [each.strip() for each in servers.split(",")]
    return listed[0] if len(listed) == 1 and is_name(listed[0]) else listed


@contextmanager
def reported() -> Iterator[None]:
    """Turn an error in the block into one line on stderr and an exit status; end the process."""
    try:
        yield
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        fail("interrupted", Exit.INTERRUPTED)
    except (PsError, OSError) as error:
        fail(str(error), _status(error))


def fail(message: str, status: Exit) -> NoReturn:
    """Print one line to stderr and exit with ``status``."""
    typer.echo(f"psctl: {' '.join(message.split())}", err=True)
    raise typer.Exit(status) from None


def _status(error: Exception) -> Exit:
    """Return the exit status for an error."""
    if isinstance(error, ImportIncomplete):
        return Exit.INCOMPLETE
    if isinstance(error, (Unavailable, DeadlineExceeded)):
        return Exit.UNREACHABLE
    return Exit.FAILED


# ---- progress


@contextmanager
def bar(what: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr, if it is a terminal.

    what  text before the bar
    unit  unit of the numbers: "bytes", or a word such as "rows"

    Yields a function show(done, total) that updates the bar. If ``total`` is 0, it is unknown.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[amount]}"),
    )
    start, console = time.monotonic(), Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None, amount="")

        def show(done: int, total: int) -> None:
            amount = _amount(done, total, unit, time.monotonic() - start)
            total = max(done, total, 1) if total else 0
            progress.update(task, completed=done, total=total or None, amount=amount)

        yield show
        progress.update(task, completed=1, total=1)  # full, even if nothing was reported


def _amount(done: int, total: int, unit: str, seconds: float) -> str:
    """Format an amount and its average speed: "12 MB of 30 MB, 3 MB/s" or "12 rows, 3 rows/s"."""
    speed = int(done / seconds) if seconds else 0
    if unit != "bytes":
        return f"{done:,} {unit}, {speed:,} {unit}/s"
    whole = f" of {filesize.decimal(total)}" if total > done else ""
    return f"{filesize.decimal(done)}{whole}, {filesize.decimal(speed)}/s"


def summed(show: Callable[[int, int], None]) -> Callable[[int], None]:
    """Return a function that adds its argument to a sum and calls ``show(sum, 0)``."""
    done = 0

    def add(size: int) -> None:
        nonlocal done
        done += size
        show(done, 0)

    return add
