"""Finite pushes leave finite rows, or are refused whole."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from storage.admission.rules import Counter
from storage.arena import Budget
from storage.errors import RowOverflow
from storage.initializers import make_initializer
from storage.kernels import Images, largest_magnitude
from storage.optimizer import TAME_GRADIENT, TAME_LR, TAME_NUMBER
from storage.optimizers import OPTIMIZERS, make_optimizer
from storage.schema import TableSchema
from storage.table import Table

DIM = 3
MOST = float(np.finfo(np.float32).max)
NAMES = list(OPTIMIZERS)

# Hyper-parameters that are still tame, at the ends of their ranges.
ENDS: dict[str, list[dict[str, float]]] = {
    "momentum": [{"momentum": 1 - 1e-7}, {"momentum": 0.9, "nesterov": 1}],
    "adagrad": [{"eps": 1e-30}, {"initial_accumulator": 1e-30, "eps": 1e-30}],
    "rowwise_adagrad": [{"eps": 1e-30}],
    "adagrad_decay": [
        {"initial_accumulator": 1e-30},
        {"accumulator_decay_step": 1, "accumulator_decay_rate": 1e-30},
    ],
    "adam": [
        {"beta1": 1 - 1e-6, "beta2": 0.0, "eps": 1e-12},
        {"beta1": 0.0, "beta2": 1 - 2e-9, "eps": 1e-12},
    ],
    "adamw": [{"beta1": 1 - 1e-6, "beta2": 0.0, "eps": 1e-12, "weight_decay": 1e3}],
    "adam_async": [
        {"beta1": 1 - 1e-6, "beta2": 0.0, "eps": 1e-12},
        {"apply_sparse_rmsprop": 1, "beta2": 1 - 2e-9, "eps": 1e-12},
    ],
    "ftrl": [
        {"l2_shrinkage": 1e6, "l1": 1.0},
        {"learning_rate_power": -1.0, "initial_accumulator": 1e-3},
        {"learning_rate_power": 0.0},
        {"initial_accumulator": 0.0, "l2": 5e-7},
    ],
    "group_ftrl": [{"l2_shrinkage": 1e6, "l21": 1e6}, {"initial_accumulator": 0.0, "l2": 5e-7}],
}
CASES = [(name, params) for name in NAMES for params in ({}, *ENDS.get(name, []))]


def make(name: str, lr: float | None = None, **changes: Any) -> Table:
    params = changes.pop("params", {})
    fields: dict[str, Any] = {
        "name": "t",
        "dim": DIM,
        "optimizer": make_optimizer(name, lr, params),
        "initializer": make_initializer("constant", {"value": 0.5}),
    }
    return Table(TableSchema(**{**fields, **changes}), Budget(1 << 26))


def push(table: Table, keys: Any, gradients: Any, version: int = 1, **changes: Any) -> None:
    keys = np.asarray(keys, np.uint64)
    gradients = np.broadcast_to(np.float32(gradients), (len(keys), DIM)).copy()
    counts = np.ones(len(keys), np.uint32)
    table.push(keys, gradients, counts, **{"version": version, "step": 1, **changes})


def overflow(table: Table, *args: Any, **changes: Any) -> RowOverflow | None:
    """Push; return the error if it was refused."""
    try:
        push(table, *args, **changes)
    except RowOverflow as error:
        return error
    return None


def state(table: Table) -> Any:
    dump = table.dump()
    return (dump.keys.tolist(), dump.rows.tolist(), dump.meta.tolist(), dump.counters.tolist())


def is_finite(table: Table) -> bool:
    return bool(np.isfinite(table.dump().rows).all())


# ---- refused or finite


HUGE = [1e19, 1e25, 1e38, MOST]


@pytest.mark.quick(20)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gradient", [*HUGE, *(-g for g in HUGE)])
def test_a_finite_gradient_leaves_no_infinity_and_no_nan(name: str, gradient: float) -> None:
    table = make(name)
    push(table, [1, 2], 0.1)
    refused = 0
    for version in range(2, 40):
        before = state(table)
        error = overflow(
            table, [2, 3, 1], [[0.1] * DIM, [gradient, 0.0, 1.0], [0.2] * DIM], version
        )
        if error is not None:
            refused += 1
            assert (error.table, error.key) == ("t", 3)
            assert state(table) == before
        assert is_finite(table)
    push(table, [1, 2, 4], 0.1, 50)  # the others are trained as before
    if name in ("ftrl", "group_ftrl", "adagrad", "adam") and abs(gradient) >= 1e25:
        assert refused == 38


@pytest.mark.parametrize("name", NAMES)
def test_a_learning_rate_of_one_push_leaves_no_infinity(name: str) -> None:
    table = make(name)
    for version, lr in enumerate((1e10, 1e20, 1e30, 1e30, 1e30, 1e30), 1):
        for _ in range(200):
            overflow(table, [1], 1e9, version, lr=lr)
    assert is_finite(table)


def test_sums_beyond_float32_are_refused() -> None:
    table = make("sgd", 1.0)
    push(table, [1], MOST)
    before = state(table)
    with pytest.raises(RowOverflow, match=r"row of key 1 \(largest gradient: 1\.7"):
        push(table, [1], MOST / 2, 2)
    assert state(table) == before
    push(table, [1], -MOST / 2, 3)
    assert is_finite(table)


def test_a_refused_push_creates_no_row_and_counts_nothing() -> None:
    table = make("adagrad", admission=Counter(threshold=3))
    push(table, [1], 1.0)
    before = state(table)
    for keys in ([1], [2], [1, 2, 3]):
        with pytest.raises(RowOverflow):
            push(table, keys, 1e30, 2)
    assert state(table) == before
    assert table.tally.refused == 1


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_were_not_finite_before_hold_up_nobody(name: str) -> None:
    """They were imported, or pushed before such pushes were refused. A delete repairs them."""
    table = make(name)
    rows = np.full((1, table.schema.width), np.nan, np.float32)
    one = np.ones(1, np.uint64)
    table.put(Images(np.array([7], np.uint64), one, one.view(np.int64), one, rows))
    push(table, [7, 8], 0.1, 2)
    errors = [overflow(table, [7, 8], MOST, version, lr=1e30) for version in range(3, 100)]
    assert {error.key for error in errors if error is not None} == {8}
    table.delete(np.array([7], np.uint64))
    push(table, [7, 8], 0.1, 500)
    assert is_finite(table)


@pytest.mark.parametrize("name", [n for n in NAMES if OPTIMIZERS[n]().roots(1) != slice(1, 1)])
def test_imported_state_that_no_push_could_leave_is_looked_at(name: str) -> None:
    table = make(name)
    rows = np.full((1, table.schema.width), -1.0, np.float32)
    one = np.ones(1, np.uint64)
    table.put(Images(np.array([7], np.uint64), one, one.view(np.int64), one, rows))
    for version in range(2, 6):
        before = state(table)
        if overflow(table, [7], 0.1, version) is not None:
            assert state(table) == before
        assert is_finite(table)


# ---- what is not looked at


@pytest.mark.parametrize("lr", [0.0, 1e-6, 1e-3, 1.0, TAME_LR])
@pytest.mark.parametrize(("name", "params"), CASES)
def test_a_tame_step_leaves_every_tame_row_finite(
    name: str, params: dict[str, float], lr: float
) -> None:
    """Every corner of rows and gradients, with numbers that float32 hardly has among them."""
    optimizer = make_optimizer(name, None, params)
    if not optimizer.is_tame(lr):
        assert lr in (0.0, 1e-6, TAME_LR)
        return
    roots, first = optimizer.roots(1), optimizer.initial_state(1)
    tiny = (0.0, 1e-45, 1e-38, 1e-20, 1.0)
    numbers = sorted({sign * x for x in (*tiny, TAME_NUMBER) for sign in (-1, 1)})
    width = 1 + optimizer.state_width(1)
    columns: list[list[float]] = [numbers] * width
    for j in range(roots.start, roots.stop):
        floor = float(first[j - 1])
        columns[j] = sorted({max(x, floor) for x in numbers})
    gradients = sorted({sign * x for x in (*tiny, TAME_GRADIENT) for sign in (-1, 1)})
    corners = np.array(list(itertools.product(*columns)), np.float32)
    for gradient in gradients:
        slab = corners.copy()
        grads = np.full((len(slab), 1), gradient, np.float32)
        for step in (0, 3, 1 << 40):
            optimizer.step(slab, np.arange(len(slab)), grads, lr, step)
            assert np.isfinite(slab).all()
            slab = corners.copy()


@pytest.mark.quick(20)
@pytest.mark.parametrize("lr", [0.0, 1e-6, 1e-3, 1.0, TAME_LR])
@pytest.mark.parametrize(("name", "params"), CASES)
@pytest.mark.parametrize("dim", [1, 3])
def test_no_step_raises_a_number_by_more_than_its_reach(
    name: str, params: dict[str, float], dim: int, lr: float
) -> None:
    """Every corner of rows and gradients, at the edges of what float32 can square."""
    optimizer = make_optimizer(name, None, params)
    if optimizer.reach(dim, 1.0, 1.0) == np.inf:
        return
    tiny = [0.0, 1e-45, 1e-38, 1e-30, *np.geomspace(1e-24, 1e-18, 49), 1e-9, 1e-3]
    sizes = np.array([*tiny, 1.0, 16777215.0, 1e9, TAME_NUMBER], np.float32)
    weights, states, signs = np.meshgrid(sizes, sizes, [-1, 1])
    state = np.maximum(optimizer.initial_state(dim), states.reshape(-1, 1))
    if name == "adagrad_decay":
        state[:, dim] = 2.0
    corners = np.hstack([np.repeat((signs * weights).reshape(-1, 1), dim, 1), state])
    corners = corners.astype(np.float32)
    for gradient in (*tiny, 0.5, 1.0, 3e3, TAME_GRADIENT):
        for given in ([gradient] * dim, [gradient] + [0.0] * (dim - 1)):
            slab = corners.copy()
            grads = np.tile(np.float32(given), (len(slab), 1))
            optimizer.step(slab, np.arange(len(slab)), grads, lr, 250_000)
            reach = optimizer.reach(dim, lr, float(np.float32(gradient)))
            bounds = (np.abs(corners).max(axis=1).astype(np.float64) + reach).astype(np.float32)
            assert (np.abs(slab).max(axis=1) <= bounds).all()


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad"])
def test_rows_are_looked_at_only_once_the_bound_might_be_passed(name: str) -> None:
    table = make(name)
    looks: list[Any] = []
    largest = table.store.host.largest
    table.store.host.largest = lambda slots: (looks.append(slots), largest(slots))[1]  # type: ignore[method-assign]
    for version in range(1, 50):
        push(table, [1, 2], 1.0, version)
    assert not looks
    push(table, [1], TAME_GRADIENT, 50, lr=TAME_LR)
    push(table, [1], TAME_GRADIENT, 51, lr=TAME_LR)
    assert len(looks) == (2 if name != "sgd" else 0)


def test_the_defaults_of_every_optimizer_are_tame() -> None:
    for name in NAMES:
        optimizer = make_optimizer(name, None, {})
        assert optimizer.is_tame(optimizer.lr)
        assert optimizer.is_tame(1.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("copied", [False, True])
def test_a_row_beyond_the_bound_is_seen_whoever_wrote_it(name: str, copied: bool) -> None:
    table = make(name)
    keys, counts = np.array([1], np.uint64), np.ones(1, np.uint32)
    tries: list[Any] = []
    guard = table._guard
    guard._copies = lambda keys, of=guard._copies: (tries.append(keys), of(keys))[1]

    def push(gradient: float, version: int) -> None:
        given = np.full((1, DIM), gradient, np.float32)
        pushed = table.push(keys, given, counts, version=version, step=1, copied=copied)
        if copied:
            width = table.schema.width
            table.images(pushed.slots, np.empty(1, np.uint64), np.empty((1, width), np.float32))

    push(1.0, 1)
    push(TAME_GRADIENT, 2)
    assert not tries
    push(1e15, 3)
    assert len(tries) == 1
    wild = largest_magnitude(table.dump().rows) > TAME_NUMBER
    push(1.0, 4)
    assert len(tries) == 1 + wild


def test_the_largest_magnitude_is_that_of_any_number() -> None:
    for numbers, want in (
        ([], 0.0),
        ([0.0, -0.0], 0.0),
        ([1.0, -3.0, 2.0], 3.0),
        ([MOST, -1.0], MOST),
        ([1.0, -np.inf], np.inf),
    ):
        assert largest_magnitude(np.array(numbers, np.float32)) == want
    for nan in (np.nan, -np.nan):
        assert np.isnan(largest_magnitude(np.array([1.0, nan, np.inf], np.float32)))
