"""A shard as a plain object: what an exchange checks first, applies in order, and never touches."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from psproto import codec
from psproto import ps_pb2 as pb
from psproto.codec import Exchanged, Pulled
from psproto.routing import even_map
from psserver.errors import BadRequest, SessionExpired, TooLarge, VersionInFuture
from psserver.requests import Pull, Push
from psserver.shard import Shard
from storage.arena import HUGE
from storage.errors import OutOfMemory, RowOverflow, SchemaMismatch, UnknownTable
from storage.initializers import make_initializer
from storage.optimizers import make_optimizer
from storage.schema import TableSchema

DIM = 2
MASK = 2**64 - 1
REPLY = 10_000


def make_shard(**changes: Any) -> Shard:
    settings: dict[str, Any] = {
        "number": 0,
        "shard_map": even_map(1),
        "memory_bytes": 1 << 30,
        "reply_bytes": REPLY,
        "max_tables": 3,
        "max_sessions": 2,
        "session_ttl": 600.0,
        "clock": lambda: 0.0,
    }
    return Shard(**{**settings, **changes})


def schema(name: str = "t", **changes: Any) -> TableSchema:
    fields: dict[str, Any] = {
        "name": name,
        "dim": DIM,
        "optimizer": make_optimizer("sgd", 1.0, {}),
        "initializer": make_initializer("constant", {"value": 10.0}),
        "serving_default": -1.0,
    }
    return TableSchema(**{**fields, **changes})


def push(keys: list[int], value: float = 1.0, **changes: Any) -> Push:
    n = len(keys)
    fields: dict[str, Any] = {
        "table": "t",
        "keys": np.array(keys, np.uint64),
        "counts": np.ones(n, np.uint32),
        "gradients": np.full((n, DIM if n else 0), value, np.float32),
        "step": 5,
        "lr": None,
        "client": 0,
        "incarnation": 0,
        "sequence": 0,
        "acknowledged": 0,
    }
    return Push(**{**fields, **changes})


def pull(keys: list[int], **changes: Any) -> Pull:
    fields: dict[str, Any] = {
        "table": "t",
        "keys": np.array(keys, np.uint64),
        "dtype": pb.DTYPE_FLOAT32,
        "mode": "train",
        "with_metadata": False,
        "min_version": 0,
    }
    return Pull(**{**fields, **changes})


def protected(keys: list[int], sequence: int, **changes: Any) -> Push:
    return push(keys, client=0xA, sequence=sequence, **changes)


def state(shard: Shard) -> Any:
    """Everything a shard holds."""
    sessions = [(client, asdict(s)) for client, s in shard.sessions._sessions.items()]
    tables = {
        name: (dump.keys.tolist(), dump.rows.tolist(), dump.meta.tolist())
        for name, dump in shard.dump().items()
    }
    return copy.deepcopy((shard.version, sessions, tables, shard.budget.held))


def answers(exchanged: Exchanged) -> list[tuple[int, bool]]:
    return [(answer.version, answer.duplicate) for answer in exchanged.pushes]


@pytest.fixture
def shard() -> Shard:
    shard = make_shard()
    shard.create_table(schema())
    shard.create_table(schema("u", dim=4))
    return shard


# ---- pushes that overflow


@pytest.mark.parametrize("keys", [[1], [2]])
def test_an_exchange_with_a_push_that_overflows_changes_nothing(
    shard: Shard, keys: list[int]
) -> None:
    most = float(np.finfo(np.float32).max)
    shard.exchange([push([1, 2], most)], [])
    before = state(shard)
    for pushes in (
        [push(keys, most)],
        [push([7]), push(keys, most)],
        [protected([7], 1), protected(keys, 2, gradients=np.full((1, DIM), most, np.float32))],
    ):
        with pytest.raises(RowOverflow, match=f"row of key {keys[0]}"):
            shard.exchange(pushes, [])
        assert state(shard) == before
    shard.exchange([push(keys, -most)], [])
    assert np.isfinite(shard.dump()["t"].rows).all()


def test_pushes_of_one_exchange_that_overflow_together_are_refused_in_part(shard: Shard) -> None:
    most = float(np.finfo(np.float32).max)
    pushes = [
        protected([1], sequence, gradients=np.full((1, DIM), most / 1.5, np.float32))
        for sequence in (1, 2)
    ]
    for _ in range(2):  # the first is applied once, whoever repeats it
        with pytest.raises(RowOverflow):
            shard.exchange(pushes, [])
        assert shard.version == 3
        assert np.isfinite(shard.dump()["t"].rows).all()


# ---- tables


def test_a_table_is_created_once_and_found_again(shard: Shard) -> None:
    shard.exchange([push([1])], [])
    before = state(shard)
    assert shard.create_table(schema()) == schema()
    assert state(shard) == before
    assert shard.tables() == ["t", "u"]


def test_a_table_with_another_schema_is_refused_and_named(shard: Shard) -> None:
    before = state(shard)
    with pytest.raises(SchemaMismatch, match=r"table 't' exists with dim 2, but 3 was requested"):
        shard.create_table(schema(dim=3))
    assert state(shard) == before


def test_tables_are_limited_in_number(shard: Shard) -> None:
    shard.create_table(schema("v"))
    with pytest.raises(
        TooLarge, match=r"^this shard already has 3 tables, its limit \(max_tables\)$"
    ) as caught:
        shard.create_table(schema("w"))
    assert caught.value.reason == "TOO_MANY_TABLES"
    assert shard.create_table(schema("v")) == schema("v")
    assert shard.tables() == ["t", "u", "v"]


def test_a_table_without_room_is_not_created() -> None:
    shard = make_shard(memory_bytes=1 << 16)
    with pytest.raises(OutOfMemory):
        shard.create_table(schema())
    assert (shard.tables(), shard.budget.held) == ([], 0)


def test_a_dropped_table_is_gone_with_its_rows_and_its_memory(shard: Shard) -> None:
    held = shard.budget.held
    shard.create_table(schema("v"))
    shard.exchange([push(list(range(1000)), table="v")], [])
    shard.drop_table("v")
    assert (shard.budget.held, shard.version) == (held, 5)  # create, create, create, push, drop
    for call in (shard.drop_table, shard.describe):
        with pytest.raises(UnknownTable, match=r"no table 'v' on this shard"):
            call("v")
    shard.create_table(schema("v"))
    assert shard.describe("v")[1].rows == 0


def test_describe_tells_schema_rows_and_bytes(shard: Shard) -> None:
    shard.exchange([push([1, 2, 3])], [])
    described, stats = shard.describe("t")
    assert (described, stats.rows) == (schema(), 3)
    assert stats.bytes + shard.describe("u")[1].bytes == shard.budget.held


# ---- pushes and pulls


def test_every_push_gets_the_next_version(shard: Shard) -> None:
    assert shard.version == 2  # two tables were created
    assert answers(shard.exchange([push([1]), push([]), push([1, 2])], [])) == [
        (3, False),
        (4, False),
        (5, False),
    ]
    assert answers(
        shard.exchange([push([9], table="u", gradients=np.ones((1, 4), np.float32))], [])
    ) == [(6, False)]
    assert shard.version == 6


def test_pushes_are_applied_in_order_and_then_pulls_are_read_in_order(shard: Shard) -> None:
    done = shard.exchange(
        [push([1, 2], 1.0, step=7), push([1], 0.5, lr=2.0, step=8)],
        [pull([2, 1, 3, 1], with_metadata=True), pull([3], mode="serve")],
    )
    first, second = done.pulls
    assert first.header == pb.PullResponseHeader(version=4, dim=DIM, dtype=pb.DTYPE_FLOAT32)
    assert first.embeddings.tolist() == [[9, 9], [8, 8], [10, 10], [8, 8]]
    assert first.versions.tolist() == [3, 4, 0, 4]
    assert first.steps.tolist() == [7, 8, 0, 8]
    assert first.frequencies.tolist() == [1, 2, 0, 2]
    assert second.embeddings.tolist() == [[-1, -1]]
    assert [len(a) for a in (second.versions, second.steps, second.frequencies)] == [0, 0, 0]


@pytest.mark.parametrize("dtype", codec.WIRE)
def test_a_pull_answers_in_the_dtype_asked_for(shard: Shard, dtype: int) -> None:
    shard.exchange([push([1], 8.0 + 1 / 256)], [])
    pulled = shard.exchange([], [pull([1, 2], dtype=dtype)]).pulls[0]
    exact = np.array([[10 - 8 - 1 / 256] * DIM, [10] * DIM], np.float32)
    assert pulled.embeddings.dtype == codec.WIRE[dtype]
    assert np.array_equal(pulled.embeddings, codec.to_wire(exact, dtype))
    assert pulled.header.dtype == dtype


@pytest.mark.parametrize("dtype", codec.WIRE)
def test_a_number_beyond_the_dtype_is_its_largest_and_not_infinity(
    shard: Shard, dtype: int
) -> None:
    most = float(np.finfo(np.float32).max)
    for key, value in ((1, 1e5), (2, -1e5), (3, most), (4, -most)):
        shard.exchange([push([key], -value)], [])
    pulled = shard.exchange([], [pull([1, 2, 3, 4], dtype=dtype)]).pulls[0]
    sent = codec.from_wire(pulled.embeddings, dtype)[:, 0]
    assert np.isfinite(sent).all()
    assert (np.sign(sent) == [1, -1, 1, -1]).all()
    largest = float(codec.from_wire(codec.to_wire(np.float32([65504.0]), dtype), dtype)[0])
    assert (np.abs(sent) >= largest).all()
    if dtype == pb.DTYPE_FLOAT16:
        assert sent.tolist() == [65504.0, -65504.0, 65504.0, -65504.0]


def test_an_answer_can_be_encoded(shard: Shard) -> None:
    done = shard.exchange([push([1])], [pull([1, 5], with_metadata=True), pull([])])
    read = codec.decode_exchanged(codec.encode_exchanged(done))
    assert read.pushes == done.pushes
    for one, other in zip(read.pulls, done.pulls, strict=True):
        assert one.header == other.header
        for field in ("embeddings", "versions", "steps", "frequencies"):
            mine, theirs = getattr(one, field), getattr(other, field)
            assert mine.tolist() == theirs.reshape(-1).tolist()


@pytest.mark.parametrize("mode", ["train", "serve"])
@pytest.mark.parametrize("with_metadata", [False, True])
@pytest.mark.parametrize("dtype", codec.WIRE)
def test_a_pull_changes_nothing(shard: Shard, mode: str, with_metadata: bool, dtype: int) -> None:
    shard.exchange([protected([1, 2, MASK], 1)], [])
    before = state(shard)
    for keys in ([1, 2], [3, 4, 1 << 63], [MASK, MASK, 7], []):
        shard.exchange([], [pull(keys, mode=mode, with_metadata=with_metadata, dtype=dtype)])
    assert state(shard) == before


def test_an_exchange_of_nothing_is_nothing(shard: Shard) -> None:
    before = state(shard)
    assert shard.exchange([], []) == Exchanged([], [])
    assert state(shard) == before


# ---- all or nothing

BAD_PARTS: dict[str, tuple[Any, type[Exception], str, str | None]] = {
    "push to an unknown table": (
        push([1], table="x"),
        UnknownTable,
        "no table 'x' on this shard",
        None,
    ),
    "push of another dim": (
        push([1], gradients=np.ones((1, 3), np.float32)),
        BadRequest,
        "table 't': gradients must have 2 numbers (the table's dim), got 3",
        "DIM_MISMATCH",
    ),
    "push without gradients": (
        push([1], gradients=np.ones((1, 0), np.float32)),
        BadRequest,
        "table 't': gradients must have 2 numbers (the table's dim), got 0",
        "DIM_MISMATCH",
    ),
    "push with impossible numbers": (
        protected([1], 0),
        BadRequest,
        "field 'sequence' must be greater than field 'acknowledged', got 0 and 0",
        "INVALID_ARGUMENT",
    ),
    "push of a forgotten session": (
        protected([1], 9, acknowledged=8, incarnation=1),
        SessionExpired,
        "no session of client 0xa, incarnation 1, although the client acknowledged pushes up to 8:"
        " the session expired, or a restore removed it",
        "SESSION_EXPIRED",
    ),
    "push of one client too many": (
        push([1], client=0xC, sequence=1),
        TooLarge,
        "this shard already has 2 client sessions, its limit (max_sessions)",
        "TOO_MANY_SESSIONS",
    ),
    "pull from an unknown table": (
        pull([1], table="x"),
        UnknownTable,
        "no table 'x' on this shard",
        None,
    ),
    "pull from the future": (
        pull([1], min_version=5),
        VersionInFuture,
        "field 'min_version' is 5, but the newest version of shard 0 is 4",
        "VERSION_IN_FUTURE",
    ),
    "pull of too much": (
        pull([0] * (REPLY // 8 + 1)),
        TooLarge,
        "the reply would take 10008 bytes, more than the limit of 10000: pull fewer keys per"
        " request",
        "TOO_MANY_KEYS",
    ),
}


@pytest.mark.parametrize("what", BAD_PARTS)
@pytest.mark.parametrize("where", ["alone", "first", "last"])
def test_an_exchange_with_one_bad_part_applies_nothing(shard: Shard, what: str, where: str) -> None:
    bad, error, message, reason = BAD_PARTS[what]
    shard.exchange([protected([1], 1), push([2], client=0xB, sequence=1)], [])
    before = state(shard)
    pushes, pulls = [push([7]), protected([1, 8], 2)], [pull([])]
    if where == "alone":
        pushes, pulls = [], []
    into = pushes if isinstance(bad, Push) else pulls
    into.insert(len(into) if where == "last" else 0, bad)
    with pytest.raises(error) as caught:
        shard.exchange(pushes, pulls)
    assert str(caught.value) == message
    assert getattr(caught.value, "reason", None) == reason
    assert state(shard) == before


def test_the_replies_of_an_exchange_count_together_with_their_metadata() -> None:
    shard = make_shard(reply_bytes=2 * (8 + 24) + 3 * 4)
    shard.create_table(schema())
    fits = [pull([1, 2], with_metadata=True), pull([1, 2, 3], dtype=pb.DTYPE_FLOAT16)]
    assert len(shard.exchange([], fits).pulls) == 2
    with pytest.raises(
        TooLarge, match=r"^the reply would take 80 bytes, more than the limit of 76:"
    ):
        shard.exchange([], [*fits, pull([1], dtype=pb.DTYPE_BFLOAT16)])


def test_a_min_version_that_was_reached_is_answered(shard: Shard) -> None:
    shard.exchange([push([1]), push([1])], [])
    for least in (0, 1, 4):
        assert shard.exchange([], [pull([1], min_version=least)]).pulls[0].header.version == 4


def test_memory_may_run_out_between_two_pushes_and_a_repetition_completes_the_exchange() -> None:
    shard = make_shard(memory_bytes=4 * HUGE)
    shard.create_table(schema())
    small, large = protected([1], 1), protected(list(range(400_000)), 2)
    with pytest.raises(OutOfMemory):
        shard.exchange([small, large], [])
    assert shard.version == 2
    before = state(shard)
    with pytest.raises(OutOfMemory):
        shard.exchange([small, large], [])
    assert state(shard)[:3] == before[:3]
    assert answers(shard.exchange([small, protected([5], 2)], [])) == [(2, True), (3, False)]


# ---- repeated pushes


def test_a_repeated_push_is_answered_with_its_version_and_applied_once(shard: Shard) -> None:
    assert answers(shard.exchange([protected([1], 1), protected([1], 2)], [])) == [
        (3, False),
        (4, False),
    ]
    before = state(shard)
    for again in ([1, 2], [2], [1]):
        assert answers(shard.exchange([protected([1], number) for number in again], [])) == [
            (2 + number, True) for number in again
        ]
    assert state(shard) == before
    mixed = [protected([1], 2, acknowledged=1), protected([1], 3, acknowledged=1)]
    assert answers(shard.exchange(mixed, [])) == [(4, True), (5, False)]
    shard.exchange([protected([1], 4, acknowledged=3)], [])
    with pytest.raises(SessionExpired):
        shard.exchange([protected([1], 2)], [])


def test_an_unprotected_push_is_applied_each_time(shard: Shard) -> None:
    same = push([1])
    assert answers(shard.exchange([same, same], [])) == [(3, False), (4, False)]
    assert len(shard.sessions) == 0
    assert shard.exchange([], [pull([1])]).pulls[0].embeddings.tolist() == [[8, 8]]


def test_a_repetition_is_known_by_its_numbers_alone(shard: Shard) -> None:
    shard.exchange([protected([1], 1)], [])
    changed = replace(protected([2, 3], 1), table="u", gradients=np.ones((2, 4), np.float32))
    assert answers(shard.exchange([changed], [])) == [(3, True)]
    assert shard.describe("u")[1].rows == 0


def test_versions_grow_by_one_with_each_push_that_takes_effect() -> None:
    rng, shard = np.random.default_rng(1), make_shard()
    shard.create_table(schema())
    done: dict[int, int] = {}
    version = 1
    for _ in range(300):
        sequences = rng.choice(np.arange(1, 60), size=int(rng.integers(1, 4)), replace=False)
        sequences.sort()
        pushes = [protected([int(s)], int(s)) for s in sequences]
        want = []
        for sequence in sequences.tolist():
            duplicate = sequence in done
            if not duplicate:
                version += 1
                done[sequence] = version
            want.append((done[sequence], duplicate))
        pulled: Exchanged = shard.exchange(pushes, [pull([1])])
        assert answers(pulled) == want
        assert pulled.pulls[0].header.version == shard.version == version
    assert isinstance(pulled.pulls[0], Pulled)
    rows = shard.dump()["t"]
    assert {int(k): int(v) for k, v in rows.meta[:, :2]} == done


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((1, 5, 4), (1, 3, 0)),  # acknowledges the one behind it
        ((1, 5000, 0), (1, 2, 0)),  # moves the window past it
        ((2, 1, 0), (1, 2, 0)),  # replaces its incarnation
        ((1, 2, 0), (2, 1, 0)),
        ((1, 2, 0), (1, 2, 0)),
        ((1, 2, 0), (1, 3, 2)),
    ],
)
@pytest.mark.parametrize("between", [[], [push([5], client=0xB, sequence=1)], [push([6])]])
def test_pushes_that_could_cost_each_other_the_session_are_refused_as_a_whole(
    shard: Shard, first: tuple[int, int, int], second: tuple[int, int, int], between: list[Push]
) -> None:
    shard.exchange([protected([1], 1, incarnation=1)], [])
    before = state(shard)
    one, other = (
        protected([1], sequence, incarnation=incarnation, acknowledged=acknowledged)
        for incarnation, sequence, acknowledged in (first, second)
    )
    with pytest.raises(BadRequest) as caught:
        shard.exchange([one, *between, other], [])
    assert caught.value.reason == "INVALID_ARGUMENT"
    assert str(caught.value) == (
        "pushes of one client in an exchange must have one incarnation and ascending sequences, and"
        f" must not acknowledge each other: client 0xa sent incarnation {second[0]}, sequence"
        f" {second[1]}, acknowledged {second[2]} after incarnation {first[0]}, sequence {first[1]}"
    )
    assert state(shard) == before


def test_an_exchange_that_replaces_a_session_of_its_own_clients_is_applied_as_a_whole() -> None:
    clock = [0.0]
    shard = make_shard(clock=lambda: clock[0])
    shard.create_table(schema())
    for client in (0xA, 0xB):
        shard.exchange([push([1], client=client, sequence=1)], [])
    clock[0] = 1e9  # the two sessions that there may be have expired
    new = [push([client], client=client, sequence=1) for client in (0xC, 0xD, 0xE)]
    assert answers(shard.exchange(new, [])) == [(4, False), (5, False), (6, False)]
