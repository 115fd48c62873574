"""One checkpoint of a trainer, taken on a background thread up to a barrier."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from psclient import pruning
from psclient.checkpoints import CheckpointInfo, checkpoint
from psclient.client import Client
from psclient.errors import CheckpointUnfit, PsError, Unavailable
from psclient.signals import Shield

EARLY = 2.0  # begin to copy this many times earlier than the last copy would have needed


class Writing:
    """A checkpoint that the servers take while training goes on.

    name    name of the checkpoint, and of the barrier at which it ends
    full    whether the checkpoint has no parent
    placed  whether the caller has placed the barrier
    stored  whether the servers have completed it and the job of ``finish`` has begun. From then on
            an error does not delete the checkpoint, because the job may have recorded it
    error   why it failed; None: it did not, so far
    """

    def __init__(self, client: Client, name: str, parent: str | None, timeout: float) -> None:
        """Begin to take the checkpoint.

        parent   name of the checkpoint on which it builds, if that is possible; None: it is full
        timeout  seconds that the shards wait for the barrier
        """
        self.name = name
        self.full = parent is None
        self.placed = self.stored = False
        self.error: BaseException | None = None
        self.began, self.copied = time.monotonic(), 0.0
        self._client, self._parent, self._timeout = client, parent, timeout
        self._given_up = False
        self._changed = threading.Event()  # ready, failed or ended
        self._decided = threading.Event()  # ``finish`` or ``give_up`` was called
        self._job: Callable[[CheckpointInfo], None] | None = None
        with Shield():
            self._thread = threading.Thread(target=self._run, name="psclient-cut", daemon=True)
            self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether the checkpoint is complete, or has failed."""
        return not self._thread.is_alive()

    def ready(self) -> None:
        """Wait until all shards have copied their rows, and wait for the barrier.

        Raises the error if the checkpoint has failed.
        """
        self._changed.wait()
        if self.error is not None:
            raise self.error

    def finish(self, job: Callable[[CheckpointInfo], None]) -> None:
        """Let the background thread run ``job`` once the servers have completed the checkpoint.

        job  called with the checkpoint's description; its error is that of the checkpoint
        """
        self._job = job
        self._decided.set()

    def give_up(self) -> None:
        """Stop to take the checkpoint, and delete what the servers have of it; wait for that."""
        self._given_up = True
        self._decided.set()
        self.join()

    def join(self) -> None:
        """Wait until ``ended``."""
        self._thread.join()

    def _run(self) -> None:
        try:
            info = self._take()
            self._decided.wait()
            if self._job is None or self._given_up:
                raise Unavailable(f"checkpoint {self.name!r} was given up")
            self.stored = True
            self._job(info)
        except BaseException as error:
            self.error = error
            if not self.stored:
                with suppress(PsError):
                    pruning.delete(self._client, self.name)
        finally:
            self._changed.set()

    def _take(self) -> CheckpointInfo:
        """Take the checkpoint; a full one if the parent does not fit."""
        try:
            return self._checkpoint(self._parent)
        except CheckpointUnfit:
            if self._parent is None:
                raise
        self.full = True
        return self._checkpoint(None)

    def _checkpoint(self, parent: str | None) -> CheckpointInfo:
        return checkpoint(
            self._client,
            self.name,
            parent=parent,
            until_barrier=self.name,
            barrier_timeout=self._timeout,
            on_ready=self._be_ready,
            progress=self._still,
        )

    def _be_ready(self) -> None:
        self.copied = time.monotonic() - self.began
        self._changed.set()

    def _still(self, *_: int) -> None:
        """Stop the calls to the servers if the checkpoint was given up."""
        if self._given_up:
            raise Unavailable(f"checkpoint {self.name!r} was given up")


class Pace:
    """Decides how many steps before a cut the servers begin to copy their rows.

    every    steps from one cut to the next
    seconds  how long the servers took to copy the last time
    """

    def __init__(self, every: int, seconds: float) -> None:
        self.seconds = seconds
        self._every = every
        self._first: tuple[int, float] | None = None  # (step, time) of the first call

    def begins(self, step: int) -> bool:
        """Return whether to begin after ``step``, for the cut at the next multiple of ``every``.

        Call it after each step: it measures how long a step takes.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        since, began = self._first
        pace = (step - since) / max(now - began, 1e-6)  # steps per second
        left = -step % self._every
        return left <= max(1, math.ceil(EARLY * self.seconds * pace))
