"""Adam, AdamW and AdamAsync."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from storage.formula import Single, formula, powers
from storage.kernels import jit, prefetch_row
from storage.optimizer import NEXT, ONE, Optimizer, StepKernel

VANISHED = 2.0**-60  # 1 less a number up to this is 1 in float64


@lru_cache(maxsize=256)
def _last_count(beta1: float, beta2: float) -> float:
    """Return a count t from which on 1 - beta^t is 1 in float64, for both betas."""
    beta = max(beta1, beta2)
    return 1.0 if beta <= 0.0 else float(math.ceil(math.log(VANISHED) / math.log(beta)))


@formula
def _counted(t: Single, last: Single) -> Any:
    return t if t < last else last


@formula
def _adam_rate(lr: float, power1: float) -> Any:
    return np.float32(lr / (1.0 - power1))


@formula
def _adam_unbias(power2: float) -> Any:
    return np.float32(1.0 / np.sqrt(1.0 - power2))


@formula
def _async_rate(lr: float, power1: float, power2: float) -> Any:
    return np.float32(lr * np.sqrt(1.0 - power2) / (1.0 - power1))


@formula
def _adam_number(
    g: Single,
    w: Single,
    m: Single,
    v: Single,
    rate: Single,
    unbias: Single,
    b1: Single,
    b2: Single,
    rest1: Single,
    rest2: Single,
    tiny: Single,
    keep: Single,
) -> Any:
    m = b1 * m + rest1 * g
    v = b2 * v + rest2 * (g * g)
    return keep * w - rate * m / (unbias * np.sqrt(v) + tiny), m, v


@jit
def _adam(
    slab: Any,
    slots: Any,
    grads: Any,
    lr: float,
    beta1: float,
    beta2: float,
    last: Single,
    tiny: Single,
    keep: Single,
) -> None:
    last = np.float32(last)
    tiny, keep = np.float32(tiny), np.float32(keep)
    b1, b2 = np.float32(beta1), np.float32(beta2)
    rest1, rest2 = np.float32(1.0 - beta1), np.float32(1.0 - beta2)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    second, count = dim + dim, dim + dim + dim
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        t = slab[s, count] + np.float32(1.0)
        slab[s, count] = t
        power1, power2 = powers(beta1, beta2, _counted(t, last))
        rate, unbias = _adam_rate(lr, power1), _adam_unbias(power2)
        for j in range(dim):
            slab[s, j], slab[s, dim + j], slab[s, second + j] = _adam_number(
                grads[i, j],
                slab[s, j],
                slab[s, dim + j],
                slab[s, second + j],
                rate,
                unbias,
                b1,
                b2,
                rest1,
                rest2,
                tiny,
                keep,
            )


@formula
def _async_number(
    g: Single,
    w: Single,
    m: Single,
    v: Single,
    rate: Single,
    b1: Single,
    b2: Single,
    rest1: Single,
    rest2: Single,
    tiny: Single,
) -> Any:
    m = b1 * m + rest1 * g
    v = b2 * v + rest2 * (g * g)
    return w - rate * m / (np.sqrt(v) + tiny), m, v


@jit
def _adam_async(
    slab: Any,
    slots: Any,
    grads: Any,
    lr: float,
    beta1: float,
    beta2: float,
    last: Single,
    tiny: Single,
) -> None:
    last = np.float32(last)
    tiny = np.float32(tiny)
    b1, b2 = np.float32(beta1), np.float32(beta2)
    rest1, rest2 = np.float32(1.0 - beta1), np.float32(1.0 - beta2)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    second, count = dim + dim, dim + dim + dim
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        t = slab[s, count] + np.float32(1.0)
        slab[s, count] = t
        power1, power2 = powers(beta1, beta2, _counted(t, last))
        rate = _async_rate(lr, power1, power2)
        for j in range(dim):
            slab[s, j], slab[s, dim + j], slab[s, second + j] = _async_number(
                grads[i, j],
                slab[s, j],
                slab[s, dim + j],
                slab[s, second + j],
                rate,
                b1,
                b2,
                rest1,
                rest2,
                tiny,
            )


@formula
def _rmsprop_number(
    g: Single,
    w: Single,
    m: Single,
    v: Single,
    rate: Single,
    b1: Single,
    b2: Single,
    rest2: Single,
    tiny: Single,
) -> Any:
    v = b2 * v + rest2 * (g * g)
    m = b1 * m + rate * g / np.sqrt(v + tiny)
    return w - m, m, v


@jit
def _rmsprop(
    slab: Any, slots: Any, grads: Any, rate: Single, beta1: float, beta2: float, tiny: Single
) -> None:
    """Run one step of AdamAsync with apply_sparse_rmsprop = 1. It does not change t."""
    rate, tiny = np.float32(rate), np.float32(tiny)
    b1, b2, rest2 = np.float32(beta1), np.float32(beta2), np.float32(1.0 - beta2)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    second = dim + dim
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        for j in range(dim):
            slab[s, j], slab[s, dim + j], slab[s, second + j] = _rmsprop_number(
                grads[i, j],
                slab[s, j],
                slab[s, dim + j],
                slab[s, second + j],
                rate,
                b1,
                b2,
                rest2,
                tiny,
            )


_BETAS = """
        const float b1 = (float)beta1, b2 = (float)beta2;
        const float rest1 = (float)(1.0 - beta1), rest2 = (float)(1.0 - beta2);
        (void)rest1;
