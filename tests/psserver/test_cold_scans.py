"""Snapshots, catch-ups, exports, analyses and sweeps of tables whose rows are partly on disk."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feeds import Copy, Node, kinds, with_node
from homes import Homes
from stores import analyses_of, schema

from psproto import ps_pb2 as pb
from psserver.outbox import Columns
from psserver.pace import Pace
from psserver.shard import Shard
from psserver.sweeper import Sweeper
from storage.eviction.rules import CapacityLru, StepTtl
from storage.table import Table

KEYS = 120


def table_of(shard: Shard, name: str = "t") -> Table:
    return shard._tables.get(name).table


def demote(shard: Shard, count: int) -> None:
    table_of(shard).store.demote(count)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.rowstore.MARGIN", 0)


async def stir(node: Node, rng: random.Random) -> None:
    """Push, delete, flush and demote rows."""
    for _ in range(rng.randrange(4)):
        some = rng.sample(range(KEYS), rng.randint(1, 20))
        match rng.randrange(5):
            case 0:
                await node.push(some, float(rng.randint(1, 9)))
            case 1:
                await node.delete(some[:3])
            case 2:
                await asyncio.to_thread(node.home.flush)
            case _:
                await node.engine.submit(lambda: demote(node.shard, rng.randint(1, KEYS)))


@pytest.mark.quick(3)
@pytest.mark.parametrize("seed", range(8))
def test_a_snapshot_and_a_catch_up_are_right_wherever_rows_are(tmp_path: Path, seed: int) -> None:
    async def test(node: Node) -> None:
        rng = random.Random(seed)
        await node.create()
        await node.push(list(range(KEYS)))
        for _ in range(8):
            await stir(node, rng)
        await node.durable()
        copied, token = Copy(), b""
        for _ in range(3):
            async with node.subscribe(copied, token=token, chunk_bytes=300) as reader:
                found = [await reader.next()]
                while found[-1].header.more or found[-1].header.version < node.shard.version:
                    await stir(node, rng)
                    if rng.random() < 0.5:
                        await node.durable()
                    found.append(await reader.next())
                    if len(found) > 60:
                        await node.durable()
                        found += await reader.up_to(node.shard.version)
                token = reader.token
            assert "ROWS" in kinds(found)
            for _ in range(6):
                await stir(node, rng)
            await node.push([1, 2, 3])
            await node.cut()

    asyncio.run(with_node(tmp_path / "shard", test))


def filled(path: Path, **fields: Any) -> Homes:
    """One shard with a table of 300 rows, most of them only on disk, and 50 changed since."""
    homes = Homes(path, 1, f"file://{path}/checkpoints")
    homes.__enter__()
    homes.create(schema(**fields))
    [node] = homes.nodes
    for step in range(30):
        homes.push(range(10 * step, 10 * step + 10), float(step), step=step)
    node.home.flush()
    demote(node.shard, 300)
    homes.push(range(50), 5.0, step=30)
    node.home.flush()
    homes.push(range(20, 70), 6.0, step=31)
    store = table_of(node.shard).store
    assert store.host.rows < 100
    assert store.blocks is not None
    assert store.blocks.rows > 200
    return homes


def test_an_export_has_each_row_once(tmp_path: Path) -> None:
    homes = filled(tmp_path)
    [node] = homes.nodes
    head, *messages = node.checkpoints.rows.read_rows(pb.ReadRowsRequest(table="t"))
    dump = node.shard.dump()["t"]
    assert head.header.version == node.shard.version
    keys = np.concatenate([np.frombuffer(each.keys, "<u8") for each in messages])
    rows = np.concatenate([np.frombuffer(each.rows, "<f4") for each in messages])
    versions = np.concatenate([np.frombuffer(each.versions, "<u8") for each in messages])
    order = np.argsort(keys)
    assert keys[order].tolist() == dump.keys.tolist()
    assert versions[order].tolist() == dump.meta[:, 1].tolist()
    assert rows.reshape(len(keys), -1)[order].tobytes() == dump.rows.tobytes()
    homes.__exit__(None, None, None)


def test_an_analysis_tells_the_tier_of_each_row(tmp_path: Path) -> None:
    homes = filled(tmp_path)
    [node] = homes.nodes
    analyses = analyses_of(node.shard)
    analyses._pace = Pace(node.engine, 0.0)  # type: ignore[arg-type]
    request = pb.AnalyzeRequest(table="t", columns=Columns.COLUMNS_EMBEDDING, top=300)
    *parts, last = analyses.analyze(request)
    store = table_of(node.shard).store
    assert store.blocks is not None
    counts = {tier.name: (tier.rows, tier.bytes) for tier in last.summary.tiers}
    assert counts == {
        "host": (store.host.rows, store.host.bytes),
        "lmdb": (store.blocks.rows, store.blocks.bytes),
    }
    told = {key: part.tier for part in parts for key in np.frombuffer(part.keys, "<u8").tolist()}
    keys = np.arange(300, dtype=np.uint64)
    tiers = store.names(store.find(keys)[0])
    assert told == dict(zip(keys.tolist(), tiers, strict=True))
    listed = last.summary.most_frequent
    assert list(listed.tiers) == [told[key] for key in listed.keys]
    inspected = analyses.inspect(pb.InspectRequest(table="t", keys=keys.tobytes()))
    assert [facts.tier for facts in inspected.keys] == tiers
    homes.__exit__(None, None, None)


def test_a_sweep_on_demand_evicts_rows_on_disk(tmp_path: Path) -> None:
    homes = filled(tmp_path, evictions=(StepTtl(steps=16), CapacityLru(max_rows=100)))
    [node] = homes.nodes
    sweeper = Sweeper(node.shard, node.engine)  # type: ignore[arg-type]
    dry = sweeper.evict(pb.EvictRequest(table="t", dry_run=True))
    done = sweeper.evict(pb.EvictRequest(table="t"))
    assert dry.evicted == done.evicted == {"step_ttl": 80, "capacity": 120}
    assert len(table_of(node.shard)) == 100
    left = node.shard.dump()["t"].keys.tolist()
    node.reopen()
    assert node.shard.dump()["t"].keys.tolist() == left
    homes.__exit__(None, None, None)
