"""The command ``psctl``: look at a cluster from outside."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from psclient import admin, analysis, export, report
from psclient.client import Client
from psclient.errors import InvalidArgument, PsError
from psclient.strings import hash_keys
from psclient.subscriber import CONTENTS, STARTS, Change, Subscriber

DEFAULT = "127.0.0.1:7000"
Servers = Annotated[
    str,
    typer.Option(envvar="PSCTL_SERVERS", help="host:port of every shard, in order, with commas"),
]

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def _group() -> None:
    """Look at a cluster from outside."""


@app.command()
def tail(
    table: Annotated[list[str] | None, typer.Option(help="only this one; may be repeated")] = None,
    start: Annotated[str, typer.Option(help=f"one of {', '.join(STARTS)}")] = "latest",
    content: Annotated[str, typer.Option(help=f"one of {', '.join(CONTENTS)}")] = "values",
    coalesce_ms: Annotated[int, typer.Option(help="newest values within so many ms")] = 0,
    keys: Annotated[int, typer.Option(help="keys shown of a change")] = 4,
    progress: Annotated[bool, typer.Option(help="show progress messages too")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
    limit: Annotated[int, typer.Option(help="end after so many changes; 0: never")] = 0,
    servers: Servers = DEFAULT,
) -> None:
    """Follow the changes of a cluster, one a line."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        with Subscriber(
            [each.strip() for each in servers.split(",")],
            tables=table or None,
            start=start,  # type: ignore[arg-type]
            content=content,  # type: ignore[arg-type]
            coalesce_ms=coalesce_ms,
        ) as changes:
            shown = 0
            for change in changes:
                if change.kind == "progress" and not progress:
                    continue
                if as_json:
                    print(json.dumps(_facts(change, keys)), flush=True)
                else:
                    console.print(_line(change, keys))
                shown += 1
                if shown == limit:
                    return
    except KeyboardInterrupt:
        return
    except PsError as error:
        typer.echo(f"psctl: {error}", err=True)
        raise typer.Exit(1) from None


def _facts(change: Change, keys: int) -> dict[str, object]:
    """What a change says, with its first keys and rows."""
    rows = change.rows[:keys].tolist() if change.rows is not None else None
    facts = {
        "shard": change.shard,
        "version": change.version,
        "kind": change.kind,
        "table": change.table,
        "count": len(change.keys),
        "keys": change.keys[:keys].tolist(),
        "rows": rows,
        "barrier": change.barrier,
        "cause": change.cause,
        "more": change.more,
        "behind": change.head - change.version,
        "time": change.time,
    }
    return {name: value for name, value in facts.items() if value not in ("", None)}


def _line(change: Change, keys: int) -> str:
    """A change as a line for the eye."""
    clock = time.strftime("%H:%M:%S", time.localtime(change.time)) if change.time else ""
    said = [f"[dim]{clock:8} shard {change.shard} {change.version:>10,}[/dim]"]
    said += [f"[bold]{change.kind:8}[/bold]"]
    said += [escape(word) for word in (change.table, change.barrier, change.cause) if word]
    if len(change.keys):
        some = " ".join(str(key) for key in change.keys[:keys].tolist())
        said.append(f"{len(change.keys):,} keys: {some}{' ...' * (len(change.keys) > keys)}")
    if change.more:
        said.append("[dim]more follows[/dim]")
    return "  ".join(said)


# ---- rows that leave


@app.command()
def evict(
    table: str,
    dry_run: Annotated[bool, typer.Option(help="only count the rows that would leave")] = False,
    servers: Servers = DEFAULT,
) -> None:
    """Evict the rows of a table that are to leave by its rules, now."""
    with _connected(servers) as client:
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


# ---- checkpoints


@app.command()
def checkpoint(
    name: Annotated[str, typer.Argument(help="of the new checkpoint")],
    incremental_from: Annotated[
        str | None, typer.Option(help="store only what changed since this one, and need it")
    ] = None,
    servers: Servers = DEFAULT,
) -> None:
    """Take a checkpoint of all tables, while trainers go on."""
    with _connected(servers) as client, _bar(f"checkpoint {name}") as tell:
        done = admin.checkpoint(client, name, base=incremental_from, progress=tell)
    typer.echo(f"{name}: {sum(done.rows.values()):,} rows, {done.bytes:,} bytes")


@app.command()
def checkpoints(servers: Servers = DEFAULT) -> None:
    """List the checkpoints."""
    with _connected(servers) as client:
        found = admin.checkpoints(client)
    table = Table("name", "taken", "builds on", "shards", "rows", "bytes", "problem")
    for each in found:
        table.add_row(
            each.name,
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.time)) if each.time else "",
            each.base or "",
            str(each.shards or ""),
            f"{sum(each.rows.values()):,}" if each.shards else "",
            f"{each.bytes:,}" if each.shards else "",
            each.problem or "",
        )
    Console().print(table)


