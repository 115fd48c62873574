"""Verify the rows of live tables that are on disk, and replace the rows that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from psclient import checked
from psclient.calls import OnProgress, Repeat, links, stream
from psclient.client import Client
from psclient.errors import InvalidArgument
from psclient.rows import RowBatch, read_rows, write_rows
from psproto import ps_pb2 as pb

WRITTEN = 10_000  # rows that are written per call


@dataclass(frozen=True, slots=True)
class DamagedBlock:
    """A damaged block on disk, which contains rows of one table."""

    table: str
    shard: int
    number: int  # of the block in the file base/data.mdb of the shard
    rows: int  # rows of the table in the block
    lost_rows: int  # rows that cannot be read
    problem: str  # what is wrong with the block
    keys: NDArray[np.uint64] = field(repr=False)  # [lost_rows], keys of the rows; may be left out


@dataclass(frozen=True, slots=True)
class Repaired:
    """The result of ``repair``, in numbers of rows."""

    lost: int  # rows that could not be read
    restored: int  # rows of these that were replaced by their rows in the checkpoint
    deleted: int  # rows of these that were deleted, because the checkpoint does not have them

    @property
    def left(self) -> int:
        """Return how many rows still cannot be read."""
        return self.lost - self.restored - self.deleted


def verify_rows(
    client: Client, table: str, *, keys: bool = False, progress: OnProgress | None = None
) -> list[DamagedBlock]:
    """Have all shards read and verify the rows of a table that are on disk; return the damage.

    table     name of the table
    keys      whether to return the keys of the rows that cannot be read
    progress  called with (bytes done, estimated total bytes) of one shard after the other

    Pulls and pushes go on meanwhile. Raises TableNotFound.
    """
    request = pb.VerifyRowsRequest(table=checked.text("name of a table", table), keys=keys)
    repeat = Repeat(client._timeout, lambda answer: bool(answer.HasField("damaged")))
    found = []
    for shard, link in enumerate(links(client)):
        answers = stream(
            link,
            "VerifyRows",
            request,
            pb.VerifyRowsResponse,
            service="AnalysisService",
            repeat=repeat,
        )
        for answer in answers:
            if progress is not None:
                progress(answer.bytes, answer.total)
            if answer.HasField("damaged"):
                each = answer.damaged
                counts = each.number, each.rows, each.lost_rows
                some = np.frombuffer(each.keys, "<u8").astype(np.uint64)
                found.append(DamagedBlock(table, shard, *counts, each.problem, some))
    return found


def repair(
    client: Client,
    table: str,
    *,
    checkpoint: str | None = None,
    delete: bool = False,
    progress: OnProgress | None = None,
) -> Repaired:
    """Replace the rows of a table that cannot be read, because their blocks on disk are damaged.

    table       name of the table
    checkpoint  name of a checkpoint with the same table: its rows are written; None: write none
    delete      whether to delete rows that the checkpoint does not have
    progress    called with (bytes verified, estimated total bytes)

    Other rows do not change. A replaced row is as old as the checkpoint, and a deleted row begins
    anew with its next push. Idempotent. Raises TableNotFound, CheckpointNotFound, and
    InvalidArgument if the rows of the checkpoint have a different width.
    """
    blocks = verify_rows(client, table, keys=True, progress=progress)
    lost = np.unique(np.concatenate([np.empty(0, np.uint64), *(each.keys for each in blocks)]))
    left = lost
    if checkpoint is not None and len(lost):
        left = _restore(client, table, checkpoint, lost)
    deleted = client.table(table).delete(left) if delete and len(left) else 0
    return Repaired(len(lost), len(lost) - len(left), deleted)


def _restore(
    client: Client, table: str, checkpoint: str, lost: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Write the rows of some keys from a checkpoint; return the keys that it does not have.

    lost  uint64[n], ascending
    """
    live = (each for each in read_rows(client, table, shards=[0]) if isinstance(each, RowBatch))
    width, found = next(live).rows.shape[1], [np.empty(0, np.uint64)]
    live.close()
    for batch in read_rows(client, table, checkpoint=checkpoint):
        if not isinstance(batch, RowBatch):
            continue
        if batch.rows.shape[1] != width:
            raise InvalidArgument(
                f"table {table!r} has {width} numbers per row, but its rows in checkpoint"
                f" {checkpoint!r} have {batch.rows.shape[1]}"
            )
        wanted = np.flatnonzero(np.isin(batch.keys, lost))
        for at in range(0, len(wanted), WRITTEN):
            some = wanted[at : at + WRITTEN]
            steps, frequencies = batch.steps[some], batch.frequencies[some]
            counts = np.minimum(frequencies, np.uint64(0xFFFFFFFF))
            rows = batch.keys[some], batch.rows[some]
            write_rows(client, table, *rows, steps=steps, frequencies=counts)
        found.append(batch.keys[wanted])
    return np.setdiff1d(lost, np.concatenate(found))
