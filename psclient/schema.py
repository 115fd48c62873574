"""Schemas of tables: rules for requests, descriptions from answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from psclient import checked
from psclient.choices import DURABILITIES
from psclient.errors import SchemaMismatch
from psclient.versions import Versions
from psproto import codec
from psproto import ps_pb2 as pb

MAX_DIM = 8192


@dataclass(frozen=True, slots=True)
class TableInfo:
    """Settings of a table as they are now, alterations included, and its size over all shards."""

    name: str
    dim: int
    optimizer: str
    optimizer_args: dict[str, float]  # all of them, "lr" too
    initializer: str
    initializer_args: dict[str, float]
    seed: int
    serving_default: float
    durability: str
    admission: str
    admission_args: dict[str, float]
    eviction: dict[str, dict[str, float]]  # by rule
    max_step_ahead: int  # steps that a push may be ahead of the table; 0: no bound
    rows: int
    bytes: int  # of server memory: rows, metadata, index, counters, spare capacity
    waiting: int  # keys that are counted but have no row yet; an estimate with a sketch
    counter_bytes: int  # of the counters of waiting keys; part of ``bytes``
    shard_rows: tuple[int, ...]
    shard_bytes: tuple[int, ...]
    versions: Versions  # of the shards


def table_schema(
    name: str,
    dim: int,
    *,
    optimizer: tuple[str, Mapping[str, float] | None, float | None],
    initializer: tuple[str, Mapping[str, float] | None],
    seed: int,
    serving_default: float,
    durability: str,
    admission: tuple[str, Mapping[str, float] | None],
    eviction: Mapping[str, Mapping[str, float]] | None,
    max_step_ahead: int | None,
) -> pb.TableSchema:
    """Return the schema that Client.create_table describes; InvalidArgument for a bad value.

    optimizer, initializer, admission  name and parameters; the optimizer's learning rate
    """
    at = f"table {checked.text('name', name)!r}: "
    rates = {} if optimizer[2] is None else {"lr": optimizer[2]}
    schema = pb.TableSchema(
        name=name,
        dim=checked.integer(f"{at}dim", dim, 1, MAX_DIM + 1),
        optimizer=rule(f"{at}optimizer", optimizer[0], optimizer[1], rates),
        initializer=rule(f"{at}initializer", *initializer),
        seed=checked.integer(f"{at}seed", seed, 0, 1 << 64),
        serving_default=checked.number(f"{at}serving_default", serving_default),
        durability=checked.one_of("durability", durability, DURABILITIES),  # type: ignore[arg-type]
        admission=rule(f"{at}admission", *admission),
        evictions=[
            rule(f"{at}eviction", kind, args)
            for kind, args in checked.mapping(f"{at}eviction", eviction).items()
        ],
    )
    if max_step_ahead is not None:
        ahead = checked.integer(f"{at}max_step_ahead", max_step_ahead, 0, codec.STEPS)
        schema.max_step_ahead = ahead
    return schema


def rule(
    field: str,
    name: str,
    parameters: Mapping[str, float] | None,
    more: Mapping[str, float] | None = None,
) -> pb.Rule:
    """Return a rule with its parameters. ``field`` names it in errors."""
    numbers = {
        checked.text(f"parameter of {field}", key): checked.number(f"{field} {key}", value)
        for key, value in {**checked.mapping(field, parameters), **(more or {})}.items()
    }
    return pb.Rule(name=checked.text(field, name), parameters=numbers)


def table_info(shards: Sequence[pb.DescribeTableResponse]) -> TableInfo:
    """Return the descriptions of all shards as one; SchemaMismatch if their schemas differ."""
    schema = shards[0].schema
    for number, shard in enumerate(shards):
        if shard.schema != schema:
            fields = [f.name for f in schema.DESCRIPTOR.fields]
            field = next(f for f in fields if getattr(shard.schema, f) != getattr(schema, f))
            raise SchemaMismatch(
                f"table {schema.name!r} has another {field} on shard {number} than on shard 0;"
                " drop it and create it anew, or repeat an alteration that failed midway"
            )
    return TableInfo(
        name=schema.name,
        dim=schema.dim,
        optimizer=schema.optimizer.name,
        optimizer_args=dict(schema.optimizer.parameters),
        initializer=schema.initializer.name,
        initializer_args=dict(schema.initializer.parameters),
        seed=schema.seed,
        serving_default=schema.serving_default,
        durability=next(k for k, v in DURABILITIES.items() if v == schema.durability),
        admission=schema.admission.name,
        admission_args=dict(schema.admission.parameters),
        eviction={rule.name: dict(rule.parameters) for rule in schema.evictions},
        max_step_ahead=schema.max_step_ahead,
        rows=sum(shard.stats.rows for shard in shards),
        bytes=sum(shard.stats.bytes for shard in shards),
        waiting=sum(shard.stats.waiting for shard in shards),
        counter_bytes=sum(shard.stats.counter_bytes for shard in shards),
        shard_rows=tuple(shard.stats.rows for shard in shards),
        shard_bytes=tuple(shard.stats.bytes for shard in shards),
        versions=Versions((shard.version for shard in shards), (shard.epoch for shard in shards)),
    )
