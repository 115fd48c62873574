"""Server-side optimizers: in-place steps over rows of a slab.

A row is [embedding | state]; each class says what its state holds and what a new row's state is.
Nothing is global to a table: what bias correction and decay need to know is counted per row, so
nothing is lost at recovery. Rows without a gradient are left as they are: weight decay, momentum
and l2 shrinkage act on a row when it is pushed.

Hyper-parameters carry the names and defaults of their sources; where a source demands a learning
rate, the default here is that of the nearest one that has it.

To add one: write the class, add it to OPTIMIZERS. Nothing else changes; the tests run over the
dict.

In the formulas g is the gradient, w the embedding, and all are per number unless a row is named.
The kernels take hyper-parameters as Python floats, compute in float32, and count in uint64, which
spares the compiler the question of negative positions. They read

    slab   float32[capacity, width]  C-contiguous; rows in ``slots`` are written, no others
    slots  int64[n]                  distinct positions of rows that are there
    grads  float32[n, dim]           C-contiguous, finite
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from numba import njit

from storage.kernels import AHEAD, Rows, Slots, inline, jit, prefetch_row

SMALLEST = 1e-30  # a hyper-parameter closer to 0, or beyond LARGEST, does not survive float32
LARGEST = 1e30
LAST_COUNT = 1 << 24  # float32 counts no further; by then no correction is left to make

_ONE = np.uint64(1)
_AHEAD = np.uint64(AHEAD)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def _square_sum(numbers: Any) -> Any:
    """Sum of squares of float32[n], added in the order that suits the vector unit.

    The order depends on n and the machine, not on the run: no other kernel lets it vary at all.
    """
    total = np.float32(0.0)
    for j in range(numbers.shape[0]):
        total += numbers[j] * numbers[j]
    return total


@inline
def _linear(z: Any, g: Any, w: Any, growth: Any, shrink: Any) -> Any:
    """The next z of FTRL."""
    return z + (g + shrink * w) - growth * w


@inline
def _excess(z: Any, cut: Any) -> Any:
    """clip(z, -cut, cut) - z"""
    return (cut if z > cut else z if z > -cut else -cut) - z


@jit
def _sgd(slab: Any, slots: Any, grads: Any, lr: float) -> None:
    rate = np.float32(lr)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    for i in range(n):
        prefetch_row(slab, slots[min(i + _AHEAD, n - _ONE)], size)
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
        prefetch_row(slab, slots[min(i + _AHEAD, n - _ONE)], size)
        s = np.uint64(slots[i])
        for j in range(dim):
            g = grads[i, j]
            b = keep * slab[s, dim + j] + g
            slab[s, dim + j] = b
            slab[s, j] -= of_grad * g + of_buffer * b


@jit
def _adagrad(slab: Any, slots: Any, grads: Any, lr: float, eps: float) -> None:
    rate, tiny = np.float32(lr), np.float32(eps)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    for i in range(n):
        prefetch_row(slab, slots[min(i + _AHEAD, n - _ONE)], size)
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
        prefetch_row(slab, slots[min(i + _AHEAD, n - _ONE)], size)
        s = np.uint64(slots[i])
        acc = slab[s, dim] + _square_sum(grads[i]) / np.float32(dim)
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
        prefetch_row(slab, slots[min(i + _AHEAD, n - _ONE)], size)
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
        prefetch_row(slab, slots[min(i + _AHEAD, n - _ONE)], size)
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
        prefetch_row(slab, slots[min(i + _AHEAD, n - _ONE)], size)
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
    """AdamAsync with apply_sparse_rmsprop; the count of pushes stays as it is."""
    b1, b2, tiny = np.float32(beta1), np.float32(beta2), np.float32(eps)
    rate, rest2 = np.float32(lr), np.float32(1.0 - beta2)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    second = dim + dim
    for i in range(n):
        prefetch_row(slab, slots[min(i + _AHEAD, n - _ONE)], size)
        s = np.uint64(slots[i])
        for j in range(dim):
            g = grads[i, j]
            v = b2 * slab[s, second + j] + rest2 * (g * g)
            m = b1 * slab[s, dim + j] + rate * g / np.sqrt(v + tiny)
            slab[s, second + j] = v
            slab[s, dim + j] = m
            slab[s, j] -= m


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
    """Leaves clip(z) - z in w, then scales and divides. The usual power has loops of its own."""
    p, cut, shrink = np.float32(-power), np.float32(l1), np.float32(2.0 * shrinkage)
    inverse, ridge = np.float32(1.0 / lr), np.float32(beta / lr + 2.0 * l2)
    n, dim, size = np.uint64(slots.shape[0]), np.uint64(grads.shape[1]), 4 * slab.shape[1]
    linear = dim + dim
    group_cut = np.float32(l21 * np.sqrt(np.float64(dim)))
    for i in range(n):
        prefetch_row(slab, slots[min(i + _AHEAD, n - _ONE)], size)
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
            norm = np.sqrt(_square_sum(slab[s, :dim]))
            scale = scale - group_cut / norm if norm > group_cut else np.float32(0.0)
        if power == -0.5:
            for j in range(dim):
                slab[s, j] *= scale / (np.sqrt(slab[s, dim + j]) * inverse + ridge)
        else:
            for j in range(dim):
                slab[s, j] *= scale / (slab[s, dim + j] ** p * inverse + ridge)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer(ABC):
    """How a gradient changes a row. Hyper-parameters are checked at birth."""

    name: ClassVar[str]

    lr: float  # learning rate, where a push brings none

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            self._require(field.name, *_is_number(value))
            if field.type == "int":
                self._require(field.name, value == int(value), "a whole number")
            kind = int if field.type == "int" else float
            object.__setattr__(self, field.name, kind(value))
        self.require_lr(self.lr)
        self._check()

    def require_lr(self, lr: float) -> None:
        """Raise ValueError unless ``lr``, perhaps a push's own, is one to step with."""
        for holds, rule in (_is_number(lr), self._lr_rule(lr)):
            if not holds:
                raise ValueError(f"optimizer {self.name!r}: lr must be {rule}, got {lr!r}")

    def _lr_rule(self, lr: float) -> tuple[bool, str]:
        return lr >= 0.0, ">= 0"

    def _check(self) -> None:
        """Refuse numbers that make no sense."""
        return  # any number will do, unless a kind says otherwise

    def _require(self, field: str, holds: bool, rule: str) -> None:
        if not holds:
            value = getattr(self, field)
            raise ValueError(f"optimizer {self.name!r}: {field} must be {rule}, got {value!r}")

    def _require_fraction(self, *names: str) -> None:
        for field in names:
            self._require(field, 0.0 <= getattr(self, field) < 1.0, ">= 0 and < 1")

    def _require_positive(self, *names: str) -> None:
        for field in names:
            self._require(field, getattr(self, field) > 0.0, "> 0")

    def _require_not_negative(self, *names: str) -> None:
        for field in names:
            self._require(field, getattr(self, field) >= 0.0, ">= 0")

    def _require_flag(self, field: str) -> None:
        self._require(field, getattr(self, field) in (0, 1), "0 or 1")

    @abstractmethod
    def state_width(self, dim: int) -> int:
        """Numbers of state behind an embedding of ``dim`` numbers."""

    def initial_state(self, dim: int) -> Rows:
        """The state of a new row, float32[state_width(dim)]."""
        return np.zeros(self.state_width(dim), np.float32)

    @abstractmethod
    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        """Apply one gradient to each row in ``slots``, in place.

        slab   float32[capacity, dim + state_width(dim)]  C-contiguous
        slots  int64[n]         distinct positions of rows that are there
        grads  float32[n, dim]  C-contiguous, finite
        lr     the table's or the push's own; require_lr holds
        step   the trainer's global step
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Sgd(Optimizer):
    """w -= lr g. State: none. PyTorch's SGD."""

    name: ClassVar[str] = "sgd"

    lr: float = 1e-3

    def state_width(self, dim: int) -> int:
        return 0

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        _sgd(slab, *_readonly(slots, grads), float(lr))


