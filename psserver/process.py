"""Run one shard as a process: handle its signals, restart it after a restore, set the exit status.

On SIGTERM or SIGINT the health service reports NOT_SERVING, new calls are refused with UNAVAILABLE,
and calls in flight have drain_seconds to finish. Then the process exits with status 0. A signal
before the shard is ready ends the process immediately.

A server whose number is not below the number of shards is alive, but never ready. It does not exit,
because a supervisor would start it again and again.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import sys
import threading
import time

import structlog
import uvloop

from psproto import cpu
from psproto.kernelcache import KernelCache
from psserver.addresses import join
from psserver.config import ServerConfig
from psserver.datadir import lock
from psserver.errors import NotAShard
from psserver.eventloop import Loop
from psserver.memory import BASE_BYTES, show
from psserver.server import Server
from psserver.unusable import ConfigError
from psserver.warm import warm
from storage.errors import OutOfMemory

SWITCH_SECONDS = 1e-4  # seconds that a thread may keep the interpreter lock while others wait
MMAP_BYTES, TRIM_BYTES = 4 << 20, 16 << 20  # see ``keep_freed_memory``
CLOSE_SECONDS = 30.0  # maximum time to close files and threads at a stop, because disks can hang

log = structlog.get_logger()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next request instead of returning it to the system.

    By default glibc may return the arrays of each request; the next request then has hundreds of
    page faults, which take more time than its work. Up to TRIM_BYTES of free memory are kept at the
    end of each heap; arrays of MMAP_BYTES or more are returned at once. Other C libraries are left
    as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, TRIM_BYTES)  # M_TRIM_THRESHOLD
        mallopt(-3, MMAP_BYTES)  # M_MMAP_THRESHOLD


def report_memory(config: ServerConfig) -> None:
    """Log the memory limit and how it is divided among the uses of memory; also log a warning if
    they can exceed the limit together.
    """
    plan = config.memory
    log.info(
        "memory",
        limit=str(plan.limit),
        shards_sharing_it=plan.sharing,
        base=show(BASE_BYTES),
        max_inflight=show(plan.inflight),
        transport=show(plan.transport),
        log_backlog=show(plan.backlog),
        psctl=show(plan.tool),
        gpu=show(plan.gpu),
        tables=show(config.host_bytes),
    )
    if config.host_bytes + plan.reserve > plan.part:
        log.warning(
            "memory limit may be exceeded",
            limit=str(plan.limit),
            needed=show(plan.sharing * (config.host_bytes + plan.reserve)),
            advice="lower host_bytes or max_inflight_bytes, or raise the limit",
        )


async def _serve(config: ServerConfig) -> bool:
    """Serve the shard until SIGTERM, SIGINT, or a restore that requires a restart; then close it.

    Returns True if the process must start again.
    """
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
    if config.surplus:
        log.error("not a shard of the cluster", advice=str(NotAShard(config.shard, config.shards)))
        await stop.wait()
        await server.abandon()
        return False
    if not await _start(server, stop):
        log.info("stopped before it was ready", shard=config.shard)
        return False
    log.info(
        "ready",
        shard=config.shard,
        shards=config.shards,
        address=join(config.host, config.port),
        seconds=round(time.monotonic() - started, 2),
        pid=os.getpid(),
    )
    print("ready", flush=True)
    await stop.wait()
    await _close(server, config)
    return again.is_set() and not over


async def _close(server: Server, config: ServerConfig) -> None:
    """Close the server, but stop waiting for it after drain_seconds + CLOSE_SECONDS."""
    log.info("stopping", shard=config.shard)
    limit = config.drain_seconds + CLOSE_SECONDS
    try:
        await asyncio.wait_for(server.close(), limit)
    except TimeoutError:
        log.error("stopped without closing", shard=config.shard, waited_seconds=limit)
    else:
        log.info("stopped", shard=config.shard)


async def _start(server: Server, stop: asyncio.Event) -> bool:
    """Load the compiled kernels, recover the shard and serve it. Return True once it serves.

    Returns False as soon as ``stop`` is set. Then the start is abandoned where it is, which is as
    safe as a crash: the next start of the server recovers the data directory.
    """

    async def start() -> None:
        try:
            await asyncio.to_thread(_warm)
        except BaseException:
            await server.abandon()
            raise
        await server.open()

    starting = asyncio.ensure_future(start())
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if starting.done():
        await starting
        return True
    return False


def _warm() -> None:
    """Load the compiled kernels; compile those that no cache directory has. Then take all objects
    out of the garbage collector: they live as long as the process, and a full collection that
    looked at them would stop all threads for 60 ms.

    Raises ConfigError if the address space does not suffice.
    """
    started = time.monotonic()
    try:
        warm()
    except OutOfMemory as error:
        raise ConfigError(
            f"not enough address space to start ({error}): raise ulimit -v and -d, or remove them"
        ) from error
    log.info(
        "kernels",
        loaded=KernelCache.loaded,
        compiled=KernelCache.compiled,
        cpu=cpu.target(),
        seconds=round(time.monotonic() - started, 2),
    )
    if KernelCache.compiled:
        why = ": they cannot be saved, so each start compiles them" if KernelCache.unsaved else ""
        log.warning(
            f"kernels were compiled, which delayed this start{why}",
            advice="run psserver warm while the image is built, with the same NUMBA_CPU_NAME,"
            " NUMBA_CPU_FEATURES and NUMBA_CACHE_DIR; psserver doctor shows where it looks",
        )
    gc.collect()
    gc.freeze()


async def _serve_and_exit(config: ServerConfig) -> None:
    """Serve the shard, then exit with status 0, or execute the command line again for a restart.

    Never returns. Does not wait for threads, which may hang in a file operation.
    """
    again = await _serve(config)
    sys.stdout.flush()
    sys.stderr.flush()
    if again:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606
    os._exit(0)


def serve(config: ServerConfig) -> None:
    """Run one shard until SIGTERM or SIGINT, then exit the process. Raises ConfigError if the shard
    cannot start.

    A restore restarts the shard: the process executes its own command line again and keeps its
    process id. So a supervisor only sees that the shard is not ready for a while.
    """
    if problem := cpu.problem():
        raise ConfigError(problem)
    lock_file = lock(config.data_dir) if config.data_dir and not config.surplus else None
    report_memory(config)
    sys.setswitchinterval(SWITCH_SECONDS)
    keep_freed_memory()
    try:
        uvloop.run(_serve_and_exit(config), loop_factory=Loop)
    finally:
        if lock_file:
            lock_file.close()
