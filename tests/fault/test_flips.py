"""Hundreds of damaged files of a stopped shard. `python -m tests.fault.flips` does 10,000."""

from __future__ import annotations

import pytest
from fault import flips


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_start_from_damaged_files_refuses_or_is_identical(seed: int) -> None:
    with flips.a_directory() as directory:
        outcomes, wrong = flips.run(150, seed, directory)
    assert wrong == []
    refused = sum(often for outcome, often in outcomes.items() if "Corrupt" in outcome)
    assert refused > 30, "hardly any damage met something that matters"
