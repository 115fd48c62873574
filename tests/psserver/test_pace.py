"""Slow readers take turns and pause."""

from __future__ import annotations

from typing import Any

import pytest
from stores import Direct

from psserver import pace
from psserver.pace import Pace


def test_the_pause_after_a_slice_is_a_multiple_of_the_work_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    clock = iter([5.0, 5.5, 7.0, 8.0])
    monkeypatch.setattr(pace.time, "thread_time", lambda: next(clock))
    monkeypatch.setattr(pace.time, "sleep", slept.append)
    engine: Any = Direct()
    assert Pace(engine, 19).run(lambda: "slice", lambda found: f"{found} done") == "slice done"
    assert slept == [19 * 1.5]
