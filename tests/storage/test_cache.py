"""Which clean rows leave host memory first."""

from __future__ import annotations

import numpy as np
import pytest

from storage.arena import Budget
from storage.cache import Cache, Policy
from storage.tiers.host import HostTier

ROWS = 64


def tier_of(versions: list[int], steps: list[int], frequencies: list[int]) -> HostTier:
    """Return a tier with some clean rows, whose keys are their slots."""
    tier = HostTier(1, np.empty(0, np.float32), Budget(1 << 20))
    entries, slots = tier.slots, tier.allocate(len(versions), exact=True)
    columns = np.array(versions, np.uint64), np.array(steps), np.array(frequencies, np.uint64)
    entries.record(slots, slots.astype(np.uint64), *columns)
    entries.settle(slots, np.arange(1, len(slots) + 1, dtype=np.uint64))
    return tier


def leaving(tier: HostTier, count: int, policy: Policy, half_life: float = 10.0) -> set[int]:
    """Return the slots that leave first, if only the lowest-scoring may be chosen."""
    return set(Cache(tier, policy, half_life).victims(count)[0].tolist())


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.cache.SHARE", 0)


def test_lru_takes_rows_pushed_once_and_then_the_oldest() -> None:
    versions, once = list(range(1, ROWS + 1)), [i % 4 == 3 for i in range(ROWS)]
    tier = tier_of(versions, [0] * ROWS, [1 if each else 9 for each in once])
    first = leaving(tier, 4, "lru")
    assert len(first) == 4
    assert first <= set(range(3, 32, 4))


@pytest.mark.parametrize(("half_life", "first"), [(10.0, 1), (5.0, 0)])
def test_a_frequency_counts_half_after_half_life_steps(half_life: float, first: int) -> None:
    """Even rows: pushed 4 times, until step 0. Odd rows: pushed once, at step 15."""
    odd = [i % 2 for i in range(ROWS)]
    tier = tier_of([100 - each for each in odd], [15 * i for i in odd], [4 - 3 * i for i in odd])
    found = leaving(tier, 8, "lfu", half_life)
    assert len(found) == 8
    assert {slot % 2 for slot in found} == {first}
