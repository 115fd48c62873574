"""Threads for what blocks: checkpoints, analyses, sweeps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from psserver.errors import DeadlinePassed

THREADS = 4

Result = TypeVar("Result")


class Workers:
    """Run calls on threads for the event loop."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, "worker")

    def close(self) -> None:
        """Wait for the threads."""
        self._pool.shutdown()

    def submit(self, call: Callable[..., Result], *args: Any) -> asyncio.Future[Result]:
        """Run ``call(*args)`` on a thread."""
        return asyncio.get_running_loop().run_in_executor(self._pool, call, *args)

    async def run(self, call: Callable[[Any], Result], request: Any, deadline: float) -> Result:
        """Run ``call(request)`` on a thread; DeadlinePassed if it could not begin in time."""

        def work() -> Result:
            if time.monotonic() > deadline:
                raise DeadlinePassed("the deadline passed before the work began")
            return call(request)

        return await self.submit(work)
