"""Optimizers and batches for which a step on a device must equal the step on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from storage.optimizer import Optimizer
from storage.optimizers import OPTIMIZERS

DIMS = (1, 3, 8, 33, 64, 128)
PENALTIES = {"l1": 0.01, "l2": 0.1, "l2_shrinkage": 0.01, "beta": 0.5}
CASES: list[tuple[str, dict[str, float]]] = [
    *((name, {}) for name in OPTIMIZERS),
    ("momentum", {"nesterov": 1}),
    ("adagrad_decay", {"accumulator_decay_step": 3, "accumulator_decay_rate": 0.7}),
    ("adam", {"beta1": 0.0, "beta2": 0.0}),
    ("adamw", {"weight_decay": 0.3, "eps": 1e-2}),
    ("adam_async", {"apply_sparse_rmsprop": 1}),
    ("ftrl", PENALTIES),
    ("ftrl", {"learning_rate_power": 0.0}),
    ("ftrl", {**PENALTIES, "learning_rate_power": -0.3}),
    ("group_ftrl", {**PENALTIES, "l21": 0.01}),
    ("group_ftrl", {**PENALTIES, "l21": 0.01, "learning_rate_power": -0.3}),
]

# These add squares of a row, in another order on each machine, so that last bits may differ.
SUMS_OVER_A_ROW = {"rowwise_adagrad", "group_ftrl"}
ROWS, PUSHED, STEPS = 60, 37, 25


def exact(optimizer: Optimizer) -> bool:
    """Return whether a step must have the same bits on every machine."""
    return optimizer.kernel.name not in SUMS_OVER_A_ROW


def first_rows(optimizer: Optimizer, dim: int) -> Any:
    """Return float32[ROWS, width]: rows before the first step."""
    rng = np.random.default_rng(dim)
    rows = np.empty((ROWS, dim + optimizer.state_width(dim)), np.float32)
    rows[:, :dim] = rng.standard_normal((ROWS, dim)) * 0.1
    rows[:, dim:] = optimizer.initial_state(dim)
    return rows


def batches(dim: int) -> Iterator[tuple[Any, Any, int]]:
    """Yield (slots, gradients, step); the last batch is empty."""
    rng = np.random.default_rng([dim, 1])
    for step in range(STEPS):
        slots = rng.permutation(ROWS)[:PUSHED].astype(np.int64)
        sizes = np.full(dim, (1e-20, 1e-3, 0.1, 1.0)[step % 4])  # the square of 1e-20 is denormal
        if dim > 1:
            sizes[-1] = 1e-39  # denormal
        yield slots, (rng.standard_normal((PUSHED, dim)) * sizes).astype(np.float32), step
    yield np.empty(0, np.int64), np.empty((0, dim), np.float32), STEPS


def agree(optimizer: Optimizer, got: Any, wanted: Any) -> bool:
    """Return whether rows are equal: to the bit, or where ``exact`` is False up to rounding.

    The tolerance is 1e-5 of a number, and 1e-6 for numbers near 0.
    """
    if exact(optimizer):
        return bool(got.tobytes() == wanted.tobytes())
    return np.allclose(got, wanted, rtol=1e-5, atol=1e-6)
