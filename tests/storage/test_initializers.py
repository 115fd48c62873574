"""Initial values: exact against a reference in Python integers, and distributed rightly."""

from __future__ import annotations

import math
import statistics
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from storage import initializers, normal
from storage.initializers import (
    INITIALIZERS,
    Constant,
    Initializer,
    Normal,
    TruncatedNormal,
    Uniform,
    compile_all,
    make_initializer,
    table_seed,
)

NAMES = list(INITIALIZERS)
DRAWN = ["uniform", "normal", "truncated_normal"]
EDGES = [0, 1, 2, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]
SEED = 0x9F2C_0044_7788_1234
MASK = 2**64 - 1


def values(initializer: Initializer, keys: Any, dim: int, seed: int = SEED) -> NDArray[np.float32]:
    keys = np.asarray(keys, np.uint64)
    out = np.full((len(keys), dim), np.nan, np.float32)
    initializer.fill(seed, keys, np.arange(len(keys)), dim, out)
    return out


def unit(seed: int, key: int, j: int) -> float:
    """Draw j of SplitMix64 started at the mixed key, as a number in (0, 1)."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
        return z ^ (z >> 31)

    bits = mix((mix(key ^ seed) + (j + 1) * 0x9E3779B97F4A7C15) & MASK)
    return float(((bits >> 12) + 0.5) / 2**52)


def reference(initializer: Any, u: float) -> float:
    """The value of a draw; the standard library has its own transcription of AS 241."""
    normal = statistics.NormalDist()
    match initializer.name:
        case "zeros":
            return 0.0
        case "constant":
            return float(initializer.value)
        case "uniform":
            return float(initializer.low + (initializer.high - initializer.low) * u)
        case "normal":
            return float(initializer.mean + initializer.std * normal.inv_cdf(u))
        case "truncated_normal":
            p = normal.cdf(-2) + (normal.cdf(2) - normal.cdf(-2)) * u
            return float(initializer.mean + initializer.std * normal.inv_cdf(p))
    raise NotImplementedError(f"no reference for {initializer.name!r}")


# Parameters besides the defaults.
PARAMS: dict[str, dict[str, float]] = {
    "zeros": {},
    "constant": {"value": -1.25},
    "uniform": {"low": 2.0, "high": 5.0},
    "normal": {"mean": 1.0, "std": 3.0},
    "truncated_normal": {"mean": -1.0, "std": 3.0},
}


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_reference(name: str) -> None:
    for params in ({}, PARAMS[name]):
        initializer = make_initializer(name, params)
        for seed in (0, 1, SEED, MASK):
            drawn = values(initializer, EDGES, 40, seed)
            expected = [
                [reference(initializer, unit(seed, key, j)) for j in range(40)] for key in EDGES
            ]
            np.testing.assert_allclose(drawn, np.float32(expected), rtol=2e-7, atol=0)


def test_the_generator_is_splitmix64() -> None:
    """The first outputs for seed 1234567, as published with many implementations of it."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = [(1234567 + (j + 1) * 0x9E3779B97F4A7C15) & MASK for j in range(3)]
    assert [int(initializers._mix(np.uint64(state))) for state in states] == known


def test_values_of_a_given_seed_and_key_never_change() -> None:
    """Frozen: tables on disk count on them."""
    seed = table_seed(7, "user")
    assert seed == 17041566006748803680
    assert values(Uniform(), [42], 3, seed).tobytes().hex() == "80f01bbd423e7f3c77c4203d"
    assert values(Normal(), [42], 3, seed).tobytes().hex() == "071841bce565833b45264b3c"
    assert values(TruncatedNormal(), [42], 3, seed).tobytes().hex() == "dd8333bc77397a3bd72f3c3c"


