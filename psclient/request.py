"""The pushes and pulls of a request, and the messages that carry them to the shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.arrays import Rows
from psclient.batch import Batch
from psclient.cluster import Cluster
from psclient.errors import SchemaMismatch
from psclient.gpurows import Arrived
from psclient.outputs import Output
from psclient.versions import Versions
from psproto import codec, routing
from psproto import ps_pb2 as pb


@dataclass(slots=True)
class Header:
    """Options of a push that hold for all tables of a request. Client.push explains them."""

    step: int = 0
    lr: float | None = None
    durability: int = 0  # number in ps.proto; 0: the durability of each table


NO_HEADER = Header()  # of requests without pushes


@dataclass(slots=True)
class PullPart:
    """The pull of one table in a request, and the arrays that receive its result."""

    table: str
    dim: int
    batch: Batch
    dtype: int  # of the embeddings on the wire, a number in ps.proto
    mode: int  # train or serve, a number in ps.proto
    metadata: bool  # whether to pull versions, steps and frequencies too
    distinct: bool  # whether ``out`` has one row per distinct key instead of per key
    min_version: Versions  # oldest version at which each shard may be read; (): any version
    out: Rows  # embeddings float32[n, dim], or [distinct, dim]; written by ``take``
    history: NDArray[np.uint64]  # [3, distinct]: versions, steps, frequencies; else [3, 0]
    prefetch: bool = False  # the shards only read the rows into memory; the reply has no rows
    output: Output | None = None  # array of the caller, whose memory ``out`` is; None: ours
    at: NDArray[np.int64] | None = None  # index in ``out`` of each distinct key; None: its own

    def shaped(self) -> Any:
        """Return ``out`` as float32[*shape of the keys, dim], or as [distinct, dim].

        If the caller passed an array for the result, returns that array.
        """
        if self.output is not None:
            return self.output.finish()
        shape = (-1,) if self.distinct else self.batch.shape
        return self.out.reshape(*shape, self.dim)


Range = tuple[PullPart, int, int]  # (pull, low, high): the distinct keys ``batch.keys[low:high]``


@dataclass(slots=True)
class PushPart:
    """The push to one table in a request: a gradient for each distinct key of the batch."""

    table: str
    batch: Batch
    gradients: Rows  # float32[distinct, dim]
    dtype: int  # of the gradients on the wire, a number in ps.proto
    counts: NDArray[np.uint32]  # [distinct] occurrences of each key in the batch


def messages(
    cluster: Cluster,
    shard: int,
    pushes: Sequence[PushPart],
    pulls: Sequence[PullPart],
    header: Header,
) -> list[tuple[codec.Exchange, list[Range]]]:
    """Build the message of a request for one shard, or several messages if one would be too large.

    cluster  connections to the shards, with the servers' limits on messages
    shard    number of the shard
    pushes   pushes of the request, one per table
    pulls    pulls of the request, one per table
    header   options of the pushes

    Returns a list of (message, ranges), empty if the shard owns no key of the request. ``ranges``
    has, for each pull in the message, the range of distinct keys whose rows the reply contains. If
    there are several messages, each contains one push or one pull; messages with pushes come first.
    """
    pieces = _pieces(cluster, shard, pushes, pulls)
    sent: list[codec.PushMessage] = []
    asked: list[codec.PullMessage] = []
    ranges: list[Range] = []
    for push in pushes:
        sent += _push_messages(push, shard, pieces, header)
    for pull in pulls:
        for low, high in _ranges(pull.batch, shard, pieces):
            asked.append(_pull_message(pull, shard, low, high))
            ranges.append((pull, low, high))
    if not sent and not asked:
        return []
    if pieces == 1 and len(sent) + len(asked) <= codec.MOST_PARTS:
        return [(codec.Exchange(sent, asked), ranges)]
    each: list[tuple[codec.Exchange, list[Range]]] = []
    each += [(codec.Exchange([push], []), []) for push in sent]
    each += [(codec.Exchange([], [pull]), [at]) for pull, at in zip(asked, ranges, strict=True)]
    return each


def _pieces(
    cluster: Cluster, shard: int, pushes: Sequence[PushPart], pulls: Sequence[PullPart]
) -> int:
    """Return the number of pieces into which to split each push and pull to one shard.

    With that many pieces, no message exceeds the servers' limits on bytes and keys.
    """
    request = reply = most = widest = 0
    for push in pushes:
        first, last = push.batch.bounds[shard], push.batch.bounds[shard + 1]
        row = 12 + push.gradients.shape[1] * codec.WIRE[push.dtype].itemsize
        request += (last - first) * row
        widest, most = max(widest, row), max(most, last - first)
    for pull in pulls:
        first, last = pull.batch.bounds[shard], pull.batch.bounds[shard + 1]
        row = pull.dim * codec.WIRE[pull.dtype].itemsize + 24 * pull.metadata
        row *= not pull.prefetch
        request += (last - first) * 8
        reply += (last - first) * row
        widest, most = max(widest, row), max(most, last - first)
    size = max(request, reply)
    if size <= cluster.message_bytes and most <= cluster.keys:
        return 1
    room = cluster.message_bytes - widest  # a piece is rounded up to whole rows
    return max(-(-size // room), -(-most // cluster.keys))


def _push_messages(
    push: PushPart, shard: int, pieces: int, header: Header
) -> list[codec.PushMessage]:
    """Return the messages, at most ``pieces``, that push a table's gradients to one shard."""
    found = []
    for low, high in _ranges(push.batch, shard, pieces):
        head = pb.PushHeader(
            table=push.table,
            dtype=push.dtype,  # type: ignore[arg-type]
            step=header.step,
            lr=header.lr,
            durability=header.durability,  # type: ignore[arg-type]
        )
        gradients = codec.to_wire(push.gradients[low:high], push.dtype)
        keys, counts = push.batch.keys[low:high], push.counts[low:high]
        found.append(codec.PushMessage(head, keys, counts, gradients))
    return found


