"""Named checkpoints of this shard's part of every table, taken.

    WriteCheckpoint     version S, rows while pushes go on, version E, records S+1..E, manifest
    CompleteCheckpoint  the parts of all shards become a checkpoint

Everything here blocks, and runs on threads of its own. The engine is asked for moments only: to
capture a version, or to take or copy a slice of rows. storage/checkpoint.py has the files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import structlog

from psproto import ps_pb2 as pb
from psserver.catalog import Catalog, describe
from psserver.engine import Engine
from psserver.errors import CheckpointExists, CheckpointUnfit, NoLog
from psserver.packing import blocks_of, counters_of
from psserver.rows import RowFiles
from psserver.shard import Shard
from psserver.stored import require_id, require_name, runs
from psserver.views import Capture
from psserver.work import Progress, Work
from storage.block import BLOCK_BYTES, ROWS, pack_counters
from storage.checkpoint import open_part, read_manifest
from storage.errors import StorageError
from storage.manifest import (
    ATTEMPT,
    MANIFEST,
    MAX_CHAIN,
    MAX_MANIFEST,
    Base,
    CheckpointTable,
    File,
    Manifest,
    Part,
    PartTable,
    facts,
)
from storage.part_writer import PartWriter
from storage.sealed import seal
from storage.store import Store
from storage.versionlog import VersionLog

RECORD_BYTES = 4 << 20  # of the log, copied at once

logger = structlog.get_logger()


class Checkpoints:
    """What one shard does about named checkpoints. Thread-safe.

    log    None: this shard cannot take checkpoints
    pins   of the flusher: keeps the log while it is copied
    store  None: the configuration names no place for checkpoints
    now    seconds since 1970
    """

    def __init__(
        self,
        shard: Shard,
        engine: Engine,
        log: VersionLog | None,
        pins: dict[str, int],
        store: Store | None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._log = log
        self._pins = pins
        self._now = now
        self.work = Work()
        self.catalog = self._catalog = Catalog(shard, store)
        self.rows = RowFiles(shard, engine, log, self.catalog, self.work)

    def write(
        self, request: pb.WriteCheckpointRequest, progress: Progress
    ) -> pb.CheckpointProgress:
        """Write this shard's part."""
        name, attempt = require_name(request.name), require_id("attempt", request.attempt)
        if self._log is None:
            raise NoLog
        if self._catalog.store.exists(f"{name}/{MANIFEST}"):
            raise CheckpointExists(f"checkpoint {name!r} exists")
        base = self._base(request.base) if request.base else None
        with self.work.alone():
            self._pins[attempt] = 0  # until the version is known
            try:
                return self._write(name, attempt, base, self._log, progress)
            finally:
                del self._pins[attempt]

    def _base(self, name: str) -> tuple[Base, Part]:
        """What to build on: CheckpointUnfit unless this shard can."""
        base, shard = self._catalog.open(name), self._shard
        if len(base.chain) >= MAX_CHAIN:
            raise CheckpointUnfit(
                f"{name!r} is the {len(base.chain)}th of a chain, {MAX_CHAIN} may be:"
                " take a full one"
            )
        part = next((part for part in base.parts if part.shard == shard.number), None)
        if part is None or part.shards != shard.shard_map.shards or part.buckets != runs(shard):
            raise CheckpointUnfit(f"{name!r} was taken of other shards: take a full one")
        assert self._log is not None
        if part.lineage != self._log.lineage.hex() or part.version > shard.version:
            raise CheckpointUnfit(
                f"{name!r} is of another history of shard {shard.number}: take a full one"
            )
        return Base(name=name, checksum=base.checksum), part

    def _write(
        self,
        name: str,
        attempt: str,
        base: tuple[Base, Part] | None,
        log: VersionLog,
        progress: Progress,
    ) -> pb.CheckpointProgress:
        shard = self._shard
        captured = self._engine.run(shard.capture)
        self._pins[attempt] = captured.version
        after = base[1].version if base else 0
        if base and captured.horizon > after:
            raise CheckpointUnfit(
                f"{base[0].name!r} is too old: shard {shard.number} has forgotten which keys were"
                f" deleted up to version {captured.horizon}: take a full one"
            )
        progress.total = 0 if base else _bytes_of(captured)
        writer = PartWriter(self._catalog.store, name, attempt, shard.number, progress.tell)
        try:
            for block in blocks_of(captured, after, np.empty(BLOCK_BYTES, np.uint8)):
                if base or block.kind == ROWS:  # a full one needs no tombstones
                    writer.block(block.seal())
            for table, keys, totals, versions in counters_of(captured, 0, self._engine):
                writer.block(pack_counters(table, keys, versions, totals), "counters")
            end = self._engine.run(shard.capture)
            log.sync(end.version)
            cursor = log.cursor(captured.version)
            try:
                while frames := cursor.read(upto=end.version, max_bytes=RECORD_BYTES):
                    writer.frames(frames)
            finally:
                cursor.close()
            writer.sessions(end.sessions)
            part, file = writer.finish(
                attempt=attempt,
                shard=shard.number,
                shards=shard.shard_map.shards,
                buckets=runs(shard),
                lineage=log.lineage.hex(),
                version=end.version,
                copied=captured.version,
                after=after,
                base=base[0] if base else None,
                tables=_tables_of(end),
                micros=int(self._now() * 1e6),
            )
        except BaseException:
            writer.discard()
            raise
        told = pb.CheckpointPart(
            path=file.path, bytes=file.bytes, checksum=file.checksum, version=part.version
        )
        return pb.CheckpointProgress(bytes=progress.bytes, total=progress.bytes, part=told)

    def complete(self, request: pb.CompleteCheckpointRequest) -> pb.CheckpointInfo:
        """Make the parts of all shards a checkpoint; the same again if they are one already."""
        name, attempt = require_name(request.name), require_id("attempt", request.attempt)
        path = f"{name}/{MANIFEST}"
        if not self._catalog.store.exists(path):
            with suppress(FileExistsError):
                self._catalog.store.publish(path, seal(facts(self._manifest(request))))
        manifest, _ = read_manifest(self._catalog.store, name)
        if manifest.attempt != attempt:
            raise CheckpointExists(f"checkpoint {name!r} exists")
        self._catalog.store.sync(path)  # who published it may have died before it did
        self._clear_away(name, attempt)
        return describe(manifest, schemas=True)

    def _manifest(self, request: pb.CompleteCheckpointRequest) -> Manifest:
        """Of the checkpoint that the parts make; CheckpointUnfit if they make none."""
        base = self._catalog.open(request.base) if request.base else None
        parts = [self._part(request, shard, told) for shard, told in enumerate(request.parts)]
        if len(parts) != self._shard.shard_map.shards:
            raise CheckpointUnfit(
                f"{len(parts)} parts, there are {self._shard.shard_map.shards} shards"
            )
        named = Base(name=request.base, checksum=base.checksum) if base else None
        for part in parts:
            if part.base != named or part.shards != len(parts):
                raise CheckpointUnfit(f"shard {part.shard} wrote something else")
        tables = _common_tables(parts)
        told_parts = tuple(
            File(path=told.path, bytes=told.bytes, checksum=told.checksum) for told in request.parts
        )
        return Manifest(
            name=request.name,
            attempt=request.attempt,
            base=named,
            parts=told_parts,
            versions=tuple(part.version for part in parts),
            tables=tables,
            bytes=sum(part.bytes for part in parts) + sum(file.bytes for file in told_parts),
            micros=int(self._now() * 1e6),
        )

    def _clear_away(self, name: str, kept: str) -> None:
        """Remove what other attempts at a checkpoint left, if that can be done."""
        try:
            for other in self._catalog.store.directories(name):
                if other != kept and ATTEMPT.fullmatch(other):
                    self._catalog.store.remove(f"{name}/{other}")
        except StorageError as error:
            logger.warning("earlier attempts are left", checkpoint=name, error=str(error))

    def _part(
        self, request: pb.CompleteCheckpointRequest, shard: int, told: pb.CheckpointPart
    ) -> Part:
        """A part that a client says a shard wrote."""
        path = f"{request.attempt}/{shard:05}.json"  # the only one it can be
        if told.path != path or not 0 < told.bytes <= MAX_MANIFEST:
            raise CheckpointUnfit(f"the part of shard {shard} is not what a shard wrote")
        file = File(path=path, bytes=told.bytes, checksum=told.checksum)
        return open_part(self._catalog.store, request.name, file)


def _bytes_of(captured: Capture) -> int:
    return sum(each.rows * (32 + 4 * each.width) for each in captured.tables)


def _tables_of(captured: Capture) -> tuple[PartTable, ...]:
    return tuple(
        PartTable(
            number=each.base.number,
            name=str(json.loads(each.base.schema)["name"]),
            schema=each.base.schema,
            rows=each.rows,
            step=each.step,
        )
        for each in captured.tables
    )


def _common_tables(parts: Sequence[Part]) -> tuple[CheckpointTable, ...]:
    """The tables, which all parts must have with equal schemas."""
    held = [{table.name: table for table in part.tables} for part in parts]
    names = sorted(set().union(*held))
    for name in names:
        schemas = {each[name].schema if name in each else None for each in held}
        if len(schemas) > 1:
            raise CheckpointUnfit(
                f"table {name!r} was created or dropped while the checkpoint was taken: take it"
                " again"
            )
    return tuple(
        CheckpointTable(
            name=name, schema=held[0][name].schema, rows=sum(each[name].rows for each in held)
        )
        for name in names
    )
