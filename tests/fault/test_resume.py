"""Some kills under each policy. `python -m tests.fault.resume` does a hundred."""

from __future__ import annotations

import pytest
from fault import resume

pytestmark = pytest.mark.slow


@pytest.mark.timeout(400)
@pytest.mark.parametrize("policy", resume.POLICIES)
def test_a_trainer_comes_back_from_kills(policy: str) -> None:
    assert resume.run(policy, 4, 5) == []
