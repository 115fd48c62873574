"""Timelines: precision, clocks that go back, restarts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.eviction.timeline import PARTS, Timeline


@given(
    pauses=st.lists(
        st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.4, 1.0, 7.0, 60.0, 250.0]), min_size=1, max_size=400
    ),
    asked=st.lists(st.floats(0.0, 400.0), max_size=20),
)
@settings(max_examples=100, deadline=None)
def test_idle_rows_are_found_in_time_and_never_too_early(
    pauses: list[float], asked: list[float]
) -> None:
    ttl = 100.0
    timeline, times = Timeline(ttl), np.cumsum(pauses)
    for version, seconds in enumerate(times, 1):
        timeline.add(version, float(seconds))
        for now in (float(seconds), *(float(seconds) + each for each in asked[: 20 // len(times)])):
            found = timeline.version_before(now)
            assert found <= np.count_nonzero(now - times[:version] > ttl)
            assert found >= np.count_nonzero(now - times[:version] > ttl + ttl / PARTS)
        assert len(timeline) <= PARTS + 3


def test_a_busy_timeline_stays_small_and_exact() -> None:
    timeline, ttl = Timeline(100.0), 100.0
    for version in range(1, 100_001):
        timeline.add(version, version / 100)
        assert len(timeline) <= PARTS + 3
    assert len(timeline) > 0.9 * PARTS
    for seconds in np.arange(1000.0, 1100.0, 0.37):
        exact = (seconds - ttl) * 100
        assert exact - 100 * ttl / PARTS - 1 <= timeline.version_before(seconds) <= exact
    assert timeline.version_before(1100.1) == 100_000  # the very last push, exactly
    assert timeline.version_before(1099.9) < 100_000


def test_a_clock_that_goes_back_a_little_stands_still() -> None:
    timeline = Timeline(10.0)
    timeline.add(1, 100.0)
    timeline.add(2, 100.0 - 10.0 / PARTS)
    assert [timeline.version_before(t) for t in (99.0, 109.9, 110.1)] == [0, 0, 2]


TTL = 100.0
AHEAD, BEHIND = [0.3, 1.0, 30.0, 150.0, 1e5, 1e9], [-1e5, -1e9]


@pytest.mark.slow
@given(
    pauses=st.lists(st.sampled_from([0.3, 1.0, 7.0, 40.0, 130.0]), min_size=1, max_size=60),
    errors=st.sampled_from([AHEAD, BEHIND]).flatmap(
        lambda wrong: st.lists(st.sampled_from([0.0] * 7 + wrong), min_size=60, max_size=60)
    ),
)
@settings(max_examples=200, deadline=None)
def test_no_row_seems_more_idle_than_it_is_once_a_clock_that_was_wrong_is_right(
    pauses: list[float], errors: list[float]
) -> None:
    """Each push has its own error of the clock, but for the first."""
    timeline, now, times = Timeline(TTL), 2e9, [2e9]
    timeline.add(1, now)
    for version, (pause, error) in enumerate(zip(pauses, errors, strict=False), 2):
        now += pause
        times.append(now)
        timeline.add(version, now + error)
        assert len(timeline) <= PARTS + 3
        for later in (0.0, 50.0, 101.0, 250.0):
            found = timeline.version_before(now + later)
            assert found <= np.count_nonzero(now + later - np.array(times) > TTL)


@pytest.mark.parametrize("error", [1e9, 1e4, -1e9, -1e4])
def test_a_ttl_holds_again_when_a_clock_that_was_wrong_is_right(error: float) -> None:
    timeline, times = Timeline(TTL), 2e9 + np.arange(5000.0)
    for version, seconds in enumerate(times, 1):
        timeline.add(version, seconds + error * (version == 50))
    found = [timeline.version_before(float(times[-1]) + later) for later in (0.0, 50.0, 1e3)]
    assert found == [4899, 4949, 5000]


def test_a_timeline_survives_and_replay_adds_nothing_twice() -> None:
    timeline, again = Timeline(10.0), Timeline(10.0)
    for version in range(1, 1000):
        timeline.add(version, version * 0.1)
    again.load(timeline.pack())
    for version in range(900, 1000):
        again.add(version, version * 0.1)
        assert again.pack() == timeline.pack()
    for version in range(1000, 1100):
        for each in (timeline, again):
            each.add(version, version * 0.1)
    assert again.pack() == timeline.pack()
    assert len(again) == len(timeline) > 10
    Timeline(10.0).load(Timeline(10.0).pack())
    for size in (0, 7, 8, 24, 33):
        with pytest.raises(ValueError, match=f"multiple of 16 bytes, got {size} bytes"):
            again.load(bytes(size))
