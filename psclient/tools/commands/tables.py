"""psctl tables, table, create, drop, evict: list, show, create, delete and clean up tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from psclient.client import Client
from psclient.errors import TableNotFound
from psclient.schema import TableInfo
from psclient.tools import figures
from psclient.tools.commands.completion import TableName
from psclient.tools.commands.shell import Session, command
from psclient.tools.listing import listing, print_listing
from psclient.tools.rules import parse_rule, parse_rules, rule_text
from psclient.tools.summary import GPU

NewName = Annotated[str, typer.Argument(metavar="TABLE", help="Name of the table.")]


@command()
def tables(session: Session) -> None:
    """List all tables, with their total sizes over all shards.

    A table that exists only on some shards is reported on stderr and not listed.
    """
    with session.client() as client:
        found, incomplete = client.list_tables(), client.incomplete_tables()
    _warn_incomplete(session, incomplete)
    session.show(found, lambda: _print_tables(found))


def _print_tables(found: Sequence[TableInfo]) -> None:
    """Print tables as a list."""
    columns = ("table<", "dim", "optimizer<", "rows", "memory", "admission<", "eviction<")
    lines = [
        (
            escape(each.name),
            str(each.dim),
            each.optimizer,
            f"{each.rows:,}",
            figures.size(each.bytes),
            each.admission,
            ", ".join(each.eviction) or "-",
        )
        for each in found
    ]
    print_listing(listing(*columns), lines)


def _warn_incomplete(session: Session, tables: Mapping[str, Sequence[int]]) -> None:
    """Warn on stderr about tables that exist only on some shards.

    tables  {name: numbers of the shards that have the table}
    """
    for name, shards in tables.items():
        session.note(
            f"psctl: table {name!r} exists only on shard {', '.join(map(str, shards))}, because a"
            " create, drop or restore was interrupted. Repeat that command to complete it (a"
            f" restore with --replace), or delete the table with psctl drop {name}"
        )


@command()
def table(session: Session, name: TableName) -> None:
    """Show all settings of a table, and its size on each shard."""
    with session.client() as client:
        info = client.describe_table(name)
    session.show(info, lambda: _print_table(info))


def _print_table(info: TableInfo) -> None:
    """Print the settings of a table, its size on each shard, and its tiers."""
    console, grid = Console(highlight=False), Table.grid(padding=(0, 2))
    for field, value in _fields(info):
        grid.add_row(f"[dim]{field}[/dim]", escape(value))
    console.print(grid)
    lines = [
        (str(shard), f"{rows:,}", figures.size(size), f"{version:,}")
        for shard, (rows, size, version) in enumerate(
            zip(info.shard_rows, info.shard_bytes, info.versions, strict=True)
        )
    ]
    console.print()
    print_listing(listing("shard", "rows", "memory", "version"), lines)
    console.print()
    columns = "tier<", "rows", "share", "size", "hits", "misses"
    print_listing(listing(*columns), _tiers(info))


def _tiers(info: TableInfo) -> list[tuple[str, ...]]:
    """Return a line for each tier: name, rows, share of all rows, size, hits, misses."""
    return [
        (
            f"{escape(name)} ({figures.storage(name, tier.on_disk)})",
            f"{tier.rows:,}",
            figures.percent(tier.rows / max(info.rows, 1)),
            figures.size(tier.bytes),
            f"{tier.hits:,}",
            "-" if tier.on_disk else f"{tier.misses:,}",
        )
        for name, tier in info.tiers.items()
    ]


def _moves(info: TableInfo) -> list[tuple[str, str]]:
    """Return what moved between the tiers, as (name, value), both as text."""
    used, cache = sum(tier.hits for tier in info.tiers.values()), info.cache
    gpu = []
    if GPU in info.tiers:
        rate = figures.percent(info.tiers[GPU].hits / used) if used else "-"
        moved = f"{cache.gpu_promotions:,}, {cache.gpu_demotions:,}"
        gpu = [("hit rate of GPU memory", rate), ("rows to, from GPU memory", moved)]
    if not any(tier.on_disk for tier in info.tiers.values()):
        return gpu
    hits = sum(tier.hits for tier in info.tiers.values() if not tier.on_disk)
    waited = f"{cache.warm_seconds / max(cache.warm_reads, 1) * 1e3:.3g} ms"
    return [
        *gpu,
        ("hit rate of memory", figures.percent(hits / used) if used else "-"),
        ("rows promoted, demoted", f"{cache.promotions:,}, {cache.demotions:,}"),
        ("rows flushed", f"{cache.flushed_rows:,}"),
        ("blocks flushed again", f"{cache.reflushed_blocks:,}"),
        ("waits for the disk", f"{cache.warm_reads:,}, mean {waited}"),
    ]


def _fields(info: TableInfo) -> list[tuple[str, str]]:
    """Return the settings and total sizes of a table as (name, value), both as text."""
    evictions = [rule_text(name, args) for name, args in info.eviction.items()]
    return [
        ("table", info.name),
        ("dim", str(info.dim)),
        ("optimizer", rule_text(info.optimizer, info.optimizer_args)),
        ("initializer", rule_text(info.initializer, info.initializer_args)),
        ("seed", str(info.seed)),
        ("serving default", f"{info.serving_default:g}"),
        ("durability", info.durability),
        ("admission", rule_text(info.admission, info.admission_args)),
        ("eviction", "\n".join(evictions) or "none"),
        ("max step ahead", f"{info.max_step_ahead:,}" if info.max_step_ahead else "no limit"),
        ("rows", f"{info.rows:,}"),
        ("memory", f"{figures.size(info.bytes)}, with index and counters"),
        ("waiting keys", f"{info.waiting:,}, counters {figures.size(info.counter_bytes)}"),
        *_moves(info),
        *_damage(info),
    ]


def _damage(info: TableInfo) -> list[tuple[str, str]]:
    """Return how much of the table is damaged on disk, as (name, value); [] if nothing is."""
    if not info.damaged_blocks:
        return []
    return [("damaged blocks", f"{info.damaged_blocks:,}, rows lost {info.lost_rows:,}")]


DimOption = Annotated[int, typer.Option(help="Length of the embeddings.", show_default=False)]
OptimizerOption = Annotated[
    str,
    typer.Option(
        help="Optimizer: sgd, momentum, adagrad, rowwise_adagrad, adagrad_decay, adam, adamw,"
        " adam_async, ftrl or group_ftrl; parameters after a colon, for example adam:lr=0.001."
    ),
]
LrOption = Annotated[
    float | None,
    typer.Option(
        help="Learning rate, instead of lr=... in --optimizer. Default: the optimizer's own."
    ),
]
InitializerOption = Annotated[
    str,
    typer.Option(
        help="Initial values of rows: zeros, constant, uniform, normal or truncated_normal;"
        " parameters after a colon, for example uniform:low=-0.1,high=0.1."
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(
        help="Seed of the initial values: with equal seeds a key gets equal initial values."
    ),
]
ServingDefaultOption = Annotated[
    float, typer.Option(help="Number that serving pulls return for keys without a row.")
]
DurabilityOption = Annotated[
    str,
    typer.Option(
        help="When the server acknowledges a push: applied (once applied in memory), log (once"
        " it survives a crash of the server) or fsync (once it survives a power loss)."
    ),
]
AdmissionOption = Annotated[
    str,
    typer.Option(
        help="Rule that decides which keys get a row: always, counter, sketch or probability;"
        " parameters after a colon."
    ),
]
EvictionOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Rule that decides which rows to evict: step_ttl, time_ttl, norm, capacity_lru or"
        " capacity_lfu; parameters after a colon. May be repeated. Default: no rule.",
        show_default=False,
    ),
]
MaxStepAheadOption = Annotated[
    int,
    typer.Option(
        help="Refuse a push whose training step exceeds the largest step pushed to the table so"
        " far by more than this number; 0: no limit."
    ),
]


@command()
def create(
    session: Session,
    name: NewName,
    dim: DimOption,
    optimizer: OptimizerOption = "adagrad",
    lr: LrOption = None,
    initializer: InitializerOption = "uniform",
    seed: SeedOption = 0,
    serving_default: ServingDefaultOption = 0.0,
    durability: DurabilityOption = "log",
    admission: AdmissionOption = "always",
    eviction: EvictionOption = None,
    max_step_ahead: MaxStepAheadOption = 100_000_000,
) -> None:
    """Create a table on all shards.

    Write the parameters of a rule after a colon; parameters that are omitted have defaults:

    \b
      psctl create user --dim 16 --optimizer adam:lr=0.001,beta1=0.9 \\
        --admission counter:threshold=3 --eviction step_ttl:steps=100000

    If the table exists with equal settings, nothing changes. If it exists with different settings,
    the command fails.
    """
    with session.client() as client:
        existed = any(each.name == name for each in client.list_tables())
        client.create_table(
            name,
            dim,
            lr=lr,
            seed=seed,
            serving_default=serving_default,
            durability=durability,  # type: ignore[arg-type]
            eviction=parse_rules("--eviction", eviction or ()),
            max_step_ahead=max_step_ahead,
            **_rule("optimizer", optimizer),
            **_rule("initializer", initializer),
            **_rule("admission", admission),
        )
        info = client.describe_table(name)
    shown = {"table": name, "created": not existed, "counter_bytes": info.counter_bytes}
    session.show(shown, lambda: _print_created(info, existed=existed))


def _print_created(info: TableInfo, *, existed: bool) -> None:
    """Print whether a table was created, and the memory of its sketch if it has one."""
    name = info.name
    typer.echo(f"{name}: exists with these settings" if existed else f"{name}: created")
    if info.admission == "sketch":
        typer.echo(f"{name}: its sketch takes {figures.size(info.counter_bytes)} of server memory")


def _rule(field: str, text: str) -> dict[str, Any]:
    """Parse the option ``--field``; return the arguments ``field`` and ``field_args``."""
    name, parameters = parse_rule(f"--{field}", text)
    return {field: name, f"{field}_args": parameters}


@command()
def drop(
    session: Session,
    name: TableName,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Delete a table and all its rows on all shards. Asks for confirmation.

    Checkpoints that contain the table are kept. To bring its rows back from a checkpoint:

    \b
      psctl restore CHECKPOINT --table TABLE --into TABLE
    """
    with session.client() as client:
        rows = _rows(client, name)
        if not yes:
            session.confirm(f"Delete table {name} with {rows:,} rows?")
        client.drop_table(name)
    shown = {"table": name, "rows": rows}
    session.show(shown, lambda: typer.echo(f"{name}: dropped, {rows:,} rows deleted"))


