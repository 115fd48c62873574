"""Recover a shard from its data directory when its server starts.

    data directory = LOCK  SHARD  log/ (storage/versionlog.py)  base/ (storage/base.py)

The base has a copy of all rows at one log version. The log has the changes after this version.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass

from psserver.shard import Shard
from storage.base import Base
from storage.basestate import BaseState
from storage.errors import Corrupt, DiskFull
from storage.history import History, draw_epoch
from storage.records import decode
from storage.versionlog import VersionLog

REPLAY_BYTES = 4 << 20  # bytes of the log per read


@dataclass(frozen=True, slots=True)
class Recovered:
    """How much data a recovery has read."""

    rows: int  # rows, tombstones and counters loaded from the base
    records: int  # log records replayed
    record_bytes: int  # size of the replayed log records, in bytes


def restore_excess(budget: int) -> int:
    """Return the number of bytes by which a shard may exceed its memory budget while it loads
    restored data.

    budget  memory budget, in bytes

    Indexes are randomized, so the same rows need slightly different amounts of memory on two
    servers. With this margin, rows that fitted into one shard fit into every shard with an equal
    budget.
    """
    return budget // 16 + (2 << 20)


def recover(shard: Shard, base: Base, versions: VersionLog, excess: int | None = None) -> Recovered:
    """Recover an empty shard: load the base, then replay the log records after it.

    versions  log of the shard
    excess    bytes by which the tables may exceed the memory budget; None: no limit

    Then draws the epoch (random number) of this server start, and records it in the base. Raises
    Corrupt if stored bytes are damaged, OutOfMemory if the tables exceed the budget by more than
    ``excess``.
    """
    shard.recovery.begin(excess)
    rows, records, size = _load_base(shard, base), 0, 0
    if versions.first > shard.version + 1:
        raise Corrupt(
            str(base.directory),
            f"the base ends at version {shard.version}, but the log begins at version"
            f" {versions.first}: changes between them are missing",
        )
    cursor = versions.cursor(shard.version)
    while frames := cursor.read(upto=versions.last, max_bytes=REPLAY_BYTES):
        for frame in frames:
            shard.recovery.replay(frame.version, decode(frame))
            size += len(frame.payload)
        records += len(frames)
    cursor.close()
    shard.recovery.finish()
    if shard.version != versions.last:
        raise Corrupt(
            str(versions.directory),
            f"expected changes up to version {versions.last}, but recovery ended at version"
            f" {shard.version}",
        )
    _begin_epoch(base, versions)
    return Recovered(rows, records, size)


def _load_base(shard: Shard, base: Base) -> int:
    """Load the base into an empty shard; return the number of rows, tombstones and counters."""
    if base.state is None:
        return 0
    shard.recovery.load_state(base.state)
    rows = 0
    for _, block in base.blocks():
        shard.recovery.load_block(block)
        rows += len(block.keys)
    shard.recovery.blocks_loaded()
    return rows


def _begin_epoch(base: Base, versions: VersionLog) -> None:
    """Draw the epoch (random number) of this server start, and commit it to the base, together with
    the fact that a log exists.

    If the disk is full, the next flush commits them instead. If the server restarts before that
    flush, it does not recognize versions of this epoch, and subscribers that have such versions
    start with a snapshot.
    """
    state, epoch = base.state, draw_epoch()
    if state is None:
        versions.history = History((epoch,))
        state = BaseState(
            lineage=versions.lineage, history=versions.history, version=0, next_table=1
        )
    else:
        versions.history = state.history.begin(epoch, versions.last)
    with suppress(DiskFull):
        base.commit(dataclasses.replace(state, history=versions.history, logged=True))
