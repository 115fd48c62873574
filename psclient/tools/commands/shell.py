"""What all commands of psctl share: the options, a connection, a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich import filesize
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from psclient.client import Client
from psclient.errors import PsError

DEFAULT = "127.0.0.1:7000"
Servers = Annotated[
    str,
    typer.Option(envvar="PSCTL_SERVERS", help="host:port of every shard, in order, with commas"),
]

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def _group() -> None:
    """Look at a cluster from outside."""


@contextmanager
def connected(servers: str) -> Iterator[Client]:
    """A client; what it raises ends the command with a message."""
    try:
        with Client([each.strip() for each in servers.split(",")]) as client:
            yield client
    except (PsError, OSError) as error:
        typer.echo(f"psctl: {error}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def bar(what: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """A progress bar, to be told what is done and how much there is (0: unknown)."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[amount]}"),
    )
    start, console = time.monotonic(), Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None, amount="")

        def tell(done: int, total: int) -> None:
            amount = _amount(done, total, unit, time.monotonic() - start)
            total = max(done, total, 1) if total else 0
            progress.update(task, completed=done, total=total or None, amount=amount)

        yield tell
        progress.update(task, completed=1, total=1)  # full, also if there was nothing to tell


def _amount(done: int, total: int, unit: str, seconds: float) -> str:
    """How much of how much, and how fast."""
    speed = int(done / seconds) if seconds else 0
    if unit != "bytes":
        return f"{done:,} {unit}, {speed:,} {unit}/s"
    whole = f" of {filesize.decimal(total)}" if total > done else ""
    return f"{filesize.decimal(done)}{whole}, {filesize.decimal(speed)}/s"


def summed(tell: Callable[[int, int], None]) -> Callable[[int], None]:
    """For work that tells how much more is done."""
    done = 0

    def more(size: int) -> None:
        nonlocal done
        done += size
        tell(done, 0)

    return more
