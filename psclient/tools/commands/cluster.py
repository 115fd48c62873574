"""psctl tail: the changes of a cluster."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from psclient.errors import PsError
from psclient.subscriber import CONTENTS, STARTS, Change, Subscriber
from psclient.tools.commands.shell import DEFAULT, Servers, app


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
