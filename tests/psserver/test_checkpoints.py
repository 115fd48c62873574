"""Checkpoints of a cluster in this process: what is restored is what was there at the cut."""

from __future__ import annotations

import asyncio
import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from homes import Homes, Node, Step, fill
from stores import DIM, push, schema

from psproto import ps_pb2 as pb
from psproto import routing
from psserver import staging
from psserver.engine import Engine
from psserver.errors import (
    CheckpointUnfit,
)
from psserver.pinned import PinnedBase
from storage import part_writer
from storage.admission.rules import Counter
from storage.checkpoint import open_checkpoint
from storage.errors import (
    Corrupt,
    UnknownCheckpoint,
)

ID = "0123456789abcdef"
Make = Callable[..., Homes]


# ---- the whole cluster


@pytest.mark.quick(2)
@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_every_row_and_its_history_comes_back_on_any_number_of_shards(
    make: Make, shards: int
) -> None:
    source, target = make(3), make(shards)
    fill(source)
    info = source.checkpoint("full")
    assert {table.name: table.rows for table in info.tables} == {"adam": 850, "t": 357}
    assert target.restore("full") == 1207
    assert target.rows() == source.rows()
    assert set(target.versions()) == {max(source.versions())}


def test_a_restored_cluster_works_on_and_restarts(make: Make) -> None:
    source, target = make(3), make(2)
    fill(source)
    source.checkpoint("full")
    target.restore("full")
    for cluster in (source, target):
        cluster.push(range(500), 1.0, step=2**40 + 11)
        cluster.delete(range(5, 10))
    for node in target.nodes:
        node.reopen()
    without_versions = [
        {table: {key: (row, meta[2:]) for key, (row, meta) in rows.items()} for table, rows in each}
        for each in (source.rows().items(), target.rows().items())
    ]
    assert without_versions[0] == without_versions[1]


def test_a_restored_shard_begins_another_lineage_with_an_empty_log(make: Make) -> None:
    source, target = make(1), make(1)
    fill(source)
    source.checkpoint("full")
    before = target.nodes[0].home.log.lineage
    target.restore("full")
    log = target.nodes[0].home.log
    assert log.lineage not in (before, source.nodes[0].home.log.lineage)
    assert (log.first, log.last) == (source.versions()[0] + 1, source.versions()[0])
    assert target.nodes[0].shard.tombstone_horizon == source.versions()[0]


def test_an_empty_cluster_makes_a_checkpoint_too(make: Make) -> None:
    source, target = make(2), make(3)
    source.checkpoint("empty")
    assert target.restore("empty") == 0
    assert target.rows() == {}


