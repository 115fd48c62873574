"""Adam, AdamW and AdamAsync."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from storage.kernels import Rows, Slots, jit, prefetch_row, readonly
from storage.optimizer import NEXT, ONE, Optimizer


@jit
def _adam(
    slab: Any,
    slots: Any,
    grads: Any,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    b1, b2, tiny = np.float32(beta1), np.float32(beta2), np.float32(eps)
    rest1, rest2 = np.float32(1.0 - beta1), np.float32(1.0 - beta2)
    keep = np.float32(1.0 - lr * weight_decay)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    log1, log2 = np.log(beta1), np.log(beta2)
    second, count = dim + dim, dim + dim + dim
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        t = slab[s, count] + np.float32(1.0)
        slab[s, count] = t
        rate = np.float32(lr / (1.0 - np.exp(t * log1)))
        unbias = np.float32(1.0 / np.sqrt(1.0 - np.exp(t * log2)))
        for j in range(dim):
            g = grads[i, j]
            m = b1 * slab[s, dim + j] + rest1 * g
            v = b2 * slab[s, second + j] + rest2 * (g * g)
            slab[s, dim + j] = m
            slab[s, second + j] = v
            slab[s, j] = keep * slab[s, j] - rate * m / (unbias * np.sqrt(v) + tiny)


@jit
def _adam_async(
    slab: Any, slots: Any, grads: Any, lr: float, beta1: float, beta2: float, eps: float
) -> None:
    b1, b2, tiny = np.float32(beta1), np.float32(beta2), np.float32(eps)
    rest1, rest2 = np.float32(1.0 - beta1), np.float32(1.0 - beta2)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    log1, log2 = np.log(beta1), np.log(beta2)
    second, count = dim + dim, dim + dim + dim
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        t = slab[s, count] + np.float32(1.0)
        slab[s, count] = t
        rate = np.float32(lr * np.sqrt(1.0 - np.exp(t * log2)) / (1.0 - np.exp(t * log1)))
        for j in range(dim):
            g = grads[i, j]
            m = b1 * slab[s, dim + j] + rest1 * g
            v = b2 * slab[s, second + j] + rest2 * (g * g)
            slab[s, dim + j] = m
            slab[s, second + j] = v
            slab[s, j] -= rate * m / (np.sqrt(v) + tiny)


@jit
def _rmsprop(
    slab: Any, slots: Any, grads: Any, lr: float, beta1: float, beta2: float, eps: float
) -> None:
    """Run one step of AdamAsync with apply_sparse_rmsprop = 1. It does not change t."""
    b1, b2, tiny = np.float32(beta1), np.float32(beta2), np.float32(eps)
    rate, rest2 = np.float32(lr), np.float32(1.0 - beta2)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    second = dim + dim
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        for j in range(dim):
            g = grads[i, j]
            v = b2 * slab[s, second + j] + rest2 * (g * g)
            m = b1 * slab[s, dim + j] + rate * g / np.sqrt(v + tiny)
            slab[s, second + j] = v
            slab[s, dim + j] = m
            slab[s, j] -= m


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

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        rows = slab, readonly(slots), readonly(grads)
        _adam(*rows, float(lr), self.beta1, self.beta2, self.eps, 0.0)


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

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        rows = slab, readonly(slots), readonly(grads)
        _adam(*rows, float(lr), self.beta1, self.beta2, self.eps, self.weight_decay)


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

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        kernel = _rmsprop if self.apply_sparse_rmsprop else _adam_async
        rows = slab, readonly(slots), readonly(grads)
        kernel(*rows, float(lr), self.beta1, self.beta2, self.eps)


def _is_tame(beta1: float, beta2: float, eps: float) -> bool:
    """Return whether lr m / (sqrt(v) + eps) stays far below the largest float32 number."""
    return 1.0 - beta1 >= 1e-6 and 1.0 - beta2 >= 1e-9 and eps >= 1e-12


ADAM: tuple[type[Optimizer], ...] = (Adam, AdamW, AdamAsync)