def test_the_seed_of_a_table_depends_on_seed_and_name() -> None:
    pairs = [(seed, name) for seed in (0, 1, 256, MASK) for name in ("", "a", "b", "\0", "ä")]
    seeds = {table_seed(*pair) for pair in pairs}
    assert len(seeds) == len(pairs)
    assert all(0 <= seed <= MASK for seed in seeds)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_of_out_is_written(name: str) -> None:
    initializer = make_initializer(name, PARAMS[name])
    out = np.full((12, 9), np.nan, np.float32)
    before = out.view(np.uint32).copy()
    initializer.fill(SEED, np.array([5, MASK], np.uint64), np.array([8, 3]), 6, out)
    written = out.view(np.uint32) != before
    expected = np.zeros((12, 9), bool)
    expected[[3, 8], :6] = True
    assert written.tolist() == expected.tolist()
    assert out[[8, 3], :6].tobytes() == values(initializer, [5, MASK], 6).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_position_does_not_depend_on_dim(name: str) -> None:
    initializer = make_initializer(name, PARAMS[name])
    longest = values(initializer, EDGES, 100)
    for dim in (1, 2, 7, 8, 33, 64, 99):
        assert values(initializer, EDGES, dim).tobytes() == longest[:, :dim].tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_value_does_not_depend_on_its_batch(name: str) -> None:
    initializer = make_initializer(name, PARAMS[name])
    keys = np.random.default_rng(1).integers(0, 2**64, 500, np.uint64)
    whole = values(initializer, keys, 9)
    for size in (1, 3, 64, 499):
        parts = [values(initializer, keys[i : i + size], 9) for i in range(0, 500, size)]
        assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert values(initializer, keys[::-1].copy(), 9).tobytes() == whole[::-1].tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_writes_nothing(name: str) -> None:
    assert values(make_initializer(name, {}), [], 3).shape == (0, 3)


@pytest.mark.parametrize("name", DRAWN)
def test_no_two_of_many_keys_share_a_vector(name: str) -> None:
    count = 100_000
    small = np.arange(count, dtype=np.uint64)
    strided = small << np.uint64(40)
    for keys in (small, strided, ~small):
        drawn = values(make_initializer(name, {}), keys, 4)
        assert len(np.unique(drawn.view("V16"))) == count


@pytest.mark.parametrize("name", DRAWN)
def test_two_seeds_share_no_value(name: str) -> None:
    initializer = make_initializer(name, {})
    keys = np.arange(1000)
    assert (values(initializer, keys, 8, 1) != values(initializer, keys, 8, 2)).mean() > 0.999


def cdf(initializer: Any, x: Any) -> Any:
    """The distribution function of an initializer at the numbers ``x``."""
    if initializer.name == "uniform":
        return np.clip((x - initializer.low) / (initializer.high - initializer.low), 0, 1)
    z = (x - initializer.mean) / initializer.std
    phi = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in z])
    tail = 0.5 * math.erfc(2 / math.sqrt(2)) if initializer.name == "truncated_normal" else 0.0
    return (phi - tail) / (1 - 2 * tail)


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("along", ["keys", "positions"])
def test_values_follow_the_distribution(name: str, along: str) -> None:
    """Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand seeds; these are fixed."""
    count = 20_000
    for params in ({}, PARAMS[name]):
        initializer = make_initializer(name, params)
        keys, dim = (np.arange(count), 1) if along == "keys" else ([2**63], count)
        drawn = np.sort(values(initializer, keys, dim).ravel()).astype(np.float64)
        expected = cdf(initializer, drawn)
        ranks = np.arange(count + 1) / count
        distance = max(np.max(expected - ranks[:-1]), np.max(ranks[1:] - expected))
        assert distance < 1.95 / math.sqrt(count)


# Mean and standard deviation of one draw, in the parameters' own terms.
MOMENTS: dict[str, tuple[float, float]] = {
    "uniform": (3.5, 3.0 / math.sqrt(12)),
    "normal": (1.0, 3.0),
    "truncated_normal": (-1.0, 3.0 * 0.8796256610342398),
}


