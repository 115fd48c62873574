"""Adagrad, per number and per row, and Adagrad that decays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from storage.kernels import Rows, Slots, jit, prefetch_row, readonly
from storage.optimizer import NEXT, ONE, ROUNDED, Optimizer, square_sum32

LAST_COUNT = 1 << 24  # float32 cannot count further
VANISHES = 1e-22  # the float32 square of a smaller number may be 0, or half of the exact square


def _reach(lr: float, gradient: float, eps: float) -> float:
    """Return the bound for ``Optimizer.reach`` of n += g^2; w -= lr g / (sqrt(n) + eps).

    gradient  largest magnitude of g

    |g| / sqrt(n) is at most 1 because n is at least g^2, or at most 2 if g^2 has lost precision. If
    g^2 is rounded to 0, |g| / eps is at most VANISHES / eps.
    """
    return ROUNDED * max(gradient * gradient, lr * max(2.0, VANISHES / eps))


@jit
def _adagrad(slab: Any, slots: Any, grads: Any, lr: float, eps: float) -> None:
    rate, tiny = np.float32(lr), np.float32(eps)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        for j in range(dim):
            g = grads[i, j]
            acc = slab[s, dim + j] + g * g
            slab[s, dim + j] = acc
            slab[s, j] -= rate * g / (np.sqrt(acc) + tiny)


@jit
def _rowwise_adagrad(slab: Any, slots: Any, grads: Any, lr: float, eps: float) -> None:
    tiny = np.float32(eps)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        acc = slab[s, dim] + square_sum32(grads[i]) / np.float32(dim)
        slab[s, dim] = acc
        rate = np.float32(lr) / (np.sqrt(acc) + tiny)
        for j in range(dim):
            slab[s, j] -= rate * grads[i, j]


@jit
def _adagrad_decay(
    slab: Any, slots: Any, grads: Any, lr: float, decay: float, floor: float, period: float
) -> None:
    rate, least, now = np.float32(lr), np.float32(floor), np.float32(period)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    last = dim + dim
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        missed = now - slab[s, last]
        if missed > np.float32(0.0):
            factor = np.float32(decay**missed)
            for j in range(dim):
                slab[s, dim + j] = max(slab[s, dim + j] * factor, least)
            slab[s, last] = now
        for j in range(dim):
            g = grads[i, j]
            acc = slab[s, dim + j] + g * g
            slab[s, dim + j] = acc
            slab[s, j] -= rate * g / np.sqrt(acc)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adagrad(Optimizer):
    """PyTorch's Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011), without its decay of lr.

        n += g^2
        w -= lr g / (sqrt(n) + eps)

    State: n[dim], initially initial_accumulator.
    """

    name: ClassVar[str] = "adagrad"

    lr: float = 1e-2
    initial_accumulator: float = 0.0
    eps: float = 1e-10

    def _check(self) -> None:
        self._require_not_negative("initial_accumulator")
        self._require_positive("eps")

    def state_width(self, dim: int) -> int:
        return dim

    def initial_state(self, dim: int) -> Rows:
        return np.full(dim, self.initial_accumulator, np.float32)

    def roots(self, dim: int) -> slice:
        return slice(dim, 2 * dim)

    def reach(self, dim: int, lr: float, gradient: float) -> float:
        return _reach(lr, gradient, self.eps)

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        _adagrad(slab, readonly(slots), readonly(grads), float(lr), self.eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowwiseAdagrad(Optimizer):
    """FBGEMM's EXACT_ROWWISE_ADAGRAD: Adagrad with one accumulator per row.

        n += mean over the row of g^2
        w -= lr g / (sqrt(n) + eps)

    State: n[1], initially 0.
    """

    name: ClassVar[str] = "rowwise_adagrad"

    lr: float = 1e-2
    eps: float = 1e-8

    def _check(self) -> None:
        self._require_positive("eps")

    def state_width(self, dim: int) -> int:
        return 1

    def roots(self, dim: int) -> slice:
        return slice(dim, dim + 1)

    def reach(self, dim: int, lr: float, gradient: float) -> float:
        return _reach(lr * math.sqrt(dim), gradient, self.eps)  # n is a mean over the row

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        _rowwise_adagrad(slab, readonly(slots), readonly(grads), float(lr), self.eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdagradDecay(Optimizer):
    """DeepRec's AdagradDecay: Adagrad whose accumulators decay with each period of steps.

        period = step // accumulator_decay_step
        for each period since the row's last:  n = max(n accumulator_decay_rate, initial)
        n += g^2
        w -= lr g / sqrt(n)

    State: n[dim], initially initial_accumulator, and the period of the row's last push[1],
    initially 0. A new row never decays below its initial n, so 0 is correct at any step. DeepRec
    decays at most once per push, so that a row that is seldom pushed decays too little; here every
    period counts. A push in an earlier period decays nothing. Periods after 2^24 count as 2^24.
    """

    name: ClassVar[str] = "adagrad_decay"

    lr: float = 1e-2
    initial_accumulator: float = 0.1
    accumulator_decay_step: int = 100_000  # steps in a period
    accumulator_decay_rate: float = 0.9

    def _check(self) -> None:
        self._require_positive("initial_accumulator", "accumulator_decay_step")
        rate = self.accumulator_decay_rate
        self._require("accumulator_decay_rate", 0.0 < rate < 1.0, "> 0 and < 1")

    def state_width(self, dim: int) -> int:
        return dim + 1

    def initial_state(self, dim: int) -> Rows:
        state = np.full(dim + 1, self.initial_accumulator, np.float32)
        state[dim] = 0.0
        return state

    def roots(self, dim: int) -> slice:
        return slice(dim, 2 * dim)

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        period = float(min(step // self.accumulator_decay_step, LAST_COUNT))
        decay = self.accumulator_decay_rate, self.initial_accumulator, period
        _adagrad_decay(slab, readonly(slots), readonly(grads), float(lr), *decay)


ADAGRAD: tuple[type[Optimizer], ...] = (Adagrad, RowwiseAdagrad, AdagradDecay)
