"""Restore a cluster from a checkpoint: all shards or, on any failure, none.

Steps of a restore, each on all shards: prepare (store the restored tables next to the live tables),
hold (refuse pulls and pushes), commit (restart with the restored tables), release (serve again).
Until the release, a fifth step, abort, brings the old tables back. One client, the owner, directs
the restore. If it is silent for some seconds, another client may take over.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import suppress

from psclient import checked
from psclient.calls import OnProgress, call, links, on_all
from psclient.checkpoints import describe
from psclient.client import Client
from psclient.errors import DataLoss, DeadlineExceeded, PsError, RestoreConflict, Unavailable
from psclient.link import Link
from psclient.status import OVER, PREPARED
from psproto import ps_pb2 as pb

Status = pb.RestoreStatus
Step = pb.RestoreRequest
PATIENCE = 3600.0  # maximum seconds to wait until all shards reach a phase
POLL = 0.2  # seconds between two polls
POLL_TIMEOUT = 2.0  # seconds; short, so that a shard that restarts does not delay other polls
TAKEOVER = 10.0  # maximum seconds to wait until the servers consider a silent owner gone
NO_ABORT = (*OVER, Status.PHASE_ABORTING)  # phases in which a shard needs no step to abort
BACK = (Status.PHASE_FAILED, Status.PHASE_ABORTING, Status.PHASE_ABORTED)  # old tables come back


def restore(
    client: Client, name: str, *, replace: bool = False, progress: OnProgress | None = None
) -> int:
    """Replace all tables of the cluster by those of a checkpoint; return the number of their rows.

    name      name of the checkpoint; it may have been taken on a different number of shards
    replace   whether existing tables may be deleted, with pushes that arrive during the restore
    progress  called with (bytes read, estimated total bytes; 0: unknown)

    All shards are restored or, on any failure, none. If a restore of the same checkpoint was
    interrupted and its client is gone, this call finishes that restore instead.

    Raises CheckpointNotFound; NotEmpty if there are tables and ``replace`` is False; DataLoss if
    the checkpoint is damaged; ResourceExhausted if memory or disk space do not suffice; and
    RestoreConflict if another client is restoring, or an interrupted restore of a different
    checkpoint must first be finished or undone (``abort_restore``).
    """
    checked.name("checkpoint", name)
    owner = secrets.token_hex(8)
    statuses = statuses_of(client)
    if id := _unfinished(statuses, name):
        if not any(each.id == id and each.phase in BACK for each in statuses):
            _take_over(client, id, owner)
            _run(client, id, name, owner)
            return sum(table.rows for table in client.list_tables())
        abort_restore(client)
    id = secrets.token_hex(8)
    rows = _prepare(client, id, name, owner, replace, progress)
    _run(client, id, name, owner)
    return rows


def _unfinished(statuses: Sequence[pb.RestoreStatus], name: str) -> str:
    """Return the id of an interrupted restore of the checkpoint ``name``; "" if there is none.

    statuses  status of each shard

    A restore counts as interrupted if a shard has taken a step after prepare, and the restore has
    not ended there. Raises RestoreConflict if another restore was interrupted.
    """
    left = {(each.id, each.name) for each in statuses if each.phase not in (*OVER, PREPARED)}
    if len(left) > 1 or any(other != name for _, other in left):
        raise RestoreConflict(
            "another restore was interrupted, with (id, checkpoint)"
            f" {', '.join(map(str, sorted(left)))}: first finish it by restoring that checkpoint,"
            " or abort it"
        )
    return next(iter(left))[0] if left else ""


def abort_restore(client: Client) -> None:
    """Undo an interrupted restore: bring back the tables that existed before it.

    Does nothing if no restore was interrupted. Raises RestoreConflict if a shard already serves the
    restored tables: then repeat ``restore`` to finish the restore.
    """
    statuses = statuses_of(client)
    left = {each.id for each in statuses if each.phase not in OVER}
    if any(each.id in left and each.phase == Status.PHASE_RELEASED for each in statuses):
        raise RestoreConflict(
            "some shards already serve the restored tables: repeat the restore to finish it"
        )
    for link, status in zip(links(client), statuses, strict=True):
        if status.id in left:
            take_step(client, link, status.id, Step.STEP_ABORT)
    await_phases(client, OVER)


def _prepare(
    client: Client, id: str, name: str, owner: str, replace: bool, progress: OnProgress | None
) -> int:
    """Take the steps prepare and hold on all shards; return the number of rows to be restored.

    id     random id of the new restore
    name   name of the checkpoint
    owner  random id of this client

    ``restore`` explains the other arguments and the errors. Undoes the restore on any failure.
    """
    expected = sum(describe(client, name).rows.values())
    request = pb.PrepareRestoreRequest(name=name, id=id, replace=replace)
    held = False
    try:
        done = on_all(client, "PrepareRestore", request, progress, in_turn=True)
        rows = sum(each.rows for each in done)
        if rows != expected:
            raise DataLoss(
                f"checkpoint {name!r}: read {rows} rows, but the manifests list {expected}"
            )
        held = True
        for link in links(client):
            take_step(client, link, id, Step.STEP_HOLD, owner)
    except BaseException:
        _abort(client, id, PATIENCE if held else 0.0)  # a shard that is not held is not blocked
        raise
    return rows


def _take_over(client: Client, id: str, owner: str) -> None:
    """Make this client the owner of an interrupted restore.

    id     id of the restore
    owner  random id of this client

    Waits until the previous owner has been silent long enough. Raises RestoreConflict if it is
    still active after TAKEOVER seconds.
    """
    first, end = links(client)[0], time.monotonic() + TAKEOVER
    while True:
        released = any(
            each.id == id and each.phase == Status.PHASE_RELEASED for each in statuses_of(client)
        )
        try:
            take_step(client, first, id, Step.STEP_RELEASE if released else Step.STEP_HOLD, owner)
            return
        except RestoreConflict:
            if time.monotonic() > end:
                raise
        time.sleep(POLL)


def _run(client: Client, id: str, name: str, owner: str) -> None:
    """Take the remaining steps of a restore that is prepared; undo the restore if a shard failed.

    id     id of the restore
    name   name of the checkpoint, for errors
    owner  random id of this client, which owns the restore

    Raises PsError with reason RESTORE_FAILED if the restore was undone.
    """
    statuses = statuses_of(client)
    if not any(each.phase == Status.PHASE_RELEASED and each.id == id for each in statuses):
        for step in (Step.STEP_HOLD, Step.STEP_COMMIT):
            for link in links(client):
                take_step(client, link, id, step, owner)
        statuses = await_phases(client, (Status.PHASE_LOADED, *BACK), id, owner)
    for link, status in zip(links(client), statuses, strict=True):
        if status.phase in BACK:
            _abort(client, id)
            error = PsError(f"{link.where}: no shard was restored from {name!r}: {status.why}")
            error.reason = "RESTORE_FAILED"
            raise error
    for link in links(client):
        take_step(client, link, id, Step.STEP_RELEASE, owner)


def _abort(client: Client, id: str, patience: float = PATIENCE) -> None:
    """Undo restore ``id`` on all shards; wait at most ``patience`` seconds until it is undone.

    Errors are ignored: shards that cannot be reached are not undone.
    """
    end = time.monotonic() + patience
    with suppress(PsError):
        while not _undone(client, id) and time.monotonic() < end:
            time.sleep(POLL)


def _undone(client: Client, id: str) -> bool:
    """Tell each shard that answers to undo restore ``id``. Returns whether all have undone it."""
    undone = True
    for link, status in zip(links(client), _poll(client), strict=True):
        if status is not None and status.id == id and status.phase not in NO_ABORT:
            status = _try_abort(client, link, id)
        undone &= status is not None and (status.id != id or status.phase in OVER)
    return undone


def _try_abort(client: Client, link: Link, id: str) -> pb.RestoreStatus | None:
    """Tell one shard to undo restore ``id``. Returns the shard's status, or None if it failed."""
    try:
        return take_step(client, link, id, Step.STEP_ABORT)
    except PsError:
        return None


