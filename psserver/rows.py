"""Read and write whole rows: embedding, optimizer state, version, step and frequency.

    ReadRows    sends all rows of a live table, or of a table in a checkpoint
    WriteRows   stores rows that a client sends

The methods block, so they run on worker threads. The engine thread copies one slice per call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psproto import ps_pb2 as pb
from psproto import routing
from psproto.codec import RowsMessage
from psserver.catalog import Catalog
from psserver.engine import Engine
from psserver.errors import BadRequest
from psserver.flusher import Flusher
from psserver.rowwrites import RowWrites
from psserver.schemas import write_schema
from psserver.shard import Shard
from psserver.slices import slice_rows, slices_of, with_state
from psserver.stored import (
    number_in,
    require_width,
    schema_in,
)
from psserver.work import Work
from storage.errors import UnknownTable
from storage.kernels import Keys, Rows
from storage.part_reader import rows_of
from storage.schema import TableSchema
from storage.slots import KEY, STEP, VERSION
from storage.tablescan import Part


class RowTransfer:
    """Implements the gRPC methods ReadRows and WriteRows for one shard. Thread-safe.

    catalog  reads checkpoints from the checkpoint store
    work     makes reads of a checkpoint fail when the server stops
    flusher  makes room in memory for rows; None: the shard has no data directory
    """

    def __init__(
        self,
        shard: Shard,
        engine: Engine,
        catalog: Catalog,
        work: Work,
        flusher: Flusher | None = None,
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._catalog = catalog
        self._work = work
        self._writes = RowWrites(shard, engine, flusher)

    def read_rows(self, request: pb.ReadRowsRequest) -> Iterator[pb.Delta]:
        """Yield a message with the table's schema, then messages with rows.

        Without a checkpoint in the request, these are all rows of this shard's table. With one,
        they are this shard's share of the table's rows in the checkpoint: every row is in the share
        of exactly one shard. Raises UnknownTable and UnknownCheckpoint.
        """
        if request.checkpoint:
            return self._stored_rows(request.table, request.checkpoint)
        return self._live_rows(request.table)

    def _live_rows(self, name: str) -> Iterator[pb.Delta]:
        """Yield a header, then the rows of this shard's table ``name``, while pushes continue.

        Each row is sent exactly once, and is consistent, but rows may be of different versions. The
        engine thread copies rows in memory; this thread reads rows on disk. Raises UnknownTable if
        the table is dropped meanwhile, and Corrupt if a row on disk is damaged.
        """
        schema, number, version, scan = self._engine.run(lambda: self._shard.scan(name))
        yield _head(schema, version)
        most = slice_rows(schema.width)

        def choose() -> Callable[[], Part]:
            if not self._shard.holds(number):  # without its rows on disk the export has gaps
                raise UnknownTable(name)
            return scan.next(most, schema.width)

        while not scan.done:
            part = self._engine.run(choose)()
            meta, steps = part.meta, part.meta[:, STEP].view(np.int64)
            if len(meta):
                columns = meta[:, KEY], meta[:, VERSION], steps
                yield _rows(schema, *columns, part.frequencies, part.rows)

    def _stored_rows(self, name: str, stored: str) -> Iterator[pb.Delta]:
        """Yield a header, then this shard's share of the rows of table ``name`` in a checkpoint.

        stored  name of the checkpoint

        Each shard reads a different share of the checkpoint's parts (what one shard of the
        checkpointed cluster wrote). The keys may belong to other shards.
        """
        progress = self._work.progress()
        with self._catalog.reading(stored, "rows are read from it") as checkpoint:
            schema = schema_in(checkpoint, name)
            yield _head(schema, max(checkpoint.manifest.versions))
            for part in self._catalog.share(checkpoint):
                number = number_in(checkpoint, part, name)
                for piece in rows_of(self._catalog.store, checkpoint, part, [number], progress.add):
                    require_width(checkpoint, schema, piece.rows)
                    yield _rows(schema, *piece[1:])

    # ---- rows in

    def write_rows(self, request: RowsMessage) -> pb.WriteRowsResponse:
        """Insert or overwrite the rows of a message; return the version after it.

        Rows without optimizer state get the state of new rows. Raises BadRequest, before any row is
        written, if the message is invalid. After OutOfMemory, DiskFull or UnknownTable (the table
        was dropped meanwhile) some of the rows may have been written, but never to a newer table
        with the same name.
        """
        shard, table = self._shard, request.table
        schema, number, now = self._engine.run(
            lambda: (shard.describe(table)[0], shard.number_of(table), shard.step(table))
        )
        keys, steps, frequencies, rows = self._read_message(request, schema, now)
        whole = with_state(rows, schema)

        for slices in slices_of(keys, steps, frequencies, whole):
            self._writes.write(number, slices[::-1])
        return pb.WriteRowsResponse(version=self._shard.version)

    def _read_message(
        self, request: RowsMessage, schema: TableSchema, now: int
    ) -> tuple[Keys, NDArray[Any], NDArray[Any], Rows]:
        """Return the valid arrays of a message: keys uint64[n], steps int64[n], frequencies
        uint64[n], rows float32[n, width].

        schema  schema of the table
        now     training step of all rows if the message has no steps

        Raises BadRequest for wrong lengths, repeated keys, keys of other shards, or numbers that
        are not finite or out of range.
        """
        shard, where = self._shard, f"table {request.table!r}"
        if request.width not in (schema.dim, schema.width):
            raise BadRequest(
                "DIM_MISMATCH",
                f"{where}: rows must have {schema.dim} numbers (embedding only) or {schema.width}"
                f" (with optimizer state), got {request.width}",
            )
        keys, steps, frequencies, rows = _arrays(request, now, where)
        repeated, foreign = routing.check(keys, shard.shard_map, shard.number)
        if foreign >= 0 or repeated:
            wrong = (
                f"key {keys[foreign]} of another shard" if foreign >= 0 else f"{repeated} repeated"
            )
            raise BadRequest(
                "INVALID_ARGUMENT",
                f"{where}: keys must be distinct and owned by shard {shard.number}, got {wrong}",
            )
        _require_in_range(steps, frequencies, rows, where)
        return keys, steps, frequencies, rows.reshape(len(keys), request.width)


def _arrays(
    request: RowsMessage, now: int, where: str
) -> tuple[Keys, NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the arrays of a message: keys uint64[n], steps int64[n], frequencies uint64[n],
    rows float32[n * width]. Absent frequencies are 1.

    now    training step of all rows if the message has no steps
    where  description of the table, for messages

    Raises BadRequest if the lengths do not match.
    """
    keys, rows = _array(request.keys, "<u8", where), _array(request.rows, "<f4", where)
    n = len(keys)
    steps = _array(request.steps, "<i8", where) if request.steps else np.full(n, now)
    frequencies = np.ones(n, np.uint64)
    if request.frequencies:
        frequencies = _array(request.frequencies, "<u8", where)
    if not len(steps) == len(frequencies) == n or len(rows) != n * request.width:
        raise BadRequest(
            "INVALID_ARGUMENT",
            f"{where}: for {n} keys and width {request.width}, expected {n} steps, {n} frequencies"
            f" and {n * request.width} numbers in rows, got {len(steps)}, {len(frequencies)} and"
            f" {len(rows)}",
        )
    return keys, steps, frequencies, rows


