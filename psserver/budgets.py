"""The memory and disk space of a server that has a limit, and how much of it is in use."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from psserver.config import ServerConfig
from psserver.connections import Connections
from psserver.parts import Parts
from psserver.stats import ServiceStats

STATM = Path("/proc/self/statm")  # sizes of this process in pages: total, resident, shared, ...


class Use(NamedTuple):
    """A limited resource: its name, the bytes in use, and the limit.

    The name is that of the setting with the limit. Three limits are parts of the memory limit:
    "process" (private memory of this process), "transport" (messages that arrive) and "log_backlog"
    (records that are not written yet).
    """

    budget: str
    used: int
    limit: int


def uses(
    config: ServerConfig, stats: ServiceStats, connections: Connections, parts: Parts | None
) -> Iterator[Use]:
    """Yield all resources that have a limit. May block while the disk hangs.

    parts  None: the shard is not recovered yet
    """
    plan = config.memory
    with suppress(OSError):
        yield Use("process", _private(), plan.part)
    yield Use("transport", connections.unfinished, plan.transport)
    if parts is None:
        return
    shard, log, lanes = parts.shard, parts.log, parts.lanes
    yield Use("host_bytes", shard.budget.held, shard.budget.limit)
    yield Use("max_inflight_bytes", stats.inflight_bytes, config.max_inflight_bytes)
    if shard.gpu is not None:
        yield Use("hbm_bytes", shard.gpu.budget.held, shard.gpu.budget.limit)
    if lanes is not None:
        yield Use("lane_bytes", lanes.regions.bytes, config.lane_bytes)
    if log is not None:
        yield Use("log_backlog", log.memory, plan.backlog)
        if config.disk_bytes:
            with suppress(OSError):  # the base is closed
                yield Use("disk_bytes", shard.disk_bytes, config.disk_bytes)


def _private() -> int:
    """Return the resident memory of this process that is no page of a file, in bytes.

    The kernel can drop pages of files. Raises OSError.
    """
    _, resident, shared, *_ = map(int, STATM.read_bytes().split())
    return (resident - shared) * mmap.PAGESIZE
