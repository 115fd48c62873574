"""Numbers on the wire: rounded, read and copied as they should be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from wire_examples import BF16, F16, F32, f4

from psproto import codec

# ---- numbers


def interesting() -> np.ndarray:
    """float32 of every upper half, just below, at and above where rounding goes the other way."""
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (upper[:, None] | lower).reshape(-1).view(np.float32)


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    values = interesting()
    ours = codec.to_wire(values, BF16)
    theirs = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    assert ours.dtype == np.uint16
    assert np.array_equal(ours[~nan], theirs[~nan])
    assert ((ours[nan] & 0x7FFF) > 0x7F80).all()  # not a number either
    assert np.array_equal(ours[nan] >> 15, values[nan].view(np.uint32) >> 31)


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even() -> None:
    cases = {
        0x3F80_0000: 0x3F80,  # 1
        0x3F80_7FFF: 0x3F80,  # below the tie
        0x3F80_8000: 0x3F80,  # a tie, even below
        0x3F81_8000: 0x3F82,  # a tie, even above
        0x3F80_8001: 0x3F81,  # above the tie
        0x3FFF_FFFF: 0x4000,  # into the next power of two
        0x7F7F_FFFF: 0x7F80,  # the largest float32 becomes infinite
        0x7F7F_7FFF: 0x7F7F,  # the largest that does not
        0x7F80_0000: 0x7F80,
        0xFF80_0000: 0xFF80,
        0x8000_0000: 0x8000,  # -0
        0x0000_0001: 0x0000,  # the smallest subnormal
        0x0000_8001: 0x0001,
        0x007F_FFFF: 0x0080,  # the largest subnormal becomes normal
    }
    values = np.array(list(cases), np.uint32).view(np.float32)
    assert codec.to_wire(values, BF16).tolist() == list(cases.values())


def test_every_bfloat16_means_what_torch_says() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    theirs = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert np.array_equal(codec.from_wire(bits, BF16).view(np.uint32), theirs.view(np.uint32))


def test_every_float16_survives_the_way_there_and_back() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values = codec.from_wire(halves, F16)
    assert np.array_equal(values, halves.astype(np.float32), equal_nan=True)
    back = codec.to_wire(values, F16)
    assert np.array_equal(back, halves, equal_nan=True)
    assert back.dtype == np.float16


def test_float16_is_rounded_as_torch_rounds_it_and_overflows_to_infinity() -> None:
    values = interesting()
    ours = codec.to_wire(values, F16)
    theirs = torch.from_numpy(values).half().numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)
    assert codec.to_wire(f4(65504.0, 65519.0, 65520.0, -1e9), F16).tolist() == [
        65504.0,
        65504.0,
        np.inf,
        -np.inf,
    ]


def test_float32_travels_as_it_is_without_a_copy() -> None:
    values = interesting()
    assert codec.to_wire(values, F32) is values
    assert codec.from_wire(values, F32) is values


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_rounding_keeps_the_shape_whatever_the_strides(dtype: int) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2]
    sent = codec.to_wire(values, dtype)
    assert sent.shape == (4, 3)
    assert np.array_equal(codec.from_wire(sent, dtype), values)
    assert codec.to_wire(values[:0], dtype).shape == (0, 3)
