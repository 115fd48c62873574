"""Delete named checkpoints of a cluster."""

from __future__ import annotations

import secrets
import threading

from psclient import checked
from psclient.calls import all_streams, links, proceed, stream
from psclient.client import Client
from psclient.errors import InvalidArgument
from psproto import ps_pb2 as pb


def delete(client: Client, *names: str, dry_run: bool = False) -> list[str]:
    """Delete checkpoints. Returns their names in the order in which they were deleted.

    names    names of the checkpoints; incomplete and damaged ones can be deleted too
    dry_run  delete nothing; return the names that would be deleted

    Deletes nothing, and raises CheckpointNotFound, if one of them does not exist; CheckpointNeeded,
    if a checkpoint that is not among ``names`` builds on one of them; and ResourceExhausted, if one
    of them is being taken, verified, restored or read.
    """
    if not names:
        raise InvalidArgument("names must have at least one name of a checkpoint, got none")
    names = tuple(checked.name("checkpoint", each) for each in names)
    return _delete(client, pb.DeleteCheckpointsRequest(names=names, dry_run=dry_run))


def prune(client: Client, keep: int, *, dry_run: bool = False) -> list[str]:
    """Delete all checkpoints except the newest ``keep`` and the checkpoints that these build on.

    keep     number of checkpoints, at least 1
    dry_run  delete nothing; return the names that would be deleted

    Returns the deleted names. Incomplete and damaged checkpoints are neither counted nor deleted.
    Deletes nothing and raises ResourceExhausted if a checkpoint to delete is being taken, verified,
    restored or read.
    """
    keep = checked.integer("keep", keep, 1, 1 << 32)
    return _delete(client, pb.DeleteCheckpointsRequest(keep=keep, dry_run=dry_run))


def _delete(client: Client, request: pb.DeleteCheckpointsRequest) -> list[str]:
    """Run DeleteCheckpoints on all shards; return the names of the deleted checkpoints.

    request  without an id, which is added here

    Shard 0 deletes the files after every shard has agreed to refuse reads of these checkpoints.
    """
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
        if shard == 0 and message.stage == done:  # the other shards need not refuse readers now
            proceed(client, request.id, pb.ContinueRequest.STEP_START, range(1, shards))

    last = all_streams(
        client, "DeleteCheckpoints", request, pb.CheckpointProgress, take, wait_for=accepted
    )
    return list(last[0].names)
