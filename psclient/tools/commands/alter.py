"""psctl alter: change settings of an existing table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from psclient.client import Client
from psclient.errors import InvalidArgument
from psclient.tools.commands.completion import TableName
from psclient.tools.commands.shell import Session, command
from psclient.tools.rules import parse_rule, parse_rules
from psproto import ps_pb2 as pb

FIXED = ("dim", "optimizer", "initializer", "seed")
NUMBERS = {"lr": float, "serving_default": float, "max_step_ahead": int}


@command()
def alter(
    session: Session,
    name: TableName,
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="FIELD=VALUE...",
            help="Settings to change, with their new values.",
            show_default=False,
        ),
    ],
) -> None:
    """Change settings of a table on all shards. Its rows stay.

    \b
      lr=NUMBER               learning rate of pushes that specify none
      serving_default=NUMBER  number that serving pulls return for keys without a row
      durability=LEVEL        durability of pushes that specify none: applied, log, fsync
                              (see psctl create --help)
      admission=RULE          rule that decides which keys get a row (see psctl create --help)
      eviction=RULE           rule that decides which rows to evict (see psctl create --help);
                              may be repeated; the given rules replace all eviction rules
                              of the table; eviction=none removes all
      max_step_ahead=STEPS    refuse a push whose step exceeds the table's largest step
                              by more than STEPS; 0: no limit

    For example: psctl alter user lr=0.01 admission=counter:threshold=3

    All other settings are fixed when a table is created. The admission rule counts the occurrences
    of keys that have no row yet. If a different rule is chosen, or a sketch of a different size,
    these counts are discarded. If a shard fails, repeat the command to complete it.
    """
    asked = _parse(settings)
    with session.client() as client:
        _require_alterable(client, name, asked)
        before = client.describe_table(name)
        done = client.alter_table(name, **_arguments(asked))
    changed = [field for field in asked if _shown(before, field) != _shown(done.table, field)]
    session.show(
        {"table": name, "changed": changed, "dropped_counters": done.dropped_counters},
        lambda: _report(name, changed, done.dropped_counters),
    )


def _report(name: str, changed: Sequence[str], counters: int) -> None:
    """Print which settings of a table changed, and how many admission counters were discarded."""
    typer.echo(
        f"{name}: altered {', '.join(changed)}"
        if changed
        else f"{name}: unchanged, it already has these settings"
    )
    if counters:
        typer.echo(
            f"{name}: {counters:,} admission counters were discarded; their keys are"
            " counted from zero again"
        )


def _parse(settings: Sequence[str]) -> dict[str, list[str]]:
    """Parse settings FIELD=VALUE; return {field: values}.

    Only the field "eviction" may be repeated, so only it may have several values.
    """
    asked: dict[str, list[str]] = {}
    for each in settings:
        field, equals, value = each.partition("=")
        if not equals or not field or (field in asked and field != "eviction"):
            raise typer.BadParameter(
                f"settings must be FIELD=VALUE, each field once (except eviction), got {each!r}"
            )
        asked.setdefault(field, []).append(value)
    return asked


def _arguments(asked: dict[str, list[str]]) -> dict[str, Any]:
    """Convert {field: values} to keyword arguments of ``Client.alter_table``.

    Raises InvalidArgument for a value that cannot be parsed.
    """
    arguments: dict[str, Any] = {}
    for field, values in asked.items():
        if field in NUMBERS:
            try:
                arguments[field] = NUMBERS[field](values[0])
            except ValueError:
                raise InvalidArgument(f"{field} must be a number, got {values[0]!r}") from None
        else:
            arguments |= _PARSED[field](values)
    return arguments


def _admission(values: list[str]) -> dict[str, Any]:
    """Convert the value of the field "admission" to arguments of ``Client.alter_table``."""
    rule, args = parse_rule("admission", values[0])
    return {"admission": rule, "admission_args": args}


def _eviction(values: list[str]) -> dict[str, Any]:
    """Convert the values of the field "eviction" to arguments of ``Client.alter_table``."""
    return {"eviction": {} if values == ["none"] else parse_rules("eviction", values)}


_PARSED = {
    "durability": lambda values: {"durability": values[0]},
    "admission": _admission,
    "eviction": _eviction,
}


def _require_alterable(client: Client, name: str, asked: dict[str, list[str]]) -> None:
    """Raise InvalidArgument if a field cannot be altered.

    For a fixed field of a table, this sends a request that the servers refuse with the reason.
    """
    alterable = (*NUMBERS, *_PARSED)
    for field in asked:
        if field in FIXED:
            client._alter(pb.AlterTableRequest(schema=pb.TableSchema(name=name), fields=[field]))
        if field not in alterable:
            raise InvalidArgument(
                f"table {name!r}: no field {field!r}; fields that can be altered:"
                f" {', '.join(alterable)}"
            )


def _shown(info: Any, field: str) -> Any:
    """Return the value of a setting, to compare it before and after the change.

    info   TableInfo
    field  name of the setting
    """
    if field == "lr":
        return info.optimizer_args["lr"]
    return (getattr(info, field), info.admission_args if field == "admission" else None)
