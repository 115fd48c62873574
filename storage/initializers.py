"""Initial values of embeddings: a pure function of (seed, key, position).

A value is the same on every shard, in every tier and after every restart, whatever the batch and
the dim, because nothing is drawn in sequence. Position j of a key's embedding is output j of the
key's own SplitMix64 stream

    stream = mix(key ^ seed)
    bits_j = mix(stream + (j + 1) * GOLDEN)

(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; the finalizer
is Stafford's mix13). The streams of two keys start at different points, since mix is a bijection.
The floating-point operations are + - * / and sqrt in float64, which round exactly: every machine
computes the same bits.

To add one: write the class, add it to INITIALIZERS. Nothing else changes; the tests run over the
dict.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar

import numpy as np

from storage.kernels import Keys, Rows, Slots, inline, jit, readonly
from storage.normal import MIDDLE, normal_middle, normal_tail
from storage.registry import build

LARGEST = 1e30  # parameters beyond it may overflow float32
CUT = 2.0  # standard deviations at which truncated_normal is truncated
BELOW_CUT = 0.022750131948179209  # Phi(-CUT)


def table_seed(seed: int, name: str) -> int:
    """Return the seed of a table's initial values, uint64, from its schema's seed and its name."""
    text = seed.to_bytes(8, "little") + name.encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@inline
def _mix(x: Any) -> Any:
    """Return a hash of the uint64 ``x``: Stafford's mix13, a bijection."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@inline
def _unit(stream: Any, j: Any) -> Any:
    """Return draw ``j`` of a stream, a float64 in (0, 1): the middle of one of 2^52 equal parts.

    stream  uint64 that identifies the stream: mix(key ^ seed)
    """
    bits = _mix(stream + np.uint64(j + 1) * np.uint64(0x9E3779B97F4A7C15))
    return (np.float64(bits >> np.uint64(12)) + 0.5) * 2.0**-52


@jit
def _constant(rows: Any, dim: int, value: float, out: Any) -> None:
    """Set the first ``dim`` numbers of some rows of ``out`` to ``value``.

    rows  int64[m]            indices of the rows
    out   float32[r, >= dim]  written
    """
    for i in range(rows.shape[0]):
        row = rows[i]
        for j in range(dim):
            out[row, j] = np.float32(value)


@jit
def _uniform(seed: int, keys: Any, rows: Any, dim: int, low: float, high: float, out: Any) -> None:
    """Set out[rows[i], j] = low + (high - low) u_j for j < dim, u_j being draw j of keys[i].

    keys  uint64[m]
    rows  int64[m]
    out   float32[r, >= dim]  written
    """
    for i in range(keys.shape[0]):
        row = rows[i]
        stream = _mix(keys[i] ^ seed)
        for j in range(dim):
            out[row, j] = np.float32(low + (high - low) * _unit(stream, j))