def _rows(client: Client, name: str) -> int:
    """Return the number of rows of a table on the shards that have it. Raises TableNotFound."""
    found = [shard[name] for shard in client._listed() if name in shard]
    if not found:
        raise TableNotFound(f"no table {name!r} on any shard; psctl tables lists all tables")
    return sum(each.stats.rows for each in found)


@command()
def evict(
    session: Session,
    table: TableName,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count the rows that would be evicted; delete none.")
    ] = False,
) -> None:
    """Evict now the rows that a table's eviction rules select.

    The servers also evict these rows in the background, but later. Use this command to evict
    without waiting.
    """
    with session.client() as client:
        info = client.describe_table(table)
        evicted = client.evict(table, dry_run=dry_run)
    shown = {"table": table, "rows_before": info.rows, "evicted": evicted, "dry_run": dry_run}
    session.show(shown, lambda: _print_evicted(info, evicted, dry_run=dry_run))


def _print_evicted(info: TableInfo, evicted: Mapping[str, int], *, dry_run: bool) -> None:
    """Print how many rows were evicted, or would be, for each cause.

    info  the table, before
    """
    if not info.eviction:
        typer.echo(f"{info.name}: no eviction rule; all {info.rows:,} rows stay")
        return
    shown = listing("cause<", "rows that would be evicted" if dry_run else "rows evicted", "share")
    lines = [
        (cause, f"{rows:,}", figures.percent(rows / max(info.rows, 1)))
        for cause, rows in sorted(evicted.items())
    ]
    gone = sum(evicted.values())
    lines.append(("total", f"{gone:,}", figures.percent(gone / max(info.rows, 1))))
    lines.append(("rows before", f"{info.rows:,}", ""))
    print_listing(shown, lines)
