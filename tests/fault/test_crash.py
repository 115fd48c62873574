"""Twenty kills under load. `python -m tests.fault.crash` does a thousand."""

from __future__ import annotations

import pytest
from fault import crash

pytestmark = pytest.mark.slow


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("shards", "cycles", "seed"), [(1, 8, 1), (2, 12, 2)])
def test_no_push_is_lost_or_applied_twice(shards: int, cycles: int, seed: int) -> None:
    assert crash.run(cycles, seed, shards) == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [3])
def test_no_push_is_lost_or_applied_twice_if_rows_are_on_disk(seed: int) -> None:
    assert crash.run(10, seed, 1, memory=2_500_000) == []
