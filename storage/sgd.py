"""SGD, with and without momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from storage.kernels import Rows, Slots, jit, prefetch_row, readonly
from storage.optimizer import NEXT, ONE, ROUNDED, Optimizer


@jit
def _sgd(slab: Any, slots: Any, grads: Any, lr: float) -> None:
    rate = np.float32(lr)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        for j in range(dim):
            slab[s, j] -= rate * grads[i, j]


@jit
def _momentum(
    slab: Any, slots: Any, grads: Any, lr: float, momentum: float, nesterov: float
) -> None:
    keep = np.float32(momentum)
    of_grad = np.float32(lr * nesterov)
    of_buffer = np.float32(lr * (momentum if nesterov else 1.0))
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        for j in range(dim):
            g = grads[i, j]
            b = keep * slab[s, dim + j] + g
            slab[s, dim + j] = b
            slab[s, j] -= of_grad * g + of_buffer * b


@dataclass(frozen=True, slots=True, kw_only=True)
class Sgd(Optimizer):
    """PyTorch's SGD: w -= lr g. It has no state."""

    name: ClassVar[str] = "sgd"

    lr: float = 1e-3

    def state_width(self, dim: int) -> int:
        return 0

    def reach(self, dim: int, lr: float, gradient: float) -> float:
        return ROUNDED * lr * gradient

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        _sgd(slab, readonly(slots), readonly(grads), float(lr))


@dataclass(frozen=True, slots=True, kw_only=True)
class Momentum(Optimizer):
    """PyTorch's SGD with momentum, without dampening.

        b = momentum b + g
        w -= lr b                     with nesterov = 0
        w -= lr (g + momentum b)      with nesterov = 1

    State: b[dim], initially 0. The buffer b of a row decays only when the row is pushed.
    """

    name: ClassVar[str] = "momentum"

    lr: float = 1e-3
    momentum: float = 0.9
    nesterov: int = 0  # 0 or 1

    def _check(self) -> None:
        self._require_fraction("momentum")
        self._require_flag("nesterov")

    def state_width(self, dim: int) -> int:
        return dim

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        rows = slab, readonly(slots), readonly(grads)
        _momentum(*rows, float(lr), self.momentum, float(self.nesterov))


SGD: tuple[type[Optimizer], ...] = (Sgd, Momentum)
