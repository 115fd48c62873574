"""Take, list and verify named checkpoints of a cluster."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from psclient import checked
from psclient.calls import OnProgress, Repeat, call, links, on_all
from psclient.client import Client
from psclient.errors import CheckpointUnfit, InvalidArgument
from psproto import ps_pb2 as pb

MOST_MS = 2**32 - 1  # longest barrier_timeout that a message can carry, in milliseconds


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """Description of a checkpoint, read from the manifests in its directory."""

    name: str  # name of the checkpoint
    parent: str | None  # name of the checkpoint that this one builds on; None: a full checkpoint
    shards: int  # number of shards of the cluster when it was taken
    versions: tuple[int, ...]  # version of each shard that it contains
    bytes: int  # size of its own files; those of its parent are not included
    time: float  # when it was taken, in seconds since 1970
    rows: dict[str, int]  # number of rows by table
    problem: str | None  # why it cannot be restored (other fields may be empty); None: it can be


def checkpoint(
    client: Client,
    name: str,
    *,
    parent: str | None = None,
    until_barrier: str | None = None,
    barrier_timeout: float = 600.0,
    on_ready: Callable[[], None] | None = None,
    progress: OnProgress | None = None,
) -> CheckpointInfo:
    """Take a checkpoint of all tables while pushes continue; return its description.

    name             name of the new checkpoint
    parent           name of an existing checkpoint. The new one then stores only the changes since
                     the parent was taken, and cannot be read without the parent. None: take a full
                     checkpoint
    until_barrier    name of a barrier. The checkpoint then contains, on all shards, exactly the
                     changes before the next barrier of this name (``Client.barrier``), which
                     another thread or process must place once all shards wait for it. None: each
                     shard ends its part of the checkpoint once it has copied its rows
    barrier_timeout  seconds that the shards wait for the barrier
    on_ready         called once, when all shards have copied their rows and wait for the barrier.
                     It must return soon
    progress         called with (bytes written, estimated total bytes; 0: unknown)

    For each shard the checkpoint contains exactly the changes up to one version of the shard.

    Raises CheckpointExists if the name is in use, NoLog if a shard has no data directory, and
    DataLoss if the parent is damaged. Raises CheckpointUnfit if the parent was taken before a
    restore, or is so old that the version log no longer has the changes since then: take a full
    checkpoint. Raises BarrierMissed if the barrier was not placed in time, or was placed before a
    shard began to copy its rows.
    """
    checked.name("checkpoint", name)
    if parent == "":
        raise InvalidArgument("parent must be the name of a checkpoint or None, got ''")
    if parent is not None:
        checked.name("checkpoint", parent)
    attempt = secrets.token_hex(8)
    request = pb.WriteCheckpointRequest(name=name, attempt=attempt, parent=parent or "")
    if until_barrier is not None:
        request.until_barrier = checked.name("barrier", until_barrier)
        seconds = checked.seconds("barrier_timeout", barrier_timeout)
        request.barrier_timeout_ms = min(max(int(seconds * 1000), 1), MOST_MS)

    def on_stage(*_: object) -> None:
        if on_ready is not None:
            on_ready()

    done = on_all(client, "WriteCheckpoint", request, progress, on_stage=on_stage)
    if until_barrier is not None and not all(each.stage for each in done):
        raise CheckpointUnfit(
            f"checkpoint {name!r} was not completed: a server of an older release took its part"
            " without waiting for the barrier; upgrade all servers, or omit until_barrier"
        )
    complete = pb.CompleteCheckpointRequest(
        name=name, attempt=attempt, parent=parent or "", parts=[each.part for each in done]
    )
    return _info(call(client, links(client)[0], "CompleteCheckpoint", complete, pb.CheckpointInfo))


def checkpoints(client: Client) -> list[CheckpointInfo]:
    """Return all checkpoints, sorted by name. One whose ``problem`` is set cannot be restored."""
    return [_info(each) for each in list_stored(client)]


def describe(client: Client, name: str) -> CheckpointInfo:
    """Return the description of one checkpoint, after checking its manifests.

    Raises CheckpointNotFound if it does not exist, DataLoss if a manifest is damaged.
    """
    return _info(list_stored(client, name)[0])


def verify(client: Client, name: str, *, progress: OnProgress | None = None) -> int:
    """Read and check every byte of a checkpoint and of the checkpoints that it builds on.

    name      name of the checkpoint
    progress  called with (bytes read, total bytes; 0: unknown)

    Returns the number of bytes read. Raises CheckpointNotFound if the checkpoint does not exist,
    and DataLoss if a file is missing, damaged, or inconsistent with another file; the error names
    the file.
    """
    checked.name("checkpoint", name)
    request = pb.VerifyCheckpointRequest(name=name)
    repeat = Repeat(client._timeout, lambda _: False)
    done = on_all(client, "VerifyCheckpoint", request, progress, repeat=repeat)
    return sum(each.bytes for each in done)


def list_stored(client: Client, name: str | None = None) -> Sequence[pb.CheckpointInfo]:
    """Return the servers' descriptions of all checkpoints, or only of the one called ``name``."""
    stored = "" if name is None else checked.name("checkpoint", name)
    request = pb.ListCheckpointsRequest(name=stored)
    link = links(client)[0]
    found = call(client, link, "ListCheckpoints", request, pb.ListCheckpointsResponse)
    return found.checkpoints  # type: ignore[no-any-return]


def _info(message: pb.CheckpointInfo) -> CheckpointInfo:
    """Convert a server's description to a CheckpointInfo."""
    return CheckpointInfo(
        name=message.name,
        parent=message.parent or None,
        shards=message.shards,
        versions=tuple(message.versions),
        bytes=message.bytes,
        time=message.time_us / 1e6,
        rows={table.name: table.rows for table in message.tables},
        problem=message.problem or None,
    )