def _require_in_range(
    steps: NDArray[Any], frequencies: NDArray[Any], rows: NDArray[Any], where: str
) -> None:
    """Raise BadRequest if a number in a row is not finite, or a step or frequency is out of range.

    steps, frequencies  int64[n], uint64[n]
    rows                float32[n * width]
    where               description of the table, for messages
    """
    if not routing.all_finite(rows.view(np.uint32)):
        raise BadRequest("NON_FINITE", f"{where}: rows must not contain infinity or NaN")
    if not len(steps):
        return
    if (largest := frequencies.max()) >= 1 << 32:
        raise BadRequest(
            "INVALID_ARGUMENT", f"{where}: frequencies must be in 0..2^32-1, got {largest}"
        )
    if not (steps.min() >= -(1 << 47) and steps.max() < 1 << 47):
        raise BadRequest(
            "INVALID_ARGUMENT",
            f"{where}: steps must be in -2^47..2^47-1, got {steps.min()}..{steps.max()}",
        )


def _header(schema: TableSchema) -> pb.DeltaHeader:
    """Return the header of a message with rows of a table."""
    return pb.DeltaHeader(
        kind=pb.DeltaHeader.KIND_ROWS,
        table=schema.name,
        dim=schema.dim,
        width=schema.width,
        dtype=pb.DTYPE_FLOAT32,
    )


def _head(schema: TableSchema, version: int) -> pb.Delta:
    """Return the first message of ReadRows: the table's schema and a version, but no rows.

    version  version of the shard, or largest version of the checkpoint's shards
    """
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
    """Return bytes as an array, without a copy.

    dtype  NumPy name of the elements' type, for example "<u8"
    where  description of the table, for the message

    Raises BadRequest if the number of bytes is not a multiple of the element size.
    """
    try:
        return np.frombuffer(data, dtype)
    except ValueError as error:
        raise BadRequest("INVALID_ARGUMENT", f"{where}: {error}") from error
