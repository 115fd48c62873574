"""Convert the records of the version log to the messages of one subscription."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from psserver.batches import COALESCE_BYTES, Batch
from psserver.deltas import DeltaKind, Deltas
from psserver.position import Phase, Position
from psserver.schemas import from_json
from psserver.source import Source
from psserver.wanted import Wanted
from storage import records
from storage.schema import TableSchema
from storage.segment import Frame

READ_BYTES = 1 << 20  # maximum number of bytes read from the log at once
STEP_BYTES = 1 << 20  # approximate size of the messages that one call makes, in bytes
MESSAGE_BYTES = 256  # overhead in memory that is counted for each message, in bytes


class LogTail:
    """Reads the log from a position on, and makes the messages of one subscription.

    Only one thread at a time may use it.

    position   position after the last change whose messages were all returned
    seen       newest version read from the log
    gathering  monotonic time since which changes wait to be coalesced (merged); 0: none wait
    since      time when the oldest change in the last messages was applied, in seconds since 1970
    pending    approximate size of records in memory whose messages are not made yet, in bytes
    pushes     versions of the pushes whose messages were all returned; the caller removes them
    """

    def __init__(self, source: Source, wanted: Wanted, deltas: Deltas, position: Position) -> None:
        """Open the log at ``position``.

        wanted    tables and contents that the subscriber asked for
        deltas    makes the messages
        position  the first message is about the first change after it
        """
        self.position = position
        self.seen = position.version
        self.gathering = 0.0
        self.since = 0.0
        self.pending = 0
        self.pushes: list[int] = []
        self._source = source
        self._known_schema = source.shard.schema_of
        self._read: dict[int, TableSchema] = {}  # by number, of tables whose creation was read
        self._wanted = wanted
        self._deltas = deltas
        self._cursor = source.log.cursor(position.version)
        self._frames: list[Frame] = []  # records read but not in a batch yet, newest first
        self._batch = self._next_batch()
        self._making: Iterator[bytes] | None = None  # further messages of a large change

    def close(self) -> None:
        """Close the open file of the version log."""
        self._cursor.close()

    @property
    def within(self) -> bool:
        """Whether the snapshot or catch-up of the subscriber is not complete yet."""
        return self.position.phase != Phase.TAIL

    def messages(self, flush: bool) -> list[bytes]:
        """Return encoded messages that can be sent now, about STEP_BYTES of them, or none.

        flush  include changes that still wait to be coalesced (merged) with later ones

        The messages of a large change may take several calls. Raises Compacted if the log no longer
        has the next change. Messages made in the same call are then lost, and ``position`` does not
        include them.
        """
        out: list[bytes] = []
        left = STEP_BYTES
        while left > 0 and self._begin(out, flush):
            assert self._making is not None
            for message in self._making:
                out.append(message)
                left -= len(message) + MESSAGE_BYTES
                if left <= 0:
                    break
            else:
                self._making = None
        making = self._batch.bytes if self._making is not None else 0
        self.pending = making + sum(len(frame.payload) for frame in self._frames)
        idle = self._making is None and not self._batch.changes
        self.gathering = 0.0 if idle else self.gathering or time.monotonic()
        if idle and self._batch.version > self.position.version:
            self._move()
            out.append(self.progress())
        return out

    def progress(self, *, first: bool = False) -> bytes:
        """Return an encoded message that reports ``position``, without a change.

        first  this is the first message of the stream
        """
        position = self.position
        return self._deltas.progress(
            first=first,
            version=position.version,
            token=position.encode(),
            more=self.within,
        )

    def _begin(self, out: list[bytes], flush: bool) -> bool:
        """Set ``_making`` to the next messages. Return False if there is nothing to send now.

        out    if the snapshot is complete, the message that ends it is appended to this list
        flush  do not wait for more changes to merge
        """
        if self._making is not None:
            return True
        if self.within and self.position.version >= self.position.until:
            out.append(self._end())
        if not self._fill() and not (flush and self._batch.changes):
            return False
        self._making = self._make()
        return True

    def _next_batch(self) -> Batch:
        """Return an empty batch that starts after the newest version read."""
        most = min(COALESCE_BYTES, self._source.coalesce_bytes)
        return Batch(self._wanted, most, self._schema_of, self.seen)

    def _schema_of(self, number: int) -> TableSchema | None:
        """Return the schema of the table with this number.

        Returns None if the table was dropped before the last flush, and the shard has restarted
        since that flush.
        """
        return self._known_schema(number) or self._read.get(number)

    def _fill(self) -> bool:
        """Read changes of the log into the batch until it is complete or the log ends.

        Returns whether the batch is complete and can be sent.
        """
        batch, until = self._batch, self.position.until if self.within else None
        while not batch.full:
            if not self._frames:
                self._frames = self._cursor.read(max_bytes=READ_BYTES)[::-1]
                if not self._frames:
                    return False
            if not batch.takes(self._frames[-1].kind):
                return True
            frame = self._frames.pop()
            record = records.decode(frame)
            if isinstance(record, records.CreateRecord):
                self._read[record.table] = from_json(record.schema)
            batch.take(frame.version, record)
            if isinstance(record, records.DropRecord):
                self._read.pop(record.table, None)
            self.seen = frame.version
            if frame.version == until:
                return True
        return True

    def _make(self) -> Iterator[bytes]:
        """Yield the messages of the batch, then start the next batch."""
        batch = self._batch
        if batch.changes:
            self.since = batch.since_us / 1e6
            token = replace(self.position, version=batch.version).encode()
            yield from self._deltas.batch(batch, token, self.within)
            self.pushes += [
                each.version
                for each in batch.changes
                if isinstance(each.record, records.PushRecord)
            ]
        self._move()
        self._batch = self._next_batch()

    def _move(self) -> None:
        """Set ``position`` to the end of the batch."""
        self.position = replace(self.position, version=self._batch.version)

    def _end(self) -> bytes:
        """Leave the snapshot phase; return the encoded message that the snapshot is complete."""
        self.position = replace(self.position, phase=Phase.TAIL, after=0, until=0, boot=0)
        return self._deltas.mark(
            DeltaKind.KIND_SNAPSHOT_END,
            version=self.position.version,
            token=self.position.encode(),
        )
