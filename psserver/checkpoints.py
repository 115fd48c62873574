"""Named checkpoints of this shard's part of every table: taken, listed, verified, read.

    WriteCheckpoint   version S, rows while pushes go on, version E, records S+1..E, manifest
    LoadTable         rows of a table in a checkpoint, written into another table like pushes
    ReadRows          the rows of a table, or of a table in a checkpoint
    WriteRows         rows that a client has

Everything here blocks, and runs on threads of its own. The engine is asked for moments only: to
capture a version, or to take or copy a slice of rows. storage/checkpoint.py has the files.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from psproto import ps_pb2 as pb
from psproto import routing
from psserver.checkpointer import blocks_of, counters_of
from psserver.engine import Engine
from psserver.errors import (
    BadRequest,
    CheckpointBusy,
    CheckpointExists,
    CheckpointUnfit,
    Draining,
    NoCheckpointUrl,
    NoLog,
    NotEmpty,
    Overloaded,
)
from psserver.schemas import from_json, write_schema
from psserver.shard import Captured, Shard
from storage import checkpoint as files
from storage.block import BLOCK_BYTES, ROWS, pack_counters
from storage.checkpoint import Base, Checkpoint, File, Manifest, Part, PartTable
from storage.errors import Corrupt, SchemaMismatch, StorageError, UnknownCheckpoint, UnknownTable
from storage.kernels import Keys, Rows
from storage.schema import TableSchema
from storage.store import Store
from storage.tiers.base import KEY, STEP, VERSION
from storage.versionlog import VersionLog

RECORD_BYTES = 4 << 20  # of the log, copied at once
SLICE_ROWS, SLICE_BYTES = 2048, 512 << 10  # for the engine at once: well below a millisecond
SLICE_STEPS = 16  # versions that the engine makes at once

logger = structlog.get_logger()


class Progress:
    """How far a piece of work is: read by the event loop, told by the thread that does it."""

    def __init__(self, stopping: threading.Event) -> None:
        self.bytes = 0
        self.total = 0  # about; 0: unknown
        self.given_up = False  # nobody waits any more
        self._stopping = stopping

    def tell(self, size: int) -> None:
        """Count ``size`` more bytes; raises Draining if the work is not wanted any more."""
        self.bytes += size
        if self.given_up or self._stopping.is_set():
            raise Draining("the server is stopping, or nobody waits")


class Checkpoints:
    """What one shard does about named checkpoints. Thread-safe.

    log    None: this shard cannot take checkpoints
    pins   of the checkpointer: keeps the log while it is copied
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
        self._store = store
        self._now = now
        self._working = threading.Lock()
        self._stopping = threading.Event()

    @property
    def store(self) -> Store:
        """Where checkpoints are."""
        if self._store is None:
            raise NoCheckpointUrl
        return self._store

    def progress(self) -> Progress:
        """For a piece of work that is about to begin."""
        return Progress(self._stopping)

    def stop(self) -> None:
        """Give up what is under way."""
        self._stopping.set()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One large piece of work at a time; CheckpointBusy otherwise."""
        if not self._working.acquire(blocking=False):
            raise CheckpointBusy("the shard is at work on another checkpoint or restore")
        try:
            yield
        finally:
            self._working.release()

    def open(self, name: str) -> Checkpoint:
        """A checkpoint's manifests, checked."""
        return files.open_checkpoint(self.store, require_name(name))

    # ---- taking one

    def write(
        self, request: pb.WriteCheckpointRequest, progress: Progress
    ) -> pb.CheckpointProgress:
        """Write this shard's part."""
        name, attempt = require_name(request.name), require_id("attempt", request.attempt)
        if self._log is None:
            raise NoLog
        if self.store.exists(f"{name}/{files.MANIFEST}"):
            raise CheckpointExists(f"checkpoint {name!r} exists")
        base = self._base(request.base) if request.base else None
        with self.alone():
            self._pins[attempt] = 0  # until the version is known
            try:
                return self._write(name, attempt, base, self._log, progress)
            finally:
                del self._pins[attempt]

    def _base(self, name: str) -> tuple[Base, Part]:
        """What to build on: CheckpointUnfit unless this shard can."""
        base, shard = self.open(name), self._shard
        if len(base.chain) >= files.MAX_CHAIN:
            raise CheckpointUnfit(
                f"{name!r} is the {len(base.chain)}th of a chain, {files.MAX_CHAIN} may be:"
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
        writer = files.PartWriter(self.store, name, attempt, shard.number, progress.tell)
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
        path = f"{name}/{files.MANIFEST}"
        if not self.store.exists(path):
            with suppress(FileExistsError):
                self.store.publish(path, files.to_json(files.facts(self._manifest(request))))
        manifest, _ = files.read_manifest(self.store, name)
        if manifest.attempt != attempt:
            raise CheckpointExists(f"checkpoint {name!r} exists")
        self.store.sync(path)  # who published it may have died before it did
        self._clear_away(name, attempt)
        return _info(manifest, schemas=True)

    def _manifest(self, request: pb.CompleteCheckpointRequest) -> Manifest:
        """Of the checkpoint that the parts make; CheckpointUnfit if they make none."""
        base = self.open(request.base) if request.base else None
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
            for other in self.store.directories(name):
                if other != kept and files.ATTEMPT.fullmatch(other):
                    self.store.remove(f"{name}/{other}")
        except StorageError as error:
            logger.warning("earlier attempts are left", checkpoint=name, error=str(error))

    def _part(
        self, request: pb.CompleteCheckpointRequest, shard: int, told: pb.CheckpointPart
    ) -> Part:
        """A part that a client says a shard wrote."""
        path = f"{request.attempt}/{shard:05}.json"  # the only one it can be
        if told.path != path or not 0 < told.bytes <= files.MAX_MANIFEST:
            raise CheckpointUnfit(f"the part of shard {shard} is not what a shard wrote")
        file = File(path=path, bytes=told.bytes, checksum=told.checksum)
        return files.open_part(self.store, request.name, file)

    # ---- looking at them

    def listed(self, request: pb.ListCheckpointsRequest) -> pb.ListCheckpointsResponse:
        """All of them, or one."""
        if request.name:
            info = _info(self.open(request.name).manifest, schemas=True)
            return pb.ListCheckpointsResponse(checkpoints=[info])
        names = [name for name in self.store.directories() if files.NAME.fullmatch(name)]
        return pb.ListCheckpointsResponse(checkpoints=map(self._look, names))

    def _look(self, name: str) -> pb.CheckpointInfo:
        try:
            return _info(files.read_manifest(self.store, name)[0], schemas=False)
        except UnknownCheckpoint:
            return pb.CheckpointInfo(name=name, problem="not completed")
        except StorageError as error:
            return pb.CheckpointInfo(name=name, problem=str(error))

    def verify(
        self, request: pb.VerifyCheckpointRequest, progress: Progress
    ) -> pb.CheckpointProgress:
        """Read everything of the parts that are this shard's to verify."""
        checkpoint = self.open(request.name)
        mine = self.share(checkpoint)
        progress.total = sum(each.parts[p].bytes for each in checkpoint.chain for p in mine)
        for part in mine:
            files.verify_part(self.store, checkpoint, part, progress.tell)
        return pb.CheckpointProgress(bytes=progress.bytes, total=progress.total)

    def share(self, checkpoint: Checkpoint) -> range:
        """The parts that this shard looks at, where every part is looked at once."""
        return range(self._shard.number, len(checkpoint.parts), self._shard.shard_map.shards)

    # ---- rows out

    def read_rows(self, request: pb.ReadRowsRequest) -> Iterator[pb.Delta]:
        """The rows of a table, of this shard or of a checkpoint."""
        if request.checkpoint:
            return self._stored_rows(request.table, request.checkpoint)
        return self._live_rows(request.table)

    def _live_rows(self, name: str) -> Iterator[pb.Delta]:
        schema, version, scan = self._engine.run(lambda: self._shard.scan(name))
        yield _head(schema, version)
        start: int | None = 0
        most = slice_rows(schema.width)
        frequencies, rows = np.empty(most, np.uint64), np.empty((most, schema.width), np.float32)

        def copy(start: int) -> tuple[Any, int | None]:
            places, following = scan.find(start, 0, (1 << 48) - 1, most)
            n = len(places)
            return scan.copy(places, frequencies[:n], rows[:n]), following

        while start is not None:
            meta, start = self._engine.run(lambda start=start: copy(start))  # type: ignore[misc]
            n = len(meta)
            steps = meta[:, STEP].view(np.int64)
            yield _rows(schema, meta[:, KEY], meta[:, VERSION], steps, frequencies[:n], rows[:n])

    def _stored_rows(self, name: str, stored: str) -> Iterator[pb.Delta]:
        checkpoint = self.open(stored)
        schema = schema_in(checkpoint, name)
        progress = self.progress()
        yield _head(schema, max(checkpoint.manifest.versions))
        for part in self.share(checkpoint):
            number = number_in(checkpoint, part, name)
            for piece in files.rows_of(self.store, checkpoint, part, [number], progress.tell):
                require_width(checkpoint, schema, piece.rows)
                yield _rows(schema, *piece[1:])

    # ---- rows in

    def write_rows(self, request: pb.WriteRowsRequest) -> pb.WriteRowsResponse:
        """Write the rows of a message."""
        shard, table = self._shard, request.table
        schema, now = self._engine.run(lambda: (shard.describe(table)[0], shard.step(table)))
        keys, steps, frequencies, rows = self._read_message(request, schema, now)
        own = with_state(rows, schema)
        for each in self._slices(keys, steps, frequencies, own):
            self._engine.run(lambda each=each: self._apply(request.table, each))  # type: ignore[misc]
        return pb.WriteRowsResponse(version=self._shard.version)

    def load_table(self, request: pb.LoadTableRequest, progress: Progress) -> pb.CheckpointProgress:
        """Write this shard's rows of a stored table into an empty one; they are on disk then."""
        checkpoint = self.open(request.name)
        source = schema_in(checkpoint, request.table)
        schema, stats = self._engine.run(lambda: self._shard.describe(request.into))
        if schema.dim != source.dim:
            raise SchemaMismatch(request.into, "dim", schema.dim, source.dim)
        if stats.rows:
            raise NotEmpty(
                f"table {request.into!r} has {stats.rows} rows on shard {self._shard.number}"
            )
        same = fits(source, schema)
        written = 0
        parts = overlapping(checkpoint, self._shard)
        progress.total = sum(each.parts[p].bytes for each in checkpoint.chain for p in parts)
        with self.alone():
            for part in parts:
                number = number_in(checkpoint, part, request.table)
                for piece in files.rows_of(self.store, checkpoint, part, [number], progress.tell):
                    require_width(checkpoint, source, piece.rows)
                    mine = own(piece.keys, self._shard)
                    rows = piece.rows[mine]
                    whole = rows if same else with_state(rows[:, : schema.dim], schema)
                    columns = (piece.keys[mine], piece.steps[mine], piece.frequencies[mine])
                    for each in self._slices(*columns, whole):
                        self._patiently(request.into, each, progress)
                    written += len(rows)
        if self._log is not None:
            self._log.sync(self._engine.run(lambda: self._shard.version))
        return pb.CheckpointProgress(bytes=progress.bytes, total=progress.total, rows=written)

    def _patiently(self, table: str, each: list[_Slice], progress: Progress) -> None:
        """Apply slices, as soon as the log keeps up."""
        while True:
            progress.tell(0)
            try:
                self._engine.run(lambda: self._apply(table, each))
                return
            except Overloaded:
                time.sleep(0.05)

    def _apply(self, table: str, slices: list[_Slice]) -> None:
        for step, keys, frequencies, rows in slices:
            self._shard.write_rows(table, step, keys, frequencies, rows)

    def _slices(
        self, keys: Keys, steps: NDArray[Any], frequencies: NDArray[Any], rows: Rows
    ) -> Iterator[list[_Slice]]:
        """The rows in portions for the engine: runs of one step each, a few at a time."""
        order = np.argsort(steps, kind="stable")
        most = slice_rows(rows.shape[1])
        batch: list[_Slice] = []
        held = 0
        edges = np.flatnonzero(np.diff(steps[order])) + 1
        for run in np.split(order, edges) if len(order) else []:
            for at in range(0, len(run), most):
                chosen = run[at : at + most]
                batch.append((int(steps[run[0]]), keys[chosen], frequencies[chosen], rows[chosen]))
                held += len(chosen)
                if held >= most or len(batch) == SLICE_STEPS:
                    yield batch
                    batch, held = [], 0
        if batch:
            yield batch

    def _read_message(
        self, request: pb.WriteRowsRequest, schema: TableSchema, now: int
    ) -> tuple[Keys, NDArray[Any], NDArray[Any], Rows]:
        """Keys, steps, frequencies and rows of a message; BadRequest if they break a rule.

        now  the step of rows that come without one
        """
        shard, where = self._shard, f"table {request.table!r}"
        if request.width not in (schema.dim, schema.width):
            raise BadRequest(
                "DIM_MISMATCH",
                f"{where} has dim {schema.dim} and width {schema.width}, the rows have"
                f" {request.width}",
            )
        keys = _array(request.keys, "<u8", where)
        n = len(keys)
        rows = _array(request.rows, "<f4", where)
        steps = _array(request.steps, "<i8", where) if request.steps else np.full(n, now)
        frequencies = np.ones(n, np.uint64)
        if request.frequencies:
            frequencies = _array(request.frequencies, "<u8", where)
        if not len(steps) == len(frequencies) == n or len(rows) != n * request.width:
            raise BadRequest(
                "INVALID_ARGUMENT",
                f"{where}: {n} keys, {len(steps)} steps, {len(frequencies)} frequencies,"
                f" {len(rows)} numbers of rows",
            )
        repeated, stray = routing.check(keys, shard.shard_map, shard.number)
        if stray >= 0 or repeated:
            raise BadRequest(
                "INVALID_ARGUMENT",
                f"{where}: keys must be distinct and of shard {shard.number}",
            )
        if not routing.all_finite(rows.view(np.uint32)):
            raise BadRequest("NON_FINITE", f"{where}: all numbers of rows must be finite")
        if n and not (steps.min() >= -(1 << 47) and steps.max() < 1 << 47):
            raise BadRequest("INVALID_ARGUMENT", f"{where}: steps must be in -2^47..2^47-1")
        return keys, steps, frequencies, rows.reshape(n, request.width)


_Slice = tuple[int, Keys, NDArray[Any], Rows]  # step, keys, frequencies, rows


# ---- names


def require_name(name: str) -> str:
    """The name of a checkpoint, which is no path; BadRequest otherwise."""
    if not files.NAME.fullmatch(name):
        raise BadRequest(
            "INVALID_ARGUMENT",
            "the name of a checkpoint must be 1..128 letters, digits or any of _ . - and start with"
            f" a letter, a digit or _, got {name[:200]!r}",
        )
    return name


def require_id(field: str, value: str) -> str:
    """16 hexadecimal digits; BadRequest otherwise."""
    if not files.ATTEMPT.fullmatch(value):
        raise BadRequest(
            "INVALID_ARGUMENT", f"{field} must be 16 hexadecimal digits, got {value[:200]!r}"
        )
    return value


# ---- what a checkpoint holds for a shard


def runs(shard: Shard) -> tuple[tuple[int, int], ...]:
    """The buckets that a shard owns, as runs: first, last + 1."""
    mine = shard.shard_map.shard_of_bucket == shard.number
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mine, [False]]).astype(np.int8)))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def overlapping(checkpoint: Checkpoint, shard: Shard) -> list[int]:
    """The parts that may hold rows of this shard."""
    mine = runs(shard)
    return [
        part.shard
        for part in checkpoint.parts
        if any(first < end and start < last for first, last in part.buckets for start, end in mine)
    ]


