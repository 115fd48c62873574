"""FTRL-Proximal, per number, and with a penalty on whole rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from storage.kernels import Rows, Slots, inline, jit, prefetch_row, readonly
from storage.optimizer import NEXT, ONE, Optimizer, square_sum32


@inline
def _linear(z: Any, g: Any, w: Any, growth: Any, shrink: Any) -> Any:
    """Return the next z of FTRL, z + g + shrink w - growth w."""
    return z + (g + shrink * w) - growth * w


@inline
def _excess(z: Any, cut: Any) -> Any:
    """Return clip(z, -cut, cut) - z."""
    return (cut if z > cut else z if z > -cut else -cut) - z


@jit
def _ftrl(
    slab: Any,
    slots: Any,
    grads: Any,
    lr: float,
    power: float,
    l1: float,
    l2: float,
    l21: float,
    shrinkage: float,
    beta: float,
) -> None:
    """Run one step of Ftrl or GroupFtrl, whose hyper-parameters are power, l1, l2, l21, shrinkage
    and beta (power: learning_rate_power; shrinkage: l2_shrinkage; l21 = 0 for Ftrl).

    First writes u = clip(z, -l1, l1) - z of GroupFtrl to w, then multiplies w by the factor of u.
    There are separate loops for the usual power, -0.5, which use sqrt.
    """
    p, cut, shrink = np.float32(-power), np.float32(l1), np.float32(2.0 * shrinkage)
    inverse, ridge = np.float32(1.0 / lr), np.float32(beta / lr + 2.0 * l2)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    linear = dim + dim
    group_cut = np.float32(l21 * np.sqrt(np.float64(dim)))
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        if power == -0.5:
            for j in range(dim):
                g, w, acc = grads[i, j], slab[s, j], slab[s, dim + j]
                more = acc + g * g
                growth = (np.sqrt(more) - np.sqrt(acc)) * inverse
                z = _linear(slab[s, linear + j], g, w, growth, shrink)
                slab[s, j] = _excess(z, cut)
                slab[s, dim + j] = more
                slab[s, linear + j] = z
        else:
            for j in range(dim):
                g, w, acc = grads[i, j], slab[s, j], slab[s, dim + j]
                more = acc + g * g
                growth = (more**p - acc**p) * inverse
                z = _linear(slab[s, linear + j], g, w, growth, shrink)
                slab[s, j] = _excess(z, cut)
                slab[s, dim + j] = more
                slab[s, linear + j] = z
        scale = np.float32(1.0)
        if l21 > 0.0:
            norm = np.sqrt(square_sum32(slab[s, :dim]))
            scale = scale - group_cut / norm if norm > group_cut else np.float32(0.0)
        if power == -0.5:
            for j in range(dim):
                slab[s, j] *= scale / (np.sqrt(slab[s, dim + j]) * inverse + ridge)
        else:
            for j in range(dim):
                slab[s, j] *= scale / (slab[s, dim + j] ** p * inverse + ridge)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ftrl(Optimizer):
    """TensorFlow's Ftrl: FTRL-Proximal per coordinate (McMahan et al., KDD 2013).

        z += g + 2 l2_shrinkage w - ((n + g^2)^-p - n^-p) / lr w      p = learning_rate_power
        n += g^2
        w = (clip(z, -l1, l1) - z) / ((n^-p + beta) / lr + 2 l2)

    State: n[dim], initially initial_accumulator, and z[dim], initially 0. As in TensorFlow, z does
    not contain the initial embedding, so the first push removes most of it: initialize with zeros.
    """

    name: ClassVar[str] = "ftrl"

    lr: float = 1e-3
    learning_rate_power: float = -0.5
    initial_accumulator: float = 0.1
    l1: float = 0.0
    l2: float = 0.0
    l2_shrinkage: float = 0.0
    beta: float = 0.0

    def _lr_rule(self, lr: float) -> tuple[bool, str]:
        return lr > 0.0, "> 0"

    def _check(self) -> None:
        self._require_not_negative("initial_accumulator", "l1", "l2", "l2_shrinkage", "beta")
        self._require("learning_rate_power", -1.0 <= self.learning_rate_power <= 0.0, "-1..0")
        divisible = self.initial_accumulator or self.beta or self.l2 or not self.learning_rate_power
        self._require("initial_accumulator", bool(divisible), "> 0 where beta and l2 are 0")

    def state_width(self, dim: int) -> int:
        return 2 * dim

    def initial_state(self, dim: int) -> Rows:
        state = np.zeros(2 * dim, np.float32)
        state[:dim] = self.initial_accumulator
        return state

    def roots(self, dim: int) -> slice:
        return slice(dim, 2 * dim)

    def _is_tame(self, lr: float) -> bool:
        if lr < 1e-6 or self.l2_shrinkage > 1e6:
            return False
        root: float = self.initial_accumulator**-self.learning_rate_power
        return bool((root + self.beta) / lr + 2.0 * self.l2 >= 1e-6)  # the least divisor of z

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        rows = slab, readonly(slots), readonly(grads)
        penalties = self.l1, self.l2, 0.0, self.l2_shrinkage, self.beta
        _ftrl(*rows, float(lr), self.learning_rate_power, *penalties)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFtrl(Ftrl):
    """FTRL with the sparse group lasso. A row is a group, and whole rows become 0.

    Yue, Chen, Xu et al., "Adaptive Optimizers with Sparse Group Lasso for Neural Networks in CTR
    Prediction", ECML PKDD 2021, as in TFPlus' SparseGroupFtrl; after Ni et al., "Feature Selection
    for Facebook Feed Ranking System via a Group-Sparsity-Regularized Training Algorithm", 2019.
    z and n are those of Ftrl. Then, for the row,

        u = clip(z, -l1, l1) - z
        w = u max(0, 1 - sqrt(dim) l21 / |u|) / ((n^-p + beta) / lr + 2 l2)

    With l21 = 0 it equals Ftrl. The state is that of Ftrl.
    """

    name: ClassVar[str] = "group_ftrl"

    l21: float = 0.0

    def _check(self) -> None:
        # super() without arguments cannot find the copy that a dataclass with slots is.
        Ftrl._check(self)
        self._require_not_negative("l21")

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        rows = slab, readonly(slots), readonly(grads)
        penalties = self.l1, self.l2, self.l21, self.l2_shrinkage, self.beta
        _ftrl(*rows, float(lr), self.learning_rate_power, *penalties)


FTRL: tuple[type[Optimizer], ...] = (Ftrl, GroupFtrl)
