"""Every optimizer against a reference that shares no code with it.

A number may differ from the reference's by 1e-5 of the largest magnitude it has had on the way:
float32 keeps a running sum to 6e-8 of its largest partial sum, so a number that came back to near
0 cannot be held to its last value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from references import REFERENCES

from storage import adagrad, adam, ftrl, sgd
from storage.adagrad import AdagradDecay, RowwiseAdagrad
from storage.adam import Adam, AdamAsync
from storage.ftrl import Ftrl, GroupFtrl
from storage.optimizer import Optimizer
from storage.optimizers import OPTIMIZERS, compile_all, make_optimizer

DIMS = (1, 8, 33, 64)
STEPS = 50
ROWS = 12
NAMES = list(OPTIMIZERS)

PENALTIES = {"l1": 0.02, "l2": 0.5, "l2_shrinkage": 0.1, "beta": 0.3}

# Hyper-parameters besides the defaults, so that every term of every formula takes part.
VARIANTS: dict[str, list[dict[str, float]]] = {
    "momentum": [{"momentum": 0.5}, {"nesterov": 1}],
    "adagrad": [{"initial_accumulator": 0.1, "eps": 1e-3}],
    "rowwise_adagrad": [{"eps": 1e-2}],
    "adagrad_decay": [{"accumulator_decay_step": 2, "accumulator_decay_rate": 0.7}],
    "adam": [{"beta1": 0.5, "beta2": 0.9, "eps": 1e-2}, {"beta1": 0.0, "beta2": 0.0}],
    "adamw": [{"weight_decay": 0.3, "eps": 1e-2}],
    "adam_async": [{"beta1": 0.5, "eps": 1e-2}, {"apply_sparse_rmsprop": 1}],
    "ftrl": [PENALTIES, {**PENALTIES, "learning_rate_power": -0.3}, {"learning_rate_power": 0.0}],
    "group_ftrl": [
        {**PENALTIES, "l21": 0.2},
        {**PENALTIES, "l21": 0.2, "learning_rate_power": -0.3},
    ],
}
CASES = [(name, params) for name in NAMES for params in ({}, *VARIANTS.get(name, []))]


def pushes(dim: int, seed: int = 0) -> Iterator[tuple[list[int], Any, float, int]]:
    """Fifty pushes to random rows: slots, float32 gradients, learning rate, global step."""
    rng = np.random.default_rng([dim, seed])
    step = 0
    for _ in range(STEPS):
        step += int(rng.integers(1, 6))
        slots = rng.permutation(ROWS)[: rng.integers(1, ROWS + 1)]
        grads = rng.normal(scale=0.1, size=(len(slots), dim)).astype(np.float32)
        yield slots.tolist(), grads, float(rng.uniform(0.01, 0.1)), step


def new_slab(optimizer: Optimizer, dim: int) -> Any:
    slab = np.empty((ROWS, dim + optimizer.state_width(dim)), np.float32)
    slab[:, :dim] = np.random.default_rng(dim).normal(scale=0.1, size=(ROWS, dim))
    slab[:, dim:] = optimizer.initial_state(dim)
    return slab


def test_every_optimizer_has_a_reference() -> None:
    assert list(REFERENCES) == NAMES


@pytest.mark.quick(32)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("name", "params"), CASES)
def test_fifty_steps_agree_with_the_reference(
    name: str, params: dict[str, float], dim: int
) -> None:
    optimizer = make_optimizer(name, None, params)
    slab = new_slab(optimizer, dim)
    reference = REFERENCES[name](optimizer, slab[:, :dim].astype(np.float64))
    largest = np.zeros(slab.shape)
    for slots, grads, lr, step in pushes(dim):
        optimizer.step(slab, np.array(slots), grads, lr, step)
        reference.step(slots, grads.astype(np.float64), lr, step)
        largest = np.maximum(largest, abs(reference.rows()))
    assert np.max(abs(slab - reference.rows()) / np.maximum(largest, 1e-30)) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_default_learning_rate_is_that_of_the_source(name: str) -> None:
    sources = {
        "sgd": torch.optim.SGD,
        "momentum": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    published = {"rowwise_adagrad": 0.01, "adam_async": 0.001}
    chosen = {"adagrad_decay": 0.01, "ftrl": 0.001, "group_ftrl": 0.001}  # the sources demand one
    if name in sources:
        source: Any = sources[name]([torch.nn.Parameter(torch.zeros(1))])
        assert make_optimizer(name, None, {}).lr == source.defaults["lr"]
    else:
        assert make_optimizer(name, None, {}).lr == {**published, **chosen}[name]


@pytest.mark.parametrize("name", NAMES)
def test_no_byte_outside_the_pushed_rows_is_written(name: str) -> None:
    optimizer = make_optimizer(name, None, {})
    for dim in DIMS:
        rows = new_slab(optimizer, dim)
        guarded = np.full((ROWS + 20, rows.shape[1]), np.nan, np.float32)
        slab = guarded[10 : 10 + ROWS]
        slab[:] = rows
        before = guarded.view(np.uint32).copy()
        optimizer.step(slab, np.array([7, 2]), np.ones((2, dim), np.float32), 0.1, 3)
        changed = np.flatnonzero((guarded.view(np.uint32) != before).any(axis=1))
        assert changed.tolist() == [12, 17]


@pytest.mark.parametrize("name", NAMES)
def test_splitting_a_batch_changes_no_bit(name: str) -> None:
    optimizer = make_optimizer(name, None, {})
    for dim in DIMS:
        whole, parts = new_slab(optimizer, dim), new_slab(optimizer, dim)
        for slots, grads, lr, step in pushes(dim, seed=1):
            optimizer.step(whole, np.array(slots), grads, lr, step)
            for i in reversed(range(len(slots))):
                optimizer.step(parts, np.array(slots[i : i + 1]), grads[i : i + 1], lr, step)
        assert whole.tobytes() == parts.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_changes_nothing(name: str) -> None:
    optimizer = make_optimizer(name, None, {})
    slab = new_slab(optimizer, 8)
    before = slab.copy()
    optimizer.step(slab, np.empty(0, np.int64), np.empty((0, 8), np.float32), 0.1, 1)
    assert slab.tobytes() == before.tobytes()


@pytest.mark.parametrize(("name", "params"), CASES)
def test_gradients_of_zero_leave_finite_rows(name: str, params: dict[str, float]) -> None:
    optimizer = make_optimizer(name, None, params)
    slab = new_slab(optimizer, 8)
    for step in range(3):
        optimizer.step(slab, np.arange(ROWS), np.zeros((ROWS, 8), np.float32), 0.1, step)
    assert np.isfinite(slab).all()


def test_after_compile_all_nothing_is_left_to_compile() -> None:
    def compiled() -> dict[str, int]:
        families = (adagrad, adam, ftrl, sgd)
        every = (item for family in families for item in vars(family).items())
        kernels = {k: v for k, v in every if hasattr(v, "signatures")}
        return {k: len(v.signatures) for k, v in kernels.items()}

    compile_all()
    before = compiled()
    for name, params in CASES:
        optimizer = make_optimizer(name, None, params)
        received = np.frombuffer(np.ones((ROWS, 8), np.float32).tobytes(), np.float32)
        grads = received.reshape(ROWS, 8)
        optimizer.step(new_slab(optimizer, 8), np.arange(ROWS), grads, 1, np.int64(1))
    assert compiled() == before


# What the state of a new row holds, written out for dim 2.
INITIAL = {
    "sgd": [],
    "momentum": [0, 0],
    "adagrad": [0, 0],
    "rowwise_adagrad": [0],
    "adagrad_decay": [0.1, 0.1, 0],
    "adam": [0, 0, 0, 0, 0],
    "adamw": [0, 0, 0, 0, 0],
    "adam_async": [0, 0, 0, 0, 0],
    "ftrl": [0.1, 0.1, 0, 0],
    "group_ftrl": [0.1, 0.1, 0, 0],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_new_row_starts_with_the_state_of_the_source(name: str) -> None:
    optimizer = make_optimizer(name, None, {})
    state = optimizer.initial_state(2)
    assert state.dtype == np.float32
    assert state.tolist() == np.float32(INITIAL[name]).tolist()
    for dim in DIMS:
        assert len(optimizer.initial_state(dim)) == optimizer.state_width(dim)


def test_the_initial_accumulator_is_a_parameter() -> None:
    adagrad = make_optimizer("adagrad", None, {"initial_accumulator": 0.5})
    assert adagrad.initial_state(3).tolist() == [0.5, 0.5, 0.5]


# TensorFlow, python/training/ftrl_test.py: what its own optimizer returns for two variables with
# the gradients below at learning rate 3: hyper-parameters, steps, start, end.
TENSORFLOW_FTRL: list[tuple[dict[str, float], int, list[float], list[float]]] = [
    ({}, 3, [0, 0, 0, 0], [-2.60260963, -4.29698515, -0.28432083, -0.56694895]),
    ({}, 3, [1, 2, 4, 3], [-2.55607247, -3.98729396, -0.28232238, -0.56096673]),
    ({"l1": 0.001}, 10, [1, 2, 4, 3], [-7.66718769, -10.91273689, -0.93460727, -1.86147261]),
    (
        {"l1": 0.001, "l2": 2.0},
        10,
        [1, 2, 4, 3],
        [-0.24059935, -0.46829352, -0.02406147, -0.04830509],
    ),
    (
        {"l1": 0.001, "l2": 2.0, "l2_shrinkage": 0.1},
        10,
        [1, 2, 4, 3],
        [-0.22578995, -0.44345796, -0.14378493, -0.13229476],
    ),
]


@pytest.mark.parametrize("kind", [Ftrl, GroupFtrl])
@pytest.mark.parametrize(("params", "steps", "start", "end"), TENSORFLOW_FTRL)
def test_ftrl_returns_what_tensorflow_published(
    kind: Any, params: dict[str, float], steps: int, start: list[float], end: list[float]
) -> None:
    optimizer = kind(**params)
    slab = np.zeros((2, 6), np.float32)
    slab[:, :2] = np.reshape(start, (2, 2))
    slab[:, 2:] = optimizer.initial_state(2)
    for _ in range(steps):
        grads = np.array([[0.1, 0.2], [0.01, 0.02]], np.float32)
        optimizer.step(slab, np.array([0, 1]), grads, 3.0, 0)
    np.testing.assert_allclose(slab[:, :2].ravel(), end, rtol=1e-5)


def test_group_ftrl_makes_whole_rows_zero() -> None:
    optimizer = GroupFtrl(l21=1.0)
    slab = new_slab(optimizer, 8)
    grads = np.full((ROWS, 8), 0.1, np.float32)
    grads[::2] = 3.0
    optimizer.step(slab, np.arange(ROWS), grads, 0.1, 0)
    assert (slab[:, :8] != 0).all(axis=1).tolist() == [True, False] * (ROWS // 2)
    assert (slab[1::2, :8] == 0).all()


def test_adagrad_decay_applies_each_missed_period_and_stops_at_the_floor() -> None:
    optimizer = AdagradDecay(accumulator_decay_step=10, accumulator_decay_rate=0.5)
    slab = np.array([[0.0, 8.0, 0.0], [0.0, 8.0, 0.0], [0.0, 8.0, 3.0]], np.float32)
    zero = np.zeros((1, 1), np.float32)
    optimizer.step(slab, np.array([0]), zero, 0.1, 39)  # three periods
    optimizer.step(slab, np.array([1]), zero, 0.1, 10_000)  # a thousand
    optimizer.step(slab, np.array([2]), zero, 0.1, 25)  # an earlier one than the row's
    expected = np.array([[0.0, 1.0, 3.0], [0.0, 0.1, 1000.0], [0.0, 8.0, 3.0]], np.float32)
    assert slab.tolist() == expected.tolist()


def test_adagrad_decay_counts_periods_up_to_where_float32_does() -> None:
    optimizer = AdagradDecay(accumulator_decay_step=1)
    slab = np.array([[0.0, 8.0, 0.0]], np.float32)
    optimizer.step(slab, np.array([0]), np.zeros((1, 1), np.float32), 0.1, 2**62)
    assert slab.tolist() == [[0.0, np.float32(0.1), float(2**24)]]


def test_a_row_pushed_very_often_keeps_its_step() -> None:
    for optimizer in (Adam(), AdamAsync()):
        slab = np.array([[0.0, 1.0, 1.0, 2.0**24]], np.float32)
        optimizer.step(slab, np.array([0]), np.ones((1, 1), np.float32), 0.5, 0)
        assert slab.tolist() == [[-0.5, 1.0, 1.0, 2.0**24]]


def test_adam_forgets_a_bias_of_float32() -> None:
    """The first step is lr in full: 1 - beta^1 must not be what float32 makes of it."""
    for optimizer in (Adam(beta2=0.99999), AdamAsync(beta2=0.99999, eps=1e-12)):
        slab = np.zeros((1, 4), np.float32)
        optimizer.step(slab, np.array([0]), np.ones((1, 1), np.float32), 1.0, 0)
        assert slab[0, 0] == pytest.approx(-1.0, rel=1e-6)


FIELDS = [(name, f.name) for name in NAMES for f in fields(OPTIMIZERS[name])]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e31, 1e-31, "x"])
@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_a_hyper_parameter_must_be_a_number(name: str, field: str, value: Any) -> None:
    kind: Any = OPTIMIZERS[name]
    with pytest.raises(ValueError, match=f"^optimizer '{name}': {field} must be 0 or a number"):
        kind(**{field: value})


BAD: dict[tuple[str, str], tuple[str, list[float]]] = {
    ("momentum", "momentum"): (">= 0 and < 1", [-0.1, 1.0]),
    ("momentum", "nesterov"): ("0 or 1", [2, -1]),
    ("adagrad", "initial_accumulator"): (">= 0", [-0.1]),
    ("adagrad", "eps"): ("> 0", [0.0, -1e-8]),
    ("rowwise_adagrad", "eps"): ("> 0", [0.0, -1e-8]),
    ("adagrad_decay", "initial_accumulator"): ("> 0", [0.0, -0.1]),
    ("adagrad_decay", "accumulator_decay_step"): ("> 0", [0, -5]),
    ("adagrad_decay", "accumulator_decay_rate"): ("> 0 and < 1", [0.0, 1.0]),
    ("adam", "beta1"): (">= 0 and < 1", [-0.1, 1.0]),
    ("adam", "beta2"): (">= 0 and < 1", [-0.1, 1.0]),
    ("adam", "eps"): ("> 0", [0.0]),
    ("adamw", "beta1"): (">= 0 and < 1", [-0.1, 1.0]),
    ("adamw", "beta2"): (">= 0 and < 1", [-0.1, 1.0]),
    ("adamw", "eps"): ("> 0", [0.0]),
    ("adamw", "weight_decay"): (">= 0", [-0.1]),
    ("adam_async", "beta1"): (">= 0 and < 1", [-0.1, 1.0]),
    ("adam_async", "beta2"): (">= 0 and < 1", [-0.1, 1.0]),
    ("adam_async", "eps"): ("> 0", [0.0]),
    ("adam_async", "apply_sparse_rmsprop"): ("0 or 1", [2]),
    **{
        (name, field): (">= 0", [-0.1])
        for name in ("ftrl", "group_ftrl")
        for field in ("l1", "l2", "l2_shrinkage", "beta")
    },
    **{(name, "learning_rate_power"): ("-1..0", [0.5, -2.0]) for name in ("ftrl", "group_ftrl")},
    ("ftrl", "initial_accumulator"): ("> 0 where beta and l2 are 0", [0.0]),
    ("group_ftrl", "initial_accumulator"): (">= 0", [-0.1]),
    ("group_ftrl", "l21"): (">= 0", [-0.1]),
    **{(name, "lr"): (">= 0", [-0.1]) for name in NAMES if "ftrl" not in name},
    ("ftrl", "lr"): ("> 0", [0.0, -0.1]),
    ("group_ftrl", "lr"): ("> 0", [0.0, -0.1]),
}


def test_every_hyper_parameter_has_a_rule() -> None:
    assert set(BAD) == set(FIELDS)


@pytest.mark.parametrize(("name", "field"), BAD)
def test_a_bad_hyper_parameter_is_refused_by_name(name: str, field: str) -> None:
    kind: Any = OPTIMIZERS[name]
    rule, values = BAD[name, field]
    for value in values:
        message = f"optimizer {name!r}: {field} must be {rule}, got "
        with pytest.raises(ValueError, match="^" + message):
            kind(**{field: value})


def test_a_whole_number_is_asked_for_where_one_is_meant() -> None:
    message = "^optimizer 'adagrad_decay': accumulator_decay_step must be a whole number, got 2.5$"
    with pytest.raises(ValueError, match=message):
        make_optimizer("adagrad_decay", None, {"accumulator_decay_step": 2.5})
    decay: Any = make_optimizer("adagrad_decay", None, {"accumulator_decay_step": 2.0})
    assert repr(decay.accumulator_decay_step) == "2"


@pytest.mark.parametrize("name", NAMES)
def test_a_push_cannot_bring_a_learning_rate_that_the_table_could_not_have(name: str) -> None:
    optimizer = make_optimizer(name, 0.1, {})
    optimizer.require_lr(0.5)
    for lr in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"^optimizer '{name}': lr must be .*, got {lr!r}$"):
            optimizer.require_lr(lr)


def test_equal_parameters_make_equal_optimizers() -> None:
    assert make_optimizer("adagrad", 1, {"eps": 1}) == make_optimizer("adagrad", 1.0, {"eps": 1.0})
    assert make_optimizer("rowwise_adagrad", None, {}) == RowwiseAdagrad(lr=0.01, eps=1e-8)
    assert make_optimizer("adam", None, {}) != make_optimizer("adamw", None, {})


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^no optimizer 'adma'; there are: sgd, momentum, .*"):
        make_optimizer("adma", None, {})
    with pytest.raises(
        ValueError,
        match=r"^optimizer 'adagrad' has no parameter 'epsilon'; it has: lr, initial_acc.*, eps$",
    ):
        make_optimizer("adagrad", None, {"epsilon": 1e-8})
    with pytest.raises(ValueError, match=r"^optimizer 'sgd' has no parameter 'eps'; it has: lr$"):
        make_optimizer("sgd", None, {"eps": 1.0})
