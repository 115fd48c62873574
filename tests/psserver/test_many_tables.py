"""Thousands of tables on one shard with a large budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from homes import Homes
from stores import push, schema

from psserver.config import ServerConfig

TABLES = 2_000
GIB = 1 << 30


def test_as_many_tables_are_allowed() -> None:
    assert ServerConfig.model_fields["max_tables"].default >= TABLES


@pytest.mark.slow
def test_two_thousand_tables_are_checkpointed_verified_and_restored(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    settings = {"memory_bytes": 64 * GIB, "max_tables": TABLES, "segment_bytes": 64 << 20}
    names = [f"t{number}" for number in range(TABLES)]

    def push_all(source: Homes, key: int) -> None:
        shard = source.nodes[0].shard
        for at in range(0, TABLES, 100):
            pushes = [push([key, 7], table=name) for name in names[at : at + 100]]
            shard.exchange(pushes, [])

    with Homes(tmp_path / "source", 1, url, **settings) as source:
        for name in names:
            source.create(schema(name))
        push_all(source, 1)
        source.checkpoint("full")
        push_all(source, 2)
        source.nodes[0].home.flush()
        source.checkpoint("more", base="full")
        assert source.verify("more") > 0
        source.nodes[0].reopen()
        before = source.nodes[0].shard.dump()
        assert len(before) == TABLES
    with Homes(tmp_path / "target", 1, url, **settings) as target:
        assert target.restore("more") == 3 * TABLES
        after = target.nodes[0].shard.dump()
        assert target.nodes[0].shard.budget.reserved < 100 << 40
    assert list(after) == list(before) == sorted(names)
    for name in names:
        assert after[name].keys.tolist() == [1, 2, 7]
        assert np.array_equal(after[name].rows, before[name].rows)
