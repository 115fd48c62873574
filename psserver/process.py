"""One shard as a process: from its configuration to its exit status.

SIGTERM or SIGINT: health turns NOT_SERVING, new work is refused with UNAVAILABLE, work in hand is
finished, the process ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time

import structlog
import uvloop

from psserver.config import ServerConfig
from psserver.datadir import lock
from psserver.memory import BASE_BYTES, show
from psserver.server import Server
from psserver.warm import warm

SWITCH_SECONDS = (
    1e-4  # loop and engine hand work to each other; 5 ms of waiting for the GIL is long
)

log = structlog.get_logger()


def report_memory(config: ServerConfig) -> None:
    """Log the memory limit and how it is divided; warn where it can be exceeded."""
    plan = config.memory
    log.info(
        "memory",
        limit=str(plan.limit),
        shards_sharing_it=plan.colocated,
        base=show(BASE_BYTES),
        max_inflight=show(plan.inflight),
        transport=show(plan.transport),
        tables=show(config.memory_bytes),
    )
    if config.memory_bytes + plan.reserve > plan.part:
        log.warning(
            "memory limit may be exceeded",
            limit=str(plan.limit),
            needed=show(plan.colocated * (config.memory_bytes + plan.reserve)),
            advice="lower memory_bytes or max_inflight_bytes, or raise the limit",
        )


async def _serve(config: ServerConfig) -> bool:
    """Serve until told to stop; whether to start anew then."""
    started = time.monotonic()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    again, over = threading.Event(), False

    def restart() -> None:
        again.set()
        loop.call_soon_threadsafe(stop.set)

    def end() -> None:
        nonlocal over
        over = True
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)

    server = Server(config, restart)
    await server.listen()
    await asyncio.to_thread(warm)
    await server.open()
    log.info(
        "ready",
        shard=config.shard,
        shards=config.shards,
        address=f"{config.host}:{config.port}",
        seconds=round(time.monotonic() - started, 2),
        pid=os.getpid(),
    )
    print("ready", flush=True)
    await stop.wait()
    log.info("stopping", shard=config.shard)
    await server.close()
    log.info("stopped", shard=config.shard)
    return again.is_set() and not over


def serve(config: ServerConfig) -> None:
    """Run one shard until SIGTERM or SIGINT; ConfigError if it cannot start.

    To start anew it becomes the command that it was started as, so that whoever looks after the
    process sees nothing but a shard that is not ready for a while.
    """
    report_memory(config)
    held = lock(config.data_dir) if config.data_dir else None
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        again = uvloop.run(_serve(config))
    finally:
        if held:
            held.close()
    if again:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606
