"""Fill a table of this shard (the target) from a checkpoint, completely or not at all.

    data directory  = ... LOADING    exists while a table is filled: its name and number, and the
                                     schema of the table that it replaces (format: sealed.py)

The rows are loaded into a hidden table (fills.py), which clients cannot use. If the load fails or
the client goes away, the shard drops the hidden table. If the target existed before, the shard then
creates an empty table; the old rows are not brought back. After a crash, the next start does the
same, because LOADING records the names.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from psproto import names
from psproto import ps_pb2 as pb
from psserver.calls import Calls, Step
from psserver.catalog import Catalog
from psserver.engine import Engine
from psserver.errors import BadRequest, Overloaded
from psserver.flusher import Flusher
from psserver.rowwrites import RowWrites
from psserver.schemas import from_json, to_json
from psserver.shard import Shard
from psserver.slices import Slice, slices_of, with_state
from psserver.stored import (
    fits,
    number_in,
    overlapping,
    own,
    require_width,
    schema_in,
)
from psserver.work import Progress, Work
from storage.checkpoint import Checkpoint
from storage.disk import as_disk_full, replace, sync
from storage.errors import DiskFull, OutOfMemory, SchemaMismatch
from storage.manifest import Format, Natural, Schema, TableName
from storage.part_reader import rows_of
from storage.schema import TableSchema
from storage.sealed import FORMAT, STRICT, seal, unseal
from storage.versionlog import VersionLog

FILE = "LOADING"
PAUSE_SECONDS = 0.05  # seconds before a retry while the log has too many unwritten records
LONGEST_PAUSE = 1.0  # maximum number of seconds before a retry while the disk is full
KEY_BYTES = 16  # minimum size of a row in addition to its numbers, in bytes

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """The contents of the file LOADING: which table is being filled."""

    __pydantic_config__ = STRICT
    format: Format = FORMAT
    name: TableName
    number: Natural  # of the hidden table
    schema: Schema | None  # JSON schema of the table that is replaced; None: there was none


class TableLoader:
    """Answers LoadTable: fills tables of one shard from checkpoints. Thread-safe.

    directory  data directory for the file LOADING; None: the shard has none, and a crash loses all
               tables anyway
    flusher    makes room in memory for rows; None: the shard has no data directory
    """

    def __init__(
        self,
        shard: Shard,
        engine: Engine,
        log: VersionLog | None,
        catalog: Catalog,
        work: Work,
        calls: Calls,
        directory: Path | None,
        flusher: Flusher | None = None,
    ) -> None:
        self._writes = RowWrites(shard, engine, flusher)
        self._shard = shard
        self._engine = engine
        self._log = log
        self._catalog = catalog
        self._work = work
        self._calls = calls
        self._directory = directory
        self._on_disk = flusher is not None  # rows may leave memory; their index may not

    def load(self, request: pb.LoadTableRequest, progress: Progress) -> pb.CheckpointProgress:
        """Fill the table ``request.into`` with this shard's rows of a table in a checkpoint.

        progress  counts the bytes read

        Blocks. Waits twice for a Continue request of the client: before the target is replaced, and
        before the filled table is published to clients.
        """
        what = f"it fills table {request.into!r}"
        with (
            self._calls.open(request.id, progress) as call,
            self._work.alone(what),
            self._catalog.reading(request.name, what) as checkpoint,
            self._claimed(request.into),
        ):
            source = schema_in(checkpoint, request.table)
            target = self._accept(checkpoint, source, request)
            progress.stage = pb.CheckpointProgress.STAGE_READY
            call.wait(Step.STEP_START)
            loading = self._begin(target, replace=request.replace)
            try:
                progress.rows = self._fill(checkpoint, source, target, loading.number, progress)
                progress.stage = pb.CheckpointProgress.STAGE_DONE
                call.wait(Step.STEP_FINISH)
                self._remove_file()
            except BaseException:
                self._cancel(loading, progress)
                raise
            self._engine.run(lambda: self._shard.fills.finish(loading.number))
        return progress.message()

    @contextmanager
    def _claimed(self, name: str) -> Iterator[None]:
        """Forbid clients to create, alter or drop a table ``name`` while the block runs.

        Raises BadRequest for an invalid name.
        """
        if problem := names.problem("table", name):
            raise BadRequest("INVALID_ARGUMENT", problem)
        self._engine.run(lambda: self._shard.fills.claim(name))
        try:
            yield
        finally:
            self._engine.run(lambda: self._shard.fills.release(name))

    def _accept(
        self, checkpoint: Checkpoint, source: TableSchema, request: pb.LoadTableRequest
    ) -> TableSchema:
        """Check whether the target can be created or replaced, and filled, before any change.

        source  schema of the table in the checkpoint

        Returns the schema of the new table. Raises TableLoading, NotEmpty, SchemaMismatch or
        OutOfMemory.
        """
        fresh = dataclasses.replace(source, name=request.into)

        def look() -> tuple[TableSchema, int]:
            fills = self._shard.fills
            old = fills.require_replaceable(request.into, replace=request.replace)
            if old is None:
                self._shard.require_creatable(fresh)
                return fresh, 0
            return old.schema, old.table.stats().bytes

        target, freed = self._engine.run(look)
        if target.dim != source.dim:
            raise SchemaMismatch(request.into, "dim", target.dim, source.dim)
        shards = self._shard.shard_map.shards
        if len(checkpoint.parts) == shards:  # else the number of rows is not known yet
            tables = checkpoint.parts[self._shard.number].tables
            rows = sum(each.rows for each in tables if each.name == request.table)
            size = KEY_BYTES + (0 if self._on_disk else 4 * target.width)
            self._require_memory(rows * size, freed)
        return target

    def _require_memory(self, size: int, freed: int) -> None:
        """Raise OutOfMemory if the memory budget does not allow ``size`` more bytes.

        freed  bytes that are released before
        """
        budget = self._shard.budget
        held = budget.held - freed
        if self._on_disk:  # rows can make room
            held = max(0, held - sum(holder.held for holder in budget.holders))
        if size > budget.limit - held:
            raise OutOfMemory(budget.limit, held, size)

    def _begin(self, target: TableSchema, *, replace: bool) -> Loading:
        """Write the file LOADING, then replace the target by a hidden table without rows.

        target   schema of the hidden table
        replace  allow this even if the target has rows or admission counters

        Returns the contents of LOADING. After an error nothing has changed.
        """
        fills = self._shard.fills

        def look() -> Loading:
            old = fills.require_replaceable(target.name, replace=replace)
            text = None if old is None else json.dumps(to_json(old.schema), sort_keys=True)
            return Loading(name=target.name, number=fills.next_number(), schema=text)

        try:
            while True:
                loading = self._engine.run(look)
                self._write_file(loading)
                begin = partial(fills.begin, target, loading.number, replace=replace)
                if self._engine.run(begin):
                    return loading
        except BaseException:
            self._remove_file()
            raise

    def _fill(
        self,
        checkpoint: Checkpoint,
        source: TableSchema,
        target: TableSchema,
        number: int,
        progress: Progress,
    ) -> int:
        """Copy this shard's rows to the hidden table. Returns their number, once all are durable.

        source  schema of the table in the checkpoint
        target  schema of the hidden table
        number  number of the hidden table
        """
        same, written = fits(source, target), 0
        parts = overlapping(checkpoint, self._shard)
        progress.total = checkpoint.bytes_of(parts)
        for part in parts:
            stored = number_in(checkpoint, part, source.name)
            for piece in rows_of(self._catalog.store, checkpoint, part, [stored], progress.add):
                require_width(checkpoint, source, piece.rows)
                mine = own(piece.keys, self._shard)
                rows = piece.rows[mine]
                whole = rows if same else with_state(rows[:, : target.dim], target)
                columns = piece.keys[mine], piece.steps[mine], piece.frequencies[mine], whole
                for slices in slices_of(*columns):
                    self._apply(number, slices, progress)
                written += len(rows)
        if self._log is not None:
            self._log.sync(self._engine.run(lambda: self._shard.version))
        return written

    def _apply(self, number: int, slices: list[Slice], progress: Progress) -> None:
        """Write slices of rows to the table with this number.

        Waits while the log has too many unwritten records. Raises Draining if the client is gone or
        the server stops.
        """
        left = slices[::-1]
        while True:
            progress.require_wanted()
            try:
                self._writes.write(number, left)
                return
            except Overloaded:
                time.sleep(PAUSE_SECONDS)

    def _cancel(self, loading: Loading, progress: Progress) -> None:
        """Undo the load: drop the hidden table; create an empty one if the target existed.

        Retries while the disk is full or the log has too many unwritten records. After a different
        error, or if the server stops, logs an error; the next start then undoes the load.
        """
        pause = PAUSE_SECONDS
        while True:
            try:
                self._engine.run(lambda: _cancel(self._shard, loading))
                if self._log is not None:
                    self._log.sync(self._engine.run(lambda: self._shard.version))
                self._remove_file()
                return
            except Exception as error:
                full = isinstance(error, (Overloaded, DiskFull))  # a later attempt may succeed
                if not full or progress.stopping:
                    why = f"a failed load of table {loading.name!r} is undone only by a restart"
                    self._work.refuse(why)  # refuse checkpoints, and loads that overwrite LOADING
                    logger.error(why, error=str(error))
                    return
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _write_file(self, loading: Loading) -> None:
        if self._directory is not None:
            data = seal(loading)
            with as_disk_full(self._directory, len(data)):
                replace(self._directory / FILE, data)

    def _remove_file(self) -> None:
        if self._directory is not None:
            _remove(self._directory)


def settle_load(directory: Path, shard: Shard, log: VersionLog) -> None:
    """Undo a load that a crash has interrupted, if there is one. Call before the shard serves.

    directory  data directory of the shard
    log        version log of the shard

    Raises Corrupt if the file LOADING is damaged.
    """
    path = directory / FILE
    if path.exists():
        loading = unseal(Loading, path.read_bytes(), str(path))
        shard.budget.begin_loading()  # a smaller budget than before must not stop the start
        try:
            _cancel(shard, loading)
        finally:
            shard.budget.end_loading()
        log.sync(shard.version)
        _remove(directory)
        logger.warning("an interrupted load was undone", table=loading.name)


def _cancel(shard: Shard, loading: Loading) -> None:
    """Drop the hidden table that ``loading`` describes; create an empty one if it replaced a table.

    Must run on the engine thread.
    """
    schema = None if loading.schema is None else from_json(json.loads(loading.schema))
    shard.fills.cancel(loading.name, loading.number, schema)


def _remove(directory: Path) -> None:
    """Delete the file LOADING in the data directory, and sync the directory to disk."""
    (directory / FILE).unlink(missing_ok=True)
    sync(directory)
