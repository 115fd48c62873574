"""What clients can fill in gates and evictors is in the budget, or bounded."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from storage.admission.rules import ADMISSIONS, make_admission
from storage.arena import Budget
from storage.eviction.evictor import Evictor
from storage.eviction.rules import EVICTIONS, make_eviction

KEYS, PUSHES = 30_000, 12


def growth(fill: Callable[[], None]) -> int:
    """Bytes that a call leaves in memory of Python and NumPy; arenas are not among them."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        fill()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ADMISSIONS)
def test_counters_of_any_number_of_keys_are_in_the_budget(name: str) -> None:
    budget = Budget(1 << 30)
    rule = make_admission(name, {"threshold": 9} if name in ("counter", "sketch") else {})
    gate = rule.gate(budget, 1)
    ones = np.ones(KEYS, np.uint32)

    def fill(first: int = 1) -> None:
        for number in range(first, PUSHES):
            keys = np.arange(number * KEYS, (number + 1) * KEYS, dtype=np.uint64)
            gate.admit(keys, ones, number + 1)

    fill(PUSHES - 1)  # compiles kernels
    grown = growth(fill)
    assert budget.held == gate.bytes
    assert grown < 16_384 + budget.held // 32
    if gate.counting:
        assert budget.held > PUSHES * KEYS


@pytest.mark.parametrize("name", EVICTIONS)
def test_an_evictor_is_small_however_many_pushes_there_are(name: str) -> None:
    params = {"steps": 1000} if name == "step_ttl" else {}
    evictor = Evictor([make_eviction(name, params)])

    def fill() -> None:
        for version in range(1, 20_000):
            evictor.pushed(version, version, version * 1000.0)

    assert growth(fill) < 16_384
