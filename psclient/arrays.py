"""Arrays of any framework as keys and as gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.errors import InvalidArgument

Rows = NDArray[np.float32]


def as_array(values: Any, name: str) -> NDArray[Any]:
    """A NumPy view of an array of any framework (DLPack), or of a sequence; copies nothing of an
    array in host memory, but bfloat16, which becomes float32. InvalidArgument if it cannot be read
    here.
    """
    if isinstance(values, np.ndarray):
        return values
    if hasattr(values, "detach"):  # a tensor that records gradients refuses DLPack
        values = values.detach()
    try:
        return np.from_dlpack(values) if hasattr(values, "__dlpack__") else np.asarray(values)
    except (BufferError, TypeError, ValueError, RuntimeError) as error:
        if str(getattr(values, "dtype", "")).endswith("bfloat16"):  # NumPy has none
            wide = values.float() if hasattr(values, "float") else values.astype("float32")
            return as_array(wide, name)
        raise InvalidArgument(f"{name}: no array in host memory: {error}") from error


def as_keys(keys: Any) -> NDArray[np.uint64]:
    """Keys of any shape as contiguous uint64; signed ones keep their bits."""
    array = as_array(keys, "keys")
    if not array.size and array.dtype.kind == "f":  # np.asarray([])
        array = array.astype(np.uint64)
    if array.dtype.kind not in "iu":
        raise InvalidArgument(f"keys must be integers, got dtype {array.dtype}")
    if array.dtype.kind == "i":
        array = array.astype(np.int64, copy=False)
    return array.astype(np.uint64, order="C", copy=False)  # of any shape, () too


def as_gradients(gradients: Any, shape: tuple[int, ...], table: str) -> Rows:
    """Gradients as contiguous float32 of a shape, or InvalidArgument."""
    array = as_array(gradients, f"table {table!r}: gradients")
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":  # ml_dtypes'
        raise InvalidArgument(f"table {table!r}: gradients must be floats, got {array.dtype}")
    if array.shape != shape:
        raise InvalidArgument(
            f"table {table!r}: gradients must have shape {list(shape)}, got {list(array.shape)}"
        )
    return np.ascontiguousarray(array, np.float32)
