"""Administer a cluster: checkpoints and restores, and rows of a table as arrays.

    with Client(addresses) as ps:
        admin.checkpoint(ps, "monday")
        admin.checkpoint(ps, "tuesday", parent="monday")
        admin.restore(ps, "tuesday", replace=True)

A checkpoint has a name but no path: the servers' configuration (checkpoint_url) determines where
checkpoints are stored. The servers do the work, all shards at once. If a client dies during a call,
the next call finishes that work or removes the unfinished files.
"""

from psclient.checkpoints import CheckpointInfo, checkpoint, checkpoints, describe, verify
from psclient.pruning import delete, prune
from psclient.repairs import DamagedBlock, Repaired, repair, verify_rows
from psclient.restores import abort_restore, restore
from psclient.rows import RowBatch, read_rows, warm_start, write_rows

__all__ = [
    "CheckpointInfo",
    "DamagedBlock",
    "Repaired",
    "RowBatch",
    "abort_restore",
    "checkpoint",
    "checkpoints",
    "delete",
    "describe",
    "prune",
    "read_rows",
    "repair",
    "restore",
    "verify",
    "verify_rows",
    "warm_start",
    "write_rows",
]
