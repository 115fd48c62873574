"""Named checkpoints of a cluster: take, list, verify."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from psclient.calls import Tell, call, links, on_all
from psclient.client import Client
from psproto import ps_pb2 as pb


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A checkpoint, as the servers see it."""

    name: str
    base: str | None  # the checkpoint that it needs
    shards: int
    versions: tuple[int, ...]  # of the shards
    bytes: int  # without its base
    time: float  # seconds since 1970
    rows: dict[str, int]  # by table
    problem: str | None  # why it cannot be used


def checkpoint(
    client: Client, name: str, *, base: str | None = None, progress: Tell | None = None
) -> CheckpointInfo:
    """Take a checkpoint of all tables while pushes go on; each shard's is one cut.

    base  store only what changed since that checkpoint, which the new one then needs for ever

    Raises CheckpointExists, CheckpointUnfit where the base cannot serve, NoLog where a shard has no
    data directory, DataLoss where the base is damaged.
    """
    attempt = secrets.token_hex(8)
    request = pb.WriteCheckpointRequest(name=name, attempt=attempt, base=base or "")
    done = on_all(client, "WriteCheckpoint", request, progress)
    complete = pb.CompleteCheckpointRequest(
        name=name, attempt=attempt, base=base or "", parts=[each.part for each in done]
    )
    return _info(call(client, links(client)[0], "CompleteCheckpoint", complete, pb.CheckpointInfo))


def checkpoints(client: Client) -> list[CheckpointInfo]:
    """All checkpoints, by name; those with a ``problem`` cannot be used."""
    return [_info(each) for each in list_stored(client, "")]


def describe(client: Client, name: str) -> CheckpointInfo:
    """One checkpoint, its manifests checked. Raises CheckpointNotFound, DataLoss."""
    return _info(list_stored(client, name)[0])


def verify(client: Client, name: str, *, progress: Tell | None = None) -> int:
    """Read every byte of a checkpoint, and of what it builds on; how many they are.

    Raises DataLoss naming the first file that is missing or damaged.
    """
    done = on_all(client, "VerifyCheckpoint", pb.VerifyCheckpointRequest(name=name), progress)
    return sum(each.bytes for each in done)


def list_stored(client: Client, name: str) -> Sequence[pb.CheckpointInfo]:
    """Return the messages about all checkpoints, or about one."""
    request = pb.ListCheckpointsRequest(name=name)
    link = links(client)[0]
    found = call(client, link, "ListCheckpoints", request, pb.ListCheckpointsResponse)
    return found.checkpoints  # type: ignore[no-any-return]


def _info(told: pb.CheckpointInfo) -> CheckpointInfo:
    return CheckpointInfo(
        name=told.name,
        base=told.base or None,
        shards=told.shards,
        versions=tuple(told.versions),
        bytes=told.bytes,
        time=told.time_us / 1e6,
        rows={table.name: table.rows for table in told.tables},
        problem=told.problem or None,
    )
