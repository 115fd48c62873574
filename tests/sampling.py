"""Tests with many long cases: a few of them run in ``make quick``, all of them in ``make test``."""

from __future__ import annotations

from collections import defaultdict

import pytest


def mark(items: list[pytest.Item]) -> None:
    """Mark as slow the cases that ``@pytest.mark.quick(count)`` leaves out of ``make quick``.

    The ``count`` cases that stay are evenly spaced, in the order of collection.
    """
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("quick"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for several in cases.values():
        marker = several[0].get_closest_marker("quick")
        assert marker is not None
        count = min(*marker.args, len(several))
        stay = {len(several) * i // count for i in range(count)}
        for number, item in enumerate(several):
            if number not in stay:
                item.add_marker(pytest.mark.slow)
