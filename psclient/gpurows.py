"""Copy pulled rows within GPU memory, from a room of the same-host lane to the caller's array."""

from __future__ import annotations

from typing import Any

import numpy as np

from psclient.batch import Batch
from psproto import lanes


class _View:
    """Rows in a room, for PyTorch and CuPy."""

    def __init__(self, room: lanes.GpuRoom, rows: int, dim: int) -> None:
        self._room = room
        self.__cuda_array_interface__ = {
            "shape": (rows, dim),
            "typestr": "<f4",
            "data": (room.address, False),
            "strides": None,
            "version": 2,
        }


class Arrived:
    """Rows of some distinct keys of a pull, which are in GPU memory.

    room      where they are
    first     index of the first key among the distinct ones
    last      index after the last key
    batch     keys of the pull
    distinct  whether the result has one row per distinct key
    at        index in the result of each distinct key; None: its own
    """

    def __init__(
        self, room: lanes.GpuRoom, first: int, last: int, batch: Batch, distinct: bool, at: Any
    ) -> None:
        self._room, self._first, self._last = room, first, last
        self._batch, self._distinct, self._at = batch, distinct, at

    def places(self) -> tuple[Any, Any]:
        """Return (index in the result; index among these rows of the row that goes there).

        One of both is None: each row of the result, or of these, in order.
        """
        first, last = self._first, self._last
        if self._at is not None:
            return self._at[first:last], None
        if self._distinct:
            return np.arange(first, last), None
        inverse = self._batch.split.inverse
        if last - first == len(self._batch.keys):
            return None, inverse
        there = np.flatnonzero((inverse >= first) & (inverse < last))
        return there, inverse[there] - first

    def put(self, framework: str, given: Any) -> None:
        """Copy the rows to an array of the caller, and wait until they are there.

        framework  "torch" or "cupy"
        """
        dim = given.shape[-1]
        view, (to, of) = _View(self._room, self._last - self._first, dim), self.places()
        if framework == "torch":
            _put_torch(view, given, to, of)
        else:
            _put_cupy(view, given, to, of)


def _put_torch(view: _View, given: Any, to: Any, of: Any) -> None:
    import torch

    device, out = given.device, given.detach().view(-1, given.shape[-1])
    rows = torch.as_tensor(view, device=device)

    def moved(index: Any) -> Any:
        return torch.from_numpy(np.ascontiguousarray(index)).to(device)

    if to is None:
        torch.index_select(rows, 0, moved(of), out=out)
    else:
        if of is not None:
            rows = torch.index_select(rows, 0, moved(of))
        out.index_copy_(0, moved(to), rows)
    torch.cuda.current_stream(device).synchronize()


def _put_cupy(view: _View, given: Any, to: Any, of: Any) -> None:
    import cupy

    with given.device:
        rows, out = cupy.asarray(view), given.reshape(-1, given.shape[-1])
        if to is None:
            cupy.take(rows, cupy.asarray(of), axis=0, out=out)
        else:
            out[cupy.asarray(to)] = rows if of is None else rows[cupy.asarray(of)]
        cupy.cuda.get_current_stream().synchronize()
