"""Keys and gradients from what programs have: lists, arrays, columns of data frames."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.testing import assert_array_equal

from psclient.arrays import as_array, as_gradients, as_keys
from psclient.batch import Batch
from psclient.errors import InvalidArgument
from psproto.routing import even_map

TOP = 1 << 63


def keys(*values: int) -> np.ndarray:
    return np.array([value % (1 << 64) for value in values], np.uint64)


class Nullable:
    """A column of pandas of dtype Int64 or UInt64: an array of objects; None where missing."""

    def __init__(self, values: list[Any], dtype: str) -> None:
        self.values = values
        self.dtype = dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array(self.values, object)

    def to_numpy(self, dtype: Any) -> np.ndarray:
        if None in self.values:
            raise ValueError("cannot convert NA to integer")
        return np.array(self.values, dtype)


class TestKeys:
    @pytest.mark.parametrize(
        "given",
        [
            [-1, TOP],
            (-1, TOP),
            [np.int64(-1), np.uint64(TOP)],
            np.array([-1, TOP], object),
            [[-1], [TOP]],
        ],
        ids=repr,
    )
    def test_python_integers_on_both_sides_of_the_sign_bit(self, given: Any) -> None:
        assert_array_equal(as_keys(given).reshape(-1), keys(-1, TOP))
        assert as_keys(given).shape == np.shape(given)

    @pytest.mark.parametrize("given", [[TOP, 1], [TOP + 1, 2**64 - 1, -TOP], [2**53 + 1, TOP + 1]])
    def test_no_digit_is_lost_on_the_way(self, given: list[int]) -> None:
        assert_array_equal(as_keys(given), keys(*given))

    @pytest.mark.parametrize(
        "given",
        [
            pa.array([1, -2]),
            pa.array([1, TOP], pa.uint64()),
            pa.chunked_array([[1, 2], [-2]]),
            pa.array([1, 2], pa.int8()),
            Nullable([1, -2], "Int64"),
            Nullable([1, TOP], "UInt64"),
            np.ma.array([1, 2]),
            np.ma.array([1, 2], mask=[False, False]),
            torch.tensor([1, -2]),
        ],
        ids=lambda given: type(given).__name__,
    )
    def test_columns_without_nulls(self, given: Any) -> None:
        expected = given.to_pylist() if hasattr(given, "to_pylist") else list(np.asarray(given))
        assert_array_equal(as_keys(given), keys(*map(int, expected)))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (pa.array([1, None]), "keys: 1 values are null; fill or drop them first"),
            (pa.chunked_array([[1], [None]]), "keys: 1 values are null; fill or drop them"),
            (np.ma.array([1, 2], mask=[True, False]), "keys: 1 values are masked; fill or drop"),
            (Nullable([1, None], "Int64"), "dtype object: None at position 1; fill or drop"),
            ([1, None], "dtype object: None at position 1; fill or drop missing keys"),
            ([1.0, 2.0], "dtype float64: 1.0 at position 0; floats lose integers above"),
            ([1, 2.5], r"dtype float64: 2.5 at position 1; floats lose"),
            ([1, float("nan")], "nan at position 1; fill or drop missing keys"),
            (np.ones(2), "dtype float64: floats lose integers above"),
            (["a", "b"], r"dtype <U1: psclient.hash_keys\(strings\) turns strings into keys"),
            (np.array(["a", 1], object), r"'a' at position 0; psclient.hash_keys\(strings\)"),
            ([True, False], r"dtype bool: convert with keys.astype\(np.int64\)"),
            (np.array(["2020-01-01"], "M8[s]"), r"convert with keys.astype\(np.int64\)"),
            ([Decimal(1)], r"Decimal\('1'\) at position 0; .* convert others to integers"),
            ([2**64], "of 64 bits, .* got 18446744073709551616 at position 0"),
            ([-TOP - 1], "of 64 bits, .* got -9223372036854775809 at position 0"),
            (np.array([1, 2**70], object), "of 64 bits, .* got 1180591620717411303424"),
            ([[1], [2, 3]], "keys must be an array in host memory"),
            ([1j], "dtype complex128: convert them to int64 or uint64"),
        ],
        ids=lambda each: each if isinstance(each, str) else type(each).__name__,
    )
    def test_what_is_refused_and_how_to_convert_it(self, given: Any, message: str) -> None:
        with pytest.raises(InvalidArgument, match=message):
            as_keys(given)

    def test_data_frames_of_pandas(self) -> None:
        pandas = pytest.importorskip("pandas")
        for dtype in ("Int64", "int64[pyarrow]", "int32"):
            assert_array_equal(as_keys(pandas.Series([1, 2], dtype=dtype)), keys(1, 2))
        assert_array_equal(as_keys(pandas.Series([1, TOP], dtype="UInt64")), keys(1, TOP))
        for dtype in ("Int64", "int64[pyarrow]"):
            with pytest.raises(InvalidArgument, match="fill or drop"):
                as_keys(pandas.Series([1, None], dtype=dtype))

    def test_data_frames_of_polars(self) -> None:
        polars = pytest.importorskip("polars")
        assert_array_equal(as_keys(polars.Series([1, -2])), keys(1, -2))
        with pytest.raises(InvalidArgument, match="1 values are null"):
            as_keys(polars.Series([1, None]))


class TestGradients:
    @pytest.mark.parametrize(
        "given",
        [
            [[1, -2]],
            np.array([[1, 255]], np.uint8),
            np.array([[2**24, -(2**24)]]),
            np.array([[2**60, -(2**63)]]),
            np.array([[(2**24 - 1) << 40, 2**63]], np.uint64),
            torch.tensor([[1, 2]]),
        ],
        ids=repr,
    )
    def test_integers_that_float32_represents(self, given: Any) -> None:
        found = as_gradients(given, (1, 2), "gradients")
        assert found.dtype == np.float32
        assert [int(value) for value in found[0]] == [int(value) for value in given[0]]

    @pytest.mark.parametrize(
        "value", [2**24 + 1, -(2**24) - 1, 2**63 - 1, (2**25 - 1) << 20, 2**53 + 1]
    )
    def test_others_are_refused_by_value(self, value: int) -> None:
        with pytest.raises(InvalidArgument, match=f"cannot represent the integer {value}: conv"):
            as_gradients(np.array([[1, value]]), (1, 2), "gradients")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ([[True, False]], r"must be floats, got bool: convert with .astype\(np.float32\)"),
            ([["1", "2"]], "must be floats, got <U1"),
            (np.ma.array([[1.0, 2.0]], mask=[[True, False]]), "1 values are masked"),
            ([[1.0]], r"must have shape \[1, 2\], got \[1, 1\]"),
        ],
    )
    def test_what_is_refused(self, given: Any, message: str) -> None:
        with pytest.raises(InvalidArgument, match=f"table 't': gradients:? {message}"):
            Batch([1], even_map(1)).sum(given, "t", 2)

    def test_masked_offsets_and_weights_are_refused_too(self) -> None:
        masked = np.ma.array([0, 1], mask=[False, True])
        for name in ("offsets", "weights"):
            with pytest.raises(InvalidArgument, match=f"{name}: 1 values are masked"):
                as_array(masked, name)
