"""Checkpoints of a cluster: take, list, verify, restore, and the rows of a table as arrays.

    with Client(addresses) as ps:
        admin.checkpoint(ps, "monday")
        admin.checkpoint(ps, "tuesday", base="monday")
        admin.restore(ps, "tuesday", replace=True)

A checkpoint has a name, never a path: where checkpoints lie is in the configuration of the servers.
Work is done by the servers, all shards at once; a client that dies leaves nothing half done that
the next call would not finish or clear away.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from psclient.batch import Rows
from psclient.channels import Link, UnaryLink, retry, rpc_error
from psclient.client import Client
from psclient.errors import DataLoss, NotEmpty, PsError, RestoreConflict, TableNotFound
from psproto import ps_pb2 as pb
from psproto import routing

Tell = Callable[[int, int], Any]  # bytes done, bytes in all (0: unknown)
Status = pb.RestoreStatus
Step = pb.RestoreRequest
SERVICE = "CheckpointService"
PATIENCE = 3600.0  # seconds that a shard may take to start with what was restored
PREPARED = Status.PHASE_PREPARED
POLL = 0.2  # seconds between looks at it
OVER = (Status.PHASE_UNSPECIFIED, Status.PHASE_RELEASED, Status.PHASE_ABORTED)
BACK = (Status.PHASE_FAILED, Status.PHASE_ABORTING, Status.PHASE_ABORTED)


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


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Whole rows of one table."""

    keys: NDArray[np.uint64]  # [n]
    versions: NDArray[np.uint64]
    steps: NDArray[np.int64]
    frequencies: NDArray[np.uint64]
    rows: Rows  # float32[n, width]: [embedding | optimizer state]


# ---- checkpoints


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
    done = _on_all(client, "WriteCheckpoint", request, progress)
    complete = pb.CompleteCheckpointRequest(
        name=name, attempt=attempt, base=base or "", parts=[each.part for each in done]
    )
    return _info(
        _call(client, _links(client)[0], "CompleteCheckpoint", complete, pb.CheckpointInfo)
    )


def checkpoints(client: Client) -> list[CheckpointInfo]:
    """All checkpoints, by name; those with a ``problem`` cannot be used."""
    return [_info(each) for each in _list(client, "")]


def describe(client: Client, name: str) -> CheckpointInfo:
    """One checkpoint, its manifests checked. Raises CheckpointNotFound, DataLoss."""
    return _info(_list(client, name)[0])


def verify(client: Client, name: str, *, progress: Tell | None = None) -> int:
    """Read every byte of a checkpoint, and of what it builds on; how many they are.

    Raises DataLoss naming the first file that is missing or damaged.
    """
    done = _on_all(client, "VerifyCheckpoint", pb.VerifyCheckpointRequest(name=name), progress)
    return sum(each.bytes for each in done)


# ---- restore


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
    statuses = _statuses(client)
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
    statuses = _statuses(client)
    left = {each.id for each in statuses if each.phase not in OVER}
    if any(each.id in left and each.phase == Status.PHASE_RELEASED for each in statuses):
        raise RestoreConflict("the restore is over on some shards: finish it")
    for link, status in zip(_links(client), statuses, strict=True):
        if status.id in left:
            _step(client, link, status.id, Step.STEP_ABORT)
    _await(client, OVER)


def _prepare(client: Client, id: str, name: str, replace: bool, progress: Tell | None) -> int:
    expected = sum(describe(client, name).rows.values())
    request = pb.PrepareRestoreRequest(name=name, id=id, replace=replace)
    try:
        done = _on_all(client, "PrepareRestore", request, progress)
        rows = sum(each.rows for each in done)
        if rows != expected:
            raise DataLoss(f"checkpoint {name!r}: {rows} rows were read, {expected} were stored")
        for link in _links(client):
            _step(client, link, id, Step.STEP_HOLD)
    except BaseException:
        _abort(client, id)
        raise
    return rows


def _run(client: Client, id: str, name: str) -> None:
    """From wherever a restore is to its end, or back."""
    statuses = _statuses(client)
    if not any(each.phase == Status.PHASE_RELEASED and each.id == id for each in statuses):
        for step in (Step.STEP_HOLD, Step.STEP_COMMIT):
            for link in _links(client):
                _step(client, link, id, step)
        statuses = _await(client, (Status.PHASE_LOADED, *BACK))
    for link, status in zip(_links(client), statuses, strict=True):
        if status.phase in BACK:
            _abort(client, id)
            error = PsError(f"{link.where}: {name!r} was restored nowhere: {status.why}")
            error.reason = "RESTORE_FAILED"
            raise error
    for link in _links(client):
        _step(client, link, id, Step.STEP_RELEASE)