@jit
def _normal(
    seed: Any,
    keys: Any,
    rows: Any,
    dim: int,
    mean: float,
    std: float,
    cut: float,
    below: float,
    out: Any,
) -> None:
    """Set out[rows[i], j] = mean + std z_j for j < dim; keys, rows and out as in ``_uniform``.

    z_j is drawn from the standard normal distribution between -cut and cut: it is the inverse of
    the normal CDF at ``below + (1 - 2 below) u_j``. u_j is draw j of keys[i]; ``below`` must be the
    CDF at -cut.
    """
    for i in range(keys.shape[0]):
        row = rows[i]
        stream = _mix(keys[i] ^ seed)
        for j in range(dim):  # right for most draws; no branch, so that the draws of a row overlap
            q = below + (1.0 - 2.0 * below) * _unit(stream, j) - 0.5
            out[row, j] = np.float32(mean + std * normal_middle(q))
        for j in range(dim):
            p = below + (1.0 - 2.0 * below) * _unit(stream, j)
            if p < 0.5 - MIDDLE:
                out[row, j] = np.float32(mean + std * max(-cut, normal_tail(p)))
            elif p > 0.5 + MIDDLE:
                out[row, j] = np.float32(mean - std * max(-cut, normal_tail(1.0 - p)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Initializer(ABC):
    """Base class of initializers, which compute the embedding of a new row.

    The constructor raises ValueError for a parameter that is not allowed.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, Real) and abs(float(value)) <= LARGEST
            self._require(field.name, number, f"a number of magnitude up to {LARGEST:g}")
            object.__setattr__(self, field.name, float(value))
        self._check()

    def _check(self) -> None:
        """Validate the parameters: call ``_require`` for each condition. It raises ValueError."""
        return  # unless an initializer has conditions

    def _require(self, field: str, holds: bool, rule: str) -> None:
        if not holds:
            value = getattr(self, field)
            raise ValueError(f"initializer {self.name!r}: {field} must be {rule}, got {value!r}")

    @abstractmethod
    def fill(self, seed: int, keys: Keys, rows: Slots, dim: int, out: Rows) -> None:
        """Write the initial values of ``keys[i]`` to ``out[rows[i], :dim]``, and nothing else.

        seed  seed of the table, from ``table_seed``
        keys  uint64[m]            may contain duplicates
        rows  int64[m]             positions in out
        out   float32[r, >= dim]   C-contiguous
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Zeros(Initializer):
    """Sets all numbers of an embedding to 0."""

    name: ClassVar[str] = "zeros"

    def fill(self, seed: int, keys: Keys, rows: Slots, dim: int, out: Rows) -> None:
        _constant(readonly(rows), dim, 0.0, out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant(Initializer):
    """Sets all numbers of an embedding to ``value``."""

    name: ClassVar[str] = "constant"

    value: float = 0.0

    def fill(self, seed: int, keys: Keys, rows: Slots, dim: int, out: Rows) -> None:
        _constant(readonly(rows), dim, self.value, out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform(Initializer):
    """Draws from the uniform distribution between ``low`` and ``high``. Keras's defaults.

    Rounding to float32 can result in exactly ``low`` or ``high``.
    """

    name: ClassVar[str] = "uniform"

    low: float = -0.05
    high: float = 0.05

    def _check(self) -> None:
        self._require("high", self.high >= self.low, f">= low = {self.low!r}")

    def fill(self, seed: int, keys: Keys, rows: Slots, dim: int, out: Rows) -> None:
        keys, rows = readonly(keys), readonly(rows)
        _uniform(np.uint64(seed), keys, rows, dim, self.low, self.high, out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Normal(Initializer):
    """Draws from the normal distribution with this mean and standard deviation.

    No value is more than 8.3 standard deviations from the mean.
    """

    name: ClassVar[str] = "normal"

    mean: float = 0.0
    std: float = 0.01

    def _check(self) -> None:
        self._require("std", self.std >= 0.0, ">= 0")

    def fill(self, seed: int, keys: Keys, rows: Slots, dim: int, out: Rows) -> None:
        keys, rows = readonly(keys), readonly(rows)
        _normal(np.uint64(seed), keys, rows, dim, self.mean, self.std, math.inf, 0.0, out)


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncatedNormal(Initializer):
    """Draws from the normal distribution, truncated at 2 standard deviations, as in TensorFlow.

    std  standard deviation before truncation; that of the values is ``0.88 std``
    """

    name: ClassVar[str] = "truncated_normal"

    mean: float = 0.0
    std: float = 0.01

    def _check(self) -> None:
        self._require("std", self.std >= 0.0, ">= 0")

    def fill(self, seed: int, keys: Keys, rows: Slots, dim: int, out: Rows) -> None:
        keys, rows = readonly(keys), readonly(rows)
        _normal(np.uint64(seed), keys, rows, dim, self.mean, self.std, CUT, BELOW_CUT, out)


def make_initializer(name: str, parameters: Mapping[str, float]) -> Initializer:
    """Construct the initializer with this name, for example "normal".

    parameters  values by name; those left out keep their defaults

    Raises ValueError for an unknown name or parameter, or for a value that is not allowed.
    """
    return build("initializer", INITIALIZERS, name, parameters)


def compile_all() -> None:
    """Run every initializer once: each kernel is then compiled, or loaded from the cache."""
    for name in INITIALIZERS:
        out = np.empty((1, 1), np.float32)
        make_initializer(name, {}).fill(0, np.zeros(1, np.uint64), np.zeros(1, np.int64), 1, out)


INITIALIZERS: dict[str, type[Initializer]] = {
    c.name: c for c in (Zeros, Constant, Uniform, Normal, TruncatedNormal)
}
