"""Stage a checkpoint for a restore: write the checkpoint's rows that this shard owns as a new base.

A base is a directory with a copy of all rows at one log version. A server loads it when it starts.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from psserver.schemas import to_json
from psserver.shard import Shard
from psserver.stored import (
    overlapping,
    own,
    read_stored,
    require_width,
    runs,
    sessions_in,
)
from psserver.work import Progress
from storage.base import Base
from storage.basestate import BaseState, BaseTable
from storage.block import Block, pack_counters, rows_per_block, tombstones_per_block
from storage.checkpoint import Checkpoint
from storage.directory import BlockEntry, Zones, pack
from storage.eviction.evictor import Evictor
from storage.history import History, draw_epoch
from storage.kernels import Keys
from storage.part_reader import Piece, counters_of, rows_of
from storage.schema import TableSchema
from storage.store import Store

AHEAD_BLOCKS = 24  # maximum number of blocks that wait to be written


def stage(
    shard: Shard, store: Store, checkpoint: Checkpoint, directory: Path, progress: Progress
) -> int:
    """Write a base with the rows, counters and sessions of a checkpoint that belong to this shard.

    store      store that contains the checkpoint
    directory  directory of the new base
    progress   its fields ``bytes`` and ``total`` are updated meanwhile

    Returns the number of rows written. Raises Corrupt if the checkpoint is damaged, CheckpointUnfit
    if this release cannot read a table's schema, Draining if the server stops.
    """
    manifest = checkpoint.manifest
    schemas = {
        table.name: read_stored(manifest.name, table.name, table.schema)
        for table in manifest.tables
    }
    numbers = {name: number for number, name in enumerate(sorted(schemas), 1)}
    parts = overlapping(checkpoint, shard)
    progress.total = checkpoint.bytes_of(parts)
    with _Writer(directory) as writer:
        packers = {name: _Packer(numbers[name], schema, writer) for name, schema in schemas.items()}
        for part in parts:
            of = _names(checkpoint, part)
            for piece in rows_of(store, checkpoint, part, of, progress.add):
                name = of[piece.table]
                require_width(checkpoint, schemas[name], piece.rows)
                packers[name].add(piece, own(piece.keys, shard))
        for packer in packers.values():
            packer.flush()
        for part in parts:
            of = _names(checkpoint, part)
            counters = counters_of(store, checkpoint, part, of, progress.add)
            for number, keys, totals, versions in counters:
                mine = own(keys, shard)
                writer.counters(numbers[of[number]], keys[mine], totals[mine], versions[mine])
        sessions = _sessions(shard, store, checkpoint)
        writer.commit(_base_state(checkpoint, schemas, numbers, sessions))
    return sum(packer.rows for packer in packers.values())


def _names(checkpoint: Checkpoint, part: int) -> dict[int, str]:
    """Return the names of the tables in one part of a checkpoint, by their numbers in the part."""
    return {table.number: table.name for table in checkpoint.parts[part].tables}


def _base_state(
    checkpoint: Checkpoint,
    schemas: dict[str, TableSchema],
    numbers: dict[str, int],
    sessions: bytes,
) -> BaseState:
    """Return what the new base records besides rows: tables, version, history, sessions.

    It has a new lineage (random id of the log), because the shard's history begins again. Its
    version is the largest version of the checkpoint's shards.

    schemas   schema of each table, by name
    numbers   new number of each table, by name
    sessions  packed client sessions, or b""
    """
    version = max(checkpoint.manifest.versions)
    tables = (
        BaseTable(
            number=number,
            schema=_text(schemas[name]),
            created=version,
            policy=_policy(checkpoint, schemas[name]),
        )
        for name, number in numbers.items()
    )
    return BaseState(
        lineage=os.urandom(16),
        history=History((draw_epoch(),)),
        version=version,
        next_table=len(numbers) + 1,
        tables=tuple(tables),
        horizon=version,
        sessions=sessions,
    )


def _policy(checkpoint: Checkpoint, schema: TableSchema) -> bytes:
    """Return the packed state of a table's evictor, with the table's largest training step in the
    checkpoint. Returns b"" if the checkpoint has no step for the table.
    """
    tables = (each for part in checkpoint.parts for each in part.tables)
    steps = [each.step for each in tables if each.name == schema.name and each.step is not None]
    if not steps:
        return b""
    evictor = Evictor(schema.evictions)
    evictor.loaded(max(checkpoint.manifest.versions), max(steps))
    return evictor.pack()


def _sessions(shard: Shard, store: Store, checkpoint: Checkpoint) -> bytes:
    """Return the packed client sessions that the checkpoint has for this shard.

    Returns b"" if the checkpointed cluster was divided into shards in a different way.
    """
    if len(checkpoint.parts) != shard.shard_map.shards:
        return b""
    part = checkpoint.parts[shard.number]
    if part.buckets != runs(shard):
        return b""
    return sessions_in(store, checkpoint, shard.number)


class _Writer:
    """Writes a new base on a background thread, while the caller packs the next blocks.

    Use it as a context manager: it opens the base on entry, and closes it on exit.
    """

    def __init__(self, directory: Path) -> None:
        self._base = Base(directory)
        self._thread = ThreadPoolExecutor(1, "restore writer")
        self._begun: deque[Future[int]] = deque()
        self._added: list[int] = []
        self._listed: list[BlockEntry] = []  # blocks of rows; numbers are positions in ``_added``

    def __enter__(self) -> Self:
        try:
            self._thread.submit(self._base.open).result()
        except BaseException:
            self._thread.shutdown()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each in self._begun:
            each.cancel()
        self._thread.submit(self._base.close).result()
        self._thread.shutdown()

    def add(self, block: Block, dim: int) -> None:
        """Queue a block to be written. The caller must not change its arrays afterwards.

        dim  numbers in an embedding

        If more than AHEAD_BLOCKS blocks wait, this waits until the oldest of them is written.
        """
        data = block.seal(dim)
        self._listed.append(
            BlockEntry(
                number=len(self._added) + len(self._begun),
                table=block.table,
                width=block.width,
                count=len(block),
                zones=Zones.of(block),
                live=np.ones(len(block), np.bool_),
            )
        )
        self._begun.append(self._thread.submit(self._base.add, data))
        if len(self._begun) > AHEAD_BLOCKS:
            self._added.append(self._begun.popleft().result())

    def counters(
        self,
        table: int,
        keys: Keys,
        totals: NDArray[np.uint32],
        versions: NDArray[np.uint64],
    ) -> None:
        """Queue exact admission counters of a table, in as many blocks as they need.

        table     number of the table
        keys      uint64[n]
        totals    uint32[n]  occurrences counted
        versions  uint64[n]  versions of the last change
        """
        most = tombstones_per_block()
        for at in range(0, len(keys), most):
            part = slice(at, at + most)
            block = pack_counters(table, keys[part], versions[part], totals[part])
            self._begun.append(self._thread.submit(self._base.add, block))

    def commit(self, state: BaseState) -> None:
        """Wait until all queued blocks are written, then commit them and ``state`` to the base.

        Also writes the directory: each key is in one block, so that all rows are current.
        """
        self._added += [each.result() for each in self._begun]
        self._begun.clear()
        entries = (
            dataclasses.replace(each, number=self._added[each.number]) for each in self._listed
        )
        directory = [self._thread.submit(self._base.add, data) for data in pack(entries)]
        whole = dataclasses.replace(
            state,
            blocks=(*self._added, *(each.result() for each in directory)),
            directory=len(directory),
            distinct=True,
        )
        self._thread.submit(self._base.commit, whole).result()


class _Packer:
    """Collects the rows of one table into full blocks, and passes the blocks to a writer.

    number  number of the table in the new base
    schema  of the table
    rows    rows added so far
    """

    def __init__(self, number: int, schema: TableSchema, writer: _Writer) -> None:
        self.rows = 0
        self._writer = writer
        self._most = rows_per_block(schema.width)
        self._number, self._width, self._dim = number, schema.width, schema.dim
        self._block: Block | None = None
        self._used = 0

    def add(self, piece: Piece, chosen: Any) -> None:
        """Copy rows that were read from a checkpoint into blocks.

        piece   many rows of the table
        chosen  index that selects the rows to copy: int64[n] or a slice
        """
        arrays = [each[chosen] for each in piece[1:]]
        at, end = 0, len(arrays[0])
        self.rows += end
        while at < end:
            if self._block is None:
                self._block = Block.empty(self._number, self._width, self._most)
            n = min(end - at, self._most - self._used)
            for target, array in zip(_arrays(self._block), arrays, strict=True):
                target[self._used : self._used + n] = array[at : at + n]
            at, self._used = at + n, self._used + n
            if self._used == self._most:
                self._writer.add(self._block, self._dim)
                self._block, self._used = None, 0

    def flush(self) -> None:
        """Pass the last block, which is only partly filled, to the writer."""
        if self._block is not None and self._used:
            rest = Block.empty(self._number, self._width, self._used)
            for target, array in zip(_arrays(rest), _arrays(self._block), strict=True):
                target[:] = array[: self._used]
            self._writer.add(rest, self._dim)
        self._block, self._used = None, 0


def _arrays(block: Block) -> tuple[Any, ...]:
    """Return (keys, versions, steps, frequencies, rows) of a block."""
    return block.keys, block.versions, block.steps, block.frequencies, block.rows


def _text(schema: Any) -> str:
    """Return a schema as JSON text."""
    return json.dumps(to_json(schema), sort_keys=True)
