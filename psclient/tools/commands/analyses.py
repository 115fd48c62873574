"""psctl analyze, inspect: show statistics of a table, and the states of keys."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from psclient.errors import InvalidArgument
from psclient.strings import hash_keys
from psclient.tools import analysis, terminal
from psclient.tools import keys as known
from psclient.tools import page as pages
from psclient.tools import sink as sinks
from psclient.tools.arrow import KeyType, key_type
from psclient.tools.commands import completion
from psclient.tools.commands.completion import TableName
from psclient.tools.commands.output import Output, plain
from psclient.tools.commands.progress import bar
from psclient.tools.commands.rows import Keys, KeysOption
from psclient.tools.commands.shell import Session, command
from psclient.tools.history import Moment, append_history, read_history
from psclient.tools.misses import as_json
from psclient.tools.staged import staged_file
from psclient.tools.summary import Analysis, RowList

CheckpointOption = Annotated[
    str | None,
    typer.Option(
        help="Name of a checkpoint: analyze the table in it, not the live table.",
        autocompletion=completion.checkpoints,
    ),
]
FrequencyOption = Annotated[
    list[int] | None,
    typer.Option(
        help="Admission threshold, a number of occurrences: report exactly how many rows it would"
        " have refused, in addition to the built-in thresholds. May be repeated."
    ),
]
TtlOption = Annotated[
    list[int] | None,
    typer.Option(
        help="Step TTL, a number of training steps: report exactly how many rows it would evict,"
        " in addition to the built-in TTLs. May be repeated."
    ),
]
NormOption = Annotated[
    list[float] | None,
    typer.Option(
        help="Threshold of the norm rule: report exactly how many rows it would evict, in addition"
        " to the built-in thresholds. May be repeated."
    ),
]
GraceOption = Annotated[
    int,
    typer.Option(
        help="Grace period of the norm rule: number of steps after a push during which the row is"
        " not evicted."
    ),
]
TopOption = Annotated[
    int,
    typer.Option(
        help="Maximum number of keys in each list, up to 1000. The lists show the most and least"
        " frequent keys, and the rows with the largest and smallest norms."
    ),
]
ParquetOption = Annotated[
    Path | None,
    typer.Option(
        help="Write key, frequency, step, version, norm and tier of every row to this Parquet file."
    ),
]
EmbeddingsOption = Annotated[
    bool, typer.Option("--embeddings", help="Write the embeddings to the Parquet file too.")
]
HtmlOption = Annotated[
    Path | None, typer.Option(help="Write a report with plots to this HTML file.")
]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Write the sizes of the tiers, and the miss rates for every size of host memory, to"
        " this JSON file.",
    ),
]
HistoryOption = Annotated[
    Path | None,
    typer.Option(
        help="Append the main results to this file. The HTML report plots the table's size over"
        " time from all analyses in this file."
    ),
]


@command()
def analyze(
    session: Session,
    table: TableName,
    checkpoint: CheckpointOption = None,
    frequency: FrequencyOption = None,
    ttl: TtlOption = None,
    norm: NormOption = None,
    grace: GraceOption = 0,
    top: TopOption = 10,
    parquet: ParquetOption = None,
    embeddings: EmbeddingsOption = False,
    keys: KeysOption = Keys.UINT64,
    html: HtmlOption = None,
    to_json: JsonOption = None,
    history: HistoryOption = None,
) -> None:
    """Show statistics of a table, and what rules would do to it.

    Prints sizes, frequencies, ages and norms, and how many rows admission and eviction rules with
    different thresholds would refuse or evict. Also prints how often pushed keys would miss their
    row in host memory, by the size of the memory. Changes nothing in the cluster. Existing files of
    --parquet, --html and --json are replaced.
    """
    shown = key_type(keys)
    with session.client() as client, staged_file(html) if html else nullcontext() as page:
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
            session.show(
                _facts(result, shown),
                lambda: terminal.show(Console(highlight=False), result, keys=shown),
            )
        moments = [] if history is None else _remembered(history, result)
        if page is not None:
            page.write_text(pages.page(result, moments, keys=shown), encoding="utf-8")
    if to_json is not None:
        to_json.write_text(json.dumps(as_json(result), indent=1), encoding="utf-8")
    for path in (parquet, html, to_json):
        if path is not None and session.output is Output.TEXT:
            typer.echo(f"{path}: {path.stat().st_size:,} bytes")


def _facts(result: Analysis, keys: KeyType) -> dict[str, Any]:
    """Return the fields of an analysis, its memory and its miss rates, for JSON.

    keys  type in which keys are shown
    """
    facts: dict[str, Any] = plain(result)
    for name, each in facts.items():
        if isinstance(getattr(result, name), RowList):
            each["keys"] = plain(getattr(result, name).keys.astype(keys))
    return facts | {"bytes": result.bytes, "misses": as_json(result)["misses"]}


def _remembered(history: Path, result: Analysis) -> list[Moment]:
    """Append an analysis to a history file; return all analyses of its table in the file."""
    append_history(history, result)
    return read_history(history, result.table)


@command(context_settings={"ignore_unknown_options": True})
def inspect(
    session: Session,
    table: TableName,
    keys: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY...",
            help="Keys: decimal or hexadecimal (0x...) integers in -2^63..2^64-1, or strings with"
            " --text.",
        ),
    ],
    text: Annotated[
        bool,
        typer.Option(
            "--text",
            help="The keys are strings: look up their hashes, as psclient.hash_keys computes them.",
        ),
    ] = False,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Show the embeddings of the rows.")
    ] = False,
) -> None:
    """Show where the rows of keys are, or why keys have no row.

    Changes nothing.
    """
    with session.client() as client:
        numbers = hash_keys(keys).tolist() if text else [_number(key) for key in keys]
        infos = known.inspect(client, table, numbers, embeddings=embeddings)
        session.show(
            [plain(each) | {"reason": each.reason} for each in infos],
            lambda: terminal.show_keys(Console(highlight=False), infos, keys if text else ()),
        )


def _number(key: str) -> int:
    """Parse a decimal or hexadecimal key. Raises InvalidArgument."""
    try:
        return int(key, 0)
    except ValueError:
        raise InvalidArgument(
            f"KEY must be an integer, got {key!r}; use --text for strings"
        ) from None
