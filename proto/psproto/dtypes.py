"""Number types of embeddings and gradients in messages ("wire dtypes"): float32, bfloat16, float16.

A bfloat16 is the upper half of a float32. NumPy has no such dtype, so it is stored as uint16 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from psproto import ps_pb2 as pb

Rows = NDArray[np.float32]

WIRE: dict[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_BFLOAT16: np.dtype("<u2"),  # the bits of a bfloat16
    pb.DTYPE_FLOAT16: np.dtype("<f2"),
}

LARGEST: dict[int, np.float32] = {  # largest finite numbers; larger gradients are refused
    pb.DTYPE_BFLOAT16: np.uint32(0x7F7F0000).view(np.float32),
    pb.DTYPE_FLOAT16: np.float32(65504.0),
}


class Malformed(ValueError):
    """Raised if received bytes are not a valid message of the expected type."""


class TooManyFields(Malformed):
    """Raised if a message has more fields, pushes or pulls than the receiver accepts."""

    def __init__(self) -> None:
        super().__init__("too many fields, pushes or pulls in one message: send several messages")


def wire_dtype(number: int) -> int:
    """Return the pb.Dtype for ``number``, the field "dtype" of a message; 0 means float32.

    Raises Malformed if no pb.Dtype has this number.
    """
    number = number or pb.DTYPE_FLOAT32
    if number not in WIRE:
        raise Malformed(f"field 'dtype' must be one of {sorted(WIRE)}, got {number}")
    return number


@njit(nogil=True, cache=True, error_model="numpy")
def _round_bfloat16(bits: Any, out: Any) -> None:
    """Round float32 bits (uint32[n]) to bfloat16 bits (out: uint16[n]), ties to even."""
    for i in range(bits.shape[0]):
        b = bits[i]
        rounded = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[i] = (b >> np.uint32(16)) | np.uint32(0x40) if nan else rounded


def to_wire(values: Rows, dtype: int) -> NDArray[Any]:
    """Convert float32 numbers to a wire dtype, rounding to nearest, ties to even.

    dtype  pb.Dtype; for float32, ``values`` itself is returned

    Numbers beyond the range of the dtype become infinity.
    """
    if dtype == pb.DTYPE_FLOAT32:
        return values
    if dtype == pb.DTYPE_FLOAT16:
        with np.errstate(over="ignore"):  # becomes infinity, which the server refuses
            return values.astype(np.float16)
    values = np.ascontiguousarray(values)
    out = np.empty(values.shape, np.uint16)
    _round_bfloat16(values.reshape(-1).view(np.uint32), out.reshape(-1))
    return out


def to_wire_clamped(values: Rows, dtype: int) -> NDArray[Any]:
    """Convert float32 numbers to a wire dtype, clamped to its range; NaN stays NaN.

    dtype  pb.Dtype; for float32, ``values`` itself is returned

    For rows sent to clients: a pull of a large number must neither fail nor return infinity.
    """
    most = LARGEST.get(dtype)
    if most is None:
        return values
    return to_wire(np.clip(values, -most, most), dtype)


def from_wire(values: NDArray[Any], dtype: int) -> Rows:
    """Convert received numbers to float32.

    dtype  pb.Dtype of ``values``; for float32, ``values`` itself is returned
    """
    if dtype == pb.DTYPE_FLOAT32:
        return values
    if dtype == pb.DTYPE_FLOAT16:
        return values.astype(np.float32)
    return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
