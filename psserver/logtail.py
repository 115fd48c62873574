"""The messages that a subscription makes of the log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from psserver.deltas import COALESCE_BYTES, Batch, DeltaKind, Deltas
from psserver.position import Phase, Position
from psserver.schemas import from_json
from psserver.source import Source
from psserver.wanted import Wanted
from storage import records
from storage.schema import TableSchema
from storage.segment import Frame

READ_BYTES = 1 << 20  # bytes of the log per read
STEP_BYTES = 1 << 20  # bytes of messages per step
MESSAGE_BYTES = 256  # bytes counted per message in addition to its own


class LogTail:
    """Makes messages of the log, from a position on. One thread at a time uses it.

    position   where the last complete change ended
    seen       newest version read from the log
    gathering  monotonic seconds since when changes wait to be coalesced; 0: none do
    since      seconds since 1970 when the oldest change of the last messages was applied
    pending    approximate bytes of records in memory whose messages are not made yet
    """

    def __init__(self, source: Source, wanted: Wanted, deltas: Deltas, position: Position) -> None:
        """Start at ``position``."""
        self.position = position
        self.seen = position.version
        self.gathering = 0.0
        self.since = 0.0
        self.pending = 0
        self._source = source
        self._known_schema = source.shard.schema_of
        self._read: dict[int, TableSchema] = {}  # of tables whose creation was read here
        self._wanted = wanted
        self._deltas = deltas
        self._cursor = source.log.cursor(position.version)
        self._frames: list[Frame] = []  # read and not taken; the next one is the last
        self._batch = self._next_batch()
        self._making: Iterator[bytes] | None = None  # further messages of a large change

    def close(self) -> None:
        """Close the file."""
        self._cursor.close()

    @property
    def within(self) -> bool:
        """Whether a snapshot or catch-up is not complete yet."""
        return self.position.phase != Phase.TAIL

    def messages(self, flush: bool) -> list[bytes]:
        """Return messages that can be sent now, about STEP_BYTES of them.

        flush  also send changes that wait to be coalesced

        A large change may take several calls. Raises Compacted if the next change was truncated;
        messages made before it in the same call are then lost, and ``position`` is before them.
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
        """Return the message that there is nothing new up to here.

        first  it is the first message of the stream
        """
        position = self.position
        return self._deltas.progress(
            first=first,
            version=position.version,
            token=position.encode(),
            more=self.within,
        )

    def _begin(self, out: list[bytes], flush: bool) -> bool:
        """Have messages to make; returns False if there are none to send now."""
        if self._making is not None:
            return True
        if self.within and self.position.version >= self.position.until:
            out.append(self._end())
        if not self._fill() and not (flush and self._batch.changes):
            return False
        self._making = self._make()
        return True

    def _next_batch(self) -> Batch:
        most = min(COALESCE_BYTES, self._source.coalesce_bytes)
        return Batch(self._wanted, most, self._schema_of, self.seen)

    def _schema_of(self, number: int) -> TableSchema | None:
        """Return the schema of a table at this position of the log.

        A table that was dropped before the last flush is unknown to a shard that has restarted.
        """
        return self._known_schema(number) or self._read.get(number)

    def _fill(self) -> bool:
        """Read changes into the batch. Returns whether the batch is ready to be sent."""
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
        """Yield the messages of the batch, then begin the next batch."""
        batch = self._batch
        if batch.changes:
            self.since = batch.since_us / 1e6
            token = replace(self.position, version=batch.version).encode()
            yield from self._deltas.batch(batch, token, self.within)
        self._move()
        self._batch = self._next_batch()

    def _move(self) -> None:
        self.position = replace(self.position, version=self._batch.version)

    def _end(self) -> bytes:
        self.position = replace(self.position, phase=Phase.TAIL, after=0, until=0, boot=0)
        return self._deltas.mark(
            DeltaKind.KIND_SNAPSHOT_END,
            version=self.position.version,
            token=self.position.encode(),
        )
