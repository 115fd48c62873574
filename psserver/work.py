"""Long work on checkpoints: one at a time, with its progress, until the server stops."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from psproto import ps_pb2 as pb
from psserver.errors import CheckpointBusy, Draining


class Progress:
    """How far a long call is. Written by the thread that works, read by the event loop."""

    def __init__(self, stopping: threading.Event) -> None:
        self.bytes = 0
        self.total = 0  # an estimate; 0: unknown
        self.rows = 0
        self.stage = pb.CheckpointProgress.STAGE_UNSPECIFIED
        self.given_up = False  # the client is gone
        self._stopping = stopping

    def add(self, size: int) -> None:
        """Count ``size`` more bytes. Raises Draining if the result is not wanted any more."""
        self.bytes += size
        self.require_wanted()

    @property
    def stopping(self) -> bool:
        """Whether the server is stopping."""
        return self._stopping.is_set()

    def require_wanted(self) -> None:
        """Raise Draining if the result is not wanted any more."""
        if self.given_up or self.stopping:
            raise Draining("the server is stopping, or the client is gone")

    def message(self) -> pb.CheckpointProgress:
        """Return the message about the progress so far."""
        stage = self.stage  # first: the rows are final once it is DONE
        return pb.CheckpointProgress(
            bytes=self.bytes, total=self.total, rows=self.rows, stage=stage
        )


class Work:
    """The lock of one shard's long work, and its end. Thread-safe.

    on_stop  called by ``stop``
    """

    def __init__(self, on_stop: Callable[[], None] = lambda: None) -> None:
        self._lock = threading.Lock()
        self._owner = ""
        self._refusal = ""  # why no work can begin any more
        self._stopping = threading.Event()
        self._on_stop = on_stop

    def progress(self) -> Progress:
        """Return the progress of a call that begins."""
        return Progress(self._stopping)

    def stop(self) -> None:
        """Let all work fail soon."""
        self._stopping.set()
        self._on_stop()

    def refuse(self, why: str) -> None:
        """Let ``alone`` refuse all work from now on, until the server starts again."""
        self._refusal = why

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Hold the lock. Raises CheckpointBusy, which names the work that holds it.

        what  describes the work, for the others
        """
        if self._refusal:
            raise CheckpointBusy(f"{self._refusal}: restart the shard")
        if not self._lock.acquire(blocking=False):
            raise CheckpointBusy(f"the shard is busy: {self._owner}; try again later")
        self._owner = what
        try:
            yield
        finally:
            self._lock.release()