@dataclass(frozen=True, slots=True, kw_only=True)
class Momentum(Optimizer):
    """PyTorch's SGD with momentum, without dampening.

        b = momentum b + g
        w -= lr b, or with nesterov lr (g + momentum b)

    State: b[dim], at first 0. The buffer of a row decays when the row is pushed.
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
        rows = slab, *_readonly(slots, grads)
        _momentum(*rows, float(lr), self.momentum, float(self.nesterov))


@dataclass(frozen=True, slots=True, kw_only=True)
class Adagrad(Optimizer):
    """PyTorch's Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011), without its decay of lr.

        n += g^2
        w -= lr g / (sqrt(n) + eps)

    State: n[dim], at first initial_accumulator.
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

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        _adagrad(slab, *_readonly(slots, grads), float(lr), self.eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowwiseAdagrad(Optimizer):
    """FBGEMM's EXACT_ROWWISE_ADAGRAD: one accumulator for the row.

        n += mean over the row of g^2
        w -= lr g / (sqrt(n) + eps)

    State: n[1], at first 0.
    """

    name: ClassVar[str] = "rowwise_adagrad"

    lr: float = 1e-2
    eps: float = 1e-8

    def _check(self) -> None:
        self._require_positive("eps")

    def state_width(self, dim: int) -> int:
        return 1

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        _rowwise_adagrad(slab, *_readonly(slots, grads), float(lr), self.eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdagradDecay(Optimizer):
    """DeepRec's AdagradDecay: Adagrad that forgets, a little with each period of steps.

        period = step // accumulator_decay_step
        for each period since the row's last:  n = max(n accumulator_decay_rate, initial)
        n += g^2
        w -= lr g / sqrt(n)

    State: n[dim], at first initial_accumulator; the row's last period[1], at first 0, which is
    right at any step because n starts at its floor. DeepRec decays at most once in a push, so a
    row that is seldom pushed keeps what it should have forgotten; here every period counts. A push
    of an earlier period decays nothing. Periods beyond 2^24 count as that one.
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

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        period = float(min(step // self.accumulator_decay_step, LAST_COUNT))
        decay = self.accumulator_decay_rate, self.initial_accumulator, period
        _adagrad_decay(slab, *_readonly(slots, grads), float(lr), *decay)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam(Optimizer):
    """PyTorch's Adam (Kingma and Ba, ICLR 2015), with t counted per row.

        t += 1
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        w -= lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    State: m[dim], v[dim], t[1], at first 0. Moments of a row move when the row is pushed.
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

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        rows = slab, *_readonly(slots, grads)
        _adam(*rows, float(lr), self.beta1, self.beta2, self.eps, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW(Optimizer):
    """PyTorch's AdamW (Loshchilov and Hutter, ICLR 2019): Adam after w *= 1 - lr weight_decay.

    State as Adam's. A row decays when it is pushed, not in between.
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

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        rows = slab, *_readonly(slots, grads)
        _adam(*rows, float(lr), self.beta1, self.beta2, self.eps, self.weight_decay)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamAsync(Optimizer):
    """DeepRec's AdamAsync: Adam in its epsilon-hat form, with the powers of beta held per row.

        t += 1
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        w -= lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps)

    or with apply_sparse_rmsprop, which is RMSProp with momentum,

        v = beta2 v + (1 - beta2) g^2
        m = beta1 m + lr g / sqrt(v + eps)
        w -= m

    State: m[dim], v[dim], t[1], at first 0. DeepRec holds beta1^t and beta2^t instead of t; in
    float32 that leaves 1 - beta2^t with an error of 6e-5 where t is small, so t is held here.
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

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        kernel = _rmsprop if self.apply_sparse_rmsprop else _adam_async
        rows = slab, *_readonly(slots, grads)
        kernel(*rows, float(lr), self.beta1, self.beta2, self.eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ftrl(Optimizer):
    """TensorFlow's Ftrl: FTRL-Proximal per coordinate (McMahan et al., KDD 2013).

        z += g + 2 l2_shrinkage w - ((n + g^2)^-p - n^-p) / lr w      p = learning_rate_power
        n += g^2
        w = (clip(z, -l1, l1) - z) / ((n^-p + beta) / lr + 2 l2)

    State: n[dim], at first initial_accumulator; z[dim], at first 0. As in TensorFlow z does not
    know the initial embedding, so the first push takes most of it away; initialise with zeros.
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

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        rows = slab, *_readonly(slots, grads)
        penalties = self.l1, self.l2, 0.0, self.l2_shrinkage, self.beta
        _ftrl(*rows, float(lr), self.learning_rate_power, *penalties)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFtrl(Ftrl):
    """FTRL with the sparse group lasso; a row is a group, and whole rows become 0.

    Yue, Chen, Xu et al., "Adaptive Optimizers with Sparse Group Lasso for Neural Networks in CTR
    Prediction", ECML PKDD 2021, as in TFPlus' SparseGroupFtrl; after Ni et al., "Feature Selection
    for Facebook Feed Ranking System via a Group-Sparsity-Regularized Training Algorithm", 2019.
    z and n as in Ftrl, then for the row

        u = clip(z, -l1, l1) - z
        w = u max(0, 1 - sqrt(dim) l21 / |u|) / ((n^-p + beta) / lr + 2 l2)

    With l21 = 0 it is Ftrl. State as Ftrl's.
    """

    name: ClassVar[str] = "group_ftrl"

    l21: float = 0.0

    def _check(self) -> None:
        # A frozen dataclass with slots is a copy of the class body's, which super() would miss.
        Ftrl._check(self)
        self._require_not_negative("l21")

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        rows = slab, *_readonly(slots, grads)
        penalties = self.l1, self.l2, self.l21, self.l2_shrinkage, self.beta
        _ftrl(*rows, float(lr), self.learning_rate_power, *penalties)


def make_optimizer(name: str, lr: float | None, params: Mapping[str, float]) -> Optimizer:
    """The optimizer of that name; what is left out, or None, keeps its default.

    Raises ValueError naming what is unknown, with what is allowed, or the rule that is broken.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer {name!r}; there are: {', '.join(OPTIMIZERS)}")
    make: Callable[..., Optimizer] = OPTIMIZERS[name]
    allowed = [field.name for field in fields(OPTIMIZERS[name]) if field.name != "lr"]
    for param in params:
        if param not in allowed:
            has = ", ".join(allowed) or "none"
            raise ValueError(f"optimizer {name!r} has no parameter {param!r}; it has: {has}")
    return make(**params) if lr is None else make(lr=lr, **params)


def compile_all() -> None:
    """Run every optimizer once, so that each kernel is compiled or loaded from the cache."""
    every = [make_optimizer(name, None, {}) for name in OPTIMIZERS]
    for optimizer in (*every, AdamAsync(apply_sparse_rmsprop=1)):
        slab = np.zeros((1, 1 + optimizer.state_width(1)), np.float32)
        slab[0, 1:] = optimizer.initial_state(1)
        gradient = np.ones((1, 1), np.float32)
        optimizer.step(slab, np.zeros(1, np.int64), gradient, optimizer.lr, 0)


def _is_number(value: Any) -> tuple[bool, str]:
    """Whether a hyper-parameter survives float32, and the rule that says so."""
    size = abs(float(value)) if isinstance(value, Real) else math.nan
    holds = size == 0.0 or SMALLEST <= size <= LARGEST
    return holds, f"0 or a number of size {SMALLEST:g} to {LARGEST:g}"


def _readonly(slots: Slots, grads: Rows) -> tuple[Any, Any]:
    """Views that cannot be written: decoded arrays are such, and each kernel has one signature."""
    views = slots.view(), grads.view()
    for view in views:
        view.flags.writeable = False
    return views


OPTIMIZERS: dict[str, type[Optimizer]] = {
    c.name: c
    for c in (
        Sgd,
        Momentum,
        Adagrad,
        RowwiseAdagrad,
        AdagradDecay,
        Adam,
        AdamW,
        AdamAsync,
        Ftrl,
        GroupFtrl,
    )
}
