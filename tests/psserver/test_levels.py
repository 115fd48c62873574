"""The durability that a change has once it is answered."""

from __future__ import annotations

from typing import Any

import pytest
from stores import change, contents, make_shard, push, schema
from test_shard_log import Log, log

from psproto import ps_pb2 as pb
from psserver.errors import NoLog
from psserver.shard import Shard

__all__ = ["log"]  # a fixture


def level(shard: Shard, **changes: Any) -> int:
    return shard.exchange([push([1], **changes)], []).pushes[0].achieved


@pytest.mark.parametrize("table", ["applied", "log", "fsync"])
@pytest.mark.parametrize("asked", [None, "applied", "log", "fsync"])
def test_a_change_is_answered_with_the_level_asked_for_or_the_table_s(
    log: Log, table: Any, asked: Any
) -> None:
    shard = make_shard(log=log)
    shard.create_table(schema(durability=table))
    want = pb.Durability.Value(f"DURABILITY_{(asked or table).upper()}")
    assert level(shard, durability=asked) == want
    assert shard.delete(change([1], durability=asked)).achieved == want


def test_without_a_log_everything_is_applied_and_nothing_on_disk() -> None:
    shard = make_shard()
    with pytest.raises(NoLog):
        shard.create_table(schema(durability="fsync"))
    assert shard.tables() == []
    shard.create_table(schema())
    before = contents(shard)
    for call in (
        lambda: shard.exchange([push([2]), push([1], durability="fsync")], []),
        lambda: shard.delete(change([1], durability="fsync")),
        lambda: shard.barrier("b"),
    ):
        with pytest.raises(NoLog):
            call()
        assert contents(shard) == before
    assert level(shard) == level(shard, durability="log") == pb.DURABILITY_APPLIED
    assert shard.delete(change([1], durability="log")).achieved == pb.DURABILITY_APPLIED
    shard.drop_table("t")
    assert shard.version == 5
