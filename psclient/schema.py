"""Table schemas: build them from arguments, combine the shards' descriptions of a table."""

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
    """Current settings of a table, alterations included, and its size over all shards."""

    name: str
    dim: int
    optimizer: str
    optimizer_args: dict[str, float]  # all parameters, including "lr" and defaults
    initializer: str
    initializer_args: dict[str, float]
    seed: int
    serving_default: float
    durability: str
    admission: str
    admission_args: dict[str, float]
    eviction: dict[str, dict[str, float]]  # parameters by rule
    max_step_ahead: int  # by how much a push may exceed the table's largest step; 0: no limit
    rows: int
    bytes: int  # server memory used: rows, metadata, index, counters, spare capacity
    waiting: int  # keys that wait for admission: counted, but no row yet; estimated for a sketch
    counter_bytes: int  # memory of the counters of waiting keys; included in ``bytes``
    shard_rows: tuple[int, ...]  # ``rows`` of each shard
    shard_bytes: tuple[int, ...]  # ``bytes`` of each shard
    versions: Versions  # version of each shard


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
    """Build the schema of a table from the arguments of Client.create_table.

    optimizer    (name, parameters, learning rate)
    initializer  (name, parameters)
    admission    (name, parameters)

    Parameters may be None. Raises InvalidArgument for an invalid value.
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
    """Build a rule from its name and parameters.

    field  the argument's name in errors: "table 'user': optimizer"
    more   further parameters, which override ``parameters``

    Raises InvalidArgument if a name is not text or a parameter is not a number.
    """
    numbers = {
        checked.text(f"parameter of {field}", key): checked.number(f"{field} {key}", value)
        for key, value in {**checked.mapping(field, parameters), **(more or {})}.items()
    }
    return pb.Rule(name=checked.text(field, name), parameters=numbers)


def table_info(shards: Sequence[pb.DescribeTableResponse]) -> TableInfo:
    """Combine the descriptions of one table by all shards.

    Raises SchemaMismatch if the shards' schemas differ.
    """
    schema = shards[0].schema
    for number, shard in enumerate(shards):
        if shard.schema != schema:
            fields = [f.name for f in schema.DESCRIPTOR.fields]
            field = next(f for f in fields if getattr(shard.schema, f) != getattr(schema, f))
            raise SchemaMismatch(
                f"table {schema.name!r}: field {field!r} differs between shard 0 and shard"
                f" {number}; repeat the alteration that failed midway, or drop the table and create"
                " it anew"
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
