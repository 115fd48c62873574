"""Hostile clients of the same-host lane, for some seconds: see lane.py for the long run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fault.lane import fuzz
from servers import Cluster

pytestmark = pytest.mark.slow


def test_hostile_clients_of_the_lane_harm_nobody(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, "--lane-bytes", str(64 << 20), metrics=True)
    run = fuzz(cluster, 10.0, seed=1)
    assert run.attacks > 50
    assert run.pushes > 50
