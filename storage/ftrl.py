"""FTRL-Proximal, per number, and with a penalty on whole rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from storage.formula import Single, formula, raised
from storage.kernels import Rows, jit, prefetch_row
from storage.optimizer import NEXT, ONE, Optimizer, StepKernel, square_sum32

HALF = np.float32(0.5)  # the usual power


@formula
def _root(n: Single, p: Single) -> Any:
    """Return n^p. The usual p = 0.5 takes the square root."""
    return np.sqrt(n) if p == np.float32(0.5) else raised(n, p)


@formula
def _linear(
    g: Single, w: Single, n: Single, z: Single, p: Single, shrink: Single, inverse: Single
) -> Any:
    """Return the next z of FTRL, z + g + shrink w - growth w."""
    growth = (_root(n + g * g, p) - _root(n, p)) * inverse
    return z + (g + shrink * w) - growth * w


@formula
def _excess(z: Single, cut: Single) -> Any:
    """Return clip(z, -cut, cut) - z."""
    return (cut if z > cut else z if z > -cut else -cut) - z


@formula
def _factor(n: Single, p: Single, inverse: Single, ridge: Single, scale: Single) -> Any:
    """Return the number that turns u = clip(z, -l1, l1) - z into w."""
    return scale / (_root(n, p) * inverse + ridge)


@formula
def _ftrl_number(
    g: Single,
    w: Single,
    n: Single,
    z: Single,
    p: Single,
    cut: Single,
    shrink: Single,
    inverse: Single,
    ridge: Single,
) -> Any:
    z = _linear(g, w, n, z, p, shrink, inverse)
    n = n + g * g
    return _excess(z, cut) * _factor(n, p, inverse, ridge, np.float32(1.0)), n, z


@jit
def _ftrl(
    slab: Any,
    slots: Any,
    grads: Any,
    p: Single,
    cut: Single,
    shrink: Single,
    inverse: Single,
    ridge: Single,
) -> None:
    """Run one step of Ftrl. There is a separate loop for the usual power, which takes roots."""
    p, cut, shrink = np.float32(p), np.float32(cut), np.float32(shrink)
    inverse, ridge = np.float32(inverse), np.float32(ridge)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    second = dim + dim
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        if p == HALF:
            for j in range(dim):
                g, w, acc, z = grads[i, j], slab[s, j], slab[s, dim + j], slab[s, second + j]
                slab[s, j], slab[s, dim + j], slab[s, second + j] = _ftrl_number(
                    g, w, acc, z, HALF, cut, shrink, inverse, ridge
                )
        else:
            for j in range(dim):
                g, w, acc, z = grads[i, j], slab[s, j], slab[s, dim + j], slab[s, second + j]
                slab[s, j], slab[s, dim + j], slab[s, second + j] = _ftrl_number(
                    g, w, acc, z, p, cut, shrink, inverse, ridge
                )


@formula
def _group_number(
    g: Single,
    w: Single,
    n: Single,
    z: Single,
    p: Single,
    cut: Single,
    shrink: Single,
    inverse: Single,
) -> Any:
    """Return u = clip(z, -l1, l1) - z in place of w, and the new n and z."""
    z = _linear(g, w, n, z, p, shrink, inverse)
    return _excess(z, cut), n + g * g, z


@formula
def _group_scale(norm: Single, group_cut: Single) -> Any:
    one = np.float32(1.0)
    return one - group_cut / norm if norm > group_cut else np.float32(0.0)


@jit
def _group_ftrl(
    slab: Any,
    slots: Any,
    grads: Any,
    p: Single,
    cut: Single,
    shrink: Single,
    inverse: Single,
    ridge: Single,
    group_cut: Single,
) -> None:
    """Run one step of GroupFtrl: write u to w, then multiply it by the factor of its row."""
    p, cut, shrink = np.float32(p), np.float32(cut), np.float32(shrink)
    group_cut = np.float32(group_cut)
    inverse, ridge = np.float32(inverse), np.float32(ridge)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    second = dim + dim
    for i in range(n):
        prefetch_row(slab, slots[min(i + NEXT, n - ONE)], size)
        s = np.uint64(slots[i])
        if p == HALF:
            for j in range(dim):
                g, w, acc, z = grads[i, j], slab[s, j], slab[s, dim + j], slab[s, second + j]
                slab[s, j], slab[s, dim + j], slab[s, second + j] = _group_number(
                    g, w, acc, z, HALF, cut, shrink, inverse
                )
        else:
            for j in range(dim):
                g, w, acc, z = grads[i, j], slab[s, j], slab[s, dim + j], slab[s, second + j]
                slab[s, j], slab[s, dim + j], slab[s, second + j] = _group_number(
                    g, w, acc, z, p, cut, shrink, inverse
                )
        scale = _group_scale(np.sqrt(square_sum32(slab[s, :dim])), group_cut)
        if p == HALF:
            for j in range(dim):
                slab[s, j] *= _factor(slab[s, dim + j], HALF, inverse, ridge, scale)
        else:
            for j in range(dim):
                slab[s, j] *= _factor(slab[s, dim + j], p, inverse, ridge, scale)


_FTRL = StepKernel(name="ftrl", loop=_ftrl, number=_ftrl_number)
_GROUP = StepKernel(
    name="group_ftrl",
    loop=_group_ftrl,
    number=_group_number,
    after="""
        const float norm = sqrtf(square_sum(group, row, lane, dim));
        const float scale = group_scale(norm, group_cut);
        for (int j = lane; j < dim; j += LANES)
            row[j] *= factor(row[dim + j], p, inverse, ridge, scale);
    """,
    formulas=(_group_scale, _factor),
)


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

    @property
    def kernel(self) -> StepKernel:
        return _FTRL

    def numbers(self, lr: float, step: int, dim: int) -> tuple[float, ...]:
        cuts = -self.learning_rate_power, self.l1, 2.0 * self.l2_shrinkage
        return *cuts, 1.0 / lr, self.beta / lr + 2.0 * self.l2


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

    @property
    def kernel(self) -> StepKernel:
        return _GROUP if self.l21 else _FTRL

    def numbers(self, lr: float, step: int, dim: int) -> tuple[float, ...]:
        numbers = Ftrl.numbers(self, lr, step, dim)
        return (*numbers, self.l21 * math.sqrt(dim)) if self.l21 else numbers


FTRL: tuple[type[Optimizer], ...] = (Ftrl, GroupFtrl)
