"""Adagrad, per number and per row, and Adagrad that decays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from storage.formula import Single, formula, power
from storage.kernels import Rows, jit, prefetch_row
from storage.optimizer import (
    NEXT,
    ONE,
    ROUNDED,
    Optimizer,
    StepKernel,
    square_sum32,
)

LAST_COUNT = 1 << 24  # float32 cannot count further
VANISHES = 1e-22  # the float32 square of a smaller number may be 0, or half of the exact square


def _reach(lr: float, gradient: float, eps: float) -> float:
    """Return the bound for ``Optimizer.reach`` of n += g^2; w -= lr g / (sqrt(n) + eps).

    gradient  largest magnitude of g

    |g| / sqrt(n) is at most 1 because n is at least g^2, or at most 2 if g^2 has lost precision. If
    g^2 is rounded to 0, |g| / eps is at most VANISHES / eps.
    """
    return ROUNDED * max(gradient * gradient, lr * max(2.0, VANISHES / eps))


@formula
def _adagrad_number(g: Single, w: Single, n: Single, rate: Single, tiny: Single) -> Any:
    n = n + g * g
    return w - rate * g / (np.sqrt(n) + tiny), n


@jit
def _adagrad(slab: Any, slots: Any, grads: Any, rate: Single, tiny: Single) -> None:
    rate, tiny = np.float32(rate), np.float32(tiny)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        for j in range(dim):
            slab[s, j], slab[s, dim + j] = _adagrad_number(
                grads[i, j], slab[s, j], slab[s, dim + j], rate, tiny
            )


@formula
def _rowwise_rate(n: Single, lr: Single, tiny: Single) -> Any:
    return lr / (np.sqrt(n) + tiny)


@formula
def _rowwise_number(g: Single, w: Single, rate: Single) -> Any:
    return w - rate * g


@jit
def _rowwise_adagrad(slab: Any, slots: Any, grads: Any, lr: Single, tiny: Single) -> None:
    lr, tiny = np.float32(lr), np.float32(tiny)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        acc = slab[s, dim] + square_sum32(grads[i]) / np.float32(dim)
        slab[s, dim] = acc
        rate = _rowwise_rate(acc, lr, tiny)
        for j in range(dim):
            slab[s, j] = _rowwise_number(grads[i, j], slab[s, j], rate)


@formula
def _decaying_number(
    g: Single, w: Single, n: Single, rate: Single, factor: Single, least: Single
) -> Any:
    n = n * factor
    n = (n if n > least else least) + g * g
    return w - rate * g / np.sqrt(n), n


@formula
def _decay_factor(decay: float, missed: Single) -> Any:
    return np.float32(power(decay, missed))


@jit
def _adagrad_decay(
    slab: Any, slots: Any, grads: Any, rate: Single, decay: float, floor: Single, now: Single
) -> None:
    rate, floor, now = np.float32(rate), np.float32(floor), np.float32(now)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    last = dim + dim
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        missed, factor, least = now - slab[s, last], np.float32(1.0), np.float32(0.0)
        if missed > np.float32(0.0):
            factor, least = _decay_factor(decay, missed), floor
            slab[s, last] = now
        for j in range(dim):
            slab[s, j], slab[s, dim + j] = _decaying_number(
                grads[i, j], slab[s, j], slab[s, dim + j], rate, factor, least
            )


_ADAGRAD = StepKernel(name="adagrad", loop=_adagrad, number=_adagrad_number)
_ROWWISE = StepKernel(
    name="rowwise_adagrad",
    loop=_rowwise_adagrad,
    number=_rowwise_number,
    row="""
        const float mean = square_sum(group, grad, lane, dim) / (float)dim;
        const float acc = from_first(group, row[dim]) + mean;
        if (lane == 0) row[dim] = acc;
        const float rate = rowwise_rate(acc, lr, tiny);
    """,
    formulas=(_rowwise_rate,),
)
_DECAY = StepKernel(
    name="adagrad_decay",
    loop=_adagrad_decay,
    number=_decaying_number,
    row="""
        const float missed = now - from_first(group, row[2 * dim]);
        float factor = 1.0f, least = 0.0f;
        if (missed > 0.0f) {
            factor = decay_factor(decay, missed);
            least = floor;
            if (lane == 0) row[2 * dim] = now;
        }
    """,
    formulas=(_decay_factor,),
)


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

    @property
    def kernel(self) -> StepKernel:
        return _ADAGRAD

    def numbers(self, lr: float, step: int, dim: int) -> tuple[float, ...]:
        return float(lr), self.eps


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

    @property
    def kernel(self) -> StepKernel:
        return _ROWWISE

    def numbers(self, lr: float, step: int, dim: int) -> tuple[float, ...]:
        return float(lr), self.eps


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

    @property
    def kernel(self) -> StepKernel:
        return _DECAY

    def numbers(self, lr: float, step: int, dim: int) -> tuple[float, ...]:
        period = min(step // self.accumulator_decay_step, LAST_COUNT)
        decay = self.accumulator_decay_rate, self.initial_accumulator
        return float(lr), *decay, float(period)


ADAGRAD: tuple[type[Optimizer], ...] = (Adagrad, RowwiseAdagrad, AdagradDecay)
