"""Parts of a request, and the messages that carry them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psclient.arrays import Rows
from psclient.batch import Batch
from psclient.cluster import Cluster
from psclient.errors import SchemaMismatch
from psclient.versions import Versions
from psproto import codec, routing
from psproto import ps_pb2 as pb


@dataclass(frozen=True, slots=True)
class Header:
    """Settings that all pushes of a request share."""

    step: int = 0
    lr: float | None = None
    durability: int = 0  # 0: the table's


@dataclass(slots=True)
class PullPart:
    """One pull of a request, and the arrays for its result."""

    table: str
    dim: int
    batch: Batch
    dtype: int
    mode: int
    metadata: bool
    distinct: bool  # results for the distinct keys, not for the whole batch
    min_version: Versions  # by shard; empty: any version
    out: Rows  # embeddings: [n, dim], or [distinct, dim]
    history: NDArray[np.uint64]  # [3, distinct]: versions, steps, frequencies; [3, 0] without

    def shaped(self) -> Rows:
        """Return the embeddings in the shape of the keys, or [distinct, dim]."""
        shape = (-1,) if self.distinct else self.batch.shape
        return self.out.reshape(*shape, self.dim)


@dataclass(slots=True)
class PushPart:
    """One push of a request: a gradient for each distinct key of the batch."""

    table: str
    batch: Batch
    gradients: Rows  # float32[distinct, dim]
    dtype: int
    counts: NDArray[np.uint32]


def messages(
    cluster: Cluster,
    shard: int,
    pushes: Sequence[PushPart],
    pulls: Sequence[PullPart],
    header: Header,
) -> list[tuple[codec.Exchange, list[tuple[PullPart, int, int]]]]:
    """Return the messages of a request for one shard: several if one would be too large.

    Each comes with the ranges of distinct keys that its pulls cover.
    """
    asked = size = most = widest = 0
    for push in pushes:
        first, last = push.batch.split.bounds[shard : shard + 2].tolist()
        row = 12 + push.gradients.shape[1] * codec.WIRE[push.dtype].itemsize
        size += (last - first) * row
        widest = max(widest, row)
        most = max(most, last - first)
    for pull in pulls:
        first, last = pull.batch.split.bounds[shard : shard + 2].tolist()
        row = pull.dim * codec.WIRE[pull.dtype].itemsize + 24 * pull.metadata
        size += (last - first) * 8
        asked += (last - first) * row
        widest = max(widest, row)
        most = max(most, last - first)
    size = max(size, asked)
    pieces = 1
    if size > cluster.message_bytes or most > cluster.keys:  # ranges are rounded up to whole rows
        pieces = max(-(-size // (cluster.message_bytes - widest)), -(-most // cluster.keys))
    built_pushes, built_pulls = [], []
    for push in pushes:
        first, last = push.batch.split.bounds[shard : shard + 2].tolist()
        for low, high in _ranges(first, last, pieces):
            of_push = pb.PushHeader(
                table=push.table,
                dtype=push.dtype,  # type: ignore[arg-type]
                step=header.step,
                lr=header.lr,
                durability=header.durability,  # type: ignore[arg-type]
            )
            built_pushes.append(
                codec.PushMessage(
                    of_push,
                    push.batch.keys[low:high],
                    push.counts[low:high],
                    codec.to_wire(push.gradients[low:high], push.dtype),
                )
            )
    for pull in pulls:
        first, last = pull.batch.split.bounds[shard : shard + 2].tolist()
        for low, high in _ranges(first, last, pieces):
            head = pb.PullHeader(
                table=pull.table,
                dtype=pull.dtype,  # type: ignore[arg-type]
                mode=pull.mode,  # type: ignore[arg-type]
                with_metadata=pull.metadata,
                min_version=pull.min_version[shard] if pull.min_version else 0,
                min_epoch=pull.min_version.epochs[shard] if pull.min_version else 0,
            )
            built_pulls.append(
                (codec.PullMessage(head, pull.batch.keys[low:high]), (pull, low, high))
            )
    if pieces == 1 and len(built_pushes) + len(built_pulls) <= codec.MOST_PARTS:
        if not built_pushes and not built_pulls:
            return []
        requests, targets = [p for p, _ in built_pulls], [t for _, t in built_pulls]
        return [(codec.Exchange(built_pushes, requests), targets)]
    each: list[tuple[codec.Exchange, list[tuple[PullPart, int, int]]]] = []
    each += [(codec.Exchange([push], []), []) for push in built_pushes]
    each += [(codec.Exchange([], [pull]), [target]) for pull, target in built_pulls]
    return each


def _ranges(first: int, last: int, pieces: int) -> list[tuple[int, int]]:
    """Split first..last into non-empty ranges of about the same size."""
    if first == last:
        return []
    step = -(-(last - first) // pieces)
    return [(low, min(low + step, last)) for low in range(first, last, step)]


def take(answer: codec.Exchanged, pulls: list[tuple[PullPart, int, int]], where: str) -> None:
    """Copy the embeddings of one reply into the results of its pulls."""
    for pulled, (part, first, last) in zip(answer.pulls, pulls, strict=True):
        if pulled.header.dim != part.dim:
            raise SchemaMismatch(
                f"{where}: table {part.table!r} has dim {pulled.header.dim}, expected {part.dim}:"
                " it was dropped and created anew; call client.table() again"
            )
        rows = codec.from_wire(pulled.embeddings, part.dtype).reshape(last - first, part.dim)
        if part.distinct:
            part.out[first:last] = rows
        else:
            routing.scatter(rows, first, part.batch.split.inverse, part.out)
        if part.metadata:
            part.history[0, first:last] = pulled.versions
            part.history[1, first:last] = pulled.steps.view(np.uint64)
            part.history[2, first:last] = pulled.frequencies
