"""A cluster restored from a checkpoint: all of it or, on any failure, nothing."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import suppress

from psclient.calls import OnProgress, call, links, on_all
from psclient.checkpoints import describe
from psclient.client import Client
from psclient.errors import DataLoss, DeadlineExceeded, PsError, RestoreConflict, Unavailable
from psclient.link import Link
from psproto import ps_pb2 as pb

Status = pb.RestoreStatus
Step = pb.RestoreRequest
PATIENCE = 3600.0  # seconds that a shard may take to start with the restored tables
PREPARED = Status.PHASE_PREPARED
POLL = 0.2  # seconds between two polls
POLL_TIMEOUT = 2.0  # seconds; a shard that restarts must not delay the polls of the others
TAKEOVER = 10.0  # seconds; longer than a server waits for a client that is gone
OVER = (Status.PHASE_UNSPECIFIED, Status.PHASE_RELEASED, Status.PHASE_ABORTED)
NO_ABORT = (*OVER, Status.PHASE_ABORTING)  # phases in which a shard needs no step to abort
BACK = (Status.PHASE_FAILED, Status.PHASE_ABORTING, Status.PHASE_ABORTED)


def restore(
    client: Client, name: str, *, replace: bool = False, progress: OnProgress | None = None
) -> int:
    """Replace the tables of the whole cluster by those of a checkpoint. Returns the rows restored.

    name      the checkpoint; it may have been taken of another number of shards
    replace   existing tables are deleted, pushes included that arrive meanwhile
    progress  called with the bytes read and an estimate of all (0: unknown)

    All shards are restored or, on any failure, none. An interrupted restore of the same checkpoint
    is finished instead, once the client that began it is gone.

    Raises NotEmpty if there are tables and ``replace`` is not set, DataLoss, RestoreConflict if
    another client restores, or an interrupted restore of another checkpoint waits
    (``abort_restore``), and ResourceExhausted if memory or disk do not suffice.
    """
    owner = secrets.token_hex(8)
    statuses = statuses_of(client)
    left = {(each.id, each.name) for each in statuses if each.phase not in (*OVER, PREPARED)}
    if len(left) > 1 or any(other != name for _, other in left):
        raise RestoreConflict(f"unfinished restores: {sorted(left)}; finish or abort them first")
    if left:
        id = next(iter(left))[0]
        if not any(each.id == id and each.phase in BACK for each in statuses):
            _take_over(client, id, owner)
            _run(client, id, name, owner)
            return sum(table.rows for table in client.list_tables())
        abort_restore(client)
    id = secrets.token_hex(8)
    rows = _prepare(client, id, name, owner, replace, progress)
    _run(client, id, name, owner)
    return rows


def abort_restore(client: Client) -> None:
    """Undo an interrupted restore: the tables from before it are back. No error if there is none.

    Raises RestoreConflict if a shard already serves the restored tables: then finish the restore.
    """
    statuses = statuses_of(client)
    left = {each.id for each in statuses if each.phase not in OVER}
    if any(each.id in left and each.phase == Status.PHASE_RELEASED for each in statuses):
        raise RestoreConflict("the restore is over on some shards: finish it")
    for link, status in zip(links(client), statuses, strict=True):
        if status.id in left:
            take_step(client, link, status.id, Step.STEP_ABORT)
    await_phases(client, OVER)


def _prepare(
    client: Client, id: str, name: str, owner: str, replace: bool, progress: OnProgress | None
) -> int:
    expected = sum(describe(client, name).rows.values())
    request = pb.PrepareRestoreRequest(name=name, id=id, replace=replace)
    held = False
    try:
        done = on_all(client, "PrepareRestore", request, progress, in_turn=True)
        rows = sum(each.rows for each in done)
        if rows != expected:
            raise DataLoss(f"checkpoint {name!r}: {rows} rows were read, {expected} were stored")
        held = True
        for link in links(client):
            take_step(client, link, id, Step.STEP_HOLD, owner)
    except BaseException:
        _abort(client, id, PATIENCE if held else 0.0)  # a shard that is not held is not blocked
        raise
    return rows


def _take_over(client: Client, id: str, owner: str) -> None:
    """Become the owner of an interrupted restore. Raises RestoreConflict if its client goes on."""
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
    """Take a restore from any of its phases to its end, or undo it if it failed."""
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
    """Undo a restore of this client.

    patience  seconds to wait for shards that restart or cannot be reached
    """
    end = time.monotonic() + patience
    with suppress(PsError):
        while not _undone(client, id) and time.monotonic() < end:
            time.sleep(POLL)


def _undone(client: Client, id: str) -> bool:
    """Let all shards that answer undo a restore. Returns whether all have undone it."""
    undone = True
    for link, status in zip(links(client), _poll(client), strict=True):
        if status is not None and status.id == id and status.phase not in NO_ABORT:
            status = _try_abort(client, link, id)
        undone &= status is not None and (status.id != id or status.phase in OVER)
    return undone


def _try_abort(client: Client, link: Link, id: str) -> pb.RestoreStatus | None:
    """Let one shard undo a restore. Returns its status; None if it does not answer."""
    try:
        return take_step(client, link, id, Step.STEP_ABORT)
    except PsError:
        return None


def take_step(client: Client, link: Link, id: str, step: int, owner: str = "") -> pb.RestoreStatus:
    """Let one shard take a step of a restore. Returns its status."""
    request = pb.RestoreRequest(id=id, step=step, owner=owner)  # type: ignore[arg-type]
    status: pb.RestoreStatus = call(client, link, "Restore", request, pb.RestoreStatus)
    return status


def statuses_of(client: Client, seconds: float = 0.0) -> list[pb.RestoreStatus]:
    """Return each shard's status, waiting up to ``seconds`` for a shard that restarts."""
    request = pb.RestoreRequest()
    return [
        call(client, link, "Restore", request, pb.RestoreStatus, seconds) for link in links(client)
    ]


def await_phases(
    client: Client, phases: Sequence[int], id: str = "", owner: str = ""
) -> list[pb.RestoreStatus]:
    """Return the statuses once all shards are in one of the phases, after their restarts.

    The polls also show the shards that the owner is still there.
    """
    end = time.monotonic() + PATIENCE
    while True:
        found = _poll(client, id, owner)
        statuses = [each for each in found if each is not None and each.phase in phases]
        if len(statuses) == len(found):
            return statuses
        if time.monotonic() > end:
            raise Unavailable(f"after {PATIENCE:g} s not all shards are in the phase to wait for")
        time.sleep(POLL)


def _poll(client: Client, id: str = "", owner: str = "") -> list[pb.RestoreStatus | None]:
    """Ask all shards at once for their status; None for one that does not answer."""
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
