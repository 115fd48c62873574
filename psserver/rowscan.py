"""Send the rows of a shard to a subscriber while pushes continue.

A snapshot sends all rows; a catch-up sends the rows and deletes after the subscriber's version.
A scan notes the shard's version V, then reads the rows in slices. The engine thread copies each
slice, so every row is whole, and a push waits for at most one slice. Rows newer than V are skipped,
including rows in reused slots: the subscriber receives the log after V, which has them. When it has
the log up to the shard's version at the end of the scan, its rows are consistent (those of the
shard at one version), and it gets the message SNAPSHOT_END.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from psserver.deltas import DeltaKind, Deltas, newest
from psserver.errors import VersionCompacted
from psserver.position import AFTER_SCAN, Phase, Position
from psserver.sender import Sender
from psserver.source import Source
from psserver.tombstones import Tombstones
from psserver.views import TableList
from psserver.wanted import Wanted
from storage import records
from storage.schema import TableSchema
from storage.tiers.base import KEY, STEP, VERSION, Scan

SLICE_BYTES = 256 << 10  # bytes of rows that the engine thread copies per call
SLICE_TOMBSTONES = 65_536  # deletes that are read per call


class RowScan:
    """Sends the list of tables, then deletes, then rows to one subscriber."""

    def __init__(self, source: Source, wanted: Wanted, deltas: Deltas, sender: Sender) -> None:
        """Store the arguments.

        source  the shard, its log and threads
        wanted  options of the subscription
        deltas  builds the messages
        sender  writes messages to the subscriber; its position is where the scan starts
        """
        self._source = source
        self._wanted = wanted
        self._deltas = deltas
        self._sender = sender

    async def run(self) -> None:
        """Send the rows and deletes that are newer than ``sender.position.after``.

        Continues at the position's slot if its scan began in this process, else starts a new scan.
        At the end, moves the position to the phase that follows the scan. May return earlier if the
        scan must start again: call ``run`` again while the phase stays. Raises VersionCompacted if
        a catch-up needs deletes whose tombstones were discarded.
        """
        source, sender = self._source, self._sender
        tables = await source.engine.submit(source.shard.table_list)
        position = sender.position
        if position.boot != source.boot:  # not begun, or begun by another process
            position = await self._start(position, tables)
        if position.table == 0 and not await self._send_tables(tables):
            return
        for number, schema, created in tables.tables:
            if created <= position.version and self._wanted.wants(schema.name):
                await self._send_rows(number, schema)
        until = await source.engine.submit(lambda: source.shard.version)
        await source.durable(until)  # a crash could lose it, and reuse its number for other changes
        sender.position = replace(
            sender.position, phase=AFTER_SCAN[position.phase], until=until, table=0, slot=0
        )

    async def _start(self, position: Position, tables: TableList) -> Position:
        """Start a scan at the shard's present version: send its first message, return its
        position.
        """
        boot = self._source.boot
        position = replace(position, version=tables.version, table=0, slot=0, boot=boot)
        if position.after < tables.horizon and position.after:
            position = self._compacted(position, tables.horizon)
        await self._source.durable(position.version)
        whole = position.phase == Phase.SNAPSHOT and not position.after
        kind = DeltaKind.KIND_SNAPSHOT if whole else DeltaKind.KIND_CATCH_UP
        await self._send(
            [self._deltas.mark(kind, version=position.version, token=position.encode(), more=True)]
        )
        self._sender.position = position
        return position

    def _compacted(self, position: Position, horizon: int) -> Position:
        """Handle a position whose later deletes are no longer known.

        Returns the position with after = 0 for a snapshot, which then sends all rows. Raises
        VersionCompacted for a catch-up.

        horizon  largest version whose tombstones may have been discarded
        """
        if position.phase == Phase.SNAPSHOT:
            return replace(position, after=0)
        raise VersionCompacted(position.after, self._source.log.first - 1, horizon)

    async def _send(self, messages: list[bytes]) -> None:
        """Send messages; raise Draining if the server is stopping."""
        self._source.check_draining()
        await self._sender.send(messages)

    async def _send_tables(self, tables: TableList) -> bool:
        """Send the list of tables, then the deletes in after + 1..version.

        Returns False if tombstones were discarded meanwhile, so that the scan must start again.
        """
        sender, source = self._sender, self._source
        position = sender.position
        token, names = position.encode(), {}
        for number, schema, created in tables.tables:
            if created <= position.version and self._wanted.wants(schema.name):
                names[number] = schema.name
                await self._send(
                    [self._deltas.created(schema, version=created, token=token, more=True)]
                )
        at = position.after
        while at and at < position.version:
            dead = await source.engine.submit(partial(self._tombstones, at))
            if dead is None:
                sender.position = replace(position, boot=0)
                return False
            if not len(dead):
                break
            at = int(dead.versions[-1])
            dead = dead.take(dead.versions <= position.version)
            make = partial(self._make_deletes, dead, names, token)
            await self._send(await source.work(make))
        return True

    def _tombstones(self, after: int) -> Tombstones | None:
        """Return deletes newer than a version, oldest first; None if some were discarded.

        Must run on the engine thread.
        """
        shard = self._source.shard
        if after < shard.tombstone_horizon:
            return None
        return shard.tombstones(after, SLICE_TOMBSTONES)

    def _make_deletes(self, dead: Tombstones, names: dict[int, str], token: bytes) -> list[bytes]:
        """Return the messages of ``_deletes`` as a list."""
        return list(self._deletes(dead, names, token))

    def _deletes(self, dead: Tombstones, names: dict[int, str], token: bytes) -> Iterator[bytes]:
        """Yield messages with deletes, separate for each table and cause.

        names  names of the subscribed tables, by number; deletes from other tables are skipped
        token  put into each message
        """
        for number, of_table in dead.by_table():
            if number not in names:
                continue
            for cause in np.unique(of_table.causes).tolist():
                found = of_table.take(of_table.causes == cause)
                found = found.take(newest(found.keys))
                yield from self._deltas.deletes(
                    names[number],
                    self._sender.position.version,
                    found.keys,
                    found.versions,
                    records.Cause(cause),
                    token=token,
                    more=True,
                )

    async def _send_rows(self, number: int, schema: TableSchema) -> None:
        """Send the rows of a table, from the position's slot on; nothing if the table is done."""
        source, position = self._source, self._sender.position
        if number < position.table:
            return
        slot: int | None = position.slot if number == position.table else 0
        width = self._wanted.width(schema)
        limit = self._wanted.rows_per_message(width)
        while slot is not None:
            source.check_draining()
            scan = await source.engine.submit(partial(source.shard.rows_of, number))
            if scan is None:  # dropped; the log has a record of that, after ``version``
                return
            find = partial(scan.find, slot, position.after, position.version, limit)
            start = slot
            slots, slot = await source.work(find)
            if slot is not None and slot <= start:  # a token can name a slot after the last one
                slot = None
            position = replace(
                position,
                table=number + (slot is None),
                slot=0 if slot is None else slot,
            )
            copied = [
                await source.engine.submit(partial(_copy, scan, some, width))
                for some in _slices(slots, 32 + 4 * width)
            ]
            if copied:
                make = partial(self._make_rows, schema, copied, position)
                await self._send(await source.work(make))
            self._sender.position = position

    def _make_rows(
        self, schema: TableSchema, copied: list[tuple[Any, ...]], position: Position
    ) -> list[bytes]:
        """Return messages with a slice of rows, without the rows that were changed after the scan's
        version.

        copied    results of ``_copy``
        position  position after the slice, put into the messages as their token
        """
        meta, frequencies, rows = map(np.concatenate, zip(*copied, strict=True))
        versions = meta[:, VERSION]
        still = (versions > position.after) & (versions <= position.version)
        if not still.all():
            meta, frequencies, rows = meta[still], frequencies[still], rows[still]
        return list(
            self._deltas.rows(
                schema,
                position.version,
                np.ascontiguousarray(meta[:, KEY]),
                np.ascontiguousarray(meta[:, VERSION]),
                rows,
                np.ascontiguousarray(meta[:, STEP]).view(np.int64),
                frequencies,
                token=position.encode(),
                more=True,
            )
        )


def _slices(slots: Any, row_bytes: int) -> Iterator[Any]:
    """Split an array of slots into pieces of about SLICE_BYTES bytes of rows."""
    most = max(1, SLICE_BYTES // row_bytes)
    for start in range(0, len(slots), most):
        yield slots[start : start + most]


def _copy(scan: Scan, slots: Any, width: int) -> tuple[Any, Any, Any]:
    """Return copies of the metadata, the frequencies uint64[n] and the first ``width`` numbers
    float32[n, width] of the rows in some slots. Must run on the engine thread.

    slots  int64[n]
    """
    frequencies = np.empty(len(slots), np.uint64)
    rows = np.empty((len(slots), width), np.float32)
    return scan.copy(slots, frequencies, rows), frequencies, rows
