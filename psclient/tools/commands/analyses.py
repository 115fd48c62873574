"""psctl analyze, inspect: statistics of a table, states of keys."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from psclient.errors import InvalidArgument
from psclient.strings import hash_keys
from psclient.tools import analysis, terminal
from psclient.tools import keys as known
from psclient.tools import page as pages
from psclient.tools import sink as sinks
from psclient.tools.arrow import key_type
from psclient.tools.commands.rows import Keys, KeysOption
from psclient.tools.commands.shell import DEFAULT, Servers, app, bar, connected
from psclient.tools.history import append_history, read_history
from psclient.tools.staged import staged_file

TableName = Annotated[str, typer.Argument(metavar="TABLE", help="Name of the table.")]


@app.command()
def analyze(
    table: TableName,
    checkpoint: Annotated[
        str | None, typer.Option(help="Analyze the table in this checkpoint, not the live table.")
    ] = None,
    frequency: Annotated[
        list[int] | None,
        typer.Option(
            help="Report exactly how many rows this admission threshold would refuse, besides the"
            " built-in thresholds; may be repeated."
        ),
    ] = None,
    ttl: Annotated[
        list[int] | None,
        typer.Option(
            help="Report exactly how many rows a TTL of this many steps would evict, besides the"
            " built-in TTLs; may be repeated."
        ),
    ] = None,
    norm: Annotated[
        list[float] | None,
        typer.Option(
            help="Report exactly how many rows this threshold of the norm rule would evict,"
            " besides the built-in thresholds; may be repeated."
        ),
    ] = None,
    grace: Annotated[
        int,
        typer.Option(
            help="Grace period of the norm rule: number of steps after a push during which the"
            " row is not evicted."
        ),
    ] = 0,
    top: Annotated[
        int,
        typer.Option(
            help="Maximum number of keys in the lists of the most and least frequent keys and of"
            " the largest and smallest norms, up to 1000."
        ),
    ] = 10,
    parquet: Annotated[
        Path | None,
        typer.Option(
            help="Write key, frequency, step, version, norm and tier of every row to this Parquet"
            " file."
        ),
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Write embeddings to the Parquet file too.")
    ] = False,
    keys: KeysOption = Keys.UINT64,
    html: Annotated[
        Path | None, typer.Option(help="Write a report with plots to this HTML file.")
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(
            help="Append the main results to this file. The HTML report plots all analyses in"
            " this file over time."
        ),
    ] = None,
    servers: Servers = DEFAULT,
) -> None:
    """Show statistics of a table, and the effect of other rules.

    Prints sizes, frequencies, ages and norms. Changes nothing in the cluster. If the files of
    --parquet and --html exist, they are replaced.
    """
    with connected(servers) as client, staged_file(html) if html else nullcontext() as page:
        if html is not None:
            pages.require()
        if history is not None:
            history.open("a").close()
            read_history(history, table)
        unit = "bytes" if checkpoint else "rows"
        with sinks.ParquetSink(parquet, keys=keys) if parquet else nullcontext() as sink:
            with bar(f"analyze {table}", unit=unit) as show:
                result = analysis.analyze(
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
                    progress=show,
                )
            terminal.show(Console(highlight=False), result, keys=key_type(keys))
        moments = []
        if history is not None:
            append_history(history, result)
            moments = read_history(history, table)
        if page is not None:
            page.write_text(pages.page(result, moments, keys=key_type(keys)), encoding="utf-8")
    for path in (parquet, html):
        if path is not None:
            typer.echo(f"{path}: {path.stat().st_size:,} bytes")


@app.command(context_settings={"ignore_unknown_options": True})
def inspect(
    table: TableName,
    keys: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY...", help="Keys: decimal or hexadecimal (0x...) numbers in -2^63..2^64-1."
        ),
    ],
    text: Annotated[
        bool,
        typer.Option("--text", help="Keys are strings: hash them, as psclient.hash_keys does."),
    ] = False,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Show the embeddings of the rows.")
    ] = False,
    servers: Servers = DEFAULT,
) -> None:
    """Show for each key where its row is, or why it has no row. Changes nothing."""
    with connected(servers) as client:
        numbers = hash_keys(keys).tolist() if text else [_number(key) for key in keys]
        infos = known.inspect(client, table, numbers, embeddings=embeddings)
        terminal.show_keys(Console(highlight=False), infos, keys if text else ())


def _number(key: str) -> int:
    """Parse a decimal or hexadecimal key."""
    try:
        return int(key, 0)
    except ValueError:
        raise InvalidArgument(
            f"KEY must be an integer, got {key!r}; use --text for strings"
        ) from None
