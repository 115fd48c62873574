"""Long work on checkpoints: one piece at a time, with its progress, until the server stops."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from psserver.errors import CheckpointBusy, Draining


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


class Work:
    """The large pieces of work of one shard. Thread-safe."""

    def __init__(self) -> None:
        self._working = threading.Lock()
        self._stopping = threading.Event()

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
