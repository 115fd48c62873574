"""psctl alter: settings of a table that has rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from psclient.client import Client
from psclient.errors import InvalidArgument
from psclient.tools.commands.shell import DEFAULT, Servers, app, connected
from psclient.tools.rules import parse_rule, parse_rules
from psproto import ps_pb2 as pb

FIXED = ("dim", "optimizer", "initializer", "seed")
NUMBERS = {"lr": float, "serving_default": float, "max_step_ahead": int}


@app.command()
def alter(
    name: Annotated[str, typer.Argument(metavar="TABLE", help="Name of the table.")],
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="FIELD=VALUE...", help="New values of settings.", show_default=False
        ),
    ],
    servers: Servers = DEFAULT,
) -> None:
    """Change settings of a table on all shards. Its rows stay.

    \b
      lr=NUMBER               learning rate of pushes that send none
      serving_default=NUMBER  what serving pulls return for keys without a row
      durability=LEVEL        applied, log or fsync; of pushes that ask for none
      admission=RULE          which keys get a row, as in psctl create
      eviction=RULE           which rows are evicted; may be repeated; replaces all
                              rules of the table; eviction=none removes them
      max_step_ahead=STEPS    how far the step of a push may be ahead; 0: no bound

    For example: psctl alter user lr=0.01 admission=counter:threshold=3

    All other settings are fixed when a table is created. Counters of keys that wait for admission
    are dropped if the new rule is of another kind, or a sketch of another size. If a shard fails,
    repeat the command to complete it.
    """
    asked = _parse(settings)
    with connected(servers) as client:
        _require_alterable(client, name, asked)
        before = client.describe_table(name)
        done = client.alter_table(name, **_arguments(asked))
    changed = [field for field in asked if _shown(before, field) != _shown(done.table, field)]
    typer.echo(
        f"{name}: altered {', '.join(changed)}" if changed else f"{name}: has these settings"
    )
    if done.dropped_counters:
        typer.echo(f"{done.dropped_counters:,} counters dropped: their keys start again from zero")


def _parse(settings: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of each field that is named."""
    asked: dict[str, list[str]] = {}
    for each in settings:
        field, equals, value = each.partition("=")
        if not equals or not field or (field in asked and field != "eviction"):
            raise typer.BadParameter(f"settings are FIELD=VALUE, each once; got {each!r}")
        asked.setdefault(field, []).append(value)
    return asked


def _arguments(asked: dict[str, list[str]]) -> dict[str, Any]:
    """Return the arguments of ``Client.alter_table``."""
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
    rule, args = parse_rule("admission", values[0])
    return {"admission": rule, "admission_args": args}


def _eviction(values: list[str]) -> dict[str, Any]:
    return {"eviction": {} if values == ["none"] else parse_rules("eviction", values)}


_PARSED = {
    "durability": lambda values: {"durability": values[0]},
    "admission": _admission,
    "eviction": _eviction,
}


def _require_alterable(client: Client, name: str, asked: dict[str, list[str]]) -> None:
    """Refuse fields that cannot be altered; the servers say why."""
    alterable = (*NUMBERS, *_PARSED)
    for field in asked:
        if field in FIXED:
            client._alter(pb.AlterTableRequest(schema=pb.TableSchema(name=name), fields=[field]))
        if field not in alterable:
            raise InvalidArgument(
                f"table {name!r}: no field {field!r}; alterable are: {', '.join(alterable)}"
            )


def _shown(info: Any, field: str) -> Any:
    """Return the value of a setting of a table."""
    if field == "lr":
        return info.optimizer_args["lr"]
    return (getattr(info, field), info.admission_args if field == "admission" else None)
