"""Thirty kills under load. `python -m tests.fault.crash` does a thousand."""

from __future__ import annotations

import pytest
from fault import crash

pytestmark = pytest.mark.slow


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("shards", "cycles", "seed"), [(1, 8, 1), (2, 12, 2)])
def test_no_push_is_lost_or_applied_twice(shards: int, cycles: int, seed: int) -> None:
    assert crash.run(cycles, seed, shards) == []


@pytest.mark.timeout(300)
def test_no_push_is_lost_or_applied_twice_while_nearly_all_rows_are_only_on_disk() -> None:
    assert crash.run(10, 3, 2, cold=True) == []
