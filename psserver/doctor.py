"""Check whether this machine and these settings suit a server, and say what to do if not.

``psserver doctor`` runs the checks without a server, and a running server runs them for ``psctl
doctor``. No check changes anything, apart from a temporary file in the data directory.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import grpc
import numba
from numba.core import config as numba_config

from psproto import RELEASE, certfiles, cpu, kernelcache, routing
from psproto.kernelcache import KernelCache
from psserver.addresses import is_loopback
from psserver.config import ServerConfig
from psserver.datadir import OWNER, claim
from psserver.errors import NotAShard
from psserver.memory import BASE_BYTES, show
from psserver.security.certificates import invalid_at, paths_of
from psserver.security.certificates import load as load_certificates
from psserver.unusable import ConfigError, unusable
from psserver.warm import warm
from storage.errors import StorageError
from storage.gpu.cuda import INSTALL, probe
from storage.gpu.device import NoDevice
from storage.gpu.gpu import Gpu
from storage.gpu.nvrtc import find_library

FILES = 256  # open files of a server, apart from connections: log, base, checkpoints, libraries
WRITES = 10  # maximum number of writes whose sync to disk is measured
SYNC_SECONDS = 2.0  # time after which no further write is measured
SLOW_SYNC, STUCK_SYNC = 0.05, 1.0  # seconds of a sync that are a warning, and an error
SLOW_NAME = 0.5  # seconds of a look-up of a name that are a warning
LITTLE = 0.1  # part of the disk; a warning if less is free
TIME_ERROR = 5  # result of adjtimex: the clock is not synchronized
RENEW = "renew the certificate; the server reads the new files without a restart"
WARM = "run psserver warm in the image, or as the server's user, with the same NUMBA_ variables"

State = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check.

    check   what was checked, for example "memory"
    state   "ok"; "warning": it works, but not well; "error": it does not work, or not for long
    found   the facts
    advice  what to do; "" if there is nothing to do
    """

    check: str
    state: State
    found: str
    advice: str = ""


def examine(config: ServerConfig, *, running: bool, gpu: Gpu | None = None) -> list[Finding]:
    """Return the results of all checks.

    running  this process is the server, so its kernels are loaded already
    gpu      the GPU that the server uses; None: this is no server, or it uses no GPU
    """
    found = [_release(), _number(config), _memory(config), _files(config), _processor()]
    if cpu.problem() is None:
        found.append(_loaded() if running else _kernels())
    found += _data(config)
    if gpu is not None:
        found.append(_used_gpu(gpu))
    elif config.hbm_bytes:
        found.append(_gpu(config.hbm_bytes))
    if config.advertise:
        found.append(_name(config.advertise))
    found.append(_tls(config))
    return [*found, _clock()]


def _release() -> Finding:
    versions = f"Python {platform.python_version()}, numba {numba.__version__}"
    return Finding("release", "ok", f"{RELEASE}; {versions}, gRPC {grpc.__version__}")


def _number(config: ServerConfig) -> Finding:
    """Check that the server's number is below the number of shards."""
    found = f"shard {config.shard} of {config.shards}"
    if config.surplus:
        return Finding("number", "error", found, str(NotAShard(config.shard, config.shards)))
    return Finding("number", "ok", found)


def _memory(config: ServerConfig) -> Finding:
    """Check that everything together fits into the memory limit of this process."""
    plan = config.memory
    parts = (
        f"tables {show(config.host_bytes)}, requests in flight {show(plan.inflight)}, transport"
        f" {show(plan.transport)}, log {show(plan.backlog)}, psctl {show(plan.tool)}, base"
        f" {show(BASE_BYTES)}"
    )
    parts += f", GPU {show(plan.gpu)}" if plan.gpu else ""
    shared = f", shared by {plan.sharing} shards" if plan.sharing > 1 else ""
    found = f"limit {plan.limit}{shared}: {parts}"
    if config.host_bytes + plan.reserve > plan.part:
        advice = (
            "lower host_bytes or max_inflight_bytes, or raise the limit: the kernel may kill it"
        )
        return Finding("memory", "error", found, advice)
    return Finding("memory", "ok", found)


