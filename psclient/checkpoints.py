"""Named checkpoints of a cluster: take, list, verify."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from psclient.calls import Tell, call, links, on_all
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
    client: Client, name: str, *, parent: str | None = None, progress: Tell | None = None
) -> CheckpointInfo:
    """Take a checkpoint of all tables while pushes go on.

    Each shard's part is a consistent cut: all its changes up to one version, and none after it.

    parent    store only what changed since this checkpoint; the new one cannot be read without it
    progress  called with the bytes written and an estimate of all (0: unknown)

    Raises CheckpointExists, CheckpointUnfit if the parent belongs to another history or is too old,
    NoLog if a shard has no data directory, and DataLoss if the parent is damaged.
    """
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


def verify(client: Client, name: str, *, progress: Tell | None = None) -> int:
    """Read every byte of a checkpoint and of its parents. Returns the number of bytes.

    Raises DataLoss, which names the first file that is missing, damaged, or contradicts another.
    """
    done = on_all(client, "VerifyCheckpoint", pb.VerifyCheckpointRequest(name=name), progress)
    return sum(each.bytes for each in done)


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
