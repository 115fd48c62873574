"""The contract of an optimizer: an in-place step over rows of a slab.

In the formulas g is the gradient and w the embedding. A formula is for one number, unless it says
that it is for a row. It is written once, as a Python function (see formula.py), and runs in two
places: in the loops of the CPU, and in CUDA kernels, which are generated from ``StepKernel``.

The loops count in uint64, so that the compiler need not handle negative indexes. They take

    slab   float32[capacity, width]  C-contiguous; rows in ``slots`` are written, no others
    slots  int64[n]                  distinct positions of existing rows
    grads  float32[n, dim]           C-contiguous, finite

and then the numbers of ``Optimizer.numbers``, which are the same for all rows of a step. They are
Python floats. A loop rounds those to float32 that it declares as Single, as CUDA does.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from numba import njit

from storage.kernels import AHEAD, Rows, Slots, readonly

TAME_NUMBER = 1e12  # largest magnitude of a number in a tame row; see Optimizer.is_tame
TAME_GRADIENT = 1e6  # largest magnitude of a tame gradient
TAME_LR = 1e3  # largest learning rate of a tame push
ROUNDED = 1.01  # factor that covers the rounding errors of a step
SMALLEST = 1e-30  # smallest magnitude of a hyper-parameter, except 0
LARGEST = 1e30  # largest magnitude of a hyper-parameter

ONE = np.uint64(1)
NEXT = np.uint64(AHEAD)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def square_sum32(numbers: Any) -> Any:
    """Return the sum of squares of float32[n], added in the order that is fastest on this machine.

    So the last bits of the result may differ between machines, unlike those of all other kernels.
    """
    total = np.float32(0.0)
    for j in range(numbers.shape[0]):
        total += numbers[j] * numbers[j]
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class StepKernel:
    """A loop that runs an optimizer's step on the CPU, and what its CUDA kernel is made of.

    name      name of the CUDA kernel
    loop      the loop of the CPU; takes slab, slots and grads, then the numbers of the step
    number    the formula of one number. Its parameters begin with g, w and then the number's state,
              one for each vector of state that begins each ``dim`` numbers after the last. Further
              parameters are numbers of the step or variables that ``row`` declares. It returns the
              new w and the new state
    row       CUDA C that runs once per row before its numbers. It may use the numbers of the step,
              ``row`` (the row), ``grad`` (its gradient), ``dim``, ``lane`` (0 in one thread of the
              row), ``group`` (the threads of the row) and the functions in rows.cu
    after     CUDA C that runs once per row after its numbers
    formulas  other formulas that ``row`` and ``after`` call
    """

    name: str
    loop: Any
    number: Any
    row: str = ""
    after: str = ""
    formulas: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer(ABC):
    """Base class of optimizers. An object stores the hyper-parameters of one table.

    The constructor raises ValueError for a hyper-parameter that is not allowed.
    """

    name: ClassVar[str]

    lr: float  # learning rate of pushes that do not set one

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
        """Raise ValueError unless ``lr`` is a valid learning rate for this optimizer."""
        for holds, rule in (_is_number(lr), self._lr_rule(lr)):
            if not holds:
                raise ValueError(f"optimizer {self.name!r}: lr must be {rule}, got {lr!r}")

    def _lr_rule(self, lr: float) -> tuple[bool, str]:
        return lr >= 0.0, ">= 0"

    def _check(self) -> None:
        """Validate the parameters: call ``_require`` for each condition. It raises ValueError."""
        return  # unless an optimizer has conditions

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
        """Return the length of the optimizer state in a row with an embedding of length ``dim``."""

    def initial_state(self, dim: int) -> Rows:
        """Return the state of a new row, float32[state_width(dim)]."""
        return np.zeros(self.state_width(dim), np.float32)

    def roots(self, dim: int) -> slice:
        """Return which numbers of a row, as a slice, ``step`` raises to a power in 0..1.

        For example, Adagrad takes the square root of its accumulators. Empty by default. A push
        never makes these numbers smaller than they are in a new row.
        """
        return slice(dim, dim)

    def is_tame(self, lr: float) -> bool:
        """Return True if a step on tame rows with tame gradients never results in infinity or NaN.

        lr  learning rate of the step

        Gradients are tame if their magnitudes are at most 1e6 (TAME_GRADIENT). A row is tame if the
        magnitudes of its numbers are at most 1e12 (TAME_NUMBER), and the numbers in ``roots`` are
        not less than in a new row. Returning False is always correct, but makes pushes slower.
        """
        return lr <= TAME_LR and self._is_tame(lr)

    def _is_tame(self, lr: float) -> bool:
        return True

    def reach(self, dim: int, lr: float, gradient: float) -> float:
        """Return an upper bound for the increase of the largest magnitude in tame rows by one step.

        dim       length of an embedding
        lr        learning rate of the step
        gradient  largest magnitude of the gradients

        See ``is_tame``. The factor ROUNDED covers rounding errors. Returns infinity, the default,
        if there is no such bound; the caller then examines the rows after each push.
        """
        return math.inf

    @property
    @abstractmethod
    def kernel(self) -> StepKernel:
        """What runs a step with these hyper-parameters."""

    @abstractmethod
    def numbers(self, lr: float, step: int, dim: int) -> tuple[float, ...]:
        """Return what the kernel computes with besides rows, in the order of its parameters."""

    def step(self, slab: Rows, slots: Slots, grads: Rows, lr: float, step: int) -> None:
        """Apply one gradient to each row in ``slots``, in place.

        slab   float32[capacity, dim + state_width(dim)]  C-contiguous
        slots  int64[n]         distinct positions of existing rows
        grads  float32[n, dim]  C-contiguous, finite
        lr     learning rate, accepted by ``require_lr``
        step   the trainer's global step
        """
        numbers = self.numbers(lr, step, grads.shape[1])
        self.kernel.loop(slab, readonly(slots), readonly(grads), *numbers)


def _is_number(value: Any) -> tuple[bool, str]:
    """Return (whether ``value`` is a number that float32 expresses well, the rule in words)."""
    size = abs(float(value)) if isinstance(value, Real) else math.nan
    holds = size == 0.0 or SMALLEST <= size <= LARGEST
    return holds, f"0 or a number of magnitude {SMALLEST:g} to {LARGEST:g}"
