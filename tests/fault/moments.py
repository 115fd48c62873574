"""Moments at which a shard kills itself: the beginning or end of a step of a flush or of a move.

A process of a shard that called ``install`` looks for its *order*: a file that names one moment and
how often it must come. When it has come so often, the process kills itself with SIGKILL. So kills
hit moments that last microseconds, which kills at random times hardly ever do.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# what happens -> "class.method" of the steps
STEPS = {
    "flush": (
        "BaseWriter.write",
        "Base.add",
        "BaseWriter._write_directory",
        "Base.commit",
        "Base._seal",
        "BaseWriter._adopt_block",
        "VersionLog.truncate",
    ),
    "re-flush": ("BaseWriter._read", "RowStore.move"),
    "demotion": ("Blocks.uncache",),
    "promotion": ("Blocks.cache",),
}


class Moment(NamedTuple):
    """When a process kills itself."""

    step: str  # "class.method"
    end: bool  # after the method, instead of before it
    count: int  # at this occurrence; 1: the first


def draw(rng: random.Random) -> tuple[str, Moment]:
    """Return (what happens, moment), at random."""
    what = rng.choice(list(STEPS))
    return what, Moment(rng.choice(STEPS[what]), rng.random() < 0.5, rng.randint(1, 3))


def give(order: Path, moment: Moment) -> None:
    """Order the process that looks for the file ``order`` to kill itself at a moment."""
    new = order.with_suffix(".new")
    new.write_text(json.dumps(moment))
    new.rename(order)


def install(order: Path) -> None:
    """Change the classes of the server in this process so that it obeys the order."""
    from psserver.basewriter import BaseWriter
    from storage.base import Base
    from storage.rowstore import RowStore
    from storage.tiers.lmdb import Blocks
    from storage.versionlog import VersionLog

    seen = _Seen(order)
    classes = {each.__name__: each for each in (BaseWriter, Base, RowStore, Blocks, VersionLog)}
    for step in (step for steps in STEPS.values() for step in steps):
        name, method = step.split(".")
        setattr(classes[name], method, _watched(getattr(classes[name], method), step, seen))


class _Seen:
    """Counts how often the ordered moment has come since the order was given."""

    def __init__(self, order: Path) -> None:
        self._order = order
        self._wanted: Moment | None = None
        self._times = 0

    def comes(self, step: str, end: bool) -> None:
        if self._wanted is None:
            if not os.path.exists(self._order):
                return
            self._wanted = Moment(*json.loads(self._order.read_text()))
        if (step, end) == self._wanted[:2]:
            self._times += 1
            if self._times == self._wanted.count:
                os.kill(os.getpid(), signal.SIGKILL)


def _watched(method: Callable[..., Any], step: str, seen: _Seen) -> Callable[..., Any]:
    @functools.wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.comes(step, False)
        try:
            return method(*args, **kwargs)
        finally:
            seen.comes(step, True)

    return watched
