"""Tests of tests/sampling.py and of its list."""

from __future__ import annotations

from pathlib import Path

from sampling import LONG

ROOT = Path(__file__).parents[1]


def test_every_long_test_exists() -> None:
    gone = []
    for each in LONG:
        file, *classes, name = each.split("::")
        path = ROOT / file
        text = path.read_text() if path.exists() else ""
        defined = name == "runTest" or f"def {name}(" in text  # runTest: a machine of Hypothesis
        found = defined and all(one in text for one in classes)
        if not found:
            gone.append(each)
    assert not gone
