"""The messages of ps.proto that carry arrays, with the arrays as numpy has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psproto import ps_pb2 as pb

Keys = NDArray[np.uint64]


@dataclass(slots=True)
class PullMessage:
    """One PullRequest."""

    header: pb.PullHeader
    keys: Keys  # uint64[n]


@dataclass(slots=True)
class PushMessage:
    """One PushRequest."""

    header: pb.PushHeader
    keys: Keys  # uint64[n]
    counts: NDArray[np.uint32] | None  # [n]; None: each 1
    gradients: NDArray[Any]  # flat, in the wire dtype


@dataclass(slots=True)
class Pulled:
    """One PullResponse."""

    header: pb.PullResponseHeader
    embeddings: NDArray[Any]  # flat or [n, dim], in the wire dtype
    versions: NDArray[np.uint64]  # empty where not asked for, and so the next two
    steps: NDArray[np.int64]
    frequencies: NDArray[np.uint64]


@dataclass(slots=True)
class Exchange:
    """One ExchangeRequest."""

    pushes: list[PushMessage]
    pulls: list[PullMessage]


@dataclass(slots=True)
class Exchanged:
    """One ExchangeResponse."""

    pushes: list[pb.PushResponse]
    pulls: list[Pulled]


@dataclass(slots=True)
class Delta:
    """One Delta. Arrays that it has no use for are empty."""

    header: pb.DeltaHeader
    keys: Keys  # uint64[n]
    versions: NDArray[np.uint64]  # [n]; empty: the header's
    rows: NDArray[Any]  # flat or [n, width], in the wire dtype
    steps: NDArray[np.int64]  # [n] or empty, and so the next
    frequencies: NDArray[np.uint64]


@dataclass(slots=True)
class RowsMessage:
    """One WriteRowsRequest. Its arrays are still bytes, as their checks depend on the table."""

    table: str
    width: int
    keys: memoryview
    rows: memoryview
    steps: memoryview
    frequencies: memoryview
