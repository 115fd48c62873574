"""Schemas of tables: build one from arguments; combine the shards' descriptions of a table."""

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
class TierInfo:
    """Rows of a table in one tier (kind of storage), over all shards."""

    rows: int  # rows that are read from this tier
    bytes: int  # GPU memory, memory or disk that the tier takes, including unused space
    hits: int  # keys of pulls and pushes whose row was in this tier, since the servers started
    misses: int  # keys of pulls and pushes whose row was only in a slower tier
    on_disk: bool = False  # the tier is on disk, so that ``bytes`` is no memory


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """Moves of a table's rows between its tiers, over all shards, since they started."""

    promotions: int  # rows copied from disk to memory, because they were pushed
    demotions: int  # rows that left memory, because there was no room
    flushed_rows: int  # changed rows written to disk
    reflushed_blocks: int  # blocks on disk written again, because few of their rows were current
    warm_reads: int  # requests that waited until rows were read from disk
    warm_seconds: float  # total time that they waited, in seconds
    gpu_promotions: int = 0  # rows moved from memory to GPU memory, because they are used often
    gpu_demotions: int = 0  # rows that left GPU memory, because there was no room


@dataclass(frozen=True, slots=True)
class TableInfo:
    """Current settings of a table, alterations included, and its size over all shards.

    Client.create_table explains the settings.
    """

    name: str
    dim: int  # length of the embeddings
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
    rows: int  # number of rows
    bytes: int  # server memory in use: rows, metadata, index, counters, spare capacity
    waiting: int  # keys that wait for admission: counted, but no row yet; estimated for a sketch
    counter_bytes: int  # memory of the counters of waiting keys; included in ``bytes``
    shard_rows: tuple[int, ...]  # ``rows`` of each shard
    shard_bytes: tuple[int, ...]  # ``bytes`` of each shard
    versions: Versions  # version of each shard when it was asked
    tiers: dict[str, TierInfo]  # by name, the fastest first
    cache: CacheInfo  # moves between the tiers
    damaged_blocks: int  # blocks on disk that are known to be damaged
    lost_rows: int  # rows that cannot be read, because a block is damaged


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
    """Build the schema of a table from the arguments of Client.create_table, which explains them.

    optimizer    (name, parameters or None, learning rate or None)
    initializer  (name, parameters or None)
    admission    (name, parameters or None)

    Raises InvalidArgument for an invalid value.
    """
    at = f"table {checked.text('name', name)!r}: "
    rates = {} if optimizer[2] is None else {"lr": optimizer[2]}
    evictions = checked.mapping(f"{at}eviction", eviction).items()
    schema = pb.TableSchema(
        name=name,
        dim=checked.integer(f"{at}dim", dim, 1, MAX_DIM + 1),
        optimizer=rule(f"{at}optimizer", optimizer[0], optimizer[1], rates),
        initializer=rule(f"{at}initializer", *initializer),
        seed=checked.integer(f"{at}seed", seed, 0, 1 << 64),
        serving_default=checked.number(f"{at}serving_default", serving_default),
        durability=checked.one_of("durability", durability, DURABILITIES),  # type: ignore[arg-type]
        admission=rule(f"{at}admission", *admission),
        evictions=[rule(f"{at}eviction", *each) for each in evictions],
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
    """Build the message for an optimizer, initializer, or admission or eviction rule.

    field       name of the argument in errors, such as "table 'user': optimizer"
    name        name of the rule: "adam"
    parameters  {name: number}; None: none
    more        further parameters, which replace ``parameters`` of the same name

    Raises InvalidArgument if a name is not text or a parameter is not a number.
    """
    numbers = {
        checked.text(f"parameter of {field}", key): checked.number(f"{field} {key}", value)
        for key, value in {**checked.mapping(field, parameters), **(more or {})}.items()
    }
    return pb.Rule(name=checked.text(field, name), parameters=numbers)


def table_info(shards: Sequence[pb.DescribeTableResponse]) -> TableInfo:
    """Combine all shards' descriptions of one table.

    Raises SchemaMismatch if the shards' schemas differ.
    """
    schema = shards[0].schema
    _require_equal([shard.schema for shard in shards])
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
        tiers=_tiers([shard.stats for shard in shards]),
        cache=_cache([shard.stats.cache for shard in shards]),
        damaged_blocks=sum(shard.stats.damaged_blocks for shard in shards),
        lost_rows=sum(shard.stats.lost_rows for shard in shards),
    )


def _tiers(stats: Sequence[pb.TableStats]) -> dict[str, TierInfo]:
    """Return the sums of all shards' rows, bytes, hits and misses, by name of the tier."""
    tiers: dict[str, TierInfo] = {}
    for each in (tier for shard in stats for tier in shard.tiers):
        old = tiers.get(each.tier, TierInfo(0, 0, 0, 0))
        tiers[each.tier] = TierInfo(
            old.rows + each.rows,
            old.bytes + each.bytes,
            old.hits + each.hits,
            old.misses + each.misses,
            each.on_disk,
        )
    return tiers


def _cache(shards: Sequence[pb.CacheStats]) -> CacheInfo:
    """Return the sums over all shards of their counts of moves between tiers."""
    return CacheInfo(
        promotions=sum(each.promotions for each in shards),
        demotions=sum(each.demotions for each in shards),
        flushed_rows=sum(each.flushed_rows for each in shards),
        reflushed_blocks=sum(each.reflushed_blocks for each in shards),
        warm_reads=sum(each.warm_reads for each in shards),
        warm_seconds=sum(each.warm_seconds for each in shards),
        gpu_promotions=sum(each.gpu_promotions for each in shards),
        gpu_demotions=sum(each.gpu_demotions for each in shards),
    )


def _require_equal(schemas: Sequence[pb.TableSchema]) -> None:
    """Raise SchemaMismatch, naming a field that differs, unless all shards' schemas are equal."""
    first = schemas[0]
    for number, schema in enumerate(schemas):
        if schema != first:
            fields = [f.name for f in first.DESCRIPTOR.fields]
            field = next(f for f in fields if getattr(schema, f) != getattr(first, f))
            raise SchemaMismatch(
                f"table {first.name!r}: field {field!r} differs between shard 0 and shard {number};"
                " repeat the alteration that failed midway, or drop the table and create it anew"
            )
