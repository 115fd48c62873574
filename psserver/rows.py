"""Whole rows in and out of a shard.

    LoadTable   rows of a table in a checkpoint, written into another table like pushes
    ReadRows    the rows of a table, or of a table in a checkpoint
    WriteRows   rows that a client has

Everything here blocks, and runs on threads of its own. The engine is asked for a slice at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psproto import ps_pb2 as pb
from psproto import routing
from psproto.codec import RowsMessage
from psserver.catalog import Catalog
from psserver.engine import Engine
from psserver.errors import BadRequest, NotEmpty, Overloaded
from psserver.schemas import write_schema
from psserver.shard import Shard
from psserver.stored import (
    fits,
    number_in,
    overlapping,
    own,
    require_width,
    schema_in,
    slice_rows,
    with_state,
)
from psserver.work import Progress, Work
from storage.errors import SchemaMismatch
from storage.kernels import Keys, Rows
from storage.part_reader import rows_of
from storage.schema import TableSchema
from storage.tiers.base import KEY, STEP, VERSION
from storage.versionlog import VersionLog

SLICE_STEPS = 16  # versions that the engine makes at once


class RowFiles:
    """Whole rows of one shard's tables, in and out. Thread-safe."""

    def __init__(
        self,
        shard: Shard,
        engine: Engine,
        log: VersionLog | None,
        catalog: Catalog,
        work: Work,
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._log = log
        self._catalog = catalog
        self._work = work

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
        checkpoint = self._catalog.open(stored)
        schema = schema_in(checkpoint, name)
        progress = self._work.progress()
        yield _head(schema, max(checkpoint.manifest.versions))
        for part in self._catalog.share(checkpoint):
            number = number_in(checkpoint, part, name)
            for piece in rows_of(self._catalog.store, checkpoint, part, [number], progress.add):
                require_width(checkpoint, schema, piece.rows)
                yield _rows(schema, *piece[1:])

    # ---- rows in

    def write_rows(self, request: RowsMessage) -> pb.WriteRowsResponse:
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
        checkpoint = self._catalog.open(request.name)
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
        with self._work.alone(f"it fills table {request.into!r}"):
            for part in parts:
                number = number_in(checkpoint, part, request.table)
                for piece in rows_of(self._catalog.store, checkpoint, part, [number], progress.add):
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
            progress.add(0)
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
        self, request: RowsMessage, schema: TableSchema, now: int
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


def _array(data: bytes | memoryview, dtype: str, where: str) -> NDArray[Any]:
    try:
        return np.frombuffer(data, dtype)
    except ValueError as error:
        raise BadRequest("INVALID_ARGUMENT", f"{where}: {error}") from error
