"""Read and write whole rows of a table, and fill a table with rows of a checkpoint.

A whole row is an embedding with its optimizer state, version, step and frequency.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient import checked
from psclient.arrays import Rows, as_array, as_keys
from psclient.calls import OnProgress, Repeat, call, links, on_all, proceed, stream
from psclient.checkpoints import list_stored, verify
from psclient.client import Client
from psclient.errors import DataLoss, InvalidArgument, NotEmpty, SchemaMismatch, TableNotFound
from psproto import ps_pb2 as pb
from psproto import routing

STEPS = (-(1 << 47), (1 << 47) - 1)  # smallest and largest step of a row
FREQUENCIES = (0, (1 << 32) - 1)  # smallest and largest frequency of a row


@dataclass(frozen=True, slots=True)
class RowBatch:
    """n rows of one table, with optimizer state, version, step and frequency."""

    keys: NDArray[np.uint64]  # [n]
    versions: NDArray[np.uint64]  # [n] version of the row's last change on its shard
    steps: NDArray[np.int64]  # [n] training step of the row's last push
    frequencies: NDArray[np.uint64]  # [n] number of pushed occurrences of the key
    rows: Rows  # float32[n, width]: the embedding (dim numbers), then the optimizer state


def warm_start(
    client: Client,
    name: str,
    table: str,
    into: str,
    *,
    replace: bool = False,
    progress: OnProgress | None = None,
) -> int:
    """Fill a table with the rows of a table in a checkpoint. Returns the number of rows written.

    name      name of the checkpoint, which is verified first
    table     name of the table in the checkpoint
    into      name of the table to fill. If it does not exist, it is created with the schema of the
              stored table; otherwise it must have the same dim
    replace   True: first delete all rows of ``into``. False: ``into`` must be empty
    progress  called with (bytes done, estimated total bytes; 0: unknown)

    Steps and frequencies of the rows are kept; versions are new. If the optimizers of ``into`` and
    of the stored table differ, the rows get the optimizer state of new rows.

    Nothing is deleted before all shards have accepted the request. From then on until the table is
    complete, pulls and pushes to it raise Unavailable. If the load fails in that time, ``into`` is
    left without rows, or does not exist if it did not exist before. Finally the table becomes
    usable on one shard after another. If a shard fails at that point, the table may be complete on
    some shards only: repeat the call with replace=True.

    Raises CheckpointNotFound, TableNotFound if the checkpoint lacks the table, NotEmpty if ``into``
    has rows or admission counters, SchemaMismatch if the dims differ, ResourceExhausted if memory
    or disk space do not suffice or a shard is busy with a checkpoint operation, and DataLoss if the
    checkpoint is damaged.
    """
    checked.name("table", into)
    stored = {each.name: each for each in list_stored(client, name)[0].tables}
    if table not in stored:
        raise TableNotFound(f"no table {table!r} in checkpoint {name!r}")
    verify(client, name, progress=progress)
    request = pb.LoadTableRequest(
        name=name, table=table, into=into, id=secrets.token_hex(8), replace=replace
    )
    try:
        return _load(client, request, stored[table].rows, progress)
    except NotEmpty as error:
        if some := client.incomplete_tables().get(into):
            raise NotEmpty(
                f"table {into!r} is on shard {', '.join(map(str, some))} only: an interrupted call"
                " left it. Replace it (replace=True, --replace) or drop it"
            ) from error
        raise


def _load(
    client: Client, request: pb.LoadTableRequest, expected: int, progress: OnProgress | None
) -> int:
    """Run LoadTable on all shards; return the number of rows written.

    request   message to send
    expected  number of rows that the checkpoint's manifests list for the table
    progress  called with (bytes done, estimated total bytes; 0: unknown)

    Raises DataLoss, before the table becomes usable, if the shards read a different number of rows.
    """

    def on_stage(stage: int, messages: Sequence[pb.CheckpointProgress]) -> None:
        if stage == pb.CheckpointProgress.STAGE_READY:
            proceed(client, request.id, pb.ContinueRequest.STEP_START)
            return
        rows = sum(each.rows for each in messages)
        if rows != expected:
            raise DataLoss(
                f"checkpoint {request.name!r}, table {request.table!r}: read {rows} rows, but the"
                f" manifests list {expected}"
            )
        proceed(client, request.id, pb.ContinueRequest.STEP_FINISH)

    done = on_all(client, "LoadTable", request, progress, on_stage=on_stage, in_turn=True)
    return sum(each.rows for each in done)


def read_rows(
    client: Client,
    table: str,
    *,
    checkpoint: str | None = None,
    shards: Sequence[int] | None = None,
) -> Generator[pb.TableSchema | RowBatch, None, None]:
    """Yield the schema of a table, then all its rows in batches, in no particular order.

    table       name of the table
    checkpoint  name of a checkpoint to read the table from; None: read the live table
    shards      numbers of the shards to ask; None: all. Each shard sends its own rows of a live
                table, or a share of the rows of a checkpoint

    Yields a TableSchema, then a RowBatch without rows, whose ``rows`` have the shape [0, width],
    then RowBatches with rows. A live table is read while pushes continue, so different rows may be
    from different moments.

    Raises TableNotFound, CheckpointNotFound, and DataLoss if the checkpoint is damaged. Raises
    SchemaMismatch if the table was created anew meanwhile, with rows of another shape. Raises
    Unavailable if a shard is lost after it has sent rows: the rows so far are not the whole table.
    """
    stored = "" if checkpoint is None else checked.name("checkpoint", checkpoint)
    request = pb.ReadRowsRequest(table=checked.text("name of a table", table), checkpoint=stored)
    seen: pb.DeltaHeader | None = None  # the first header with a schema
    repeat = Repeat(client._timeout, lambda answer: bool(answer.keys))
    all_links = links(client)
    chosen = range(len(all_links)) if shards is None else shards
    for link in [all_links[checked.integer("shard", n, 0, len(all_links))] for n in chosen]:
        for answer in stream(link, "ReadRows", request, pb.Delta, repeat=repeat):
            head = answer.header
            if head.HasField("schema") and seen is not None:
                _check_same(table, seen, head)
                continue
            if head.HasField("schema"):
                seen = head
                yield head.schema
            yield _row_batch(answer)


def _check_same(table: str, first: pb.DeltaHeader, later: pb.DeltaHeader) -> None:
    """Raise SchemaMismatch if the rows after two headers of one table have different shapes."""
    one, other = ((head.schema.dim, head.width) for head in (first, later))
    if one != other:
        raise SchemaMismatch(
            f"table {table!r} was created anew while it was read: its rows had dim {one[0]} and"
            f" width {one[1]}, and now have dim {other[0]} and width {other[1]}; read it again"
        )


def _row_batch(message: pb.Delta) -> RowBatch:
    """Return the rows of a message as arrays, which share its memory."""
    return RowBatch(
        np.frombuffer(message.keys, "<u8"),
        np.frombuffer(message.versions, "<u8"),
        np.frombuffer(message.steps, "<i8"),
        np.frombuffer(message.frequencies, "<u8"),
        np.frombuffer(message.rows, "<f4").reshape(-1, message.header.width),
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
    """Write whole rows. Existing rows of the same keys are replaced. To train, use ``push``.

    table        name of the table
    keys         int[n], any 64-bit values, distinct
    rows         float[n, dim]: embeddings; the optimizer state becomes that of new rows. Or
                 float[n, width]: embeddings followed by the optimizer state
    steps        int[n] in -2^47..2^47-1, step of each row; None: the largest step that was pushed
                 to the table
    frequencies  int[n] in 0..2^32-1, number of pushed occurrences of each key; None: 1

    Idempotent. If the call fails, some of the rows may be written: repeat it. Raises
    InvalidArgument, before anything is written, if an argument breaks these rules.
    """
    checked.text("name of a table", table)
    keys, rows = _checked_rows(table, keys, rows)
    n = len(keys)
    counts = np.ones(n, np.uint64)
    if frequencies is not None:
        counts = _integers("frequencies", frequencies, n, *FREQUENCIES).astype(np.uint64)
    steps = np.empty(0, np.int64) if steps is None else _integers("steps", steps, n, *STEPS)
    cluster = client._connect()
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
            call(client, link, "WriteRows", request, pb.WriteRowsResponse)

    cluster.on_each(part)


def _checked_rows(table: str, keys: Any, rows: Any) -> tuple[NDArray[np.uint64], Rows]:
    """Return (keys uint64[n], rows float32[n, width]), after checking both.

    table  name of the table, for errors

    Raises InvalidArgument if the shapes are wrong, keys are equal, or numbers are not finite.
    """
    keys, rows = as_keys(keys), as_array(rows, "rows")
    if keys.ndim != 1 or rows.ndim != 2 or len(rows) != len(keys):
        raise InvalidArgument(
            f"keys must have shape (n,) and rows (n, width), got {keys.shape} and {rows.shape}"
        )
    if (distinct := len(np.unique(keys))) != len(keys):
        raise InvalidArgument(
            f"table {table!r}: keys must be distinct, got {len(keys)} keys with {distinct} distinct"
        )
    try:
        with np.errstate(over="ignore"):
            numbers = np.ascontiguousarray(rows, np.float32)
    except (TypeError, ValueError):
        raise InvalidArgument(f"rows must be numbers, got dtype {rows.dtype}") from None
    if not np.isfinite(numbers).all():
        raise InvalidArgument(f"table {table!r}: all numbers of rows must be finite as float32")
    return keys, numbers


def _integers(name: str, values: Any, n: int, low: int, high: int) -> NDArray[np.int64]:
    """Return ``values`` as int64[n].

    name  name of the argument, for errors

    Raises InvalidArgument unless they are ``n`` integers in low..high.
    """
    array = as_array(values, name)
    if array.shape != (n,) or (n and array.dtype.kind not in "iu"):
        raise InvalidArgument(
            f"{name} must be {n} integers, got {array.dtype} of shape {array.shape}"
        )
    if n and not (int(array.min()) >= low and int(array.max()) <= high):
        wrong = int(array.min()) if int(array.min()) < low else int(array.max())
        raise InvalidArgument(f"{name} must be in {low}..{high}, got {wrong}")
    return array.astype(np.int64)
