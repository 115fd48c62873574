"""Python classes for those messages of ps.proto that carry arrays, here as NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psproto import ps_pb2 as pb

Keys = NDArray[np.uint64]


@dataclass(slots=True)
class PullMessage:
    """A PullRequest: keys whose rows to read."""

    header: pb.PullHeader
    keys: Keys  # uint64[n]
    dim: int = 0  # length of the embeddings that the client expects; a received message has 0
    room: NDArray[np.uint8] | None = None  # memory for the reply's arrays; None: not on a lane
    device: int | None = None  # number of the GPU on which the client wants the rows; None: host
    gpu_room: Any = None  # GPU memory for the rows, a GpuRoom; None: they are in the reply


@dataclass(slots=True)
class PushMessage:
    """A PushRequest: gradients to apply to rows. Also a DeleteRequest, which has only keys."""

    header: pb.PushHeader
    keys: Keys  # uint64[n]
    counts: NDArray[np.uint32] | None  # [n]: occurrences of each key; None: 1 for each
    gradients: NDArray[Any]  # flat [n * dim], in the dtype of the header


@dataclass(slots=True)
class Pulled:
    """A PullResponse: embeddings and, if requested, metadata of rows."""

    header: pb.PullResponseHeader
    embeddings: NDArray[Any]  # flat [n * dim] or [n, dim], in the dtype of the header
    versions: NDArray[np.uint64]  # [n], or empty: metadata not requested
    steps: NDArray[np.int64]  # [n], or empty: metadata not requested
    frequencies: NDArray[np.uint64]  # [n], or empty: metadata not requested
    gpu_room: Any = None  # GPU memory that has the embeddings instead, a GpuRoom


@dataclass(slots=True)
class Exchange:
    """An ExchangeRequest: pushes, and pulls that read the rows after these pushes."""

    pushes: list[PushMessage]
    pulls: list[PullMessage]


@dataclass(slots=True)
class Exchanged:
    """An ExchangeResponse: the replies to the pushes and pulls of an Exchange, in their order."""

    pushes: list[pb.PushResponse]
    pulls: list[Pulled]


@dataclass(slots=True)
class Delta:
    """A Delta: a change that a server sends to a subscriber, for example new values of rows.

    The header has the kind of the change. Arrays that this kind does not use are empty.
    """

    header: pb.DeltaHeader
    keys: Keys  # uint64[n]
    versions: NDArray[np.uint64]  # [n]; empty: all have the header's version
    rows: NDArray[Any]  # flat [n * width] or [n, width], in the dtype of the header
    steps: NDArray[np.int64]  # [n], or empty
    frequencies: NDArray[np.uint64]  # [n], or empty


@dataclass(slots=True)
class RowsMessage:
    """A WriteRowsRequest: whole rows to store.

    The arrays are views of the received bytes, of unchecked length: the decoder does not know the
    table.
    """

    table: str
    width: int  # numbers per row
    keys: memoryview  # uint64[n]
    rows: memoryview  # float32[n, width]
    steps: memoryview  # int64[n], or empty
    frequencies: memoryview  # uint64[n], or empty