def _abort(client: Client, id: str) -> None:
    for link in _links(client):
        with suppress(PsError):
            _step(client, link, id, Step.STEP_ABORT)
    with suppress(PsError):
        _await(client, (*OVER, PREPARED))


def _step(client: Client, link: Link | UnaryLink, id: str, step: int) -> pb.RestoreStatus:
    request = pb.RestoreRequest(id=id, step=step)  # type: ignore[arg-type]
    status: pb.RestoreStatus = _call(client, link, "Restore", request, pb.RestoreStatus)
    return status


def _statuses(client: Client, seconds: float = 0.0) -> list[pb.RestoreStatus]:
    request = pb.RestoreRequest()
    return [
        _call(client, link, "Restore", request, pb.RestoreStatus, seconds)
        for link in _links(client)
    ]


def _await(client: Client, phases: Sequence[int]) -> list[pb.RestoreStatus]:
    """The statuses, once all are in one of the phases; shards that start anew are waited for."""
    while True:
        statuses = _statuses(client, PATIENCE)
        if all(each.phase in phases for each in statuses):
            return statuses
        time.sleep(POLL)


# ---- tables


def warm_start(
    client: Client,
    name: str,
    table: str,
    into: str,
    *,
    replace: bool = False,
    progress: Tell | None = None,
) -> int:
    """Fill a table from a table of a checkpoint; returns the rows written.

    ``into`` is created like the stored table if it does not exist. If it does, it must have the
    same dim, and no rows unless ``replace`` lets them go; where its optimizer is another one, the
    state of the rows is that of new ones. Steps and frequencies are kept, versions are new.

    The checkpoint is verified first. If it fails all the same, ``into`` is left without rows.
    """
    stored = {each.name: each for each in _list(client, name)[0].tables}
    if table not in stored:
        raise TableNotFound(f"no table {table!r} in checkpoint {name!r}")
    verify(client, name, progress=progress)
    schema = pb.TableSchema()
    schema.CopyFrom(stored[table].schema)
    schema.name = into
    existed = _schema(client, into)
    if existed is not None:
        schema = existed
        rows = client.describe_table(into).rows
        if rows and not replace:
            raise NotEmpty(f"table {into!r} has {rows} rows")
        if rows:
            client.drop_table(into)
    _create(client, schema)
    request = pb.LoadTableRequest(name=name, table=table, into=into)
    try:
        done = _on_all(client, "LoadTable", request, progress)
    except BaseException:
        with suppress(PsError):
            client.drop_table(into)
            if existed is not None:
                _create(client, schema)
        raise
    return sum(each.rows for each in done)


def read_rows(
    client: Client, table: str, *, checkpoint: str | None = None
) -> Iterator[pb.TableSchema | RowBatch]:
    """The schema of a table, then all its rows in no order: as they are, or as a checkpoint has it.

    The first batch is empty: it shows how wide rows are.
    Rows of a live table are each whole, but not all of one moment.
    """
    request = pb.ReadRowsRequest(table=table, checkpoint=checkpoint or "")
    told = False
    for link in _links(client):
        for answer in _stream(link, "ReadRows", request, pb.Delta):
            head = answer.header
            if head.HasField("schema") and not told:
                told = True
                yield head.schema
            elif head.HasField("schema"):
                continue
            yield RowBatch(
                np.frombuffer(answer.keys, "<u8"),
                np.frombuffer(answer.versions, "<u8"),
                np.frombuffer(answer.steps, "<i8"),
                np.frombuffer(answer.frequencies, "<u8"),
                np.frombuffer(answer.rows, "<f4").reshape(-1, head.width),
            )


