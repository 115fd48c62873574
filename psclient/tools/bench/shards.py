"""What the shards of a cluster use during a run: processor time, and time of the engine thread.

The figures are those of InfoService.GetStatus, before and after the run.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from psclient import calls
from psclient.client import Client
from psclient.errors import PsError
from psproto import ps_pb2 as pb


@dataclass(frozen=True, slots=True)
class ShardUse:
    """Mean use of one shard between two moments."""

    cores: float  # processor time per second of the whole process
    engine: float  # share of the time in which the engine thread, which owns the rows, was busy


@dataclass(frozen=True, slots=True)
class Host:
    """The machine of the load generator."""

    processor: str
    cores: int  # that this process may use
    memory: int  # bytes
    system: str
    python: str


class Watch:
    """Measures the use of all shards and of this machine, from its creation on."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._before = _status(client)
        self._times = _processor_times()

    def machine(self) -> float:
        """Return the share of the processors of this machine that were busy; 0.0: not known."""
        idle, whole = (new - old for new, old in zip(_processor_times(), self._times, strict=True))
        return 1 - idle / whole if whole else 0.0

    def shards(self) -> list[ShardUse]:
        """Return the use of each shard; []: a shard does not report it, or was restarted."""
        found = []
        after = _status(self._client)
        for first, last in zip(self._before, after, strict=False):
            seconds = last.uptime_seconds - first.uptime_seconds
            if first.start != last.start or seconds <= 0:
                return []
            cores = (last.cpu_seconds - first.cpu_seconds) / seconds
            engine = (last.engine.busy_seconds - first.engine.busy_seconds) / seconds
            found.append(ShardUse(cores, engine))
        return found


def _status(client: Client) -> list[pb.GetStatusResponse]:
    """Return the status of each shard; []: a shard does not report it."""
    request, answer = pb.GetStatusRequest(), pb.GetStatusResponse
    try:
        return [
            calls.call(client, link, "GetStatus", request, answer, service="InfoService")
            for link in calls.links(client)
        ]
    except PsError:
        return []


def _processor_times() -> tuple[int, int]:
    """Return the idle time of all processors since the system started, and their whole time."""
    try:
        line = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return 0, 0
    times = [int(each) for each in line.split()[1:9]]
    return times[3] + times[4], sum(times)


def host() -> Host:
    """Return the facts of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Host(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory=memory,
        system=f"{platform.system()} {platform.release()}",
        python=sys.version.split()[0],
    )


def _processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