@pytest.mark.parametrize("shards", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_changes_and_deletes_come_back_from_a_chain(make: Make, shards: int) -> None:
    source = make(3)
    source.create(schema())
    rng = random.Random(shards)
    wanted = []
    for step, (name, base) in enumerate([("a", ""), ("b", "a"), ("c", "b"), ("d", "c")]):
        for _ in range(4):
            source.push(rng.sample(range(300), 80), rng.randrange(9), step=step)
            source.delete(rng.sample(range(300), 40))
        if name == "c":
            source.create(schema("late"))
            source.push(range(50), table="late")
        if name == "d":
            source.drop("late")
            source.create(schema("late", dim=3))
            source.push(range(20, 40), table="late")
        info = source.checkpoint(name, base)
        assert info.parent == base
        wanted.append(source.rows())
    for name, rows in zip("abcd", wanted, strict=True):
        target = make(shards)
        target.restore(name)
        assert target.rows() == rows


@pytest.mark.parametrize("shards", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_counters_come_back_as_they_were_at_the_cut(make: Make, shards: int) -> None:
    """Keys are counted, admitted and deleted while the checkpoint is taken."""
    source = make(3)
    source.create(schema(admission=Counter(threshold=3)))
    rng = random.Random(shards)

    owners = routing.owners(np.arange(300, dtype=np.uint64), source.map)

    def work(shard: int) -> None:
        mine = np.flatnonzero(owners == shard).tolist()
        for _ in range(4):
            source.push(rng.sample(mine, len(mine) // 4))
        source.delete(rng.sample(mine, len(mine) // 8))

    for name, base in [("a", ""), ("b", "a")]:
        for shard, node in enumerate(source.nodes):  # between the copying of rows and the end
            work(shard)
            node.checkpoints._engine = Meddling(node.engine, 2, partial(work, shard))
        source.checkpoint(name, base)
        target = make(shards)
        target.restore(name)
        assert target.rows() == source.rows()
        assert target.waiting() == source.waiting()
        assert target.waiting()
        for node in source.nodes:
            node.checkpoints._engine = node.engine


class Meddling:
    """An engine that does something else before its n-th call."""

    def __init__(self, engine: Any, call: int, work: Callable[[], None]) -> None:
        self._engine, self._left, self._work = engine, call, work

    def run(self, call: Callable[[], Any]) -> Any:
        self._left -= 1
        if not self._left:
            self._work()
        return self._engine.run(call)


def test_an_incremental_checkpoint_is_as_large_as_what_changed(make: Make) -> None:
    source = make(2)
    source.create(schema())
    source.push(range(20_000))
    full = source.checkpoint("full")
    source.push(range(20))
    assert source.checkpoint("more", "full").bytes < full.bytes / 50


def test_a_delete_since_the_base_that_was_forgotten_needs_a_full_one(make: Make) -> None:
    source = make(1, max_tombstones=10)
    source.create(schema())
    source.push(range(100))
    source.checkpoint("full")
    source.delete(range(8))
    source.checkpoint("more", "full")
    source.delete(range(10, 20))
    with pytest.raises(CheckpointUnfit, match="no longer knows which keys were deleted"):
        source.checkpoint("again", "full")
    source.checkpoint("again", "more")


def test_a_base_of_another_history_or_other_shards_is_refused(make: Make) -> None:
    source, other, two = make(1), make(1), make(2)
    fill(source)
    source.checkpoint("full")
    for cluster, why in ((other, "the present log"), (two, "other shards")):
        with pytest.raises(CheckpointUnfit, match=why):
            cluster.checkpoint("more", "full")
    other.restore("full")
    with pytest.raises(CheckpointUnfit, match="the present log"):
        other.checkpoint("more", "full")
    with pytest.raises(UnknownCheckpoint):
        source.checkpoint("more", "nothing")


# ---- sessions


def test_a_repeated_push_is_known_after_a_restore_onto_the_same_shards(make: Make) -> None:
    source, target = make(1), make(1)
    source.create(schema())
    source.push([1], client=7, incarnation=1, sequence=1)
    version = source.versions()[0]
    source.checkpoint("full")
    target.restore("full")
    again = push([1], client=7, incarnation=1, sequence=1)
    answer = target.nodes[0].shard.exchange([again], []).pushes[0]
    assert (answer.duplicate, answer.version) == (True, version)
    assert target.rows() == source.rows()


def test_sessions_are_not_mixed_between_other_shards(make: Make) -> None:
    source, target = make(2), make(1)
    source.create(schema())
    source.push(range(50), client=7, incarnation=1, sequence=1)
    source.checkpoint("full")
    target.restore("full")
    assert len(target.nodes[0].shard.sessions) == 0


# ---- while pushes go on


class Busy:
    """An engine whose shard changes before each call and between blocks."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.before: Callable[[], None] | None = None

    def run(self, call: Callable[[], Any]) -> Any:
        if self.before is not None:
            self.before()
        return call()


@pytest.mark.quick(3)
@pytest.mark.parametrize("seed", range(8))
def test_what_changes_while_rows_are_copied_is_as_it_is_at_the_end(
    make: Make, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = make(2, max_tombstones=1 << 20), make(3)
    source.create(schema())
    source.create(schema("short"))
    source.push(range(3000))
    source.push(range(500), table="short")
    rng = random.Random(seed)
    real = PinnedBase.rows
    for where in ("packing", "compaction", "basewriter"):
        monkeypatch.setattr(f"psserver.{where}.rows_per_block", lambda width: 100)

    def disturbed(*args: Any) -> Iterator[Any]:
        for block in real(*args):
            yield block
            if rng.random() < 0.4:
                source.push(rng.sample(range(4000), 300), rng.randrange(5), step=rng.randrange(9))
            if rng.random() < 0.3:
                source.delete(rng.sample(range(4000), 300))
            if rng.random() < 0.05 and "short" in source.nodes[0].shard.tables():
                source.drop("short")
            if rng.random() < 0.05 and "new" not in source.nodes[0].shard.tables():
                source.create(schema("new", dim=3))
                source.push(range(40), table="new")

    monkeypatch.setattr(PinnedBase, "rows", disturbed)
    attempt, parts = "a" * 16, []
    states: dict[str, dict[int, Any]] = {}
    for node in source.nodes:  # the cut of a shard is when its own copying ends
        request = pb.WriteCheckpointRequest(name="full", attempt=attempt)
        parts.append(node.checkpoints.write(request, node.checkpoints.work.progress()).part)
        assert parts[-1].version == node.shard.version
        for name, dump in node.shard.dump().items():
            rows = zip(dump.keys.tolist(), dump.rows.tolist(), dump.meta.tolist(), strict=True)
            states.setdefault(name, {}).update({key: (row, meta) for key, row, meta in rows})
    if set(source.nodes[0].shard.tables()) != set(source.nodes[1].shard.tables()):
        pytest.skip("a table came or went between the cuts")
    try:
        source.complete("full", attempt, parts)
    except CheckpointUnfit as error:  # refused by name: a table came or went between the cuts
        assert "was created, altered or dropped" in str(error)  # noqa: PT017
        return
    assert target.restore("full") == sum(map(len, states.values()))
    assert target.rows() == states


@pytest.mark.slow
def test_a_checkpoint_under_pushes_of_another_thread_is_one_cut(
    make: Make, tmp_path: Path, url: str
) -> None:
    """Each push adds 1 to all rows: at a cut all rows are alike, and say how many there were."""
    source = make(1)
    node = source.nodes[0]
    loop = asyncio.new_event_loop()
    engine = Engine()
    engine.open(loop)
    node.checkpoints._engine = node.home.flusher._engine = engine
    keys = np.arange(60_000, dtype=np.uint64)
    engine.run(lambda: source.create(schema()))
    stop = threading.Event()
    done = 0

    def train() -> None:
        nonlocal done
        item = push([0], -1.0)
        item = replace(
            item,
            keys=keys,
            counts=np.ones(len(keys), np.uint32),
            gradients=np.full((len(keys), DIM), -1, np.float32),
        )
        while not stop.is_set():
            version = engine.run(lambda: node.shard.exchange([item], []).pushes[0].version)
            node.home.log.sync(version)
            done += 1

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        while done < 3:
            pass
        names = [f"c{i}" for i in range(4)]
        for i, name in enumerate(names):
            source.checkpoint(name, names[i - 1] if i % 2 else "")
    finally:
        stop.set()
        trainer.join()
        engine.close()
        loop.close()
    last = 0.0
    for name in names:
        part = open_checkpoint(node.checkpoints.catalog.store, name).parts[0]
        target = make(2)
        target.restore(name)
        rows = target.rows()["t"]
        values = {number for row, _ in rows.values() for number in row}
        assert len(rows) == len(keys)
        assert values == {float(part.version - 1)}  # version 1 made the table
        assert {meta[1] for _, meta in rows.values()} == {part.version}
        assert {meta[3] for _, meta in rows.values()} == {part.version - 1}
        assert last < part.version
        last = part.version


def test_the_log_is_kept_while_it_is_copied(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = make(1), make(1)
    node = source.nodes[0]
    source.create(schema())
    source.push(range(500))
    real = PinnedBase.rows

    def disturbed(*args: Any) -> Iterator[Any]:
        for block in real(*args):
            yield block
            for _ in range(40):  # several segments
                source.push(range(500))
            node.home.flush()  # which cuts the log

    monkeypatch.setattr(PinnedBase, "rows", disturbed)
    source.checkpoint("full")
    first = node.home.log.first
    target.restore("full")
    assert target.rows() == source.rows()
    assert node.home.flusher.pins == {}
    source.push([1])
    node.home.flush()
    assert node.home.log.first > first


# ---- damage


def test_no_damage_is_restored(make: Make, tmp_path: Path) -> None:
    source = make(2)
    fill(source)
    source.push(range(5), client=7, incarnation=1, sequence=1)
    source.checkpoint("a")
    source.push(range(5), client=7, incarnation=1, sequence=2)
    source.delete(range(7, 12))
    source.checkpoint("b", "a")
    target = make(1)
    rng = random.Random(0)
    paths = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert len(paths) >= 12
    for path in paths:
        whole = path.read_bytes()
        for damage in ("flip", "flip", "flip", "cut", "gone"):
            damaged = bytearray(whole)
            if damage == "flip":
                damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.unlink()
            if damage != "gone":
                path.write_bytes(damaged if damage == "flip" else damaged[:-1])
            with pytest.raises((Corrupt, UnknownCheckpoint)):
                source.verify("b")
            if path.name.endswith(".sessions") and path.parent.parent.name == "a":
                continue  # those of the base are not what is restored
            if not path.name.endswith(".sessions"):  # nor are those of other shards
                with pytest.raises((Corrupt, UnknownCheckpoint)):
                    target.restore("b")
            assert target.rows() == {}
            assert not (target.nodes[0].directory / "restore").exists()
        path.write_bytes(whole)
    target.restore("b")
    assert target.rows() == source.rows()


# ---- how much is copied at once


def test_no_piece_of_work_holds_more_than_some_blocks_at_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In files and queues of a block or two, so that a table of 16 blocks is a large one."""
    monkeypatch.setattr(part_writer, "FILE_BYTES", 1)
    monkeypatch.setattr(staging, "AHEAD_BLOCKS", 2)
    rows, dim, block = 120_000, 64, 1 << 21
    room = {"segment_bytes": 1 << 26, "memory_bytes": 1 << 30}
    source, target = make(1, **room), make(1, **room)
    source.create(schema(dim=dim))
    ones = np.ones((rows, dim), np.float32)
    for keys in np.split(np.arange(rows, dtype=np.uint64), 6):
        counts = np.ones(len(keys), np.uint64)
        source.nodes[0].shard.write_rows(1, 1, keys, counts, ones[: len(keys)])
    one, other = source.nodes[0], target.nodes[0]

    def read(**request: str) -> None:
        for _ in one.checkpoints.rows.read_rows(pb.ReadRowsRequest(**request)):
            pass

    def peak(work: Callable[[], Any]) -> float:
        """In blocks."""
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1] / block
        finally:
            tracemalloc.stop()

    peaks = {
        "base": peak(one.home.flush),
        "named": peak(lambda: source.checkpoint("full")),
        "verify": peak(lambda: source.verify("full")),
        "live": peak(lambda: read(table="t")),
        "stored": peak(lambda: read(table="t", checkpoint="full")),
        "restore": peak(lambda: other.prepare("full", ID)),
    }
    other.step(ID, Step.STEP_ABORT)
    target.create(schema("u", dim=dim))
    peaks["load"] = peak(lambda: target.load(name="full", table="t", into="u"))
    most = {"base": 1, "named": 2, "verify": 4, "live": 1, "stored": 4, "restore": 9, "load": 6}
    assert {name for name, size in peaks.items() if size > most[name]} == set(), peaks
    assert one.shard.describe("t")[1].bytes > 16 * block
