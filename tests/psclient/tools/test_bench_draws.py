"""When a load test sends its requests, and which keys they have."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from psclient.tools.bench.arrivals import Arrivals
from psclient.tools.bench.draws import Churn, Ranks, key_of
from psclient.tools.bench.mixes import Mix
from psclient.tools.bench.plan import MIXES, Plan


def times(rate: float, seconds: float, seed: int = 0) -> np.ndarray:
    arrivals, found = Arrivals(rate, seconds, (seed,)), []
    while (time := arrivals.next()) is not None:
        found.append(time)
    assert arrivals.next() is None
    return np.array(found)


# ---- arrivals


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    """Counts of a Poisson process: mean and variance are equal, in slices of any length."""
    drawn = times(500, 400)
    assert (np.diff(drawn) > 0).all()
    assert 0 <= drawn[0] < drawn[-1] < 400
    for slices in (400, 4000):
        counts = np.bincount((drawn * slices / 400).astype(int), minlength=slices)
        mean = 500 * 400 / slices
        assert_allclose(counts.mean(), mean, rtol=5 / np.sqrt(500 * 400))
        assert_allclose(counts.var(), mean, rtol=5 * np.sqrt(2 / slices))
    gaps = np.diff(drawn)
    for share in (0.1, 0.5, 0.9, 0.99):  # of an exponential distribution
        assert_allclose(np.quantile(gaps, share), -np.log(1 - share) / 500, rtol=0.03)


def test_arrivals_repeat_with_their_seed_and_differ_without() -> None:
    assert_array_equal(times(300, 20, seed=1), times(300, 20, seed=1))
    assert not np.isin(times(300, 20, seed=1), times(300, 20, seed=2)).any()


def test_a_longer_run_begins_with_the_arrivals_of_a_shorter_one() -> None:
    short, long = times(300, 5), times(300, 20)
    assert_array_equal(short, long[: len(short)])


# ---- keys


@pytest.mark.parametrize("skew", [0.0, 0.5, 0.99, 1.0, 1.3, 3.0])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_ranks_have_the_probabilities_of_zipf(count: int, skew: float) -> None:
    size = 200_000
    drawn = Ranks(count, skew).draw(np.random.default_rng(3), size)
    mass = np.arange(1, count + 1, dtype=np.float64) ** -skew
    expected = size * mass / mass.sum()
    counts = np.bincount(drawn, minlength=count)
    assert len(counts) == count
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected) + 3).all()


def test_ranks_of_a_huge_key_space_need_no_table() -> None:
    drawn = Ranks(1 << 40, 0.9).draw(np.random.default_rng(0), 10_000)
    assert drawn.min() >= 0
    assert drawn.max() < 1 << 40
    assert (drawn < 1000).any()
    assert (drawn > 1 << 30).any()


def test_keys_are_distinct_and_spread() -> None:
    keys = key_of(np.arange(100_000))
    assert len(np.unique(keys)) == 100_000
    parts = np.bincount((keys >> np.uint64(60)).astype(int), minlength=16)
    assert_allclose(parts, 100_000 / 16, rtol=0.1)


def test_new_keys_come_and_only_recent_ones_are_read() -> None:
    rng = np.random.default_rng(0)
    parts = [Churn(1000, 0.99, process, 3) for process in range(3)]
    made = np.concatenate([part.new(100) for part in parts for _ in range(50)])
    assert len(np.unique(made)) == len(made)
    assert made.min() >= 1000
    for process, part in enumerate(parts):
        read = part.read(rng, 20_000)
        own = 334 if process == 0 else 333  # of the keys 0..999
        newest = (own + 5000 - 1) * 3 + process
        assert (read % 3 == process).all()
        assert read.max() == newest
        assert read.min() > newest - 3 * own
        assert (read > newest - 30).mean() > 0.3  # Zipf: the ten newest


# ---- mixes


def stream(count: int, seed: int = 0, **settings: object) -> list[object]:
    mix = Mix(Plan(keys=5000, batch=20, tables=2, **settings), 0, (seed,))  # type: ignore[arg-type]
    return [mix.next() for _ in range(count)]


@pytest.mark.parametrize("mix", MIXES)
def test_requests_repeat_with_their_seed(mix: str) -> None:
    def flat(seed: int) -> list[object]:
        return [
            (
                each.kind,
                *(
                    None if part is None else np.concatenate(part).tolist()
                    for part in (each.pull, each.push)
                ),
            )  # type: ignore[attr-defined]
            for each in stream(50, seed, mix=mix)
        ]

    assert flat(1) == flat(1)
    assert flat(1) != flat(2)


def test_mixes_have_their_shares_of_kinds() -> None:
    shares = {}
    for mix in MIXES:
        kinds = [each.kind for each in stream(4000, mix=mix)]  # type: ignore[attr-defined]
        shares[mix] = {kind: kinds.count(kind) / 4000 for kind in sorted(set(kinds))}
    assert shares["C"] == {"pull": 1.0}
    assert shares["F"] == {"step": 1.0}
    assert shares["X"] == {"exchange": 1.0}
    for mix in "BD":
        assert set(shares[mix]) == {"pull", "push"}
        assert_allclose(shares[mix]["push"], 0.05, atol=0.015)


def test_an_exchange_pushes_to_the_keys_of_the_last_one() -> None:
    first, second, third = stream(3, mix="X")
    assert second.push is first.pull  # type: ignore[attr-defined]
    assert third.push is second.pull  # type: ignore[attr-defined]


def test_mix_d_pushes_each_key_once() -> None:
    pushed = [each.push[0] for each in stream(3000, mix="D") if each.push]  # type: ignore[attr-defined]
    keys = np.concatenate(pushed)
    assert len(keys) > 1000
    assert len(np.unique(keys)) == len(keys)
