"""Schemas of tables: to the servers and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from psclient import checked
from psclient.choices import DURABILITIES
from psclient.errors import SchemaMismatch
from psclient.versions import Versions
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
    bytes: int  # of server memory: rows, metadata, index, counters, unused room
    waiting: int  # keys that are counted and have no row; an estimate with a sketch
    counter_bytes: int  # of their counters, part of ``bytes``
    shard_rows: tuple[int, ...]
    shard_bytes: tuple[int, ...]
    versions: Versions  # of the shards


def rule(
    field: str,
    name: str,
    parameters: Mapping[str, float] | None,
    more: Mapping[str, float] | None = None,
) -> pb.Rule:
    numbers = {
        checked.text(f"parameter of {field}", key): checked.number(f"{field} {key}", value)
        for key, value in {**checked.mapping(field, parameters), **(more or {})}.items()
    }
    return pb.Rule(name=checked.text(field, name), parameters=numbers)


def table_info(shards: Sequence[pb.DescribeTableResponse]) -> TableInfo:
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
