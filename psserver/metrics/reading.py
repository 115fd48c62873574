"""Read many tables without Python's garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

from prometheus_client.core import Metric


def read_at_once(read: Callable[[], Iterator[Metric]]) -> list[Metric]:
    """Return the metrics that ``read()`` yields. The garbage collector does not run meanwhile.

    With thousands of tables, ``read`` creates so many objects that the collector would look at all
    objects made since the start, and stop all threads for about 0.2 s. ``read`` must not use the
    disk, because a disk can hang: then the collector would never run again.
    """
    if not gc.isenabled():
        return list(read())
    gc.disable()
    try:
        return list(read())
    finally:
        gc.enable()