def _pull_message(pull: PullPart, shard: int, low: int, high: int) -> codec.PullMessage:
    """Return the message that pulls the rows of the distinct keys low..high-1 from one shard."""
    head = pb.PullHeader(
        table=pull.table,
        dtype=pull.dtype,  # type: ignore[arg-type]
        mode=pull.mode,  # type: ignore[arg-type]
        with_metadata=pull.metadata,
        prefetch=pull.prefetch,
    )
    if pull.min_version:
        head.min_version = pull.min_version[shard]
        head.min_epoch = pull.min_version.epochs[shard]
    device = None if pull.output is None else pull.output.device
    if pull.metadata or pull.dtype != pb.DTYPE_FLOAT32:
        device = None  # the same-host lane has no GPU memory for them
    return codec.PullMessage(head, pull.batch.keys[low:high], pull.dim, device=device)


def _ranges(batch: Batch, shard: int, pieces: int) -> list[tuple[int, int]]:
    """Split a batch's distinct keys that ``shard`` owns into at most ``pieces`` ranges.

    Returns (low, high) of each range, which is ``batch.keys[low:high]`` and not empty.
    """
    first, last = batch.bounds[shard], batch.bounds[shard + 1]
    if first == last:
        return []
    if pieces == 1:
        return [(first, last)]
    step = -(-(last - first) // pieces)
    return [(low, min(low + step, last)) for low in range(first, last, step)]


def take(answer: codec.Exchanged, pulls: Sequence[Range], where: str) -> None:
    """Copy the rows of one reply into ``out`` and ``history`` of the pulls that it answers.

    answer  the reply
    pulls   (pull, low, high) for each pull in the reply: it has rows of ``batch.keys[low:high]``
    where   name of the shard, for errors

    Raises SchemaMismatch if the dim of a table is not the one that the pull expects.
    """
    for pulled, (part, first, last) in zip(answer.pulls, pulls, strict=True):
        if part.prefetch:
            continue
        if pulled.header.dim != part.dim:
            raise SchemaMismatch(
                f"{where}: table {part.table!r}: expected dim {part.dim}, got {pulled.header.dim}:"
                " the table was dropped and created anew; call client.table() again"
            )
        if part.output is not None and part.output.device is not None:
            room = pulled.gpu_room
            there = Arrived(room, first, last, part.batch, part.distinct, part.at)
            part.output.arrived.append(there)
            if room is not None:
                continue
        rows = codec.from_wire(pulled.embeddings, part.dtype).reshape(last - first, part.dim)
        if part.at is not None:
            part.out[part.at[first:last]] = rows
        elif part.distinct:
            part.out[first:last] = rows
        else:
            routing.scatter(rows, first, part.batch.split.inverse, part.out)
        if part.metadata:
            part.history[0, first:last] = pulled.versions
            part.history[1, first:last] = pulled.steps.view(np.uint64)
            part.history[2, first:last] = pulled.frequencies
