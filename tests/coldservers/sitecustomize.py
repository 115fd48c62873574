"""Python imports this file at the start of a server's process in `pytest --cold`.

The server then flushes its rows a few milliseconds after each change, and after each flush gives up
all rows in memory, so that nearly all of them are on disk.
"""

import sys
import threading
import time

EVERY = 0.02  # seconds between flushes while rows change
IDLE = 0.16  # seconds after which a server looks for changes when there were none for a while
SHARE = 0.3  # of the time that flushes may take
SKIPPED = 8  # looks that find no change before the next flush all the same


def squeeze() -> None:
    """Change the flusher of this process as described above."""
    from psserver.flusher import Flusher

    opened, flush = Flusher.open, Flusher._flush

    def begin(self):  # type: ignore[no-untyped-def]
        self._seconds = EVERY
        opened(self)

    def squeezed(self):  # type: ignore[no-untyped-def]
        began, captured = time.monotonic(), None
        unchanged = self._flushed_version == self._shard.version
        if unchanged and self._skipped < SKIPPED and threading.current_thread() is self._thread:
            self._skipped += 1  # a flush of hundreds of tables without a change takes 15 ms
            self._engine.run(lambda: _demote(self._shard))
            self._seconds = min(2 * self._seconds, IDLE)
            return None
        self._skipped = 0
        try:
            captured = flush(self)
            return captured
        finally:
            self._engine.run(lambda: _demote(self._shard))
            if captured is not None and captured.version == self._flushed_version:
                self._seconds = min(2 * self._seconds, IDLE)
            else:
                self._seconds = max(EVERY, (time.monotonic() - began) / SHARE)
                self._flushed_version = -1 if captured is None else captured.version

    Flusher._flushed_version, Flusher._skipped = -1, 0
    Flusher.open, Flusher._flush = begin, squeezed


def _demote(shard) -> None:  # type: ignore[no-untyped-def]
    for entry in shard._tables:
        store = entry.table.store
        if store.blocks is not None and store.host.slots.rows:
            store.demote(store.host.slots.rows)


if {"psserver", "serve"} <= set(sys.orig_argv):
    squeeze()
