"""Slices of GPU memory in requests of the same-host lane are checked before anything is written."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from psproto import lanes
from psproto import ps_pb2 as pb

SIZE = 1 << 16
MEMORY = bytearray(SIZE)
U64 = 2**64 - 1


class Region(NamedTuple):
    """Stands in for a region in GPU memory."""

    address: int = 1 << 40
    size: int = SIZE


def decoded(at: dict[str, int], **head: Any) -> lanes.GpuRoom | None:
    keys = pb.Slice(region=1, offset=64, size=80)
    asked = pb.LanePull(header=pb.PullHeader(table="t", **head), keys=keys, rows=pb.Slice(**at))
    request = pb.LaneRequest(id=1, pulls=[asked])
    exchange = lanes.decode_request(request, {1: memoryview(MEMORY)}, 100, {7: Region()})
    return exchange.pulls[0].gpu_room


@pytest.mark.parametrize(("offset", "size"), [(0, SIZE), (16, 640), (SIZE - 16, 16), (SIZE, 0)])
def test_a_slice_within_a_region_is_a_room(offset: int, size: int) -> None:
    room = decoded({"region": 7, "offset": offset, "size": size})
    assert room is not None
    assert (room.address, room.size) == ((1 << 40) + offset, size)


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, SIZE + 1),
        (16, SIZE),
        (SIZE, 16),
        (SIZE + 16, 0),
        (8, 64),
        (1, 1),
        (0, U64),
        (U64 - 15, 32),
    ],
)
def test_other_slices_are_refused(offset: int, size: int) -> None:
    with pytest.raises(lanes.BadSlice, match=r"'rows': expected .* as offset"):
        decoded({"region": 7, "offset": offset, "size": size})


def test_a_region_must_be_in_gpu_memory() -> None:
    for region in (1, 8):  # one in host memory; none
        with pytest.raises(lanes.BadSlice, match=f"region {region} of GPU memory"):
            decoded({"region": region, "offset": 64, "size": 640})


@pytest.mark.parametrize(
    "head", [{"dtype": pb.DTYPE_BFLOAT16}, {"with_metadata": True}, {"prefetch": True}]
)
def test_only_float32_rows_without_metadata(head: Any) -> None:
    with pytest.raises(lanes.BadSlice, match="only for pulls of float32"):
        decoded({"region": 7, "offset": 0, "size": 640}, **head)


def test_without_the_field_rows_go_to_host_memory() -> None:
    keys, room = pb.Slice(region=1, offset=64, size=80), pb.Slice(region=1, offset=256, size=640)
    request = pb.LaneRequest(id=1, pulls=[pb.LanePull(keys=keys, room=room)])
    (pull,) = lanes.decode_request(request, {1: memoryview(MEMORY)}, 100).pulls
    assert pull.gpu_room is None
    assert pull.room is not None
    assert isinstance(pull.room, np.ndarray)
    assert len(pull.room) == 640
