"""A table against a dict: reads that change nothing, pushes that happen wholly or not at all."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.arena import HUGE, Budget
from storage.errors import OutOfMemory
from storage.initializers import INITIALIZERS, make_initializer
from storage.kernels import Images
from storage.optimizers import OPTIMIZERS, make_optimizer
from storage.results import Dump
from storage.schema import TableSchema
from storage.table import Table

MASK = 2**64 - 1
EXTREMES = [0, 1, MASK, MASK - 1, 1 << 63, (1 << 63) - 1, (1 << 63) + 1]
DIM = 3
ROOM = 1 << 30
MODES = ("train", "serve")


def schema(**changes: Any) -> TableSchema:
    fields: dict[str, Any] = {
        "name": "t",
        "dim": DIM,
        "optimizer": make_optimizer("sgd", 0.5, {}),
        "initializer": make_initializer("uniform", {}),
        "seed": 7,
        "serving_default": -2.5,
    }
    return TableSchema(**{**fields, **changes})


def u64(numbers: Any) -> np.ndarray:
    return np.array(list(numbers), np.uint64)


def ones(count: int) -> np.ndarray:
    return np.ones(count, np.uint32)


def gradients(count: int, dim: int = DIM, start: int = 1) -> np.ndarray:
    return np.arange(start, start + count * dim, dtype=np.float32).reshape(count, dim)


def push(table: Table, keys: np.ndarray, version: int = 1, **rest: Any) -> None:
    dim = table.schema.dim
    given = {"step": 10, **rest}
    table.push(keys, gradients(len(keys), dim), ones(len(keys)), version=version, **given)


def deleted(table: Table, keys: np.ndarray, **which: int) -> tuple[list[int], int]:
    gone, rows = table.delete(keys, **which)
    return gone.tolist(), rows


def pull(table: Table, keys: np.ndarray, mode: Any = "train") -> np.ndarray:
    out = np.full((len(keys), table.schema.dim), np.nan, np.float32)
    table.pull(keys, mode, out)
    return out


def assert_equal(one: Dump, other: Dump) -> None:
    assert np.array_equal(one.keys, other.keys)
    assert np.array_equal(one.rows, other.rows)
    assert np.array_equal(one.meta, other.meta)


# ---- reads


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("initializer", INITIALIZERS)
def test_a_pull_changes_nothing(optimizer: str, initializer: str, mode: str) -> None:
    budget = Budget(ROOM)
    table = Table(
        schema(
            optimizer=make_optimizer(optimizer, None, {}),
            initializer=make_initializer(initializer, {}),
        ),
        budget,
    )
    push(table, u64(EXTREMES))
    before, stats, held = table.dump(), table.stats(), budget.held
    known, unknown = u64(EXTREMES), np.arange(1000, 2000, dtype=np.uint64)
    for keys in (known, unknown, np.concatenate([known, unknown, known]), known[:0]):
        pull(table, keys, mode)
    assert_equal(table.dump(), before)
    [tier] = stats.tiers
    counted = dataclasses.replace(tier, hits=tier.hits + 3 * len(known))  # nothing but the count
    assert table.stats() == dataclasses.replace(stats, tiers=(counted,))
    assert budget.held == held


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("initializer", INITIALIZERS)
def test_a_row_steps_first_from_what_a_training_pull_returned_before(
    optimizer: str, initializer: str
) -> None:
    rule = make_optimizer(optimizer, None, {})
    made = schema(optimizer=rule, initializer=make_initializer(initializer, {}))
    table, keys = Table(made, Budget(ROOM)), u64(EXTREMES)
    row = np.empty((len(keys), made.width), np.float32)
    row[:, :DIM] = pull(table, keys)
    row[:, DIM:] = rule.initial_state(DIM)
    push(table, keys)
    rule.step(row, np.arange(len(keys)), gradients(len(keys)), rule.lr, 10)
    order = np.argsort(keys)
    assert np.array_equal(table.dump().keys, keys[order])
    assert np.array_equal(table.dump().rows, row[order])
    assert np.array_equal(pull(table, keys), row[:, :DIM])


@pytest.mark.parametrize("lr", [None, 0.25, 0.0])
def test_sgd_takes_lr_times_the_gradient_from_the_initial_value(lr: float | None) -> None:
    table, keys = Table(schema(), Budget(ROOM)), u64(EXTREMES)
    initial = pull(table, keys)
    push(table, keys, lr=lr)
    rate = np.float32(0.5 if lr is None else lr)
    assert np.array_equal(pull(table, keys), initial - rate * gradients(len(keys)))


def test_every_key_has_an_initial_value_of_its_own_on_every_table_alike() -> None:
    keys = u64([*EXTREMES, *range(2, 1000)])
    one, same = Table(schema(), Budget(ROOM)), Table(schema(), Budget(1 << 24))
    push(same, u64(range(5000, 6000)))
    assert np.array_equal(pull(one, keys), pull(same, keys))
    assert len(np.unique(pull(one, keys), axis=0)) == len(keys)
    for other in (schema(seed=8), schema(name="u")):
        assert not np.isin(pull(Table(other, Budget(ROOM)), keys), pull(one, keys)).all(1).any()


def test_a_serving_pull_returns_the_default_for_unknown_keys_alone() -> None:
    table = Table(schema(), Budget(ROOM))
    push(table, u64([1, MASK]))
    trained = pull(table, u64([1, MASK]))
    served = pull(table, u64([5, 1, 0, MASK, 5]), "serve")
    default = [-2.5] * DIM
    assert served.tolist() == [
        default,
        trained[0].tolist(),
        default,
        trained[1].tolist(),
        default,
    ]


def test_a_pull_answers_every_occurrence_and_says_which_keys_have_rows() -> None:
    table, asked = Table(schema(), Budget(ROOM)), u64([1, 9, 1, 2, 9])
    push(table, u64([1, 2]))
    out = np.empty((5, DIM), np.float32)
    locations = table.pull(asked, "train", out)
    assert (locations != 0).tolist() == [True, False, True, True, False]
    single = {key: pull(table, u64([key]))[0].tolist() for key in (1, 2, 9)}
    assert out.tolist() == [single[key] for key in (1, 9, 1, 2, 9)]


def test_metadata_is_that_of_the_last_push_and_zero_without_a_row() -> None:
    table = Table(schema(), Budget(ROOM))
    zero = np.zeros((2, DIM), np.float32)
    table.push(u64([3, MASK]), zero, np.array([5, 1], np.uint32), version=1, step=-(2**47))
    table.push(u64([4, MASK]), zero, np.array([2, 2**32 - 1], np.uint32), version=2, step=2**47 - 1)
    asked = u64([MASK, 9, 3, 4, MASK])
    locations = table.pull(asked, "train", np.empty((5, DIM), np.float32))
    versions, steps, frequencies = table.metadata(locations)
    assert versions.tolist() == [2, 0, 1, 2, 2]
    assert steps.tolist() == [2**47 - 1, 0, -(2**47), 2**47 - 1, 2**47 - 1]
    assert frequencies.tolist() == [2**32 - 1, 0, 5, 2, 2**32 - 1]
    assert [array.dtype for array in (versions, steps, frequencies)] == [
        np.uint64,
        np.int64,
        np.uint64,
    ]


def test_a_dump_holds_every_row_by_ascending_key() -> None:
    table = Table(schema(), Budget(ROOM))
    assert len(table.dump().keys) == 0
    keys = np.random.default_rng(1).permutation(u64([*EXTREMES, *range(100, 60_000)]))
    push(table, keys)
    dump = table.dump()
    assert dump.keys.tolist() == sorted(keys.tolist())
    assert np.array_equal(dump.meta[:, 0], dump.keys)
    assert np.array_equal(dump.rows[:, :DIM], pull(table, dump.keys))
    assert len(table) == table.stats().rows == len(keys)


# ---- pushes


def test_a_push_without_keys_changes_nothing() -> None:
    table = Table(schema(), Budget(ROOM))
    push(table, u64([1]))
    before = table.dump()
    table.push(u64([]), np.empty((0, 0), np.float32), ones(0), version=2, step=3)
    assert_equal(table.dump(), before)


def test_a_push_leaves_other_rows_and_its_arguments_alone() -> None:
    table, keys = Table(schema(), Budget(ROOM)), u64(range(100))
    push(table, keys)
    before = table.dump()
    given = (u64([50, 200]), gradients(2), ones(2))
    for array in given:
        array.flags.writeable = False
    table.push(*given, version=2, step=1)
    after = table.dump()
    others = np.flatnonzero(before.keys != 50)
    assert np.array_equal(after.rows[others], before.rows[others])
    assert np.array_equal(after.meta[others], before.meta[others])
    assert after.keys.tolist() == [*range(100), 200]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("known", [0, 1000])
def test_a_push_without_room_changes_nothing_at_all(optimizer: str, known: int) -> None:
    refused = set()
    keys = np.random.default_rng(2).permutation(np.arange(300_000, dtype=np.uint64))
    for chunks in range(2, 40, 2):
        budget = Budget(chunks * HUGE)
        table = Table(schema(optimizer=make_optimizer(optimizer, None, {})), budget)
        push(table, keys[:known])
        before = table.dump()
        try:
            push(table, keys, version=2)
        except OutOfMemory as error:
            refused.add(str(error))
            assert_equal(table.dump(), before)
            assert len(table) == known
            push(table, keys[: known + 10], version=2)
            assert len(table) == known + 10
        else:
            assert len(table) == len(keys)
        assert budget.held <= budget.limit
        table.close()
        assert budget.held == 0
    assert len(refused) >= 3  # the rows, their metadata and the index were refused room


def test_a_push_that_the_index_has_no_room_for_gives_its_places_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> None:
        raise OutOfMemory(1, 1, 1)

    table = Table(schema(), Budget(ROOM))
    push(table, u64([1, 2]))
    before = table.dump()
    with monkeypatch.context() as broken:
        broken.setattr(table.store.index, "insert", refuse)
        with pytest.raises(OutOfMemory):
            push(table, u64(range(5000)), version=2)
    assert_equal(table.dump(), before)
    assert table.store.host.rows == len(table) == 2
    push(table, u64(range(5000)), version=2)
    assert table.store.host.rows == len(table) == 5000
    assert set(table.dump().meta[:, 1].tolist()) == {2}


def test_memory_is_what_the_budget_gave_and_all_of_it_comes_back() -> None:
    budget = Budget(ROOM)
    one, two = Table(schema(), budget), Table(schema(name="u", dim=40), budget)
    for version in range(1, 6):
        push(one, np.arange(version * 50_000, dtype=np.uint64), version)
        push(two, np.arange(version * 1_000, dtype=np.uint64), version)
        stats = one.stats(), two.stats()
        assert sum(s.bytes for s in stats) == budget.held
        assert all(0 < s.index_bytes < s.bytes for s in stats)
        assert [s.rows for s in stats] == [version * 50_000, version * 1_000]
    left = one.stats().bytes
    two.close()
    assert budget.held == left
    one.close()
    assert budget.held == 0


POOL = [*EXTREMES, *range(2, 12)]
operations = st.lists(
    st.tuples(
        st.lists(st.sampled_from(POOL), unique=True, max_size=8),
        st.integers(-4, 4),  # gradient
        st.integers(1, 2**32 - 1),  # occurrences
        st.integers(-(2**47), 2**47 - 1),  # step
        st.sampled_from([None, 1.0, 2.0]),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(operations)
def test_pushes_do_to_a_table_what_they_do_to_a_dict(pushes: list[Any]) -> None:
    made = schema(
        optimizer=make_optimizer("sgd", 4.0, {}),
        initializer=make_initializer("constant", {"value": 3.0}),
    )
    table = Table(made, Budget(1 << 24))
    model: dict[int, list[int]] = {}
    for version, (keys, gradient, count, step, lr) in enumerate(pushes, 1):
        asked = u64(keys)
        out = pull(table, asked)
        assert out.tolist() == [[model.get(key, [3])[0]] * DIM for key in keys]
        given = np.full((len(keys), DIM), gradient, np.float32)
        counts = np.full(len(keys), count, np.uint32)
        table.push(asked, given, counts, version=version, step=step, lr=lr)
        for key in keys:
            value, _, _, frequency = model.get(key, [3, 0, 0, 0])
            rate = 4 if lr is None else int(lr)
            model[key] = [value - rate * gradient, version, step, min(frequency + count, 2**32 - 1)]
    dump = table.dump()
    assert dump.keys.tolist() == sorted(model)
    want = [model[key] for key in sorted(model)]
    assert dump.rows.tolist() == [[value] * DIM for value, *_ in want]
    assert dump.meta.tolist() == [
        [key, version, step & MASK, seen] for key, (_, version, step, seen) in sorted(model.items())
    ]
    served = pull(table, u64(POOL), "serve")
    assert served.tolist() == [[model.get(key, [-2.5])[0]] * DIM for key in POOL]
    table.close()


# ---- rows from a block or a record, and deletes


def put(table: Table, keys: Any, versions: Any, value: float = 0.0, step: int = 3) -> None:
    n = len(keys)
    rows = np.full((n, table.schema.width), value, np.float32)
    table.put(Images(u64(keys), u64(versions), np.full(n, step), u64(range(1, n + 1)), rows))


def versions_of(table: Table) -> dict[int, int]:
    return {int(key): int(version) for key, version in table.dump().meta[:, :2]}


def test_the_images_of_a_push_put_into_another_table_make_it_equal() -> None:
    for optimizer in OPTIMIZERS:
        made = schema(optimizer=make_optimizer(optimizer, None, {}))
        one, two = Table(made, Budget(ROOM)), Table(made, Budget(ROOM))
        rng = np.random.default_rng(3)
        for version in range(1, 20):
            keys = rng.choice(u64([*EXTREMES, *range(2, 10)]), 5, replace=False)
            given = rng.normal(size=(5, DIM)).astype(np.float32)
            step = int(rng.integers(-9, 9))
            slots = one.push(keys, given, ones(5), version=version, step=step).slots
            frequencies, rows = np.zeros(5, np.uint64), np.zeros((5, made.width), np.float32)
            one.images(slots, frequencies, rows)
            versions = np.full(5, version, np.uint64)
            two.put(Images(keys, versions, np.full(5, step), frequencies, rows))
        assert_equal(one.dump(), two.dump())


def test_put_in_any_order_and_any_number_of_times_leaves_the_newest() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        table = Table(schema(), Budget(ROOM))
        newest: dict[int, int] = {}
        for version in rng.integers(1, 20, size=30).tolist():
            keys = rng.choice(12, int(rng.integers(0, 6)), replace=False).tolist()
            put(table, keys, [version] * len(keys), float(version))
            newest |= {key: max(version, newest.get(key, 0)) for key in keys}
        assert versions_of(table) == newest
        dump = table.dump()
        want = [[float(newest[key])] * schema().width for key in sorted(newest)]
        assert dump.rows.tolist() == want
        assert len(table) == len(newest)


def test_delete_returns_the_keys_that_were_there_in_the_order_asked() -> None:
    table = Table(schema(), Budget(ROOM))
    push(table, u64(EXTREMES))
    assert deleted(table, u64([9, MASK, 5, 0])) == ([MASK, 0], 2)
    assert deleted(table, u64([9, MASK, 5, 0])) == ([], 0)
    assert deleted(table, u64([])) == ([], 0)
    assert set(table.dump().keys.tolist()) == set(EXTREMES) - {MASK, 0}
    assert len(table) == len(EXTREMES) - 2


def test_delete_before_a_version_leaves_newer_rows() -> None:
    table = Table(schema(), Budget(ROOM))
    put(table, [1, 2, 3, 4], [5, 6, 7, 8])
    before = u64([7, 7, 7, 7, 7])
    assert deleted(table, u64([4, 3, 2, 1, 9]), before=before) == ([2, 1], 2)
    assert versions_of(table) == {3: 7, 4: 8}
    assert deleted(table, u64([3, 4]), before=u64([8, 8])) == ([3], 1)


def test_a_deleted_key_starts_anew() -> None:
    table = Table(schema(), Budget(ROOM))
    push(table, u64([1, 2]))
    before = pull(table, u64([3]))
    push(table, u64([3]))
    table.delete(u64([3]))
    assert np.array_equal(pull(table, u64([3])), before)
    assert pull(table, u64([3]), "serve").tolist() == [[-2.5] * DIM]
    push(table, u64([3]), version=9)
    assert table.dump().meta[-1].tolist() == [3, 9, 10, 1]


def test_deletes_give_their_places_back() -> None:
    budget = Budget(ROOM)
    table = Table(schema(), budget)
    push(table, np.arange(50_000, dtype=np.uint64))
    held = budget.held
    for version in range(2, 8):
        table.delete(np.arange(50_000, dtype=np.uint64))
        assert len(table) == 0
        push(table, np.arange(version * 100_000, version * 100_000 + 50_000, dtype=np.uint64))
        table.delete(np.arange(version * 100_000, version * 100_000 + 50_000, dtype=np.uint64))
        push(table, np.arange(50_000, dtype=np.uint64))
    assert table.stats().bytes == budget.held <= held + table.stats().index_bytes


def test_a_put_without_room_changes_nothing() -> None:
    budget = Budget(4 * HUGE)
    table = Table(schema(dim=64), budget)
    put(table, [1, 2], [1, 2])
    before, held = table.dump(), budget.held
    with pytest.raises(OutOfMemory):
        put(table, range(100_000), [3] * 100_000)
    assert_equal(table.dump(), before)
    put(table, [1, 5], [3, 3])
    assert versions_of(table) == {1: 3, 2: 2, 5: 3}
    assert budget.held >= held


def test_a_scan_of_a_table_finds_what_its_dump_shows() -> None:
    table = Table(schema(), Budget(ROOM))
    for version in range(1, 30):
        push(table, u64([version, version + 1, version // 2]), version)
    table.delete(u64([7, 8]))
    found, start = table.scan().find(0, 10, 20, 1000)
    assert start is None
    copied = table.scan().copy(
        found, np.zeros(len(found), np.uint64), np.zeros((len(found), DIM), np.float32)
    )
    want = {key: version for key, version in versions_of(table).items() if 10 < version <= 20}
    assert {int(key): int(version) for key, version in copied[:, :2]} == want
