"""What a shard knows of keys, and that telling it changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from homes import Homes
from stores import (
    Home,
    analyses_of,
    change,
    contents,
    make_shard,
    push,
    schema,
    shard_of_all_kinds,
)

from psproto import ps_pb2 as pb
from psproto import routing
from psserver import inspection
from psserver.analysis import Analyses
from psserver.errors import BadRequest, TooLarge, WrongShard
from psserver.shard import Shard
from storage.admission.rules import make_admission
from storage.errors import UnknownTable
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


# ---- keys


def inspected(shard: Shard, *keys: int, log: Any = None, **more: Any) -> dict[int, pb.KeyFacts]:
    array = np.array([key % (1 << 64) for key in keys], np.uint64)
    request = pb.InspectRequest(table="t", keys=array.tobytes(), **more)
    response = analyses_of(shard, log=log).inspect(request)
    assert [facts.key for facts in response.keys] == array.tolist()
    assert (response.version, response.created) == (shard.version, 1)
    return dict(zip(keys, response.keys, strict=True))


def test_a_key_with_a_row_tells_where_it_is(shard: Shard) -> None:
    shard.exchange([push([7, -7 % (1 << 64)], 2.0, step=177)], [])
    known = inspected(shard, 7, -7, embeddings=True)
    dump = shard.dump()["t"]
    for key, facts in known.items():
        at = int(np.searchsorted(dump.keys, np.uint64(key % (1 << 64))))
        row = dump.rows[at]
        assert facts.state == State.STATE_ROW
        assert facts.tier in ("hbm", "host", "lmdb")
        assert (facts.version, facts.step) == (shard.version, 177)
        assert facts.frequency == dump.meta[at, 3]
        assert facts.embedding == row.tolist()
        assert facts.norm == pytest.approx(float(np.linalg.norm(row)))
    assert not inspected(shard, 7)[7].embedding


def test_a_key_that_was_never_pushed_is_new(shard: Shard) -> None:
    assert {facts.state for facts in inspected(shard, 5000, -5000).values()} == {State.STATE_NEW}


def test_a_key_that_waits_tells_with_how_many_occurrences() -> None:
    shard = make_shard()
    shard.create_table(schema(admission=COUNTING))
    shard.exchange([push([1, 2, 3]), push([2, 3]), push([3])], [])
    known = inspected(shard, 1, 2, 3, 4)
    assert [(f.state, f.waiting) for f in known.values()] == [
        (State.STATE_WAITING, 1),
        (State.STATE_WAITING, 2),
        (State.STATE_ROW, 0),
        (State.STATE_NEW, 0),
    ]


def evict(shard: Shard) -> None:
    number, sweep = shard.sweeps.begin("t", False)
    while not sweep.done:
        shard.sweeps.take_slice(number, sweep)


def test_an_evicted_key_tells_by_which_rule_and_at_which_step(home: Home) -> None:
    shard = home.shard
    shard.create_table(schema(admission=COUNTING, evictions=TTL))
    shard.exchange([push([1, 2, 3], counts=np.full(3, 3, np.uint32), step=5)], [])
    shard.exchange([push([3], step=20)], [])
    evict(shard)
    shard.delete(change([3]))
    shard.exchange([push([2], step=21)], [])
    home.written()
    known = inspected(shard, 1, 2, 3, log=home.log)
    assert [facts.state for facts in known.values()] == [
        State.STATE_GONE,
        State.STATE_WAITING,
        State.STATE_GONE,
    ]
    ttl = State.Gone(version=4, cause="step_ttl", time_us=1_500_000, step=20)
    request = State.Gone(version=5, cause="request", time_us=1_500_000, step=20)
    assert [list(facts.gone) for facts in known.values()] == [[ttl], [ttl], [request]]
    for _ in range(40):  # until the log has another segment
        shard.exchange([push(range(100, 300), step=21)], [])
    home.flush()
    assert home.log.first > 4
    [gone] = inspected(shard, 1, log=home.log)[1].gone
    assert gone == State.Gone(version=4, cause="step_ttl")


def test_a_key_that_came_back_remembers_that_it_went(shard: Shard) -> None:
    shard.exchange([push([0])], [])
    shard.delete(change([0]))
    shard.exchange([push([0])], [])
    facts = inspected(shard, 0)[0]
    assert facts.state == State.STATE_ROW
    assert [(gone.version, gone.cause) for gone in facts.gone] == [
        (42, "request"),
        (45, "request"),
    ]


def test_a_key_that_went_and_came_often_costs_no_more_than_one_that_did_not(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each record of the log takes about a millisecond: 20,000 of them kept a worker for 26 s."""
    shard, reads = home.shard, []
    shard.create_table(schema())
    gone: dict[int, list[int]] = {1: [], 2: []}
    for number in range(60):
        some = [1, 2] if number % 3 else [1]
        shard.exchange([push(some, step=number)], [])
        shard.delete(change(some))
        for key in some:
            gone[key].append(shard.version)
    home.written()
    real = home.log.read
    monkeypatch.setattr(home.log, "read", lambda *a, **k: reads.append(a) or real(*a, **k))
    monkeypatch.setattr(inspection, "DEAD", 7)
    monkeypatch.setattr(inspection, "MAX_READS", 5)
    known = inspected(shard, 1, 2, log=home.log)
    for key, facts in known.items():
        assert facts.state == State.STATE_GONE
        assert [each.version for each in facts.gone] == gone[key][-16:]
        assert {each.cause for each in facts.gone} == {"request"}
    assert len(reads) == 5
    assert [each.HasField("step") for each in known[1].gone] == [False] * 11 + [True] * 5


