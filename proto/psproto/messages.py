"""The messages of ps.proto that carry arrays, with NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psproto import ps_pb2 as pb

Keys = NDArray[np.uint64]


@dataclass(slots=True)
class PullMessage:
    """A PullRequest."""

    header: pb.PullHeader
    keys: Keys  # uint64[n]


@dataclass(slots=True)
class PushMessage:
    """A PushRequest."""

    header: pb.PushHeader
    keys: Keys  # uint64[n]
    counts: NDArray[np.uint32] | None  # [n]; None: each 1
    gradients: NDArray[Any]  # flat, in the wire dtype


@dataclass(slots=True)
class Pulled:
    """A PullResponse."""

    header: pb.PullResponseHeader
    embeddings: NDArray[Any]  # flat or [n, dim], in the wire dtype
    versions: NDArray[np.uint64]  # [n]; this and the next two: empty unless requested
    steps: NDArray[np.int64]
    frequencies: NDArray[np.uint64]


@dataclass(slots=True)
class Exchange:
    """An ExchangeRequest."""

    pushes: list[PushMessage]
    pulls: list[PullMessage]


@dataclass(slots=True)
class Exchanged:
    """An ExchangeResponse."""

    pushes: list[pb.PushResponse]
    pulls: list[Pulled]


@dataclass(slots=True)
class Delta:
    """A Delta. Arrays that its kind does not use are empty."""

    header: pb.DeltaHeader
    keys: Keys  # uint64[n]
    versions: NDArray[np.uint64]  # [n]; empty: the header's
    rows: NDArray[Any]  # flat or [n, width], in the wire dtype
    steps: NDArray[np.int64]  # [n], or empty; so is the next field
    frequencies: NDArray[np.uint64]


@dataclass(slots=True)
class RowsMessage:
    """A WriteRowsRequest. Its arrays are bytes, because the table decides how to check them."""

    table: str
    width: int
    keys: memoryview
    rows: memoryview
    steps: memoryview
    frequencies: memoryview
