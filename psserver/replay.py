"""A shard brought back from its data directory, at a start.

data directory = LOCK  SHARD  log/ (storage/versionlog.py)  base/ (storage/base.py)
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
    """What a start read."""

    rows: int  # rows, tombstones and counters in blocks
    records: int  # records replayed
    record_bytes: int


def restore_excess(budget: int) -> int:
    """Return the bytes that a restored shard may take beyond its budget.

    Equal rows do not take equal memory on two shards: indexes are random. What fitted into the
    budget of one shard must fit into an equal budget of another.
    """
    return budget // 16 + (2 << 20)


def recover(shard: Shard, base: Base, versions: VersionLog, excess: int | None = None) -> Recovered:
    """Bring an empty shard to the newest version: load the base, then replay the log after it.

    excess  bytes of memory that the tables may take beyond the budget; None: any number

    Begins the epoch of this process. Raises Corrupt where stored bytes are damaged, OutOfMemory if
    the tables take more than ``excess`` allows.
    """
    shard.recovery.begin(excess)
    rows = records = size = 0
    state = base.state
    if state is not None:
        shard.recovery.load_state(state)
        for _, block in base.blocks():
            shard.recovery.load_block(block)
            rows += len(block.keys)
        shard.recovery.blocks_loaded()
    if versions.first > shard.version + 1:
        raise Corrupt(
            str(base.directory),
            f"stands at version {shard.version}, but the log begins at version {versions.first}",
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
        raise Corrupt(str(versions.directory), f"ends at version {shard.version}, before its end")
    _begin_epoch(base, versions)
    return Recovered(rows, records, size)


def _begin_epoch(base: Base, versions: VersionLog) -> None:
    """Draw the epoch of this process, and record it in the base, with the fact that a log exists.

    On a full disk the next flush records both. Until then a restart does not recognize the
    versions of this process, and subscribers take a snapshot.
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
