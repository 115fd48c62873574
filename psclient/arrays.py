"""Keys and gradients from arrays of any framework, and from sequences of Python numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.errors import InvalidArgument

Rows = NDArray[np.float32]

LOW, END = -(1 << 63), 1 << 64  # keys are in LOW..END - 1: they may be signed or unsigned
MASK = END - 1
EXACT = 1 << 24  # float32 represents every integer up to this size
CONVERSIONS = {  # by dtype.kind: advice on how to convert such an array to keys, for errors
    "f": "floats lose integers above 2^53: read the column as int64, or convert with"
    " keys.astype(np.int64) if every value is whole",
    "b": "convert with keys.astype(np.int64)",
    "U": "psclient.hash_keys(strings) turns strings into keys",
    "S": "psclient.hash_keys(strings) turns strings into keys",
    "T": "psclient.hash_keys(strings) turns strings into keys",
    "M": "convert with keys.astype(np.int64)",
    "m": "convert with keys.astype(np.int64)",
}


def as_array(values: Any, name: str) -> NDArray[Any]:
    """Convert an array of any framework, or a sequence, to a NumPy array of the same shape.

    values  NumPy array, array of another framework (read by DLPack), data frame column, or sequence
    name    name of the argument, for errors

    Arrays in host memory are not copied, except bfloat16, which is converted to float32. Raises
    InvalidArgument if the array is not in host memory, or if values are masked or null.
    """
    if type(values) is np.ndarray:
        return values
    if isinstance(values, np.ma.MaskedArray):
        if np.ma.is_masked(values):
            count = int(np.ma.getmaskarray(values).sum())
            raise InvalidArgument(f"{name}: {count} values are masked; fill or drop them first")
        return np.ma.getdata(values)
    if isinstance(values, np.ndarray):
        return values
    _refuse_nulls(values, name)
    if hasattr(values, "detach"):  # a tensor that records gradients refuses DLPack
        values = values.detach()
    try:  # a data frame's column, which has null_count, is read by np.asarray
        dlpack = hasattr(values, "__dlpack__") and not hasattr(values, "null_count")
        return np.from_dlpack(values) if dlpack else np.asarray(values)
    except (BufferError, TypeError, ValueError, RuntimeError) as error:
        if str(getattr(values, "dtype", "")).endswith("bfloat16"):  # a dtype that NumPy lacks
            wide = values.float() if hasattr(values, "float") else values.astype("float32")
            return as_array(wide, name)
        raise InvalidArgument(
            f"{name} must be an array in host memory, or a sequence: {error}"
        ) from error


def as_keys(keys: Any) -> NDArray[np.uint64]:
    """Convert integers of any shape to a contiguous uint64 array of the same shape.

    keys  integers in -2^63..2^64-1; a negative key k becomes ``k + 2^64``

    Raises InvalidArgument if they are not such integers; the message tells how to convert them.
    """
    array = as_array(keys, "keys")
    if array.dtype == np.int64 and array.flags.c_contiguous:
        return array.view(np.uint64)
    if not array.size and array.dtype.kind in "fO":  # np.asarray([])
        array = array.astype(np.uint64)
    if array.dtype.kind == "O":
        array = _integers(_of_column(keys, array))
    elif array.dtype.kind == "f" and isinstance(keys, list | tuple):
        array = _integers(np.asarray(keys, object))  # NumPy makes floats of [-1, 2**63]
    if array.dtype.kind not in "iu":
        how = CONVERSIONS.get(array.dtype.kind, "convert them to int64 or uint64")
        if array.dtype.kind == "f" and (missing := int(np.isnan(array).sum())):
            how = f"{missing} values are missing (NaN); fill or drop them first"
        raise InvalidArgument(f"keys must be integers, got dtype {array.dtype}: {how}")
    if array.dtype.kind == "i":
        array = array.astype(np.int64, copy=False)
    return array.astype(np.uint64, order="C", copy=False)  # keeps the shape (), too


def as_gradients(gradients: Any, shape: tuple[int, ...], name: str) -> Rows:
    """Convert gradients to a contiguous float32 array.

    gradients  floats, or integers that float32 represents exactly
    shape      shape that they must have
    name       name of the argument, for errors

    Raises InvalidArgument for a different shape, and for numbers that are neither floats nor such
    integers.
    """
    array = as_array(gradients, name)
    if array.dtype == np.float32 and array.shape == shape and array.flags.c_contiguous:
        return array
    if array.dtype.kind in "iu":
        _require_exact(array, name)
    elif array.dtype.kind != "f" and array.dtype.name != "bfloat16":  # ml_dtypes'
        raise InvalidArgument(
            f"{name} must be floats, got {array.dtype}: convert with .astype(np.float32)"
        )
    if array.shape != shape:
        raise InvalidArgument(f"{name} must have shape {list(shape)}, got {list(array.shape)}")
    return np.ascontiguousarray(array, np.float32).reshape(shape)


def _refuse_nulls(values: Any, name: str) -> None:
    """Raise InvalidArgument if ``values`` is a column of pyarrow or polars that contains nulls.

    name  name of the argument, for errors

    An array of such a column would have floats instead of integers.
    """
    nulls = getattr(values, "null_count", 0)
    if count := nulls() if callable(nulls) else nulls:
        raise InvalidArgument(f"{name}: {count} values are null; fill or drop them first")


def _of_column(values: Any, array: NDArray[Any]) -> NDArray[Any]:
    """Convert a nullable integer column of pandas to an int64 or uint64 array.

    values  any object, such as a pandas Series
    array   the same values as an array of Python objects

    Returns ``array`` unchanged if ``values`` is not such a column or has missing values.
    """
    kind = str(getattr(values, "dtype", "")).lower()
    if kind.startswith(("int", "uint")) and hasattr(values, "to_numpy"):
        try:
            return np.asarray(
                values.to_numpy(dtype=np.uint64 if kind.startswith("u") else np.int64)
            )
        except (TypeError, ValueError):
            pass  # values are missing
    return array


def _integers(array: NDArray[Any]) -> NDArray[Any]:
    """Convert an array of Python objects, which must be keys, to uint64 of the same shape.

    Returns an array of any other dtype unchanged. Raises InvalidArgument, with the position, if an
    object is not an integer in -2^63..2^64-1.
    """
    if array.dtype.kind != "O":
        return array
    flat = array.reshape(-1).tolist()
    for index, value in enumerate(flat):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            if isinstance(value, float | np.floating) and value == value:
                how = CONVERSIONS["f"]
            elif isinstance(value, str | bytes):
                how = CONVERSIONS["U"]
            else:
                how = "fill or drop missing keys, and convert others to integers"
            raise InvalidArgument(
                f"keys must be integers, got dtype {_shown(array, flat)}: {value!r} at position"
                f" {index}; {how}"
            )
        if not LOW <= value < END:
            raise InvalidArgument(
                f"keys must be integers of 64 bits, -2^63..2^64-1, got {value} at position {index}"
            )
    return np.fromiter((int(value) & MASK for value in flat), np.uint64, len(flat)).reshape(
        array.shape
    )


def _shown(array: NDArray[Any], flat: list[Any]) -> str:
    """Return the dtype that an error reports for ``array``, an array of Python objects.

    flat  list of the objects. If all are ints and floats, the dtype is "float64": NumPy would have
          made floats of them
    """
    kinds = {type(value) for value in flat}
    return "float64" if kinds <= {int, float} else str(array.dtype)


def _require_exact(array: NDArray[Any], name: str) -> None:
    """Raise InvalidArgument if float32 cannot represent an integer of ``array`` exactly.

    float32 represents integers of up to 24 significant bits. ``name`` names the array in the error.
    """
    if not array.size or (array.max() <= EXACT and array.min() >= -EXACT):
        return
    wide = array.astype(np.int64).view(np.uint64) if array.dtype.kind == "i" else array
    size = np.where(array < 0, np.uint64(0) - wide, wide).astype(np.uint64)
    lowest = size & (np.uint64(0) - size)  # the lowest bit that is set
    odd = size // np.maximum(lowest, np.uint64(1))
    if (odd >= EXACT).any():
        value = array[odd >= EXACT].reshape(-1)[0]
        raise InvalidArgument(
            f"{name}: float32 cannot represent the integer {value}: convert with"
            " .astype(np.float32), which rounds"
        )
