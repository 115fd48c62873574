"""Every change is one record of the log, and the records alone bring back the shard."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from blocks import pack_rows, pack_tombstones
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import DIM, change, contents, make_shard, push, schema

from psproto import ps_pb2 as pb
from psserver import sequencer as sequencer_module
from psserver.errors import BadRequest, Overloaded, SessionExpired
from psserver.requests import Pull
from psserver.schemas import from_json
from psserver.shard import Shard
from psserver.tombstones import joined
from storage import records
from storage.basestate import BaseState, BaseTable
from storage.block import unpack
from storage.errors import Corrupt, DiskFull, SchemaMismatch, UnknownTable
from storage.history import History
from storage.optimizers import OPTIMIZERS, make_optimizer
from storage.records import Cause, Kind, decode
from storage.segment import Frame

U64 = 2**64 - 1


class Log:
    """A log in memory. ``reserved`` are the sizes that the last call asked for."""

    lineage = bytes(16)
    epoch = 1

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.last = self.written = self.durable = 0
        self.memory = 0
        self.reserved: tuple[int, ...] = ()
        self.full = False
        self.lazy: list[tuple[int, int, Any]] = []  # appended, not written
        self.writes = True

    def reserve(self, *sizes: int) -> None:
        if self.full:
            raise DiskFull("log", sum(sizes))
        self.reserved = sizes

    def append(self, version: int, kind: int, parts: Any) -> None:
        assert version == self.last + 1
        self.last = version
        self.lazy.append((version, kind, parts))
        if self.writes:
            self.write()

    def write(self) -> None:
        for version, kind, parts in self.lazy:
            payload = memoryview(b"".join(memoryview(part).tobytes() for part in parts))
            self.frames.append(Frame(version, kind, payload))
            self.written = version
        self.lazy = []

    def records(self) -> list[records.Record]:
        return [decode(frame) for frame in self.frames]


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def shard(log: Log) -> Shard:
    shard = make_shard(log=log)
    shard.create_table(schema())
    return shard


def replayed(log: Log, **changes: Any) -> Shard:
    """A new shard after all records."""
    shard = make_shard(**changes)
    for frame in log.frames:
        shard.recovery.replay(frame.version, decode(frame))
    return shard


# ---- one record a change


def test_each_kind_of_change_is_a_record_of_the_next_version(shard: Shard, log: Log) -> None:
    who = {"client": 7, "incarnation": 2, "sequence": 3, "acknowledged": 0}
    then = {**who, "sequence": 4, "acknowledged": 2}
    shard.exchange([push([5, U64], 2.0, step=-4, **who)], [])
    shard.delete(change([U64, 6], **then))
    assert shard.barrier("epoch-1") == 4
    shard.drop_table("t")
    assert [(frame.version, frame.kind) for frame in log.frames] == [
        (1, Kind.CREATE),
        (2, Kind.PUSH),
        (3, Kind.DELETE),
        (4, Kind.BARRIER),
        (5, Kind.DROP),
    ]
    created, pushed, deleted, barrier, dropped = log.records()
    assert isinstance(created, records.CreateRecord)
    assert (created.table, from_json(created.schema)) == (1, schema())
    assert isinstance(pushed, records.PushRecord)
    assert pushed.origin == records.Origin(**who, step=-4, time_us=1_500_000)
    assert (pushed.table, pushed.keys.tolist()) == (1, [5, U64])
    assert pushed.frequencies.tolist() == [1, 1]
    assert pushed.rows.tolist() == [[-2.0, -2.0]] * 2
    assert isinstance(deleted, records.DeleteRecord)
    assert deleted.origin == records.Origin(**then, step=-4, time_us=1_500_000)  # the table's step
    assert (deleted.table, deleted.cause, deleted.keys.tolist()) == (1, Cause.REQUEST, [U64])
    assert isinstance(barrier, records.BarrierRecord)
    assert barrier.name == "epoch-1"
    assert isinstance(dropped, records.DropRecord)
    assert dropped.table == 1


def test_what_changes_nothing_is_no_record(shard: Shard, log: Log) -> None:
    shard.exchange([push([1], client=7, sequence=1)], [])
    before = len(log.frames)
    shard.create_table(schema())
    shard.exchange([push([1], client=7, sequence=1)], [])
    shard.delete(change([1], client=7, sequence=1))
    shard.exchange([], [Pull("t", np.array([1], np.uint64), pb.DTYPE_FLOAT32, "train", True, 0)])
    shard.describe("t")
    shard.capture()
    assert len(log.frames) == before
    assert shard.version == log.last == before


def test_numbers_of_tables_are_never_used_again(shard: Shard, log: Log) -> None:
    for _ in range(3):
        shard.drop_table("t")
        shard.create_table(schema())
    made = [record.table for record in log.records() if isinstance(record, records.CreateRecord)]
    assert made == [1, 2, 3, 4]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_push_is_logged_with_the_whole_rows_that_it_left(log: Log, optimizer: str) -> None:
    made = schema(optimizer=make_optimizer(optimizer, 0.1, {}))
    shard = make_shard(log=log)
    shard.create_table(made)
    rng = np.random.default_rng(1)
    for step in range(5):
        keys = rng.choice(6, 4, replace=False)
        counts = rng.integers(1, 9, 4).astype(np.uint32)
        gradients = rng.normal(size=(4, DIM)).astype(np.float32)
        shard.exchange([push(keys.tolist(), gradients=gradients, counts=counts, step=step)], [])
        record = decode(log.frames[-1])
        assert isinstance(record, records.PushRecord)
        dump = shard.dump()["t"]
        at = np.searchsorted(dump.keys, record.keys)
        assert np.array_equal(record.rows, dump.rows[at])
        assert np.array_equal(record.frequencies, dump.meta[at, 3])
    assert contents(replayed(log)) == contents(shard)


def test_rows_wait_in_memory_of_their_own_until_they_are_written(shard: Shard, log: Log) -> None:
    log.writes = False
    for value in range(1, 50):
        shard.exchange([push([1, 2, 3], 1.0), push([1], float(value))], [])
        if value % 10 == 0:
            log.write()
    log.write()
    pushed = [record for record in log.records() if isinstance(record, records.PushRecord)]
    total, want = 0.0, []
    for value in range(1, 50):
        want += [-(total + 1), -(total + 1 + value)]
        total += 1 + value
    assert [float(record.rows[0, 0]) for record in pushed] == want
    assert contents(replayed(log)) == contents(shard)


def test_the_reservation_covers_every_record_of_an_exchange(shard: Shard, log: Log) -> None:
    shard.create_table(schema("wide", dim=5, optimizer=make_optimizer("adam", 0.1, {})))
    assert len(log.frames[-1].payload) <= sum(log.reserved)
    pushes = [push(list(range(n))) for n in (1, 0, 9)]
    pushes.append(push([1, 2], table="wide", gradients=np.ones((2, 5), np.float32)))
    before = len(log.frames)
    shard.exchange(pushes, [])
    sizes = [len(frame.payload) for frame in log.frames[before:]]
    assert len(log.reserved) == len(sizes)
    assert all(size <= room for size, room in zip(sizes, log.reserved, strict=True))
    changes: list[Callable[[], Any]] = [
        lambda: shard.delete(change([0, 1, 2, 77])),
        lambda: shard.barrier("b" * 128),
        lambda: shard.drop_table("wide"),
        lambda: shard.create_table(schema("n" * 128)),
    ]
    for call in changes:
        call()
        assert len(log.frames[-1].payload) <= sum(log.reserved)


# ---- refused before anything happened

CHANGES: dict[str, Callable[[Shard], Any]] = {
    "push": lambda shard: shard.exchange([push([1, 9]), push([2])], []),
    "delete": lambda shard: shard.delete(change([1])),
    "create": lambda shard: shard.create_table(schema("u")),
    "drop": lambda shard: shard.drop_table("t"),
    "barrier": lambda shard: shard.barrier("b"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_full_disk_refuses_a_change_before_it_is_made(shard: Shard, log: Log, what: str) -> None:
    shard.exchange([push([1, 2], client=7, sequence=1)], [])
    before = contents(shard)
    log.full = True
    for _ in range(2):
        with pytest.raises(DiskFull):
            CHANGES[what](shard)
        assert contents(shard) == before
        assert log.last == before["version"]
    pulled = shard.exchange(
        [], [Pull("t", np.array([1], np.uint64), pb.DTYPE_FLOAT32, "train", False, 0)]
    )
    assert pulled.pulls[0].embeddings.tolist() == [[-1.0, -1.0]]
    log.full = False
    CHANGES[what](shard)
    assert contents(replayed(log)) == contents(shard)


@pytest.mark.parametrize("what", CHANGES)
def test_a_log_that_is_far_behind_refuses_a_change_before_it_is_made(
    shard: Shard, log: Log, what: str
) -> None:
    shard.exchange([push([1, 2])], [])
    before = contents(shard)
    log.memory = sequencer_module.MAX_BACKLOG + 1
    with pytest.raises(Overloaded, match="bytes of memory, more than the limit of") as caught:
        CHANGES[what](shard)
    assert caught.value.retry_after
    assert contents(shard) == before
    log.memory = sequencer_module.MAX_BACKLOG
    CHANGES[what](shard)


def test_a_repeated_push_is_answered_although_the_disk_is_full(shard: Shard, log: Log) -> None:
    """It may as well be refused; what it must not do is to be applied again."""
    first = push([1], client=7, sequence=1)
    shard.exchange([first], [])
    before = contents(shard)
    log.full = True
    try:
        answer = shard.exchange([first], []).pushes[0]
        assert answer.duplicate
    except DiskFull:
        pass
    assert contents(shard) == before


# ---- deletes


def test_delete_answers_how_many_left_and_its_version(shard: Shard) -> None:
    shard.exchange([push([1, 2, 3])], [])
    done = shard.delete(change([3, 9, 1]))
    assert (done.version, done.deleted, done.duplicate) == (3, 2, False)
    done = shard.delete(change([3, 9, 1]))
    assert (done.version, done.deleted) == (4, 0)
    assert shard.dump()["t"].keys.tolist() == [2]


def test_a_repeated_delete_takes_effect_once(shard: Shard, log: Log) -> None:
    first = change([1, 2], client=7, sequence=1)
    shard.exchange([push([1, 2])], [])
    assert shard.delete(first).deleted == 2
    shard.exchange([push([1], client=7, sequence=2)], [])
    again = shard.delete(first)
    assert (again.version, again.duplicate, again.deleted) == (3, True, 0)
    assert shard.dump()["t"].keys.tolist() == [1]
    after = replayed(log)
    assert after.delete(first).duplicate


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (change([1], table="x"), UnknownTable),
        (change([1], client=7, sequence=9, acknowledged=8), SessionExpired),
        (change([1], client=7, sequence=0), BadRequest),
    ],
)
def test_a_bad_delete_changes_nothing(shard: Shard, bad: Any, error: Any) -> None:
    shard.exchange([push([1, 2])], [])
    before = contents(shard)
    with pytest.raises(error):
        shard.delete(bad)
    assert contents(shard) == before


def tombstones(shard: Shard) -> list[tuple[int, list[int]]]:
    """Return the deleted keys, by the version of their delete."""
    found: dict[int, list[int]] = {}
    dead = joined(shard.capture().tombstones)
    for version, key in zip(dead.versions.tolist(), dead.keys.tolist(), strict=True):
        found.setdefault(version, []).append(key)
    return list(found.items())


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 100])
def test_no_more_tombstones_are_kept_than_the_limit_and_the_horizon_says_which(
    log: Log, limit: int
) -> None:
    shard = make_shard(log=log, max_tombstones=limit)
    shard.create_table(schema())
    shard.exchange([push(list(range(10)))], [])
    every: list[tuple[int, list[int]]] = []
    for keys in ([0], [1, 2], [3], [99], [4, 5, 6], [7]):
        shard.delete(change(keys))
        if keys != [99]:
            every.append((shard.version, keys))
        kept = tombstones(shard)
        assert sum(len(keys) for _, keys in kept) <= limit
        assert kept == [each for each in every if each[0] > shard.tombstone_horizon]
        again = replayed(log, max_tombstones=limit)
        assert tombstones(again) == kept
        assert again.tombstone_horizon == shard.tombstone_horizon
    assert (shard.tombstone_horizon == 0) == (limit == 100)


# ---- replay and base state

operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("push"),
            st.sampled_from(["t", "u"]),
            st.lists(st.integers(0, 9), unique=True, max_size=5),
        ),
        st.tuples(
            st.just("delete"),
            st.sampled_from(["t", "u"]),
            st.lists(st.integers(0, 9), unique=True, max_size=5),
        ),
        st.tuples(st.sampled_from(["create", "drop"]), st.sampled_from(["t", "u"]), st.just([])),
        st.tuples(st.sampled_from(["barrier", "again"]), st.just("t"), st.just([])),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(operations)
def test_all_records_bring_back_the_shard(work: list[tuple[str, str, list[int]]]) -> None:
    log = Log()
    shard = make_shard(log=log)
    last: Any = None
    for sequence, (kind, table, keys) in enumerate(work, 1):
        who = {"client": 1 + sequence % 3, "sequence": sequence}
        try:
            match kind:
                case "push":
                    last = push(keys, float(sequence), table=table, **who)
                    shard.exchange([last], [])
                case "again":
                    shard.exchange([last] if last else [], [])
                case "delete":
                    shard.delete(change(keys, table=table, **who))
                case "create":
                    shard.create_table(schema(table))
                case "drop":
                    shard.drop_table(table)
                case "barrier":
                    shard.barrier("b")
        except UnknownTable:
            continue
    assert [frame.version for frame in log.frames] == list(range(1, shard.version + 1))
    assert contents(replayed(log)) == contents(shard)


def test_the_schema_of_a_replayed_table_is_held_against_another(shard: Shard, log: Log) -> None:
    again = replayed(log)
    assert again.create_table(schema()) == schema()
    with pytest.raises(SchemaMismatch):
        again.create_table(schema(seed=3))


def test_a_record_of_a_table_that_is_not_there_is_damage() -> None:
    shard = make_shard()
    record = records.DeleteRecord(records.Origin(), 9, Cause.REQUEST, np.empty(0, np.uint64))
    with pytest.raises(Corrupt, match=r"version 4: the record changes table number 9, which"):
        shard.recovery.replay(4, record)


def test_replaying_a_record_over_the_row_that_it_left_changes_nothing(
    shard: Shard, log: Log
) -> None:
    shard.exchange([push([1, 2]), push([2, 3])], [])
    before = contents(shard)
    again = replayed(log)
    for frame in log.frames[1:]:
        again.recovery.replay(frame.version, decode(frame))
    assert contents(again)["rows"] == before["rows"]


def test_a_base_state_and_its_blocks_are_the_shard() -> None:
    schemas = json.dumps(
        {"name": "t", "dim": 2, "optimizer": {"name": "sgd", "parameters": {"lr": 1.0}}}
    )
    sessions = make_shard()
    sessions.create_table(schema())
    sessions.exchange([push([1], client=7, sequence=1)], [])
    state = BaseState(
        lineage=bytes(16),
        history=History((1,)),
        version=20,
        next_table=9,
        tables=(BaseTable(number=4, schema=schemas, created=3),),
        horizon=2,
        sessions=sessions.sessions.pack(),
        blocks=(),
    )
    shard = make_shard()
    shard.recovery.load_state(state)
    keys, none = np.array([1, 2, 3], np.uint64), np.array([5], np.uint64)

    def rows(versions: list[int], value: float) -> Any:
        n = len(versions)
        data = pack_rows(
            4,
            keys[:n],
            np.array(versions, np.uint64),
            np.arange(n, dtype=np.int64),
            np.arange(1, n + 1, dtype=np.uint64),
            np.full((n, 2), value, np.float32),
        )
        return unpack(bytes(data), "block")

    shard.recovery.load_block(rows([5, 6, 7], 1.0))
    dead = pack_tombstones(4, keys, np.array([8, 6, 8], np.uint64), np.array([1, 2, 1], np.uint32))
    shard.recovery.load_block(unpack(bytes(dead), "block"))
    shard.recovery.load_block(
        unpack(bytes(pack_tombstones(9, none, none, np.ones(1, np.uint32))), "block")
    )
    assert (shard.version, shard.tables()) == (20, ["t"])
    assert shard.dump()["t"].meta[:, :2].tolist() == [[2, 6]]  # as old as its tombstone: newer
    shard.recovery.blocks_loaded()
    assert tombstones(shard) == [(6, [2]), (8, [1, 3])]
    shard.recovery.load_block(rows([9], 2.0))
    assert shard.dump()["t"].rows.tolist() == [[2.0, 2.0], [1.0, 1.0]]
    assert shard.sessions.applied(7, 0, 1, 0) == 2
    shard.create_table(schema("u"))
    assert [(each.base.number, each.base.created) for each in shard.capture().tables] == [
        (4, 3),
        (9, 21),
    ]


def test_a_repetition_may_ask_for_more_durability(shard: Shard) -> None:
    first = push([1], client=7, sequence=1)
    shard.exchange([first], [])
    again = shard.exchange([replace(first, durability="fsync")], []).pushes[0]
    assert (again.duplicate, again.achieved) == (True, pb.DURABILITY_FSYNC)
