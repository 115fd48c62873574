"""psctl status, tail: show the states of a cluster's shards, and its changes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from psclient.changes import Change
from psclient.status import ShardStatus
from psclient.status import status as ask_shards
from psclient.subscriber import CONTENTS, STARTS, Subscriber
from psclient.tools import figures
from psclient.tools.commands import completion
from psclient.tools.commands.exits import Exit
from psclient.tools.commands.output import Output
from psclient.tools.commands.shell import Session, command
from psclient.tools.listing import listing, print_listing

BAD = "bold red"  # style of what is wrong
STYLES = {"ready": "green", "unreachable": BAD, "misplaced": BAD}


@command()
def status(
    session: Session,
    timeout: Annotated[
        float, typer.Option(min=0.01, help="Maximum time to wait for each shard, in seconds.")
    ] = 5.0,
) -> None:
    """Show the state of every shard.

    \b
    States:
      ready        The shard accepts requests.
      starting     It loads its data, and refuses requests until it is ready.
      restoring    It is being restored from a checkpoint, and refuses requests.
      draining     It is stopping, and refuses new requests.
      misplaced    Its address is at the wrong position in --servers, or it is one server too many.
      forbidden    You have no right to ask it.
      unreachable  It does not answer.

    \b
    Columns (- if the shard keeps no log):
      version    number of the shard's latest change
      durable    version up to which all changes are on disk
      log        size of the version log, which records all changes
      flush age  age of the oldest change that a restart would replay from the log

    \b
    Columns of clients:
      streams       open streams of clients
      subscribers   subscribers of changes; lag: age of the oldest change that one has not received
      lane clients  clients on this machine that use shared memory, and how much (docs/lane.md)

    Exit status: 0 if all shards are ready, 3 if a shard is unreachable, 5 if one is forbidden,
    otherwise 1.
    """
    shards = ask_shards(session.addresses, timeout=timeout, access=session.access)
    session.show(shards, lambda: _show_shards(shards))
    if any(each.state == "unreachable" for each in shards):
        raise typer.Exit(Exit.UNREACHABLE)
    if any(each.state == "forbidden" for each in shards):
        raise typer.Exit(Exit.NOT_PERMITTED)
    if not all(each.ready for each in shards):
        raise typer.Exit(Exit.FAILED)


def _show_shards(shards: Sequence[ShardStatus]) -> None:
    """Print the states of the shards."""
    console = Console(highlight=False)
    ready = sum(each.ready for each in shards)
    style = "bold" if ready == len(shards) else BAD
    console.print(Text(f"{ready} of {len(shards)} shards ready\n", style=style))
    print_listing(
        listing("shard", "address<", "state<", "release<", "uptime"),
        [
            (
                str(each.shard),
                each.address,
                Text(each.state, style=STYLES.get(each.state, "yellow")),
                each.release or "-",
                _duration(each.uptime_seconds),
            )
            for each in shards
        ],
    )
    answered = [each for each in shards if each.version is not None]
    if answered:
        console.print()
        columns = ["version", "durable", "tables", "rows", "memory", "log", "flush age"]
        lines = [_data(each) for each in answered]
        if any(each.gpu_budget_bytes for each in answered):
            columns.append("GPU memory")
            lines = [(*cells, _gpu(each)) for cells, each in zip(lines, answered, strict=True)]
        print_listing(listing("shard", *columns), lines)
        _show_clients(answered)
    problems = [
        f"shard {each.shard} is {each.state}: {each.problem}" for each in shards if each.problem
    ]
    for each in answered:
        if each.damaged_blocks:
            text = f"shard {each.shard} has {each.damaged_blocks} damaged blocks: see psctl verify"
            problems.append(text)
        if each.gpu_paused:
            problems.append(f"the GPU of shard {each.shard} is full: see psctl doctor")
    if problems:
        console.print()
    for problem in problems:
        console.print(Text(" ".join(problem.split()), style=BAD), soft_wrap=True)


def _show_clients(shards: Sequence[ShardStatus]) -> None:
    """Print how many clients, subscribers and lanes each shard has, if it says so."""
    lines = [
        (
            str(each.shard),
            str(each.live.streams),
            str(each.live.subscribers.subscribers) if each.live.HasField("subscribers") else "-",
            f"{each.live.subscribers.lag_seconds:.0f} s"
            if each.live.subscribers.subscribers
            else "-",
            str(each.live.lanes.clients) if each.live.HasField("lanes") else "off",
            figures.size(each.live.lanes.bytes) if each.live.HasField("lanes") else "-",
        )
        for each in shards
        if each.live is not None
    ]
    if lines:
        typer.echo()
        columns = ("streams", "subscribers", "lag", "lane clients", "lane memory")
        print_listing(listing("shard", *columns), lines)


def _data(shard: ShardStatus) -> tuple[str, ...]:
    """Return the cells for a shard in the table of data: version, tables, rows, memory, log."""
    used, budget = shard.memory_bytes or 0, shard.memory_budget_bytes or 0
    logged = shard.durable_version is not None
    return (
        str(shard.shard),
        f"{shard.version:,}",
        f"{shard.durable_version:,}" if logged else "-",
        str(shard.tables),
        f"{shard.rows:,}",
        f"{figures.size(used)} of {figures.size(budget)}",
        figures.size(shard.log_bytes or 0) if logged else "-",
        _duration(shard.flush_age_seconds),
    )


def _gpu(shard: ShardStatus) -> str:
    """Return the cell for the GPU memory of a shard: how much of its budget is used."""
    if not shard.gpu_budget_bytes:
        return "-"
    return f"{figures.size(shard.gpu_bytes or 0)} of {figures.size(shard.gpu_budget_bytes)}"


def _duration(seconds: float | None) -> str:
    """Format a duration in the largest suitable unit, such as "3 h"; "-" for None."""
    if seconds is None:
        return "-"
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


# ---- changes


TableOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Show only changes of this table; may be repeated for several tables.",
        autocompletion=completion.tables,
    ),
]
StartOption = Annotated[
    str,
    typer.Option(
        help=f"Where to start: {', '.join(STARTS)}. snapshot: show all current rows, then changes;"
        " earliest: start at the oldest change in the version log; latest: show only new changes."
    ),
]
ContentOption = Annotated[
    str,
    typer.Option(
        help=f"Contents of changed rows to receive: {', '.join(CONTENTS)}. values: embeddings;"
        " keys: only the keys; values_and_state: embeddings and optimizer state."
    ),
]
CoalesceOption = Annotated[
    int,
    typer.Option(
        min=0,
        help="Collect changes for this many milliseconds, then show only the newest value of each"
        " key; 0: show every change at once.",
    ),
]
KeysOption = Annotated[
    int, typer.Option(min=0, help="Maximum number of keys to show for each change.")
]
ProgressOption = Annotated[
    bool,
    typer.Option(
        "--progress", help="Also show the progress messages that shards send while nothing changes."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="The same as --output json.")]
LimitOption = Annotated[
    int, typer.Option(min=0, help="Stop after this many changes; 0: do not stop.")
]


@command()
def tail(
    session: Session,
    table: TableOption = None,
    start: StartOption = "latest",
    content: ContentOption = "values",
    coalesce_ms: CoalesceOption = 0,
    keys: KeysOption = 4,
    progress: ProgressOption = False,
    as_json: JsonOption = False,
    limit: LimitOption = 0,
) -> None:
    """Print the changes of a cluster as they happen, one per line.

    Stop it with Ctrl-C.
    """
    if as_json:
        session.output = Output.JSON
    with (
        suppress(KeyboardInterrupt),
        Subscriber(
            session.addresses,
            tables=table or None,
            start=start,  # type: ignore[arg-type]
            content=content,  # type: ignore[arg-type]
            coalesce_ms=coalesce_ms,
            **session.security,
        ) as changes,
    ):
        shown = (each for each in changes if progress or each.kind != "progress")
        _print_changes(session, islice(shown, limit or None), keys)


def _print_changes(session: Session, changes: Iterable[Change], keys: int) -> None:
    """Print each change as one line of text or JSON, with its first ``keys`` keys."""
    console = Console(highlight=False, soft_wrap=True)
    for change in changes:
        session.line(_facts(change, keys), partial(console.print, _line(change, keys)))


def _facts(change: Change, keys: int) -> dict[str, object]:
    """Convert a change to a dict for JSON. It has only the first ``keys`` keys and rows."""
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
    """Format a change as one line of rich markup. It has only the first ``keys`` keys."""
    clock = time.strftime("%H:%M:%S", time.localtime(change.time)) if change.time else ""
    words = [f"[dim]{clock:8} shard {change.shard} {change.version:>10,}[/dim]"]
    words += [f"[bold]{change.kind:8}[/bold]"]
    words += [escape(word) for word in (change.table, change.barrier, change.cause) if word]
    if len(change.keys):
        first = " ".join(str(key) for key in change.keys[:keys].tolist())
        words.append(f"{len(change.keys):,} keys: {first}{' ...' * (len(change.keys) > keys)}")
    if change.more:
        words.append("[dim]more follows[/dim]")
    return "  ".join(words)
