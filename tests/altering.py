"""Alterations of a table of a shard, without a network, and what they change."""

from __future__ import annotations

import dataclasses
from typing import Any

from stores import contents, push, schema

from psproto import ps_pb2 as pb
from psserver.alterations import altered, require_alterable
from psserver.schemas import write_schema
from psserver.shard import Shard
from storage.admission.rules import Always, Counter, Probability, Sketch
from storage.eviction.rules import Norm, StepTtl
from storage.schema import TableSchema

NEW: dict[str, Any] = {
    "lr": 0.25,
    "serving_default": 2.5,
    "durability": "applied",
    "admission": Counter(threshold=3),
    "evictions": (Norm(), StepTtl(steps=7)),
    "max_step_ahead": 9,
}
SMALL_SKETCH = Sketch(threshold=3, expected_keys=1000)
KINDS = [Always(), Counter(threshold=3), SMALL_SKETCH, Probability(p=1e-9)]


def asked(table: str = "t", **values: Any) -> pb.AlterTableRequest:
    """A request as a client makes it."""
    whole = write_schema(with_values(schema(table), **values))
    return pb.AlterTableRequest(schema=whole, fields=list(values))


def with_values(old: TableSchema, **values: Any) -> TableSchema:
    if "lr" in values:
        values["optimizer"] = dataclasses.replace(old.optimizer, lr=values.pop("lr"))
    return dataclasses.replace(old, **values)


def alter(shard: Shard, table: str = "t", **values: Any) -> tuple[TableSchema, int]:
    request = asked(table, **values)
    require_alterable(request)
    return shard.alter_table(table, lambda old: altered(old, request))


def give(shard: Shard, keys: Any, step: int = 5, **changes: Any) -> None:
    shard.exchange([push(keys, step=step, **changes)], [])


def keys_of(shard: Shard, table: str = "t") -> list[int]:
    return list(shard.dump()[table].keys.tolist())


def counters(shard: Shard) -> dict[int, int]:
    return {key: total for key, total, _ in shard.dump()["t"].counters.tolist()}


def everything(shard: Shard) -> dict[str, Any]:
    """What a restart must bring back, the states of eviction and admission included."""
    return contents(shard) | {
        "policies": {each.number: each.base.policy for each in shard.capture().tables},
        "counting": {each.number: each.counting for each in shard.capture().tables},
        "ruled": sorted(shard._tables.ruled),
        "rules": {e.number: (e.table.evictor.rules, e.schema) for e in shard._tables},
    }
