"""Named checkpoints of a cluster: take, list, verify."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from psclient import checked
from psclient.calls import OnProgress, all_streams, call, links, on_all, proceed, stream
from psclient.client import Client
from psclient.errors import InvalidArgument
from psproto import ps_pb2 as pb


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What the servers know of a checkpoint."""

    name: str
    parent: str | None  # the checkpoint that it needs
    shards: int
    versions: tuple[int, ...]  # of the shards
    bytes: int  # without its parent
    time: float  # seconds since 1970
    rows: dict[str, int]  # of each table
    problem: str | None  # why it cannot be read; other fields may be empty then


def checkpoint(
    client: Client, name: str, *, parent: str | None = None, progress: OnProgress | None = None
) -> CheckpointInfo:
    """Take a checkpoint of all tables while pushes go on.

    Each shard's part is a consistent cut: all its changes up to one version, and none after it.

    parent    store only what changed since this checkpoint; the new one cannot be read without it
    progress  called with the bytes written and an estimate of all (0: unknown)

    Raises CheckpointExists, CheckpointUnfit if the parent belongs to another history or is too old,
    NoLog if a shard has no data directory, and DataLoss if the parent is damaged.
    """
    checked.name("checkpoint", name)
    if parent is not None and not parent:
        raise InvalidArgument("parent must be the name of a checkpoint, got ''")
    attempt = secrets.token_hex(8)
    request = pb.WriteCheckpointRequest(name=name, attempt=attempt, parent=parent or "")
    done = on_all(client, "WriteCheckpoint", request, progress)
    complete = pb.CompleteCheckpointRequest(
        name=name, attempt=attempt, parent=parent or "", parts=[each.part for each in done]
    )
    return _info(call(client, links(client)[0], "CompleteCheckpoint", complete, pb.CheckpointInfo))


def checkpoints(client: Client) -> list[CheckpointInfo]:
    """Return all checkpoints, sorted by name. One with a ``problem`` cannot be restored."""
    return [_info(each) for each in list_stored(client, "")]


def describe(client: Client, name: str) -> CheckpointInfo:
    """Return one checkpoint, its manifests checked. Raises CheckpointNotFound, DataLoss."""
    return _info(list_stored(client, name)[0])


def verify(client: Client, name: str, *, progress: OnProgress | None = None) -> int:
    """Read every byte of a checkpoint and of its parents. Returns the number of bytes.

    Raises DataLoss, which names the first file that is missing, damaged, or contradicts another.
    """
    done = on_all(client, "VerifyCheckpoint", pb.VerifyCheckpointRequest(name=name), progress)
    return sum(each.bytes for each in done)


def delete(client: Client, *names: str, dry_run: bool = False) -> list[str]:
    """Delete checkpoints. Returns their names in the order in which they were deleted.

    dry_run  delete nothing, and return what would be deleted

    A checkpoint that another one needs is deleted only together with it. Raises CheckpointNeeded,
    CheckpointNotFound, and ResourceExhausted if one of them is being taken, verified, restored or
    read; nothing is deleted then. A name whose checkpoint was never completed, or is damaged, can
    be deleted too.
    """
    if not names:
        raise InvalidArgument("delete needs the name of a checkpoint")
    return _delete(client, pb.DeleteCheckpointsRequest(names=names, dry_run=dry_run))


def prune(client: Client, keep: int, *, dry_run: bool = False) -> list[str]:
    """Delete all checkpoints but the newest ``keep`` and those that these need.

    Returns the names that were deleted, or with ``dry_run`` would be. Checkpoints that were never
    completed, or are damaged, neither count nor are deleted. Raises what ``delete`` raises.
    """
    if keep < 1:
        raise InvalidArgument(f"keep must be at least 1, got {keep}")
    return _delete(client, pb.DeleteCheckpointsRequest(keep=keep, dry_run=dry_run))


def _delete(client: Client, request: pb.DeleteCheckpointsRequest) -> list[str]:
    request.id = secrets.token_hex(8)
    if request.dry_run:
        answers = stream(links(client)[0], "DeleteCheckpoints", request, pb.CheckpointProgress)
        return [name for answer in answers for name in answer.names]
    shards = len(links(client))
    stages = [pb.CheckpointProgress.STAGE_UNSPECIFIED] * shards
    ready, done = pb.CheckpointProgress.STAGE_READY, pb.CheckpointProgress.STAGE_DONE
    accepted = threading.Event()

    def take(shard: int, message: pb.CheckpointProgress) -> None:
        before, stages[shard] = list(stages), message.stage
        if shard == 0 and message.stage == ready:
            accepted.set()
        if min(before) < ready <= min(stages):
            proceed(client, request.id, pb.ContinueRequest.STEP_START, [0])
        if shard == 0 and message.stage == done:  # the others refused all readers until now
            proceed(client, request.id, pb.ContinueRequest.STEP_START, range(1, shards))

    last = all_streams(
        client, "DeleteCheckpoints", request, pb.CheckpointProgress, take, wait_for=accepted
    )
    return list(last[0].names)


def list_stored(client: Client, name: str) -> Sequence[pb.CheckpointInfo]:
    """Return the messages about all checkpoints, or about one."""
    request = pb.ListCheckpointsRequest(name=name)
    link = links(client)[0]
    found = call(client, link, "ListCheckpoints", request, pb.ListCheckpointsResponse)
    return found.checkpoints  # type: ignore[no-any-return]


def _info(message: pb.CheckpointInfo) -> CheckpointInfo:
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
