"""Copy pulled rows within GPU memory, from rooms of the same-host lane to an array of the caller.

The server answers a pull once its rows are in the room, so what is launched after the answer reads
them. It does not know when the client has read them: whoever copies from a room keeps a reference
to it until the copy is over, because the next pull may get the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.batch import Batch
from psproto import lanes

Index = NDArray[np.signedinteger[Any]]


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
    """Rows of some distinct keys of a pull, as one answer has brought them.

    room      GPU memory where they are; None: they are in the ``rows`` of the Output
    first     index of the first key among the distinct ones
    last      index after the last key
    batch     keys of the pull
    distinct  whether the result has one row per distinct key
    at        index in the result of each distinct key; None: its own
    """

    def __init__(
        self,
        room: lanes.GpuRoom | None,
        first: int,
        last: int,
        batch: Batch,
        distinct: bool,
        at: Index | None,
    ) -> None:
        self.room, self._first, self._last = room, first, last
        self._batch, self._distinct, self._at = batch, distinct, at

    def __len__(self) -> int:
        return self._last - self._first

    def view(self, dim: int) -> _View:
        """Return the rows in the room, float32[n, dim]."""
        assert self.room is not None
        return _View(self.room, len(self), dim)

    def places(self) -> tuple[slice | Index | None, Index | None]:
        """Return (index in the result; index among these rows of the row that goes there).

        One of both is None: each row of the result, or of these, in order.
        """
        first, last = self._first, self._last
        if self._at is not None:
            return self._at[first:last], None
        if self._distinct:
            return slice(first, last), None
        inverse = self._batch.split.inverse
        if last - first == len(self._batch.keys):
            return None, inverse
        there = np.flatnonzero((inverse >= first) & (inverse < last))
        return there, inverse[there] - first

    def put(self, framework: str, given: Any) -> None:
        """Copy the rows from the room to an array of the caller, and wait until they are there.

        framework  "torch" or "cupy"
        """
        view, (to, of) = self.view(given.shape[-1]), self.places()
        if framework == "torch":
            import torch

            copy_torch(view, given.detach().view(-1, given.shape[-1]), to, of)
            torch.cuda.current_stream(given.device).synchronize()
        else:
            _put_cupy(view, given, to, of)


@dataclass(frozen=True, slots=True)
class Sources:
    """From where the rows of a result are copied to GPU memory: first ``host``, then ``rooms``.

    host   what to copy from host memory, to the same places: parts of the rows, which may include
           rows that are in a room
    rooms  (rows in a room, their index in the result, index among them; None: all in order)
    """

    host: list[slice]
    rooms: list[tuple[Arrived, slice | Index, Index | None]]


def sources(arrived: Sequence[Arrived], count: int) -> Sources:
    """Return from where to copy each row of a result with one row per distinct key.

    arrived  parts of the answers, in the order in which they arrived. Of a row that has arrived
             more than once, the last counts
    count    rows of the result
    """
    parts = [(each, to) for each in arrived for to in [each.places()[0]] if to is not None]
    host = [to for each, to in parts if each.room is None]
    slices = [to for to in host if isinstance(to, slice)]
    if len(slices) < len(host):  # rows in any order: a copy of everything is one copy
        slices = [slice(0, count)]
    if sum(len(each) for each in arrived) == count:
        rooms = [(each, to, None) for each, to in parts if each.room is not None]
        return Sources(slices, list(rooms))
    owner = np.full(count, -1)
    for number, (_, to) in enumerate(parts):
        owner[to] = number
    newest: list[tuple[Arrived, slice | Index, Index | None]] = []
    for number, (each, to) in enumerate(parts):
        mine = np.flatnonzero(owner[to] == number)
        if each.room is not None and len(mine):
            newest.append((each, np.arange(count)[to][mine], mine))
    return Sources(slices, newest)


def copy_torch(view: _View, out: Any, to: slice | Index | None, of: Index | None) -> None:
    """Copy rows from a room to a tensor, on the current stream of its GPU. Does not wait.

    out  float32[n, dim], in the same GPU memory
    to   index in ``out`` of each row; None: all rows, in order
    of   index among the rows in the room; None: all, in order
    """
    import torch

    def moved(index: Any) -> Any:  # page-locked memory: the CPU need not wait for the copy
        host = torch.from_numpy(np.ascontiguousarray(index, np.int64)).pin_memory()
        return host.to(out.device, non_blocking=True)

    rows = torch.as_tensor(view, device=out.device)
    if to is None:
        torch.index_select(rows, 0, moved(of), out=out)
        return
    if of is not None:
        rows = torch.index_select(rows, 0, moved(of))
    if isinstance(to, slice):
        out[to].copy_(rows)
    else:
        out.index_copy_(0, moved(to), rows)


def _put_cupy(view: _View, given: Any, to: slice | Index | None, of: Index | None) -> None:
    import cupy

    with given.device:
        rows, out = cupy.asarray(view), given.reshape(-1, given.shape[-1])
        if to is None:
            cupy.take(rows, cupy.asarray(of), axis=0, out=out)
        else:
            index = to if isinstance(to, slice) else cupy.asarray(to)
            out[index] = rows if of is None else rows[cupy.asarray(of)]
        cupy.cuda.get_current_stream().synchronize()
