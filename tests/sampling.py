"""Which tests ``make quick`` leaves out. ``make test`` runs all of them.

* the tests in long.txt: they are marked as long
* most cases of tests with many long cases: ``@pytest.mark.quick(count)``
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

# Tests that take longer than half a second, without their cases: "tests/FILE.py::CLASS::TEST"
LONG = frozenset(Path(__file__).with_name("long.txt").read_text().split())


def mark(items: list[pytest.Item]) -> None:
    """Mark the tests in long.txt as long, and as slow the cases that ``@pytest.mark.quick(count)``
    leaves out of ``make quick``.

    The ``count`` cases that stay are evenly spaced, in the order of collection.
    """
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        test = item.nodeid.partition("[")[0]
        if test in LONG:
            item.add_marker(pytest.mark.long)
        if item.get_closest_marker("quick"):
            cases[test].append(item)
    for several in cases.values():
        marker = several[0].get_closest_marker("quick")
        assert marker is not None
        count = min(*marker.args, len(several))
        stay = {len(several) * i // count for i in range(count)}
        for number, item in enumerate(several):
            if number not in stay:
                item.add_marker(pytest.mark.slow)