def _files(config: ServerConfig) -> Finding:
    """Check that max_connections fits into the limit of open files."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{limit} may be open; max_connections is {config.max_connections}"
    if limit != resource.RLIM_INFINITY and limit < config.max_connections + FILES:
        advice = f"raise ulimit -n (up to {most}), or lower max_connections"
        return Finding("open files", "warning", found, advice)
    return Finding("open files", "ok", found)


def _processor() -> Finding:
    """Check that this processor can run the kernels, and that a named one is portable."""
    if problem := cpu.problem():
        return Finding("processor", "error", problem)
    found, name = f"kernels for {cpu.target()}; this machine: {cpu.model()}", cpu.target()
    if numba_config.CPU_NAME and numba_config.CPU_FEATURES is None:
        advice = "set NUMBA_CPU_FEATURES= (empty), or each type of processor compiles them again"
        return Finding("processor", "warning", found, advice)
    if not cpu.known(name):
        advice = "name a level instead, such as x86-64-v3: only levels can be checked at the start"
        return Finding("processor", "warning", found, advice)
    return Finding("processor", "ok", found)


def _loaded() -> Finding:
    """Report how many kernels this server compiled at its start."""
    found = f"{KernelCache.loaded} loaded, {KernelCache.compiled} compiled by this server"
    if KernelCache.compiled:
        return Finding("kernels", "warning", f"{found}, which delayed its start", WARM)
    return Finding("kernels", "ok", found)


def _kernels() -> Finding:
    """Check that a server would find all kernels in the cache. Loads them."""
    start = time.monotonic()
    kernelcache.require()
    try:
        warm()
    except kernelcache.NotCached as error:
        found = f"a start compiles them, which takes up to a minute: {error}"
        return Finding("kernels", "warning", found, WARM)
    seconds = time.monotonic() - start
    return Finding("kernels", "ok", f"{KernelCache.loaded} loaded in {seconds:.1f} s")


def _gpu(limit: int) -> Finding:
    """Check that CuPy finds a GPU, and that the compiler of its kernels is installed.

    limit  the setting hbm_bytes
    """
    found = f"hbm_bytes is {show(limit)}"
    try:
        count = probe().runtime.getDeviceCount()
    except NoDevice as error:
        return Finding("GPU", "error", f"{found}; {error}", "correct this, or set hbm_bytes=0")
    if find_library() is None:
        return Finding("GPU", "error", f"{found}; NVRTC is not installed", INSTALL)
    return Finding("GPU", "ok", f"{found}; CUDA finds {count}, and the server uses the first")


def _used_gpu(gpu: Gpu) -> Finding:
    """Check that the GPU had the memory that rows were to be moved to."""
    used, limit = show(gpu.budget.held), show(gpu.budget.limit)
    found = f"rows take {used} of hbm_bytes, {limit}; the GPU has {show(gpu.device.free)} free"
    if gpu.paused:
        advice = "lower hbm_bytes, or stop the other processes that nvidia-smi shows"
        return Finding("GPU", "warning", f"{found}: no more rows are moved to it for now", advice)
    return Finding("GPU", "ok", found)


def _data(config: ServerConfig) -> Iterator[Finding]:
    """Check the data directory, and the disk that it is on."""
    directory = config.data_dir
    if directory is None:
        advice = "set data_dir, unless the rows may be lost whenever the server stops"
        yield Finding("data directory", "warning", "data_dir is not set", advice)
        return
    existing = next(each for each in (directory, *directory.parents) if each.exists())
    try:
        if (directory / OWNER).exists() and not config.surplus:
            claim(directory, config.shard, routing.even_map(config.shards))
        yield _disk(config, existing)
        yield _sync(existing)
    except (ConfigError, StorageError) as error:
        yield Finding("data directory", "error", str(error))
    except OSError as error:
        yield Finding("data directory", "error", str(unusable(directory, error)))
    else:
        new = "" if existing == directory else ", which the first start creates"
        yield Finding("data directory", "ok", f"{directory}{new}")


def _sync(directory: Path) -> Finding:
    """Measure how long the disk takes to sync a small write."""
    seconds: list[float] = []
    end = time.perf_counter() + SYNC_SECONDS
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        while len(seconds) < WRITES and (start := time.perf_counter()) < end:
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            seconds.append(time.perf_counter() - start)
    middle, slowest = statistics.median(seconds), max(seconds)
    found = f"{middle * 1e3:.2g} ms for a write of 4 KiB, at most {slowest * 1e3:.2g} ms"
    if middle < SLOW_SYNC and slowest < STUCK_SYNC:
        return Finding("fsync", "ok", found)
    advice = "use a faster disk: pushes with durability fsync and flushes wait for it"
    return Finding("fsync", "error" if middle >= STUCK_SYNC else "warning", found, advice)


def _disk(config: ServerConfig, directory: Path) -> Finding:
    """Check the free space, and that the rows and the log may not outgrow the disk."""
    disk = os.statvfs(directory)
    total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    found = f"{show(free)} of {show(total)} free"
    log_bytes = config.log_keep_bytes + 2 * config.segment_bytes
    if free < config.segment_bytes or (disk.f_files and disk.f_favail < FILES):
        files = f", {disk.f_favail} of {disk.f_files} inodes" if disk.f_files else ""
        advice = "free space or enlarge the disk: pushes are refused with DISK_FULL, pulls go on"
        return Finding("disk", "error", found + files, advice)
    if free < LITTLE * total:
        return Finding("disk", "warning", found, "free space or enlarge the disk soon")
    if config.disk_bytes + log_bytes > total:
        found += f"; disk_bytes and the log may take {show(config.disk_bytes + log_bytes)}"
        advice = "lower disk_bytes or log_keep_bytes, or enlarge the disk"
        return Finding("disk", "warning", found, advice)
    return Finding("disk", "ok", found)


def _tls(config: ServerConfig) -> Finding:
    """Check that the files for TLS can be used, and do not expire soon."""
    if not config.tls:
        if is_loopback(config.host):
            return Finding("TLS", "ok", f"off; only this machine reaches host={config.host}")
        advice = "set tls_certificate, tls_key and tls_ca, unless you trust the whole network"
        return Finding("TLS", "warning", "off: the traffic can be read and changed", advice)
    try:
        _, loaded = load_certificates(paths_of(config))
    except ConfigError as error:
        return Finding("TLS", "error", str(error), "correct the file")
    if problem := invalid_at(loaded, time.time()):
        return Finding("TLS", "error", f"tls_certificate: {problem}", RENEW)
    days = (loaded.not_after - time.time()) / 86_400
    found = f"the certificate is for {', '.join(loaded.names)}, and valid for {days:.1f} days"
    if days < certfiles.FEW_DAYS:
        return Finding("TLS", "warning", found, RENEW)
    return Finding("TLS", "ok", found)


def _name(address: str) -> Finding:
    """Look up the host under which clients reach this shard."""
    host, start = address.rpartition(":")[0].strip("[]"), time.monotonic()
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        advice = "correct the setting advertise, or the name server"
        return Finding("name", "error", f"{host} cannot be looked up: {error}", advice)
    seconds = time.monotonic() - start
    found = f"{host} is looked up in {seconds * 1e3:.0f} ms"
    if seconds < SLOW_NAME:
        return Finding("name", "ok", found)
    return Finding("name", "warning", found, "check the name server: clients wait for it")


def _clock(ask: Callable[[], int] | None = None) -> Finding:
    """Check that the kernel knows the clock to be synchronized.

    ask  returns the result of adjtimex; None: ask the kernel
    """
    if (ask or _adjtimex)() == TIME_ERROR:
        advice = (
            "run a time service such as chrony, unless the virtual machine's host sets the clock"
        )
        return Finding("clock", "warning", "not known to be synchronized", advice)
    return Finding("clock", "ok", "synchronized")


def _adjtimex() -> int:
    """Return the state of the kernel's clock. Changes nothing: all modes are 0."""
    return int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)))