@app.command()
def verify(name: str, servers: Servers = DEFAULT) -> None:
    """Read every byte of a checkpoint, and of what it builds on."""
    with _connected(servers) as client, _bar(f"verify {name}") as tell:
        size = admin.verify(client, name, progress=tell)
    typer.echo(f"{name}: {size:,} bytes are as they were written")


@app.command()
def restore(
    name: Annotated[str, typer.Argument(help="of the checkpoint", show_default=False)] = "",
    replace: Annotated[bool, typer.Option(help="let go what is there")] = False,
    abort: Annotated[bool, typer.Option(help="give up a restore that was cut off")] = False,
    table: Annotated[str | None, typer.Option(help="only this table, as another one")] = None,
    into: Annotated[str | None, typer.Option(help="the other table")] = None,
    servers: Servers = DEFAULT,
) -> None:
    """Make the cluster what a checkpoint holds; or fill one table from a table in it."""
    if (table is None) != (into is None) or bool(name) == abort:
        raise typer.BadParameter("NAME, NAME --table T --into T2, or --abort")
    with _connected(servers) as client:
        if abort:
            admin.abort_restore(client)
            return
        with _bar(f"restore {name}") as tell:
            if table is not None and into is not None:
                rows = admin.warm_start(client, name, table, into, replace=replace, progress=tell)
            else:
                rows = admin.restore(client, name, replace=replace, progress=tell)
    typer.echo(f"{name}: {rows:,} rows")


@app.command(name="export")
def export_(
    name: Annotated[str, typer.Argument(help="a table, or a checkpoint")],
    out: Annotated[
        Path, typer.Option(help="file; of a checkpoint without --table a directory of files")
    ],
    table: Annotated[str | None, typer.Option(help="of the checkpoint NAME")] = None,
    format: Annotated[str, typer.Option(help="parquet or safetensors")] = "parquet",
    servers: Servers = DEFAULT,
) -> None:
    """Write a table, or the tables of a checkpoint, to files that other programs read."""
    with _connected(servers) as client:
        work: list[tuple[str, str | None, Path]]
        if table is not None:
            work = [(table, name, out)]
        elif any(each.name == name for each in client.list_tables()):
            work = [(name, None, out)]
        else:
            out.mkdir(parents=True, exist_ok=True)
            tables = admin.describe(client, name).rows
            work = [(t, name, out / f"{t.replace('/', '%2F')}.{format}") for t in tables]
        for each, stored, path in work:
            with _bar(f"export {each}", unit="rows") as tell:
                rows = export.export(
                    client, each, path, checkpoint=stored, format=format, progress=_summed(tell)
                )
            typer.echo(f"{path}: {rows:,} rows")


@app.command(name="import")
def import_(
    table: Annotated[str, typer.Argument(help="that exists")],
    parquet: Annotated[Path, typer.Option(help="with the columns key and embedding")],
    servers: Servers = DEFAULT,
) -> None:
    """Write the rows of a Parquet file into a table, over those that are there."""
    with _connected(servers) as client, _bar(f"import {parquet.name}", unit="rows") as tell:
        rows = export.import_parquet(client, table, parquet, progress=_summed(tell))
    typer.echo(f"{table}: {rows:,} rows")


# ---- analysis


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
    with _connected(servers) as client, _whole(html) as page:
        if html is not None:
            report.require()
        if history is not None:
            history.open("a").close()
            analysis.history(history, table)
        unit = "bytes" if checkpoint else "rows"
        with analysis.ParquetSink(parquet) if parquet else nullcontext() as sink:
            with _bar(f"analyze {table}", unit=unit) as tell:
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
            report.show(Console(highlight=False), found)
        moments = []
        if history is not None:
            analysis.remember(history, found)
            moments = analysis.history(history, table)
        if page is not None:
            page.write_text(report.page(found, moments), encoding="utf-8")
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
    with _connected(servers) as client:
        numbers = hash_keys(keys).tolist() if text else [_number(key) for key in keys]
        found = analysis.inspect(client, table, numbers, embeddings=embeddings)
        report.show_keys(Console(highlight=False), found, keys if text else ())


def _number(key: str) -> int:
    """A key as it was written, in decimal or as 0x..."""
    try:
        return int(key, 0)
    except ValueError:
        raise InvalidArgument(f"KEY must be a whole number, got {key!r}; or say --text") from None


@contextmanager
def _connected(servers: str) -> Iterator[Client]:
    """A client; what it raises ends the command with a message."""
    try:
        with Client([each.strip() for each in servers.split(",")]) as client:
            yield client
    except (PsError, OSError) as error:
        typer.echo(f"psctl: {error}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def _whole(path: Path | None) -> Iterator[Path | None]:
    """What to write a file to that takes its place if all goes well."""
    if path is None:
        yield None
        return
    beside = analysis.beside(path)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _bar(what: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
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


def _summed(tell: Callable[[int, int], None]) -> Callable[[int], None]:
    """For work that tells how much more is done."""
    done = 0

    def more(size: int) -> None:
        nonlocal done
        done += size
        tell(done, 0)

    return more


def main() -> None:
    """Entry point of the ``psctl`` command."""
    app()
