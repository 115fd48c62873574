"""A cluster restored from a checkpoint: all of it or, on any failure, nothing."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import suppress

from psclient.calls import Tell, call, links, on_all
from psclient.checkpoints import describe
from psclient.client import Client
from psclient.errors import DataLoss, PsError, RestoreConflict
from psclient.link import Link
from psproto import ps_pb2 as pb

Status = pb.RestoreStatus
Step = pb.RestoreRequest
PATIENCE = 3600.0  # seconds that a shard may take to start with what was restored
PREPARED = Status.PHASE_PREPARED
POLL = 0.2  # seconds between looks at it
OVER = (Status.PHASE_UNSPECIFIED, Status.PHASE_RELEASED, Status.PHASE_ABORTED)
BACK = (Status.PHASE_FAILED, Status.PHASE_ABORTING, Status.PHASE_ABORTED)


def restore(
    client: Client, name: str, *, replace: bool = False, progress: Tell | None = None
) -> int:
    """Make the whole cluster what a checkpoint holds: all of it or, on any failure, nothing.

    The cluster may have another number of shards. It must have no table, or ``replace`` must say
    that all that is there may go, pushes included that are made meanwhile. A restore of the same
    checkpoint that was cut off between its steps is finished. Returns the rows restored.

    Raises NotEmpty, DataLoss, RestoreConflict where another restore waits to be finished
    (``abort_restore``), ResourceExhausted where memory or disk do not suffice.
    """
    statuses = statuses_of(client)
    left = {(each.id, each.name) for each in statuses if each.phase not in (*OVER, PREPARED)}
    if len(left) > 1 or any(held != name for _, held in left):
        raise RestoreConflict(f"restores wait to be finished or aborted: {sorted(left)}")
    if left:
        id = next(iter(left))[0]
        if not any(each.id == id and each.phase in BACK for each in statuses):
            _run(client, id, name)
            return sum(table.rows for table in client.list_tables())
        abort_restore(client)
    id = secrets.token_hex(8)
    rows = _prepare(client, id, name, replace, progress)
    _run(client, id, name)
    return rows


def abort_restore(client: Client) -> None:
    """Bring back what was there before a restore that was cut off; nothing where none was.

    Raises RestoreConflict if shards serve what was restored already: then it can only be finished.
    """
    statuses = statuses_of(client)
    left = {each.id for each in statuses if each.phase not in OVER}
    if any(each.id in left and each.phase == Status.PHASE_RELEASED for each in statuses):
        raise RestoreConflict("the restore is over on some shards: finish it")
    for link, status in zip(links(client), statuses, strict=True):
        if status.id in left:
            take_step(client, link, status.id, Step.STEP_ABORT)
    await_phases(client, OVER)


def _prepare(client: Client, id: str, name: str, replace: bool, progress: Tell | None) -> int:
    expected = sum(describe(client, name).rows.values())
    request = pb.PrepareRestoreRequest(name=name, id=id, replace=replace)
    try:
        done = on_all(client, "PrepareRestore", request, progress)
        rows = sum(each.rows for each in done)
        if rows != expected:
            raise DataLoss(f"checkpoint {name!r}: {rows} rows were read, {expected} were stored")
        for link in links(client):
            take_step(client, link, id, Step.STEP_HOLD)
    except BaseException:
        _abort(client, id)
        raise
    return rows


def _run(client: Client, id: str, name: str) -> None:
    """From wherever a restore is to its end, or back."""
    statuses = statuses_of(client)
    if not any(each.phase == Status.PHASE_RELEASED and each.id == id for each in statuses):
        for step in (Step.STEP_HOLD, Step.STEP_COMMIT):
            for link in links(client):
                take_step(client, link, id, step)
        statuses = await_phases(client, (Status.PHASE_LOADED, *BACK))
    for link, status in zip(links(client), statuses, strict=True):
        if status.phase in BACK:
            _abort(client, id)
            error = PsError(f"{link.where}: {name!r} was restored nowhere: {status.why}")
            error.reason = "RESTORE_FAILED"
            raise error
    for link in links(client):
        take_step(client, link, id, Step.STEP_RELEASE)


def _abort(client: Client, id: str) -> None:
    for link in links(client):
        with suppress(PsError):
            take_step(client, link, id, Step.STEP_ABORT)
    with suppress(PsError):
        await_phases(client, (*OVER, PREPARED))


def take_step(client: Client, link: Link, id: str, step: int) -> pb.RestoreStatus:
    """Have one shard take a step of a restore."""
    request = pb.RestoreRequest(id=id, step=step)  # type: ignore[arg-type]
    status: pb.RestoreStatus = call(client, link, "Restore", request, pb.RestoreStatus)
    return status


def statuses_of(client: Client, seconds: float = 0.0) -> list[pb.RestoreStatus]:
    """Return each shard's status, waiting up to ``seconds`` for a shard that starts anew."""
    request = pb.RestoreRequest()
    return [
        call(client, link, "Restore", request, pb.RestoreStatus, seconds) for link in links(client)
    ]


def await_phases(client: Client, phases: Sequence[int]) -> list[pb.RestoreStatus]:
    """The statuses, once all are in one of the phases; shards that start anew are waited for."""
    while True:
        statuses = statuses_of(client, PATIENCE)
        if all(each.phase in phases for each in statuses):
            return statuses
        time.sleep(POLL)
