"""Checkpoints of a cluster: take, list, verify, restore, and the rows of a table as arrays.

    with Client(addresses) as ps:
        admin.checkpoint(ps, "monday")
        admin.checkpoint(ps, "tuesday", parent="monday")
        admin.restore(ps, "tuesday", replace=True)

A checkpoint has a name, never a path: where checkpoints lie is in the configuration of the servers.
Work is done by the servers, all shards at once; a client that dies leaves nothing half done that
the next call would not finish or clear away.
"""

from psclient.checkpoints import (
    CheckpointInfo,
    checkpoint,
    checkpoints,
    delete,
    describe,
    prune,
    verify,
)
from psclient.restores import abort_restore, restore
from psclient.rows import RowBatch, read_rows, warm_start, write_rows

__all__ = [
    "CheckpointInfo",
    "RowBatch",
    "abort_restore",
    "checkpoint",
    "checkpoints",
    "delete",
    "describe",
    "prune",
    "read_rows",
    "restore",
    "verify",
    "warm_start",
    "write_rows",
]
