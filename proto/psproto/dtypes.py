"""Types of embeddings and gradients on the wire: float32, bfloat16 and float16.

bfloat16 is the upper half of a float32. NumPy has no such dtype, so its bits are kept as uint16.
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
    pb.DTYPE_BFLOAT16: np.dtype("<u2"),  # numpy has no bfloat16; these are its bits
    pb.DTYPE_FLOAT16: np.dtype("<f2"),
}

LARGEST: dict[int, np.float32] = {  # finite magnitudes; gradients beyond them are refused
    pb.DTYPE_BFLOAT16: np.uint32(0x7F7F0000).view(np.float32),
    pb.DTYPE_FLOAT16: np.float32(65504.0),
}


class Malformed(ValueError):
    """The bytes are not a valid message of the expected kind."""


class TooManyFields(Malformed):
    """A message has more fields, pushes or pulls than a receiver accepts."""

    def __init__(self) -> None:
        super().__init__("too many fields, pushes or pulls in one message")


def wire_dtype(number: int) -> int:
    """Return the dtype of a header: float32 if unspecified. Raises Malformed if unknown."""
    number = number or pb.DTYPE_FLOAT32
    if number not in WIRE:
        raise Malformed(f"dtype {number} is not one of {sorted(WIRE)}")
    return number


@njit(nogil=True, cache=True, error_model="numpy")
def _round_bfloat16(bits: Any, out: Any) -> None:
    for i in range(bits.shape[0]):
        b = bits[i]
        rounded = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[i] = (b >> np.uint32(16)) | np.uint32(0x40) if nan else rounded


def to_wire(values: Rows, dtype: int) -> NDArray[Any]:
    """Convert float32 numbers to a wire dtype: the nearest number, ties to even."""
    if dtype == pb.DTYPE_FLOAT32:
        return values
    if dtype == pb.DTYPE_FLOAT16:
        with np.errstate(over="ignore"):  # infinity; the server refuses it by name
            return values.astype(np.float16)
    values = np.ascontiguousarray(values)
    out = np.empty(values.shape, np.uint16)
    _round_bfloat16(values.reshape(-1).view(np.uint32), out.reshape(-1))
    return out


def to_wire_clamped(values: Rows, dtype: int) -> NDArray[Any]:
    """Convert stored numbers to a wire dtype. Numbers beyond its range become its largest one.

    A pull of one large row must neither fail nor return infinity. NaN stays NaN.
    """
    most = LARGEST.get(dtype)
    if most is None:
        return values
    return to_wire(np.clip(values, -most, most), dtype)


def from_wire(values: NDArray[Any], dtype: int) -> Rows:
    """Convert numbers of a wire dtype to float32; returns ``values`` itself if they are float32."""
    if dtype == pb.DTYPE_FLOAT32:
        return values
    if dtype == pb.DTYPE_FLOAT16:
        return values.astype(np.float32)
    return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