def own(keys: Keys, shard: Shard) -> Any:
    """Which of the keys belong to the shard: positions, or a slice where all do."""
    mine = routing.owners(keys, shard.shard_map) == shard.number
    return slice(None) if mine.all() else np.flatnonzero(mine)


def schema_in(checkpoint: Checkpoint, table: str) -> TableSchema:
    """The schema of a stored table; UnknownTable."""
    for held in checkpoint.manifest.tables:
        if held.name == table:
            return schema_of(checkpoint, held.schema)
    raise UnknownTable(table)


def schema_of(checkpoint: Checkpoint, text: str) -> TableSchema:
    """A stored schema; CheckpointUnfit if this release does not know it."""
    try:
        return from_json(json.loads(text))
    except (BadRequest, ValueError) as error:
        raise CheckpointUnfit(f"{checkpoint.manifest.name!r}: {error}") from error


def number_in(checkpoint: Checkpoint, part: int, table: str) -> int:
    """The number of a stored table on the shard of a part."""
    return next(each.number for each in checkpoint.parts[part].tables if each.name == table)


def require_width(checkpoint: Checkpoint, schema: TableSchema, rows: Rows) -> None:
    """Corrupt unless rows are as wide as their schema says."""
    if rows.shape[1] != schema.width:
        raise Corrupt(
            f"checkpoint {checkpoint.manifest.name!r}",
            f"rows of table {schema.name!r} have {rows.shape[1]} numbers, not {schema.width}",
        )


