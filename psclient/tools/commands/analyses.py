"""psctl analyze, inspect: what a table holds, what is known of a key."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from psclient.errors import InvalidArgument
from psclient.strings import hash_keys
from psclient.tools import analysis, staged, terminal
from psclient.tools import history as histories
from psclient.tools import keys as known
from psclient.tools import page as pages
from psclient.tools import sink as sinks
from psclient.tools.commands.shell import DEFAULT, Servers, app, bar, connected


@app.command()
def analyze(
    table: str,
    checkpoint: Annotated[str | None, typer.Option(help="as this one has it")] = None,
    frequency: Annotated[
        list[int] | None, typer.Option(help="admission threshold to try; may be repeated")
    ] = None,
    ttl: Annotated[list[int] | None, typer.Option(help="step TTL to try; may be repeated")] = None,
    norm: Annotated[
        list[float] | None, typer.Option(help="norm threshold to try; may be repeated")
    ] = None,
    grace: Annotated[int, typer.Option(help="of the norm rule, in steps")] = 0,
    top: Annotated[int, typer.Option(help="keys in each list of extremes")] = 10,
    parquet: Annotated[Path | None, typer.Option(help="write a line for each row here")] = None,
    embeddings: Annotated[bool, typer.Option(help="with its embedding")] = False,
    html: Annotated[Path | None, typer.Option(help="write a page with plots here")] = None,
    history: Annotated[
        Path | None, typer.Option(help="remember this analysis here; the page shows the growth")
    ] = None,
    servers: Servers = DEFAULT,
) -> None:
    """Sum up a table, and try thresholds and TTLs on it; nothing is changed."""
    with connected(servers) as client, _whole(html) as page:
        if html is not None:
            pages.require()
        if history is not None:
            history.open("a").close()
            histories.history(history, table)
        unit = "bytes" if checkpoint else "rows"
        with sinks.ParquetSink(parquet) if parquet else nullcontext() as sink:
            with bar(f"analyze {table}", unit=unit) as tell:
                found = analysis.analyze(
                    client,
                    table,
                    checkpoint=checkpoint,
                    frequencies=frequency or (),
                    ages=ttl or (),
                    norms=norm or (),
                    grace=grace,
                    top=top,
                    sink=sink,
                    embeddings=embeddings,
                    progress=tell,
                )
            terminal.show(Console(highlight=False), found)
        moments = []
        if history is not None:
            histories.remember(history, found)
            moments = histories.history(history, table)
        if page is not None:
            page.write_text(pages.page(found, moments), encoding="utf-8")
    for path in (parquet, html):
        if path is not None:
            typer.echo(f"{path}: {path.stat().st_size:,} bytes")


@app.command(context_settings={"ignore_unknown_options": True})
def inspect(
    table: str,
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="64-bit, signed or not")],
    text: Annotated[bool, typer.Option("--text", help="keys are strings, to be hashed")] = False,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="show them")] = False,
    servers: Servers = DEFAULT,
) -> None:
    """Tell where keys live, or why they have no row; nothing is changed."""
    with connected(servers) as client:
        numbers = hash_keys(keys).tolist() if text else [_number(key) for key in keys]
        found = known.inspect(client, table, numbers, embeddings=embeddings)
        terminal.show_keys(Console(highlight=False), found, keys if text else ())


def _number(key: str) -> int:
    """A key as it was written, in decimal or as 0x..."""
    try:
        return int(key, 0)
    except ValueError:
        raise InvalidArgument(f"KEY must be a whole number, got {key!r}; or say --text") from None


@contextmanager
def _whole(path: Path | None) -> Iterator[Path | None]:
    """What to write a file to that takes its place if all goes well."""
    if path is None:
        yield None
        return
    beside = staged.beside(path)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