def test_where_deletes_are_forgotten_it_is_not_known_what_was() -> None:
    shard = make_shard(max_tombstones=4)
    shard.create_table(schema())
    shard.exchange([push(range(10))], [])
    shard.delete(change([0, 1, 2, 3]))
    shard.delete(change([4]))
    known = inspected(shard, 0, 4, 5, 99)
    assert [facts.state for facts in known.values()] == [
        State.STATE_UNKNOWN,
        State.STATE_GONE,
        State.STATE_ROW,
        State.STATE_UNKNOWN,
    ]
    assert known[0].why == known[99].why == "deletes up to version 3 may have lost their tombstones"


def test_behind_a_restore_it_is_not_known_what_was_and_of_later_tables_it_is(
    tmp_path: Path,
) -> None:
    with Homes(tmp_path / "source", 1, f"file://{tmp_path}/checkpoints") as homes:
        homes.create(schema(evictions=TTL))
        homes.push(range(10), step=1)
        homes.push([99], step=50)
        evict(homes.nodes[0].shard)
        homes.checkpoint("a")
        homes.restore("a", replace=True)
        homes.create(schema("later"))
        [node] = homes.nodes
        asked = [
            pb.InspectRequest(table=table, keys=np.array([3, 99], np.uint64).tobytes())
            for table in ("t", "later")
        ]
        work = Analyses(node.shard, node.engine, node.checkpoints, None)
        told = [[(facts.state, facts.why) for facts in work.inspect(each).keys] for each in asked]
    assert told == [
        [
            (State.STATE_UNKNOWN, "deletes up to version 4 may have lost their tombstones"),
            (State.STATE_ROW, ""),
        ],
        [(State.STATE_NEW, "")] * 2,
    ]


def test_deletes_of_another_table_are_not_this_one_s(shard: Shard) -> None:
    shard.create_table(schema("u"))
    shard.exchange([push([9000], table="u")], [])
    shard.delete(change([9000], table="u"))
    assert inspected(shard, 9000)[9000].state == State.STATE_NEW


FORGETFUL = [
    ("probability", {"p": 1e-9}, "the probability rule does not record keys that it did not admit"),
    ("sketch", {"expected_keys": 10}, "a sketch loses counts as it ages"),
    ("counter", {"threshold": 3, "max_keys": 2}, "1 counters were dropped for age or room"),
]