def fits(source: TableSchema, target: TableSchema) -> bool:
    """Whether rows of one table, state included, mean the same in another."""
    return (source.dim, source.optimizer.name, source.width) == (
        target.dim,
        target.optimizer.name,
        target.width,
    )


def with_state(rows: Rows, schema: TableSchema) -> Rows:
    """Whole rows: those given, or with the state of new rows behind them."""
    if rows.shape[1] == schema.width:
        return rows
    whole = np.empty((len(rows), schema.width), np.float32)
    whole[:, : schema.dim] = rows
    whole[:, schema.dim :] = schema.optimizer.initial_state(schema.dim)
    return whole


def slice_rows(width: int) -> int:
    """Rows that the engine takes or copies at once."""
    return max(1, min(SLICE_ROWS, SLICE_BYTES // (4 * width)))


def _bytes_of(captured: Captured) -> int:
    return sum(each.rows * (32 + 4 * each.width) for each in captured.tables)


def _tables_of(captured: Captured) -> tuple[PartTable, ...]:
    return tuple(
        PartTable(
            number=each.base.number,
            name=str(json.loads(each.base.schema)["name"]),
            schema=each.base.schema,
            rows=each.rows,
        )
        for each in captured.tables
    )


def _common_tables(parts: Sequence[Part]) -> tuple[files.CheckpointTable, ...]:
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
        files.CheckpointTable(
            name=name, schema=held[0][name].schema, rows=sum(each[name].rows for each in held)
        )
        for name in names
    )


def _info(manifest: Manifest, *, schemas: bool) -> pb.CheckpointInfo:
    tables = []
    for table in manifest.tables:
        told = pb.CheckpointTable(name=table.name, rows=table.rows)
        if schemas:
            told.schema.CopyFrom(write_schema(from_json(json.loads(table.schema))))
        tables.append(told)
    return pb.CheckpointInfo(
        name=manifest.name,
        base=manifest.base.name if manifest.base else "",
        shards=len(manifest.parts),
        versions=manifest.versions,
        bytes=manifest.bytes,
        time_us=manifest.micros,
        tables=tables,
    )


def _header(schema: TableSchema) -> pb.DeltaHeader:
    return pb.DeltaHeader(
        kind=pb.DeltaHeader.KIND_ROWS,
        table=schema.name,
        dim=schema.dim,
        width=schema.width,
        dtype=pb.DTYPE_FLOAT32,
    )


def _head(schema: TableSchema, version: int) -> pb.Delta:
    header = _header(schema)
    header.version = version
    header.schema.CopyFrom(write_schema(schema))
    return pb.Delta(header=header)


def _rows(
    schema: TableSchema,
    keys: Any,
    versions: Any,
    steps: Any,
    frequencies: Any,
    rows: Any,
) -> pb.Delta:
    return pb.Delta(
        header=_header(schema),
        keys=keys.tobytes(),
        versions=versions.tobytes(),
        rows=rows.tobytes(),
        steps=steps.tobytes(),
        frequencies=frequencies.tobytes(),
    )


def _array(data: bytes, dtype: str, where: str) -> NDArray[Any]:
    try:
        return np.frombuffer(data, dtype)
    except ValueError as error:
        raise BadRequest("INVALID_ARGUMENT", f"{where}: {error}") from error