@pytest.mark.parametrize("name", DRAWN)
def test_mean_deviation_and_correlations_are_right(name: str) -> None:
    count, dim = 40_000, 8
    mean, std = MOMENTS[name]
    drawn = values(make_initializer(name, PARAMS[name]), np.arange(count), dim).astype(np.float64)
    z = (drawn - mean) / std
    noise = 5 / math.sqrt(count)  # five standard errors, for each of the few dozen numbers below
    assert np.max(abs(z.mean(axis=0))) < noise
    assert np.max(abs(z.std(axis=0) - 1)) < noise
    assert np.max(abs(z.T @ z / count - np.eye(dim))) < 2 * noise  # between positions
    assert np.max(abs((z[1:] * z[:-1]).mean(axis=0))) < noise  # between neighbouring keys


def test_a_truncated_normal_ends_at_two_deviations() -> None:
    drawn = values(TruncatedNormal(mean=0.0, std=1.0), np.arange(200_000), 4)
    assert abs(drawn).max() <= 2.0
    assert abs(drawn).max() > 1.999


def test_a_uniform_stays_between_its_ends() -> None:
    drawn = values(Uniform(low=-1.0, high=3.0), np.arange(200_000), 4)
    assert drawn.min() >= -1.0
    assert drawn.max() <= 3.0
    assert values(Uniform(low=0.5, high=0.5), [1, 2], 2).tolist() == [[0.5, 0.5]] * 2


def test_the_normal_reaches_into_its_tails() -> None:
    """The inverse CDF at the smallest draw there is, and where the formula changes."""
    for p in (2**-53, 1e-12, 1.3e-11, 1.4e-11, 0.0749, 0.075 - 1e-12):
        assert normal.normal_tail(p) == pytest.approx(statistics.NormalDist().inv_cdf(p), rel=1e-14)
    for x in (2**-53, 1e-12, 0.07, 0.5, math.sqrt(0.5), 0.999):
        assert normal.ln(x) == pytest.approx(math.log(x), rel=1e-15)


def test_after_compile_all_nothing_is_left_to_compile() -> None:
    def compiled() -> dict[str, int]:
        kernels = ("_constant", "_uniform", "_normal")
        return {name: len(vars(initializers)[name].signatures) for name in kernels}

    compile_all()
    before = compiled()
    received = np.frombuffer(np.arange(3, dtype=np.uint64).tobytes(), np.uint64)
    for name in NAMES:
        out = np.empty((3, 2), np.float32)
        make_initializer(name, PARAMS[name]).fill(1, received, np.arange(3), 2, out)
        make_initializer(name, PARAMS[name]).fill(MASK, received.copy(), np.arange(3), 2, out)
    assert compiled() == before


FIELDS = [(name, f.name) for name in NAMES for f in fields(INITIALIZERS[name])]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e31, "x"])
@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_a_parameter_must_be_a_number(name: str, field: str, value: Any) -> None:
    kind: Any = INITIALIZERS[name]
    with pytest.raises(ValueError, match=f"^initializer '{name}': {field} must be a number of "):
        kind(**{field: value})


@pytest.mark.parametrize("name", ["normal", "truncated_normal"])
def test_a_negative_deviation_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^initializer '{name}': std must be >= 0, got -0.5$"):
        make_initializer(name, {"std": -0.5})


def test_a_uniform_with_its_ends_exchanged_is_refused_by_name() -> None:
    message = "^initializer 'uniform': high must be >= low = 1.0, got 0.5$"
    with pytest.raises(ValueError, match=message):
        make_initializer("uniform", {"low": 1.0, "high": 0.5})


def test_equal_parameters_make_equal_initializers() -> None:
    assert make_initializer("constant", {"value": 1}) == Constant(value=1.0)
    assert make_initializer("normal", {}) != make_initializer("truncated_normal", {})


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    known = "zeros, constant, uniform, normal, truncated_normal"
    with pytest.raises(ValueError, match=f"^no initializer 'gauss'; there are: {known}$"):
        make_initializer("gauss", {})
    with pytest.raises(
        ValueError, match=r"^initializer 'normal' has no parameter 'stddev'; it has: mean, std$"
    ):
        make_initializer("normal", {"stddev": 1.0})
    with pytest.raises(ValueError, match=r"^initializer 'zeros' has no parameter .*: none$"):
        make_initializer("zeros", {"value": 1.0})
