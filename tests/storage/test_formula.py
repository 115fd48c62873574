"""Formulas, and their translation to CUDA C. tests/gpu compares what both compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from storage.formula import (
    CannotTranslate,
    Count,
    Single,
    Whole,
    formula,
    power,
    powers,
    raised,
    result_types,
    to_cuda,
    with_callees,
)
from storage.kernels import jit


@jit
def _raise(numbers: Any, p: Any, out: Any) -> None:
    for i in range(len(numbers)):
        out[i] = raised(numbers[i], p)


@pytest.mark.parametrize("p", [0.0, 0.01, 0.3, 0.5, 0.7, 1.0])
def test_raised_rounds_correctly(p: float) -> None:
    rng = np.random.default_rng(int(100 * p))
    wide = np.exp(rng.uniform(-103, 88, 200_000))
    near = rng.uniform(0.9, 1.1, 200_000)
    bounds = [0.0, 1e-45, 1.17e-38, 1.0, 3.4028235e38]
    numbers = np.concatenate([wide, near, bounds]).astype(np.float32)
    out = np.empty_like(numbers)
    _raise(numbers, np.float32(p), out)
    wanted = (numbers.astype(np.float64) ** np.float64(np.float32(p))).astype(np.float32)
    assert (out != wanted).sum() <= 1  # a number halfway between two may be rounded either way
    np.testing.assert_allclose(out, wanted, rtol=2e-7)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 1000, 1 << 24])
def test_power_multiplies(count: int) -> None:
    for base in (0.0, 0.5, 0.999, 0.9999999):
        wanted = pytest.approx(base**count, rel=1e-9)
        assert power(base, np.float32(count)) == wanted
        assert powers(base, 0.25, np.float32(count)) == (wanted, 0.25**count)
        assert powers(0.25, base, np.float32(count)) == (0.25**count, wanted)


@formula
def _two(a: Single, b: float) -> Any:
    """Return two numbers."""
    c = a * np.float32(2.0)
    c = -c if c > a else c
    return c + a, c * b


@formula
def _calls(a: Single) -> Any:
    return np.sqrt(power(0.5, a)) + 1.0


def test_a_function_that_is_no_formula_is_refused_by_its_translation_alone() -> None:
    refused = formula(_built_in)
    assert list(with_callees(refused)) == [refused]


def test_a_formula_is_translated_with_the_types_of_its_numbers() -> None:
    assert result_types(_two) == ["float", "double"]
    assert to_cuda(_two) == (
        "__device__ inline void two(float a, double b, float& result0, double& result1) {\n"
        "    float c = (a * ((float)2.0));\n"
        "    c = ((c > a) ? (-c) : c);\n"
        "    const float value0 = (c + a);\n"
        "    const double value1 = (c * b);\n"
        "    result0 = value0;\n"
        "    result1 = value1;\n"
        "}\n"
    )
    assert "return (sqrt(power(0.5, a)) + 1.0);" in to_cuda(_calls)
    assert list(with_callees(_calls)) == [power, _calls]


def _wider(a: Single) -> Any:
    a = a * 2.0
    return a


def _mixed(a: Single, b: Count) -> Any:
    return a * b


def _imprecise(a: Single) -> Any:
    return np.exp(a)


def _branch(a: Single) -> Any:
    if a > np.float32(0.0):
        a = -a
    return a


def _early(a: Single) -> Any:
    while a > np.float32(0.0):
        return a
    return a


def _wrong_argument(a: Single) -> Any:
    return power(a, a)


def _choice(a: Single, b: float) -> Any:
    return a if a > b else b


def _whole_division(a: Whole, b: Whole) -> Any:
    return a / b  # float64 in Python, a whole number in C


def _count_difference(a: Count, b: Count) -> Any:
    return a - b  # 64 bits in Python, 32 in C


def _negative_count(a: Count) -> Any:
    return -a


def _comparison(a: Single, b: Whole) -> Any:
    return a if a > b else a * a  # compared as float64 in Python, as float32 in C


CONSTANT = 2.0


def _constant(a: float) -> Any:
    return a * CONSTANT


def _built_in(a: float) -> Any:
    return abs(a)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (_wider, "a double for 'a' of another type"),
        (_mixed, "an operation of float and unsigned"),
        (_imprecise, r"np\.exp"),
        (_branch, "If"),
        (_early, "Return"),
        (_wrong_argument, "arguments of other types than"),
        (_choice, "a choice between float and double"),
        (_whole_division, "Div of long long"),
        (_count_difference, "Sub of unsigned"),
        (_negative_count, "a negative Count"),
        (_comparison, "a comparison of float and long long"),
        (_constant, "'CONSTANT', which is no parameter or variable"),
        (_built_in, "'abs', which is no formula"),
    ],
)
def test_what_could_differ_between_machines_is_refused(function: Any, what: str) -> None:
    name = function.__name__.lstrip("_")
    with pytest.raises(
        CannotTranslate, match=rf"^formula '{name}', line \d: cannot translate {what}"
    ):
        to_cuda(formula(function))
