"""Gates, keys and counters for the tests of admission."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from storage.admission.gates import Gate
from storage.admission.rules import (
    ADMISSIONS,
    Admission,
)
from storage.arena import Budget

MASK = 2**64 - 1
EXTREMES = [0, 1, 2, MASK, MASK - 1, 1 << 63, (1 << 63) - 1, (1 << 63) + 1, 1 << 62]
SEED = 0x0123456789ABCDEF
NAMES = list(ADMISSIONS)
SMALL: dict[str, dict[str, float]] = {  # parameters for a few keys
    "counter": {"threshold": 3, "max_keys": 1000},
    "sketch": {"threshold": 3, "expected_keys": 1000},
}
COUNTING = list(SMALL)


def u64(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


def u32(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint32)


def ones(keys: np.ndarray) -> np.ndarray:
    return np.ones(len(keys), np.uint32)


def spread(start: int, stop: int) -> np.ndarray:
    """Distinct keys all over the range."""
    return np.arange(start, stop, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def gate_of(admission: Admission, limit: int = 1 << 30) -> Any:
    return admission.gate(Budget(limit), SEED)


def held(gate: Gate, after: int = 0) -> dict[int, tuple[int, int]]:
    """Every counter: total and version by key. Asserts that no key comes twice."""
    found: dict[int, tuple[int, int]] = {}
    for keys, totals, versions in gate.changed(after):
        assert (keys.dtype, totals.dtype, versions.dtype) == (np.uint64, np.uint32, np.uint64)
        columns = keys.tolist(), totals.tolist(), versions.tolist()
        for key, total, version in zip(*columns, strict=True):
            assert key not in found
            found[key] = total, version
    return found


def five_sigma(rate: float, trials: int) -> float:
    """A share of ``trials`` that is not exceeded by chance if each succeeds with ``rate``."""
    return rate + 5 * math.sqrt(rate * (1 - rate) / trials)