@pytest.mark.parametrize(("name", "parameters", "why"), FORGETFUL)
def test_where_an_admission_rule_forgets_it_is_not_known_what_was(
    name: str, parameters: dict[str, float], why: str
) -> None:
    shard = make_shard()
    shard.create_table(schema(admission=make_admission(name, parameters)))
    for key in range(3):
        shard.exchange([push([key])], [])
    facts = inspected(shard, 12345)[12345]
    assert (facts.state, facts.why) == (State.STATE_UNKNOWN, why)


def test_where_counters_have_expired_it_is_not_known_what_was() -> None:
    shard = make_shard()
    shard.create_table(schema(admission=COUNTING, evictions=TTL))
    shard.exchange([push([1], step=0)], [])
    assert inspected(shard, 2)[2].state == State.STATE_NEW
    for step in range(1, 40):
        shard.exchange([push([3], step=step)], [])
    facts = inspected(shard, 2)[2]
    assert facts.state == State.STATE_UNKNOWN
    assert facts.why.startswith("counters not updated after version")


def test_an_inspection_says_the_rule_and_the_step_of_the_table(shard: Shard) -> None:
    response = analyses_of(shard).inspect(pb.InspectRequest(table="t"))
    assert (response.step, response.admission.name, list(response.keys)) == (108, "always", [])


def test_keys_that_make_no_sense_are_refused(shard: Shard) -> None:
    def ask(data: bytes, table: str = "t") -> None:
        analyses_of(shard).inspect(pb.InspectRequest(table=table, keys=data))

    with pytest.raises(BadRequest, match="must have 8 bytes per key, got 7 bytes"):
        ask(bytes(7))
    with pytest.raises(BadRequest, match="distinct"):
        ask(bytes(16))
    with pytest.raises(TooLarge, match="at most 1000 keys in a request, got 1001"):
        ask(np.arange(1001, dtype=np.uint64).tobytes())
    with pytest.raises(UnknownTable):
        ask(bytes(8), "u")
    other = make_shard(shard_map=routing.even_map(2))
    other.create_table(schema())
    strays = np.arange(64, dtype=np.uint64)
    with pytest.raises(WrongShard, match="belongs to shard 1"):
        analyses_of(other).inspect(pb.InspectRequest(table="t", keys=strays.tobytes()))


# ---- nothing changes


RULES = ["always", "counter", "sketch", "probability"]


@pytest.mark.parametrize("rule", RULES)
def test_neither_an_analysis_nor_an_inspection_changes_anything(home: Home, rule: str) -> None:
    shard = home.shard
    parameters: dict[str, float] = {"expected_keys": 1000} if rule == "sketch" else {}
    shard.create_table(schema(admission=make_admission(rule, parameters), evictions=TTL))
    rng = np.random.default_rng(1)
    for step in range(30):
        shard.exchange([push(np.unique(rng.integers(0, 200, 20)).tolist(), step=step)], [])
    evict(shard)
    shard.delete(change(range(20)))
    before, last = state_of(shard), home.log.last
    asked = {"columns": Columns.COLUMNS_EMBEDDING, "top": 10, "frequencies": [3], "grace": 4}
    assert list(analyses_of(shard).analyze(pb.AnalyzeRequest(table="t", **asked)))
    inspected(shard, *range(-50, 300), embeddings=True, log=home.log)
    assert state_of(shard) == before
    assert home.log.last == last


def state_of(shard: Shard) -> dict[str, Any]:
    """Everything, the budget and what rules and gates keep to themselves included."""
    table = shard._tables.get("t").table
    dump = table.dump()
    return {
        "contents": contents(shard),
        "counters": dump.counters.tolist(),
        "cells": dump.cells.tolist(),
        "policy": table.evictor.pack(),
        "tally": repr(table.tally),
        "held": shard.budget.held,
        "gate": {k: v for k, v in vars(table.gate).items() if isinstance(v, int | float)},
        "stats": table.stats(),
        "horizon": shard.tombstone_horizon,
    }
