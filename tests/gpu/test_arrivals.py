"""Rows that arrive in GPU memory and in host memory, in any order, some more than once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("grpc")
pytest.importorskip("google.protobuf")

import faketorch  # noqa: E402
from fakeipc import FakeCudaGpu  # noqa: E402

from psclient.gpurows import Arrived, sources  # noqa: E402
from psclient.outputs import Output  # noqa: E402
from psclient.regions import Space  # noqa: E402
from psclient.torch.transfer import CudaTransfer, transfer_to  # noqa: E402
from psproto import lanes  # noqa: E402

DIM, ROWS = 3, 40


class Region(Space):
    """GPU memory of a lane, without a lane."""

    def __init__(self) -> None:
        super().__init__(0, 1 << 20)
        self.gpu = FakeCudaGpu()
        self.address = self.gpu.allocate(1 << 20)

    def room(self, rows: Any) -> lanes.GpuRoom:
        """Return a room that a server has written rows to."""
        chunk = self.take(rows.nbytes)
        assert chunk is not None
        room = lanes.GpuRoom(0, chunk.start, rows.nbytes, self.address + chunk.start, chunk)
        view: Any = Arrived(room, 0, len(rows), None, True, None).view(DIM)  # type: ignore[arg-type]
        machine = faketorch.Fake.machine
        machine.room(view).host.copy_(torch.from_numpy(rows))
        return room


def arrivals(region: Region, rng: Any, again: bool) -> tuple[Output, Any]:
    """Return the Output of a pull whose parts have arrived, and the rows that it must have.

    again  whether some rows arrive a second time, with other numbers
    """
    output: Any = Output(np.full((ROWS, DIM), np.nan, np.float32), None, device=0)
    wanted = np.full((ROWS, DIM), np.nan, np.float32)
    whole, cut = rng.permutation(ROWS), int(rng.integers(1, ROWS))
    parts: list[Any] = [np.sort(whole[:cut]), np.sort(whole[cut:])]
    if rng.random() < 0.5:
        parts = [slice(0, cut), slice(cut, ROWS)]
    if again:
        parts.append(np.unique(rng.integers(0, ROWS, 9)))
        parts.append(slice(cut // 2, cut + 1))
    for part in parts:
        rows = rng.standard_normal((len(np.arange(ROWS)[part]), DIM), dtype=np.float32)
        wanted[part] = rows
        room = region.room(rows) if rng.random() < 0.6 else None
        if room is None:
            output.rows[part] = rows
        first, at = (part.start, None) if isinstance(part, slice) else (0, part)
        output.arrived.append(Arrived(room, first, first + len(rows), None, True, at))  # type: ignore[arg-type]
    return output, wanted


@pytest.mark.parametrize("mode", faketorch.MODES)
@pytest.mark.parametrize("again", [False, True])
def test_the_last_arrival_of_each_row_counts(mode: str, again: bool) -> None:
    rng = np.random.default_rng(0)
    with faketorch.fake_gpu(mode):
        transfer, region = transfer_to("cuda", 3), Region()
        for _ in range(10):
            output, wanted = arrivals(region, rng, again)
            copied = transfer.rows(output.rows, output)
            np.testing.assert_array_equal(copied.cpu().numpy(), wanted)
            transfer.finish()


def test_an_empty_pull_needs_no_copy() -> None:
    assert sources([], 0).host == sources([], 0).rooms == []


def test_rows_from_one_room_are_one_copy() -> None:
    """No index goes to the GPU, and nothing comes from host memory."""
    room: Any = object()
    found = sources([Arrived(room, 0, ROWS, None, True, None)], ROWS)  # type: ignore[arg-type]
    assert found.host == []
    ((_, to, of),) = found.rooms
    assert (to, of) == (slice(0, ROWS), None)


@pytest.mark.parametrize("released", ["finish", "later rows", "later gradients"])
def test_a_room_is_not_used_again_before_it_is_copied(released: str) -> None:
    """Whoever asks for memory in the meantime gets other memory."""
    rng = np.random.default_rng(1)
    with faketorch.fake_gpu("late"):
        transfer, region = transfer_to("cuda", 3), Region()
        assert isinstance(transfer, CudaTransfer)
        output: Any = Output(np.full((ROWS, DIM), np.nan, np.float32), None, device=0)
        rows = rng.standard_normal((ROWS, DIM), dtype=np.float32)
        output.arrived.append(Arrived(region.room(rows), 0, ROWS, None, True, None))  # type: ignore[arg-type]
        copied = transfer.rows(output.rows, output)
        before = region.room(np.zeros((ROWS, DIM), np.float32))
        assert before.offset > 0
        if released == "finish":
            transfer.finish()
        else:
            transfer._stream.synchronize()
            none: Any = Output(np.empty((0, DIM), np.float32), None, device=0)
            if released == "later rows":
                transfer.rows(none.rows, none)
            else:
                transfer.gradients("t", torch.zeros(1, DIM))
        assert region.room(np.zeros((ROWS, DIM), np.float32)).offset == 0
        np.testing.assert_array_equal(copied.cpu().numpy(), rows)
