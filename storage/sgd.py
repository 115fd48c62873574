"""SGD, with and without momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from storage.formula import Single, formula
from storage.kernels import jit, prefetch_row
from storage.optimizer import NEXT, ONE, ROUNDED, Optimizer, StepKernel


@formula
def _sgd_number(g: Single, w: Single, rate: Single) -> Any:
    return w - rate * g


@jit
def _sgd(slab: Any, slots: Any, grads: Any, rate: Single) -> None:
    rate = np.float32(rate)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        for j in range(dim):
            slab[s, j] = _sgd_number(grads[i, j], slab[s, j], rate)


@formula
def _momentum_number(
    g: Single, w: Single, b: Single, keep: Single, of_grad: Single, of_buffer: Single
) -> Any:
    b = keep * b + g
    return w - (of_grad * g + of_buffer * b), b


@jit
def _momentum(
    slab: Any, slots: Any, grads: Any, keep: Single, of_grad: Single, of_buffer: Single
) -> None:
    keep, of_grad, of_buffer = np.float32(keep), np.float32(of_grad), np.float32(of_buffer)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        for j in range(dim):
            slab[s, j], slab[s, dim + j] = _momentum_number(
                grads[i, j], slab[s, j], slab[s, dim + j], keep, of_grad, of_buffer
            )


_SGD = StepKernel(name="sgd", loop=_sgd, number=_sgd_number)
_MOMENTUM = StepKernel(name="momentum", loop=_momentum, number=_momentum_number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sgd(Optimizer):
    """PyTorch's SGD: w -= lr g. It has no state."""

    name: ClassVar[str] = "sgd"

    lr: float = 1e-3

    def state_width(self, dim: int) -> int:
        return 0

    def reach(self, dim: int, lr: float, gradient: float) -> float:
        return ROUNDED * lr * gradient

    @property
    def kernel(self) -> StepKernel:
        return _SGD

    def numbers(self, lr: float, step: int, dim: int) -> tuple[float, ...]:
        return (float(lr),)


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

    @property
    def kernel(self) -> StepKernel:
        return _MOMENTUM

    def numbers(self, lr: float, step: int, dim: int) -> tuple[float, ...]:
        of_buffer = lr * self.momentum if self.nesterov else lr
        return self.momentum, float(lr * self.nesterov), float(of_buffer)


SGD: tuple[type[Optimizer], ...] = (Sgd, Momentum)
