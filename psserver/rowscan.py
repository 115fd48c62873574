"""Send the rows of a shard to a subscriber while pushes continue.

A scan is either a snapshot, which sends all rows, or a catch-up, which sends only the rows and
deletes that are newer than the version the subscriber already has.

A scan notes the shard's version V, then reads the rows in slices: first those in memory, then those
on disk. The engine thread copies each slice of rows in memory, so every row is whole, and a push
waits for at most one slice. A thread of the feed reads the rows on disk, which never change. A row
that moves to the disk meanwhile may be sent twice. Rows newer than V are skipped, because the
subscriber then receives the log after V, which contains them. Once it has received the log up to
the shard's version at the end of the scan, its rows are consistent (equal to those of the shard at
one version). Then it gets the message SNAPSHOT_END.
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
from storage.slots import KEY, STEP, VERSION
from storage.tablescan import TableScan

SLICE_BYTES = 256 << 10  # bytes of rows that the engine thread copies per call
SLICE_TOMBSTONES = 65_536  # tombstones (records of deletes) read per call of the engine thread


class RowScan:
    """One snapshot or catch-up for one subscriber: sends the tables, then deletes, then rows."""

    def __init__(self, source: Source, wanted: Wanted, deltas: Deltas, sender: Sender) -> None:
        """Store the arguments.

        source  the shard, its log and its threads
        wanted  options that the subscriber requested: tables, columns, message size
        deltas  encodes messages
        sender  writes messages to the subscriber; the scan starts at ``sender.position``
        """
        self._source = source
        self._wanted = wanted
        self._deltas = deltas
        self._sender = sender

    async def run(self) -> None:
        """Send the rows and deletes that are newer than version ``sender.position.after``.

        Continues at table and slot of ``sender.position`` if that scan began in this process;
        otherwise starts a new scan. At the end, sets the position's phase to the one that follows
        the scan. Returns without changing the phase if tombstones were discarded during the scan:
        call ``run`` again. Raises VersionCompacted if a catch-up needs deletes whose tombstones
        were discarded before it began.
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
        """Start a scan of the rows up to ``tables.version``: send its first message (SNAPSHOT or
        CATCH_UP), and return the position at which the scan starts.

        position  position of the subscriber before the scan
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
        """Handle a scan that needs deletes which the shard no longer knows, because
        ``position.after`` is older than ``horizon``.

        horizon  largest version whose tombstones may have been discarded

        Raises VersionCompacted for a catch-up. For a snapshot, returns the position with after = 0,
        so that it sends all rows.
        """
        if position.phase == Phase.SNAPSHOT:
            return replace(position, after=0)
        raise VersionCompacted(position.after, self._source.log.first - 1, horizon)

    async def _send(self, messages: list[bytes]) -> None:
        """Send messages; raise Draining if the server is stopping."""
        self._source.check_draining()
        await self._sender.send(messages)

    async def _send_tables(self, tables: TableList) -> bool:
        """Send the subscribed tables, then the deletes newer than ``position.after``, up to the
        scan's version.

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
        """Return about SLICE_TOMBSTONES tombstones newer than version ``after``, oldest first.

        Returns None if some of them may have been discarded. Must run on the engine thread.
        """
        shard = self._source.shard
        if after < shard.tombstone_horizon:
            return None
        return shard.tombstones(after, SLICE_TOMBSTONES)

    def _make_deletes(self, dead: Tombstones, names: dict[int, str], token: bytes) -> list[bytes]:
        """Return all messages that ``_deletes`` yields, as a list."""
        return list(self._deletes(dead, names, token))

    def _deletes(self, dead: Tombstones, names: dict[int, str], token: bytes) -> Iterator[bytes]:
        """Yield encoded messages with deletes; each message has one table and one cause.

        dead   the deletes to send; those of tables that are not in ``names`` are skipped
        names  names of the subscribed tables, by number
        token  encoded position to put into each message, from which a subscriber can resume
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
        """Send the subscribed rows of one table, and advance ``sender.position`` with each message.

        Starts at the position's slot if the position is in this table. Sends nothing if the
        position is in a later table, because this table was sent before.

        number  number of the table
        """
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
            if scan.changes(slots):
                copied = [
                    await source.engine.submit(partial(_copy, scan, some, width))
                    for some in _slices(slots, 32 + 4 * width)
                ]
            else:
                copied = [await source.work(partial(_copy, scan, slots, width))]
            if len(slots):
                make = partial(self._make_rows, schema, copied, position)
                await self._send(await source.work(make))
            self._sender.position = position

    def _make_rows(
        self, schema: TableSchema, copied: list[tuple[Any, ...]], position: Position
    ) -> list[bytes]:
        """Return encoded messages with one slice of rows. Rows that were changed after the scan's
        version, or not since ``position.after``, are left out.

        copied    results of ``_copy``, which together are the slice
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
    """Split an array of slots int64[n] into pieces whose rows take about 256 KiB.

    row_bytes  size of one row, in bytes
    """
    most = max(1, SLICE_BYTES // row_bytes)
    for start in range(0, len(slots), most):
        yield slots[start : start + most]


def _copy(scan: TableScan, slots: Any, width: int) -> tuple[Any, Any, Any]:
    """Copy rows. Return (metadata uint64[n, 4], frequencies uint64[n], rows float32[n, width]).

    scan   scan over the table
    slots  int64[n], places of the rows, from ``scan.find``
    width  how many numbers of each row to copy: the embedding comes first, then optimizer state

    Must run on the engine thread if pushes may change the rows.
    """
    frequencies = np.empty(len(slots), np.uint64)
    rows = np.empty((len(slots), width), np.float32)
    return scan.copy(slots, frequencies, rows), frequencies, rows