def take_step(client: Client, link: Link, id: str, step: int, owner: str = "") -> pb.RestoreStatus:
    """Make one shard take a step of a restore; return the shard's status afterwards.

    link   connection to the shard
    id     id of the restore
    step   STEP_HOLD, STEP_COMMIT, STEP_RELEASE or STEP_ABORT
    owner  id of the client that owns the restore; "": this client does not own it (abort only)
    """
    request = pb.RestoreRequest(id=id, step=step, owner=owner)  # type: ignore[arg-type]
    status: pb.RestoreStatus = call(client, link, "Restore", request, pb.RestoreStatus)
    return status


def statuses_of(client: Client, seconds: float = 0.0) -> list[pb.RestoreStatus]:
    """Return for each shard the status of its current or last restore.

    seconds  timeout for a shard that does not answer; 0: the client's timeout
    """
    request = pb.RestoreRequest()
    return [
        call(client, link, "Restore", request, pb.RestoreStatus, seconds) for link in links(client)
    ]


def await_phases(
    client: Client, phases: Sequence[int], id: str = "", owner: str = ""
) -> list[pb.RestoreStatus]:
    """Wait until the restore on every shard is in one of ``phases``; return the shards' statuses.

    phases  phases of pb.RestoreStatus
    id      id of the restore; "": only ask for the statuses
    owner   id of this client, which owns the restore; each poll then tells the shards that the
            owner is still active

    Shards may restart in the meantime. Raises Unavailable after PATIENCE seconds.
    """
    end = time.monotonic() + PATIENCE
    while True:
        found = _poll(client, id, owner)
        statuses = [each for each in found if each is not None and each.phase in phases]
        if len(statuses) == len(found):
            return statuses
        if time.monotonic() > end:
            raise Unavailable(
                f"the restore did not reach the next phase on all shards within {PATIENCE:g} s:"
                " `psctl status` shows the state of each shard"
            )
        time.sleep(POLL)


def _poll(client: Client, id: str = "", owner: str = "") -> list[pb.RestoreStatus | None]:
    """Ask all shards at once for the status of their restore; None: the shard does not answer.

    id     id of the restore; "": only ask
    owner  id of this client, which owns the restore: tells the shards that it is still active
    """
    request = pb.RestoreRequest(id=id, owner=owner)

    def ask(link: Link) -> pb.RestoreStatus | None:
        try:
            status: pb.RestoreStatus = call(
                client, link, "Restore", request, pb.RestoreStatus, POLL_TIMEOUT
            )
            return status
        except (Unavailable, DeadlineExceeded):
            return None

    cluster = client._connect()
    return cluster.on_each(lambda shard: ask(cluster.links[shard]))
