"""Turns for slow readers: slices of work on the engine, each followed by a pause."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from psserver.engine import Engine

Slice = TypeVar("Slice")
Result = TypeVar("Result")

SPARED = 80  # times the work on a slice, the pause after it
SPARED_STORED = 9  # the same for pieces of checkpoints, which have another 10 %
LONGEST = 1.0  # seconds of a pause beside the engine: a server that stops waits for it


class Pace:
    """Takes slices for all who do such work, one after the other, and pauses after each.

    spared  how many times as long as a slice took, of processor time, the pause after it is
    """

    def __init__(self, engine: Engine, spared: float = SPARED) -> None:
        self._engine = engine
        self._spared = spared
        self._turn = threading.Lock()

    def run(self, read: Callable[[], Slice], work: Callable[[Slice], Result]) -> Result:
        """``read`` on the engine thread, ``work`` on this one on what it returned; then pause."""

        def timed() -> tuple[Slice, float]:
            start = time.thread_time()
            return read(), time.thread_time() - start

        with self._turn:
            found, took = self._engine.run(timed)
            start = time.thread_time()
            done = work(found)
            time.sleep(self._spared * (took + time.thread_time() - start))
        return done

    def beside(self, work: Callable[[], Result]) -> Result:
        """``work`` on this thread, which needs no engine; then pause, up to LONGEST."""
        with self._turn:
            start = time.thread_time()
            done = work()
            time.sleep(min(self._spared * (time.thread_time() - start), LONGEST))
        return done
