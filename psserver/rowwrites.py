"""Write whole rows on behalf of worker threads, which may wait for the disk; the engine may not."""

from __future__ import annotations

from psserver.engine import Engine
from psserver.flusher import Flusher
from psserver.shard import Shard
from psserver.slices import Slice
from storage.errors import NoRoom


class RowWrites:
    """Writes whole rows to tables of one shard. Thread-safe.

    flusher  makes room in memory; None: the shard has no data directory
    """

    def __init__(self, shard: Shard, engine: Engine, flusher: Flusher | None) -> None:
        self._shard = shard
        self._engine = engine
        self._flusher = flusher

    def write(self, number: int, left: list[Slice]) -> None:
        """Write slices of rows to the table with this number, the last slice first.

        left  the slices; each is removed once it was written

        Blocks, so it must run on a worker thread. Older rows of the keys are not read, so that even
        rows that are damaged on disk can be replaced. If there is no room in memory, flushes until
        there is. Raises the errors of ``Shard.write_rows``, and DiskFull if rows cannot leave
        memory.
        """
        flushed = False
        while left:
            before = len(left)
            try:
                self._engine.run(lambda: self._write(number, left))
            except NoRoom as error:
                if self._flusher is None or (flushed and error.oversized and len(left) == before):
                    raise
                self._flusher.flush()
                flushed = True

    def _write(self, number: int, left: list[Slice]) -> None:
        """Write as many slices as there is room for. Must run on the engine."""
        while left:
            self._shard.write_rows(number, *left[-1])
            left.pop()
