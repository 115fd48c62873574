"""Write one shard's part of a named checkpoint.

To write a part, the shard flushes its changes to the base (the copy of all rows on disk). The base
then has a version S. The shard copies the blocks of the base while pushes continue, notes its
version E, copies the log records ``S + 1`` to ``E``, and writes the manifest of the part. Then one
shard completes the checkpoint (completion.py). If the client names a barrier, E is the version of
this barrier, so that all parts of the checkpoint are of one moment (cuts.py).

These methods block, so they must run on worker threads. On the engine thread they only note a
version or read some counters. An attempt is one run of a client's checkpoint command; its
random id names the directory of its files. The module storage/checkpoint.py describes the files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np

from psproto import names
from psproto import ps_pb2 as pb
from psserver.calls import Calls
from psserver.capture import Capture
from psserver.catalog import Catalog
from psserver.completion import Completion
from psserver.cuts import Cut
from psserver.deletion import Deletion
from psserver.engine import Engine
from psserver.errors import BadRequest, CheckpointExists, CheckpointUnfit, Draining, NoLog
from psserver.flusher import Flusher
from psserver.loading import TableLoader
from psserver.packing import counters_of, tombstone_blocks
from psserver.pinned import PinnedBase
from psserver.rows import RowTransfer
from psserver.shard import Shard
from psserver.stored import require_id, require_name, runs
from psserver.timings import Timings
from psserver.work import Progress, Work
from storage.block import BLOCK_BYTES, pack_counters
from storage.checkpoint import Checkpoint
from storage.manifest import MANIFEST, MAX_CHAIN, File, Parent, Part, PartTable
from storage.part_writer import PartWriter
from storage.store import Store
from storage.versionlog import VersionLog

BARRIER_MS = 600_000  # default of barrier_timeout_ms
RECORD_BYTES = 4 << 20  # maximum size of log records copied at once, in bytes


class Checkpoints:
    """Writes named checkpoints of one shard, and owns the other operations on them. Thread-safe.

    log        version log; None: this shard cannot take checkpoints
    flusher    flushes changes to the base; None if ``log`` is None
    store      file store for checkpoints; None: checkpoint_url is not set
    now        returns seconds since 1970
    directory  data directory of the shard; None: it has none

    timings  durations and failures of the parts that this shard wrote
    written  bytes of these parts
    """

    def __init__(
        self,
        shard: Shard,
        engine: Engine,
        log: VersionLog | None,
        flusher: Flusher | None,
        store: Store | None,
        now: Callable[[], float] = time.time,
        directory: Path | None = None,
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._log = log
        self._flusher = flusher
        self._now = now
        self.timings = Timings()
        self.written = 0
        self.catalog = Catalog(shard, store)
        self.completion = Completion(shard, self.catalog, now)
        self.work = Work(self.catalog.stop)
        self.calls = Calls()
        self.deletion = Deletion(shard, self.catalog, self.calls)
        self.rows = RowTransfer(shard, engine, self.catalog, self.work, flusher)
        self.loader = TableLoader(
            shard, engine, log, self.catalog, self.work, self.calls, directory, flusher
        )

    def write(
        self, request: pb.WriteCheckpointRequest, progress: Progress
    ) -> pb.CheckpointProgress:
        """Write this shard's part of the checkpoint ``request.name``.

        progress  counts the bytes written

        With ``request.parent`` the part contains only the changes since that checkpoint. Returns
        path, size and checksum of the part's manifest. With ``request.until_barrier`` the part ends
        at that barrier; this then waits for it. Raises NoLog, CheckpointExists, CheckpointBusy,
        CheckpointUnfit or BarrierMissed.
        """
        name, attempt = require_name(request.name), require_id("attempt", request.attempt)
        log, flusher = self._log, self._flusher
        if log is None or flusher is None:
            raise NoLog
        what = f"it takes checkpoint {name!r}"
        cut = _cut_of(request)
        if cut is not None:
            what += f" up to barrier {cut.barrier!r}"
        parents = self.catalog.reading(request.parent, what) if request.parent else nullcontext()
        with self.work.alone(what), self.catalog.uses.using([name], what), parents as opened:
            if self.catalog.store.exists(f"{name}/{MANIFEST}"):
                raise CheckpointExists(name)
            parent = self._parent(opened, log) if opened else None
            flusher.pins[attempt] = 0  # until the version is known
            try:
                with (
                    self.timings.run(abandoned=(Draining,)),
                    self._expecting(cut),
                    flusher.pinned() as base,
                ):
                    flusher.pins[attempt] = base.captured.version
                    if cut is not None:
                        cut.require_after(base.captured.version)
                    return self._write(name, attempt, parent, log, base, cut, progress)
            finally:
                del flusher.pins[attempt]

    @contextmanager
    def _expecting(self, cut: Cut | None) -> Iterator[None]:
        """Return a context manager; a barrier that is placed during its block ends ``cut``."""
        if cut is None:
            yield
            return
        self._engine.run(lambda: self._shard.cuts.expect(cut))
        try:
            yield
        finally:
            self._engine.run(lambda: self._shard.cuts.forget(cut))

    def _parent(self, parent: Checkpoint, log: VersionLog) -> tuple[Parent, Part]:
        """Return (reference to a parent checkpoint, this shard's part of that checkpoint).

        parent  opened checkpoint

        Raises CheckpointUnfit if this shard's log does not have all changes since the checkpoint.
        """
        name, shard = parent.manifest.name, self._shard
        if len(parent.chain) >= MAX_CHAIN:
            raise CheckpointUnfit(
                f"checkpoint {name!r} cannot be a parent: it has {len(parent.chain) - 1} ancestors,"
                f" and a chain may have {MAX_CHAIN} checkpoints; take a full checkpoint (without"
                " parent)"
            )
        part = next((part for part in parent.parts if part.shard == shard.number), None)
        if part is None or part.shards != shard.shard_map.shards or part.buckets != runs(shard):
            raise CheckpointUnfit(
                f"checkpoint {name!r} cannot be a parent: the cluster that took it had other"
                " shards; take a full checkpoint (without parent)"
            )
        if part.lineage != log.lineage.hex() or part.version > shard.version:
            raise CheckpointUnfit(
                f"checkpoint {name!r} cannot be a parent: it does not belong to the present log of"
                f" shard {shard.number}, whose data was restored or replaced since; take a full"
                " checkpoint (without parent)"
            )
        return Parent(name=name, checksum=parent.checksum), part

    def _write(
        self,
        name: str,
        attempt: str,
        parent: tuple[Parent, Part] | None,
        log: VersionLog,
        base: PinnedBase,
        cut: Cut | None,
        progress: Progress,
    ) -> pb.CheckpointProgress:
        """Write the files of this shard's part: rows, log records, sessions and manifest.

        name     name of the checkpoint
        attempt  id of the attempt, which names the directory of the files
        parent   (reference to the parent checkpoint, this shard's part of it); None: write a full
                 checkpoint
        base     the rows as of the flush
        cut      the wait for the barrier at which the part ends; None: it ends after the copy

        Returns path, size and checksum of the manifest. After an error, the files written so far
        are removed.
        """
        shard, captured = self._shard, base.captured
        if parent and captured.horizon > parent[1].version:
            raise CheckpointUnfit(
                f"checkpoint {parent[0].name!r} is too old to be a parent: shard {shard.number} no"
                f" longer knows which keys were deleted up to version {captured.horizon}; take a"
                " full checkpoint (without parent)"
            )
        progress.total = 0 if parent else _bytes_of(captured)
        writer = PartWriter(self.catalog.store, name, attempt, shard.number, progress.add)
        try:
            after = parent[1].version if parent else None
            self._copy(base, after, writer)
            end = self._end(cut, progress)
            _copy_log(log, captured.version, end.version, writer)
            writer.sessions(end.sessions.pack())
            part, file = self._finish(attempt, captured, end, parent, log, writer)
        except BaseException:
            writer.discard()
            raise
        self.written += progress.bytes
        written = pb.CheckpointPart(
            path=file.path, bytes=file.bytes, checksum=file.checksum, version=part.version
        )
        return pb.CheckpointProgress(
            bytes=progress.bytes, total=progress.bytes, part=written, stage=progress.stage
        )

    def _copy(self, base: PinnedBase, after: int | None, writer: PartWriter) -> None:
        """Write the deletes, rows and admission counters of the base.

        base   the rows as of the flush
        after  write only rows changed and keys deleted after this version; None: all rows
        """
        captured = base.captured
        if after is not None:  # a full checkpoint needs no tombstones
            for block in tombstone_blocks(captured, after, np.empty(BLOCK_BYTES, np.uint8)):
                writer.block(block.seal())
        for data in base.rows(after or 0):
            writer.block(data)
        for table, keys, totals, versions in counters_of(captured, 0, self._engine):
            writer.block(pack_counters(table, keys, versions, totals), "counters")

    def _end(self, cut: Cut | None, progress: Progress) -> Capture:
        """Return the shard as captured at the version that the part represents.

        cut  the wait for the barrier of this version; None: the shard's present version
        """
        if cut is None:
            return self._engine.run(self._shard.capture)
        progress.stage = pb.CheckpointProgress.STAGE_READY
        return cut.wait(progress)

    def _finish(
        self,
        attempt: str,
        captured: Capture,
        end: Capture,
        parent: tuple[Parent, Part] | None,
        log: VersionLog,
        writer: PartWriter,
    ) -> tuple[Part, File]:
        """Write the manifest of this shard's part. Returns (manifest, its path, size and checksum).

        attempt   id of the attempt
        captured  the shard at the version from which rows were copied
        end       the shard at the version that the part represents
        parent    (reference to the parent checkpoint, this shard's part of it); None: the
                  checkpoint is full
        """
        shard = self._shard
        return writer.finish(
            attempt=attempt,
            shard=shard.number,
            shards=shard.shard_map.shards,
            buckets=runs(shard),
            lineage=log.lineage.hex(),
            version=end.version,
            copied=captured.version,
            after=parent[1].version if parent else 0,
            parent=parent[0] if parent else None,
            tables=_tables_of(end),
            micros=int(self._now() * 1e6),
        )


def _cut_of(request: pb.WriteCheckpointRequest) -> Cut | None:
    """Return the wait for the barrier that a request names; None if it names none.

    Raises BadRequest if the name is not valid for a barrier.
    """
    name = request.until_barrier
    if not name:
        return None
    if problem := names.problem("barrier", name):
        raise BadRequest("INVALID_ARGUMENT", f"field 'until_barrier': {problem}")
    return Cut(name, (request.barrier_timeout_ms or BARRIER_MS) / 1000)


def _copy_log(log: VersionLog, after: int, upto: int, writer: PartWriter) -> None:
    """Copy the log records of the versions ``after`` + 1 to ``upto``, inclusive, to ``writer``."""
    log.sync(upto)
    cursor = log.cursor(after)
    try:
        while frames := cursor.read(upto=upto, max_bytes=RECORD_BYTES):
            writer.frames(frames)
    finally:
        cursor.close()


def _bytes_of(captured: Capture) -> int:
    return sum(each.rows * (32 + 4 * each.width) for each in captured.tables)


def _tables_of(captured: Capture) -> tuple[PartTable, ...]:
    return tuple(
        PartTable(
            number=each.number,
            name=str(json.loads(each.schema)["name"]),
            schema=each.schema,
            rows=each.rows,
            step=each.step,
        )
        for each in captured.tables
    )