def write_rows(
    client: Client,
    table: str,
    keys: NDArray[Any],
    rows: NDArray[Any],
    *,
    steps: NDArray[Any] | None = None,
    frequencies: NDArray[Any] | None = None,
) -> None:
    """Write rows as they are given, over those that are there; not for training.

    keys         uint64[n] or int64[n], distinct
    rows         float32[n, dim]: the state becomes that of new rows; or [n, width]: with the state
    steps        int64[n]; where None, the largest that was pushed to the table
    frequencies  uint64[n]; 1 where None

    Done again, it does the same: a failure leaves some of the rows written.
    """
    cluster = client._connect()
    keys = np.ascontiguousarray(keys).view(np.uint64)
    rows = np.ascontiguousarray(rows, np.float32)
    steps = np.empty(0, np.int64) if steps is None else steps.astype(np.int64)
    counts = np.ones(len(keys), np.uint64) if frequencies is None else frequencies.astype(np.uint64)
    most = max(1, min(cluster.keys, cluster.message_bytes // (24 + 4 * rows.shape[1])))
    owners = routing.owners(keys, cluster.shard_map)

    def part(shard: int) -> None:
        mine = np.flatnonzero(owners == shard)
        for at in range(0, len(mine), most):
            some = mine[at : at + most]
            request = pb.WriteRowsRequest(
                table=table,
                width=rows.shape[1],
                keys=keys[some].tobytes(),
                rows=rows[some].tobytes(),
                steps=steps[some].tobytes() if len(steps) else b"",
                frequencies=counts[some].tobytes(),
            )
            link = cluster.links[shard]
            _call(client, link, "WriteRows", request, pb.WriteRowsResponse)

    list(cluster.pool.map(part, range(len(cluster.links))))


def _create(client: Client, schema: pb.TableSchema) -> None:
    request = pb.CreateTableRequest(schema=schema)
    client._on_all("TableService/CreateTable", request, pb.CreateTableResponse, first=True)


def _schema(client: Client, table: str) -> pb.TableSchema | None:
    request = pb.DescribeTableRequest(name=table)
    try:
        found = client._on_all("TableService/DescribeTable", request, pb.DescribeTableResponse)
    except TableNotFound:
        return None
    schema: pb.TableSchema = found[0].schema
    return schema


# ---- calls


def _links(client: Client) -> Sequence[Link | UnaryLink]:
    return client._connect().links


def _call(
    client: Client,
    link: Link | UnaryLink,
    method: str,
    request: Any,
    answer: Any,
    seconds: float = 0.0,
    *,
    service: str = SERVICE,
) -> Any:
    """Call a unary method until it is answered; all of them may be repeated.

    seconds  that it may take; 0: as long as any operation of the client
    """
    message = request.SerializeToString()

    def attempt(left: float) -> bytes:
        return link.channel.call(f"/ps.v1.{service}/{method}", message, left)

    deadline = time.monotonic() + (seconds or client._timeout)
    return answer.FromString(retry(attempt, link.where, deadline, itertools.count()))


def _stream(
    link: Link | UnaryLink, method: str, request: Any, answer: Any, *, service: str = SERVICE
) -> Generator[Any, None, None]:
    """The messages that a method answers with."""
    requests = iter([request.SerializeToString()])
    call = link.channel.open_stream(f"/ps.v1.{service}/{method}", requests)
    try:
        for data in call:
            yield answer.FromString(data)
    except grpc.RpcError as error:
        raise rpc_error(error, link.where) from None
    finally:
        link.channel.cancel(call)


def _on_all(
    client: Client, method: str, request: Any, progress: Tell | None
) -> list[pb.CheckpointProgress]:
    """Have all shards do a long piece of work; their last words. The first failure ends all."""
    told = [(0, 0)] * len(_links(client))

    def tell(shard: int, message: pb.CheckpointProgress) -> None:
        told[shard] = (message.bytes, message.total)
        if progress is not None:
            progress(*map(sum, zip(*told, strict=True)))

    return _all_streams(client, method, request, pb.CheckpointProgress, tell)


def _all_streams(
    client: Client,
    method: str,
    request: Any,
    answer: Any,
    tell: Callable[[int, Any], None],
    *,
    service: str = SERVICE,
) -> list[Any]:
    """Read a method's messages from all shards at once; the last of each. The first failure ends
    all.

    tell  is called with a shard and a message of it; not by two threads at once
    """
    links = _links(client)
    telling = threading.Lock()
    stop = threading.Event()

    def work(shard: int) -> Any:
        last = answer()
        stream = _stream(links[shard], method, request, answer, service=service)
        with closing(stream) as messages:
            for last in messages:
                if stop.is_set():
                    break
                with telling:
                    tell(shard, last)
        return last

    with ThreadPoolExecutor(len(links), "psclient-work") as pool:
        running = [pool.submit(work, shard) for shard in range(len(links))]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # each ends with its next message
    for each in running:
        if (error := each.exception()) is not None:
            raise error
    return [each.result() for each in running]


def _list(client: Client, name: str) -> Sequence[pb.CheckpointInfo]:
    request = pb.ListCheckpointsRequest(name=name)
    link = _links(client)[0]
    found = _call(client, link, "ListCheckpoints", request, pb.ListCheckpointsResponse)
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