"""
_COUNT = """
        const float t = from_first(group, row[3 * dim]) + 1.0f;
        if (lane == 0) row[3 * dim] = t;
        double power1, power2;
        powers(beta1, beta2, counted(t, last), power1, power2);
"""
_ADAM = StepKernel(
    name="adam",
    loop=_adam,
    number=_adam_number,
    row=_BETAS
    + _COUNT
    + """
        const float rate = adam_rate(lr, power1);
        const float unbias = adam_unbias(power2);
    """,
    formulas=(powers, _counted, _adam_rate, _adam_unbias),
)
_ASYNC = StepKernel(
    name="adam_async",
    loop=_adam_async,
    number=_async_number,
    row=_BETAS + _COUNT + "        const float rate = async_rate(lr, power1, power2);",
    formulas=(powers, _counted, _async_rate),
)
_RMSPROP = StepKernel(name="rmsprop", loop=_rmsprop, number=_rmsprop_number, row=_BETAS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam(Optimizer):
    """PyTorch's Adam (Kingma and Ba, ICLR 2015), with t counted per row.

        t += 1
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        w -= lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    State: m[dim], v[dim], t[1], initially 0. The moments of a row change only when it is pushed.
    """

    name: ClassVar[str] = "adam"

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def _check(self) -> None:
        self._require_fraction("beta1", "beta2")
        self._require_positive("eps")

    def state_width(self, dim: int) -> int:
        return 2 * dim + 1

    def roots(self, dim: int) -> slice:
        return slice(2 * dim, 3 * dim + 1)

    def _is_tame(self, lr: float) -> bool:
        return _is_tame(self.beta1, self.beta2, self.eps)

    @property
    def kernel(self) -> StepKernel:
        return _ADAM

    def numbers(self, lr: float, step: int, dim: int) -> tuple[float, ...]:
        betas = self.beta1, self.beta2
        return float(lr), *betas, _last_count(*betas), self.eps, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW(Optimizer):
    """PyTorch's AdamW (Loshchilov and Hutter, ICLR 2019): Adam after w *= 1 - lr weight_decay.

    The state is that of Adam. A row decays only when it is pushed.
    """

    name: ClassVar[str] = "adamw"

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2

    def _check(self) -> None:
        self._require_fraction("beta1", "beta2")
        self._require_positive("eps")
        self._require_not_negative("weight_decay")

    def state_width(self, dim: int) -> int:
        return 2 * dim + 1

    def roots(self, dim: int) -> slice:
        return slice(2 * dim, 3 * dim + 1)

    def _is_tame(self, lr: float) -> bool:
        return _is_tame(self.beta1, self.beta2, self.eps) and lr * self.weight_decay <= 1e6

    @property
    def kernel(self) -> StepKernel:
        return _ADAM

    def numbers(self, lr: float, step: int, dim: int) -> tuple[float, ...]:
        betas, keep = (self.beta1, self.beta2), 1.0 - lr * self.weight_decay
        return float(lr), *betas, _last_count(*betas), self.eps, float(keep)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamAsync(Optimizer):
    """DeepRec's AdamAsync: Adam in its epsilon-hat form, with the powers of beta kept per row.

        t += 1
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        w -= lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps)

    or with apply_sparse_rmsprop, which is RMSProp with momentum,

        v = beta2 v + (1 - beta2) g^2
        m = beta1 m + lr g / sqrt(v + eps)
        w -= m

    State: m[dim], v[dim], t[1], initially 0. DeepRec stores beta1^t and beta2^t instead of t. In
    float32 that gives 1 - beta2^t an error of 6e-5 while t is small, so t is stored here.
    """

    name: ClassVar[str] = "adam_async"

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    apply_sparse_rmsprop: int = 0  # 0 or 1

    def _check(self) -> None:
        self._require_fraction("beta1", "beta2")
        self._require_positive("eps")
        self._require_flag("apply_sparse_rmsprop")

    def state_width(self, dim: int) -> int:
        return 2 * dim + 1

    def roots(self, dim: int) -> slice:
        return slice(2 * dim, 3 * dim + 1)

    def _is_tame(self, lr: float) -> bool:
        return _is_tame(self.beta1, self.beta2, self.eps)

    @property
    def kernel(self) -> StepKernel:
        return _RMSPROP if self.apply_sparse_rmsprop else _ASYNC

    def numbers(self, lr: float, step: int, dim: int) -> tuple[float, ...]:
        betas = self.beta1, self.beta2
        if self.apply_sparse_rmsprop:
            return float(lr), *betas, self.eps
        return float(lr), *betas, _last_count(*betas), self.eps


def _is_tame(beta1: float, beta2: float, eps: float) -> bool:
    """Return whether lr m / (sqrt(v) + eps) stays far below the largest float32 number."""
    return 1.0 - beta1 >= 1e-6 and 1.0 - beta2 >= 1e-9 and eps >= 1e-12


ADAM: tuple[type[Optimizer], ...] = (Adam, AdamW, AdamAsync)
