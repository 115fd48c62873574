"""What a shard says about its tables and keys, and that saying it changes nothing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from homes import Homes
from numpy.testing import assert_array_equal
from stores import Direct, Home, analyses_of, change, make_shard, push, schema, shard_of_all_kinds

from psproto import ps_pb2 as pb
from psserver import analysis, outbox, pace
from psserver.analysis import Analyses
from psserver.checkpoints import Checkpoints
from psserver.errors import BadRequest, Draining
from psserver.pace import SPARED_STORED, Pace
from psserver.shard import Shard
from storage.admission.rules import make_admission
from storage.analysis import AGES, FREQUENCIES, NORMS, edges_of
from storage.errors import UnknownCheckpoint, UnknownTable
from storage.eviction.rules import make_eviction

Columns = pb.AnalyzeRequest.Columns
State = pb.KeyFacts
U64 = 2**64 - 1
COUNTING = make_admission("counter", {"threshold": 3})
TTL = (make_eviction("step_ttl", {"steps": 10}),)


@pytest.fixture
def shard() -> Shard:
    return shard_of_all_kinds()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path / "shard") as home:
        yield home


def answers(shard: Shard, **fields: Any) -> list[pb.AnalyzeResponse]:
    return list(analyses_of(shard).analyze(pb.AnalyzeRequest(table="t", **fields)))


def columns_of(messages: list[pb.AnalyzeResponse]) -> dict[str, np.ndarray]:
    kinds = {"keys": "<u8", "versions": "<u8", "steps": "<i8", "frequencies": "<u8"}
    kinds |= {"norms": "<f8", "embeddings": "<f4"}
    return {
        field: np.concatenate([np.frombuffer(getattr(m, field), kind) for m in messages])
        for field, kind in kinds.items()
    }


def tiers_of(shard: Shard, keys: Any) -> list[str]:
    """Return the tier of each row of table "t"."""
    table = shard._tables.get("t").table
    return table.tiers_of(table.store.find(keys)[0])


# ---- tables


@pytest.mark.parametrize("slice_rows", [1, 7, 4096])
def test_a_summary_says_what_is_in_the_table(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, slice_rows: int
) -> None:
    monkeypatch.setattr(analysis, "SLICE_ROWS", slice_rows)
    asked = {"frequencies": [3], "ages": [10, 33], "norms": [0.7]}
    *_, last = answers(shard, **asked, grace=20, top=4)
    told, dump = last.summary, shard.dump()["t"]
    versions, steps, frequencies = dump.meta[:, 1], dump.meta[:, 2].view(np.int64), dump.meta[:, 3]
    norms = np.sqrt((dump.rows.astype(np.float64) ** 2).sum(axis=1))
    ages = 108 - steps
    n = len(dump.keys)
    assert (last.done, last.total, told.rows, told.step) == (n, n, n, 108)
    assert (told.version, told.last_version, told.width) == (shard.version, shard.version, 2)
    assert told.schema.name == "t"
    assert told.occurrences == int(frequencies.sum())
    assert told.norm_sum == pytest.approx(float(norms.sum()))
    for histogram, usual, edges, values, side in (
        (told.frequencies, FREQUENCIES, [3], frequencies, "right"),
        (told.ages, AGES, [10, 33], ages, "left"),
        (told.norms, NORMS, [0.7], norms, "right"),
        (told.idle_norms, NORMS, [0.7], norms[ages >= 20], "right"),
    ):
        every = edges_of(usual, edges)
        buckets = np.searchsorted(every, values.astype(np.float64), side)  # type: ignore[call-overload]
        assert histogram.edges == every.tolist()
        assert histogram.counts == np.bincount(buckets, minlength=len(every) + 1).tolist()
    names = [tier.name for tier in told.tiers]
    assert names in (["host"], ["host", "lmdb"])
    assert sum(tier.rows for tier in told.tiers) == n
    if names == ["host"]:
        parts = told.tiers[0].bytes + told.index_bytes + told.waiting_bytes
        assert parts == shard.describe("t")[1].bytes
    order = np.lexsort((dump.keys, -frequencies.astype(float)))[:4]
    assert told.most_frequent.keys == dump.keys[order].tolist()
    assert told.most_frequent.versions == versions[order].tolist()
    assert told.most_frequent.steps == steps[order].tolist()
    assert told.most_frequent.tiers == tiers_of(shard, dump.keys[order])
    assert told.smallest.norms == pytest.approx(np.sort(norms)[:4].tolist())


@pytest.mark.parametrize("columns", [Columns.COLUMNS_METADATA, Columns.COLUMNS_EMBEDDING])
def test_rows_come_with_the_summary_if_they_are_wanted(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, columns: Any
) -> None:
    monkeypatch.setattr(analysis, "SLICE_ROWS", 7)
    monkeypatch.setattr(outbox, "MESSAGE_BYTES", 1000)
    *messages, last = answers(shard, columns=columns)
    assert len(messages) > 5
    assert {message.tier for message in messages} == set(tiers_of(shard, shard.dump()["t"].keys))
    found, dump = columns_of(messages), shard.dump()["t"]
    order = np.argsort(found["keys"])
    assert_array_equal(found["keys"][order], dump.keys)
    assert_array_equal(found["versions"][order], dump.meta[:, 1])
    assert_array_equal(found["steps"][order], dump.meta[:, 2].view(np.int64))
    assert_array_equal(found["frequencies"][order], dump.meta[:, 3])
    embeddings = dump.rows if columns == Columns.COLUMNS_EMBEDDING else dump.rows[:0]
    rows = found["embeddings"].reshape(-1, 2)
    assert_array_equal(rows[order] if len(rows) else rows, embeddings)
    assert found["norms"].sum() == pytest.approx(last.summary.norm_sum)
    assert not last.keys


def test_an_empty_table_has_a_summary_of_nothing() -> None:
    shard = make_shard()
    shard.create_table(schema())
    [last] = answers(shard, columns=Columns.COLUMNS_METADATA, top=3)
    assert (last.summary.rows, last.summary.step, last.done) == (0, 0, 0)
    assert not any(last.summary.ages.counts)


def test_keys_that_wait_are_counted_beside_the_rows() -> None:
    shard = make_shard()
    shard.create_table(schema(admission=COUNTING))
    shard.exchange([push(range(100)), push(range(10)), push(range(3))], [])
    *_, last = answers(shard)
    assert (last.summary.rows, last.summary.waiting) == (3, 97)
    assert last.summary.waiting_bytes == shard.describe("t")[1].counter_bytes > 0


def test_what_a_checkpoint_holds_is_summed_up_alike(tmp_path: Path) -> None:
    """Of a chain of checkpoints, with deletes, on other shards than it was taken from."""
    url = f"file://{tmp_path}/checkpoints"
    request = pb.AnalyzeRequest(table="t", ages=[7], norms=[1.5], top=5, grace=2)
    with Homes(tmp_path / "source", 3, url) as source, Homes(tmp_path / "two", 2, url) as two:
        source.create(schema())
        source.push(range(300), 1.0, step=1)
        source.push(range(100, 200), 2.0, step=7)
        source.checkpoint("a")
        source.push(range(50, 400), 0.5, step=9)
        source.delete(range(0, 50, 2))
        source.checkpoint("b", base="a")
        live = [last_of(node, request) for node in source.nodes]
        source.push(range(1000), 3.0, step=20)
        request.checkpoint = "b"
        same = [last_of(node, request) for node in source.nodes]
        fewer = [last_of(node, request) for node in two.nodes]
        for summary, wanted in zip(same, live, strict=True):
            for field in ("rows", "step", "occurrences", "frequencies", "ages", "norms"):
                assert getattr(summary, field) == getattr(wanted, field)
            assert summary.largest.keys == wanted.largest.keys
            assert summary.idle_norms == wanted.idle_norms
            assert [tier.name for tier in summary.tiers] == ["checkpoint"]
        for field in ("frequencies", "ages", "norms"):
            counts = [[getattr(part, field).counts for part in parts] for parts in (fewer, live)]
            assert_array_equal(np.sum(counts[0], axis=0), np.sum(counts[1], axis=0))
        request.columns = Columns.COLUMNS_EMBEDDING
        messages = [m for node in two.nodes for m in run(node, request)]
        found = columns_of([m for m in messages if m.keys])
        assert len(np.unique(found["keys"])) == sum(part.rows for part in live) == 375
        want = {k: -1.0 * (k < 300) - 2 * (100 <= k < 200) - 0.5 * (k >= 50) for k in range(400)}
        rows = zip(found["keys"].tolist(), found["embeddings"].reshape(-1, 2).tolist(), strict=True)
        assert all(row == [want[key]] * 2 for key, row in rows)
        request.table = "u"
        with pytest.raises(UnknownTable):
            run(two.nodes[0], request)
        request.checkpoint = "c"
        with pytest.raises(UnknownCheckpoint):
            run(two.nodes[0], request)


def run(node: Any, request: pb.AnalyzeRequest) -> list[pb.AnalyzeResponse]:
    pace = Pace(node.engine, 0.0)
    return list(Analyses(node.shard, node.engine, node.checkpoints, None, pace).analyze(request))


def last_of(node: Any, request: pb.AnalyzeRequest) -> pb.Summary:
    return run(node, request)[-1].summary


BAD = [
    ({"frequencies": [0]}, "frequencies must be in 1..4.29497e+09, got 0"),
    ({"frequencies": [1 << 32]}, "frequencies must be in"),
    ({"ages": [(1 << 48) + 1]}, "ages must be in"),
    ({"norms": [0.0]}, "norms must be finite and above 0, got 0.0"),
    ({"norms": [-1.0]}, "norms must be"),
    ({"norms": [float("inf")]}, "norms must be"),
    ({"norms": [float("nan")]}, "norms must be"),
    ({"grace": (1 << 48) + 1}, "grace must be in"),
    ({"top": 1001}, "top must be in 0..1000, got 1001"),
    ({"frequencies": range(1, 300)}, "frequencies may have at most 256 edges, got 299"),
    ({"columns": 9}, "columns must be one of [0, 1, 2], got 9"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: str(value)[:40])
def test_what_makes_no_sense_is_refused(shard: Shard, fields: Any, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        answers(shard, **fields)
    assert message in str(caught.value)


def small_messages(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> Iterator[pb.AnalyzeResponse]:
    """The messages about a table, a slice in each and before the next is read."""
    monkeypatch.setattr(analysis, "SLICE_ROWS", 7)
    monkeypatch.setattr(outbox, "MESSAGE_BYTES", 1)
    request = pb.AnalyzeRequest(table="t", columns=Columns.COLUMNS_METADATA)
    return analyses_of(shard).analyze(request)


def test_a_table_that_is_dropped_meanwhile_is_not_there(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = small_messages(shard, monkeypatch)
    next(messages)
    shard.drop_table("t")
    shard.create_table(schema())
    with pytest.raises(UnknownTable):
        list(messages)
    with pytest.raises(UnknownTable):
        answers(make_shard())


def test_rows_that_change_meanwhile_are_seen_as_they_are_then(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = small_messages(shard, monkeypatch)
    before = set(shard.dump()["t"].keys.tolist())
    first = set(np.frombuffer(next(messages).keys, "<u8").tolist())
    rest = sorted(before - first)
    shard.delete(change(rest[:20]))
    shard.exchange([push(rest[20:], step=1000)], [])
    *others, last = messages
    found = columns_of(others)
    assert sorted(found["keys"].tolist()) == rest[20:]
    assert set(found["steps"].tolist()) == {1000}
    assert last.summary.ages.counts[0] >= len(rest[20:])  # pushed later than it began: age 0
    assert last.summary.last_version == shard.version == last.summary.version + 2


def test_a_server_that_stops_gives_up(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "SLICE_ROWS", 7)
    engine: Any = Direct()
    checkpoints = Checkpoints(shard, engine, None, None, None)
    work = Analyses(shard, engine, checkpoints, None, Pace(engine, 0.0))
    monkeypatch.setattr(outbox, "PROGRESS_SECONDS", 0.0)
    messages = work.analyze(pb.AnalyzeRequest(table="t"))
    assert next(messages).done == 7
    checkpoints.work.stop()
    with pytest.raises(Draining):
        next(messages)


@pytest.mark.parametrize("base", ["", "a"])
def test_a_checkpoint_tells_how_many_keys_wait_and_a_sketch_is_not_in_it(
    tmp_path: Path, base: str
) -> None:
    url = f"file://{tmp_path}/checkpoints"
    with Homes(tmp_path / "source", 2, url) as source, Homes(tmp_path / "three", 3, url) as three:
        source.create(schema(admission=COUNTING))
        source.create(schema("s", admission=make_admission("sketch", {"threshold": 3})))
        source.push(range(1000))
        source.push(range(500), table="s")
        source.checkpoint("a")
        source.push(range(900, 1100))
        source.push(range(10))
        source.push(range(10))
        source.checkpoint("b", base=base)
        told = [
            [last_of(node, pb.AnalyzeRequest(table=table, checkpoint="b")) for node in three.nodes]
            for table in "ts"
        ]
    assert [
        [sum(each.rows for each in parts), sum(each.waiting for each in parts)] for parts in told
    ] == [[10, 1090], [0, 0]]


def test_a_checkpoint_is_read_with_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    ticks = itertools.count(0.0, 0.001)
    clock = SimpleNamespace(
        thread_time=lambda: next(ticks), sleep=slept.append, monotonic=time.monotonic
    )
    with Homes(tmp_path / "source", 1, f"file://{tmp_path}/checkpoints") as source:
        source.create(schema(admission=COUNTING))
        for _ in range(3):
            source.push(range(1000))
        source.checkpoint("a")
        monkeypatch.setattr(pace, "time", clock)
        [node] = source.nodes
        work = Analyses(node.shard, node.engine, node.checkpoints, None)
        *_, last = work.analyze(pb.AnalyzeRequest(table="t", checkpoint="a"))
    assert last.summary.rows == 1000
    assert len(slept) > 4
    assert slept == [pytest.approx(SPARED_STORED * 0.001)] * len(slept)
