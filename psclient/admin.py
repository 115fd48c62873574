"""Checkpoints of a cluster: take, list, verify, restore, delete; and rows of a table as arrays.

    with Client(addresses) as ps:
        admin.checkpoint(ps, "monday")
        admin.checkpoint(ps, "tuesday", parent="monday")
        admin.restore(ps, "tuesday", replace=True)

A checkpoint has a name and never a path: the configuration of the servers says where checkpoints
are stored. The servers do the work, all shards at once. If a client dies in the middle, the next
call finishes the work or removes what is left of it.
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
