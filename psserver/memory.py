"""Find the memory limit of this process, and divide it among its uses.

The limit is the smallest of: physical memory; the limits of this process's cgroup and of all groups
that contain it (cgroup v1 and v2); the commit limit, if the kernel does not overcommit; ``ulimit
-d`` and ``ulimit -v``. The kernel kills a process that exceeds the limit of a cgroup, so the
default of host_bytes leaves room for everything else:

    limit / colocated shards  =  base        the process itself: interpreter, kernels, gRPC
                              +  in flight   max_inflight_bytes
                              +  transport   messages received by gRPC and not yet admitted
                              +  backlog     log records not yet written, with their rows
                              +  tool        psctl, run in the server's container by an operator
                              +  gpu         CUDA and page-locked memory, with hbm_bytes only
                              +  slack       a tenth: heap, tombstones, sessions, pages of files
                              +  tables      host_bytes

Colocated shards are the servers on the same machine or in the same container. The limits of
``ulimit`` hold for each process alone, so colocated shards do not divide them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# Memory of a server without tables. Measured on x86-64 Linux, Python 3.11: 95 MiB private memory
# with cached kernels, 222 MiB after compiling all of them. Another 105 MiB are mapped libraries,
# whose pages the kernel can reclaim.
BASE_BYTES = 256 << 20
# Memory for one psctl that runs in the same container, whose limit it shares. Measured: 57 MiB of
# private memory for status, doctor, table, analyze, checkpoint, verify, repair and prune.
TOOL_BYTES = 64 << 20
# Host memory of a server that uses a GPU: page-locked memory for batches, CuPy and CUDA. Measured
# with an H100 and CUDA 13: 24 MiB and 157 MiB of private memory, whatever hbm_bytes is. Another 256
# MiB are mapped libraries.
GPU_BYTES = 256 << 20
ADDRESS_BYTES = 3 << 30  # address space of an idle server: stacks, heaps, reserved ranges
ADDRESS_PARTS = 4  # bytes of address space per byte of a table: reserved ranges, mapped files
DATA_BYTES, DATA_PARTS = 512 << 20, 2  # the same for private memory, which ulimit -d limits
SLACK = 10  # slack is 1 / SLACK of what remains after the other uses
LEAST_TABLES = 16 << 20  # minimum memory for tables, in bytes; with less, the server does not start
LEAST_INFLIGHT, MOST_INFLIGHT = 16 << 20, 1 << 30  # bounds of the default max_inflight_bytes
MOST_BACKLOG = 256 << 20  # maximum memory for the backlog, in bytes
NO_LIMIT = 1 << 60  # bytes; cgroup v1 reports a number larger than this if there is no limit


@dataclass(frozen=True, slots=True)
class Limit:
    """Number of bytes that a process may use, and where this limit was found."""

    bytes: int
    source: str  # for messages, for example "physical memory"
    of_process: bool = False  # True: holds for each process alone; False: processes share it

    def part(self, colocated: int) -> int:
        """Return how many bytes of this limit each server may use.

        colocated  number of servers on this machine or in this container
        """
        return self.bytes if self.of_process else self.bytes // colocated

    def __str__(self) -> str:
        return f"{show(self.bytes)} ({self.source})"


@dataclass(frozen=True, slots=True)
class Plan:
    """Division of one server's share of the memory limit; all sizes in bytes."""

    limit: Limit
    colocated: int  # number of servers on this machine or in this container
    inflight: int  # requests in flight and their replies
    transport: int  # messages received by gRPC and not yet admitted
    gpu: int = 0  # CUDA and page-locked memory; 0: the server uses no GPU

    @property
    def part(self) -> int:
        """This server's share of the limit, in bytes."""
        return self.limit.part(self.colocated)

    @property
    def sharing(self) -> int:
        """Number of servers that divide the limit."""
        return 1 if self.limit.of_process else self.colocated

    @property
    def backlog(self) -> int:
        """Maximum size of the log records that wait to be written to disk, in bytes."""
        return min(self.part // 16, MOST_BACKLOG)

    @property
    def tool(self) -> int:
        """This server's share of the memory for one psctl in the same container, in bytes.

        Less, down to 0, if the tables would otherwise get less than LEAST_TABLES.
        """
        if self.limit.of_process:
            return 0
        least = LEAST_TABLES * SLACK // (SLACK - 1) + 1  # with their slack
        return max(0, min(TOOL_BYTES // self.colocated, self.part - self._fixed - least))

    @property
    def _fixed(self) -> int:
        """Bytes that a server needs at least, apart from tables."""
        return BASE_BYTES + self.inflight + self.transport + self.backlog + self.gpu

    @property
    def reserve(self) -> int:
        """Bytes of this server's share for everything except tables and slack."""
        return self._fixed + self.tool

    @property
    def tables(self) -> int:
        """Bytes left for tables; negative if the limit is too small."""
        rest = self.part - self.reserve
        return rest - max(rest, 0) // SLACK

    def problem(self) -> str | None:
        """Return the error message if too little is left for tables; None if the limit suffices."""
        if self.tables >= LEAST_TABLES:
            return None
        shared = f", which {self.sharing} shards share" if self.sharing > 1 else ""
        gpu = f", {show(self.gpu)} for CUDA" if self.gpu else ""
        return (
            f"no memory is left for tables: the limit is {self.limit}{shared}; a server needs"
            f" {show(BASE_BYTES)} itself{gpu}, {show(self.inflight)} for requests in flight,"
            f" {show(self.transport)} for messages that arrive and {show(self.backlog)} for the"
            " log; raise the limit, or lower max_inflight_bytes and max_message_bytes, or set"
            " host_bytes"
        )


def default_inflight(limit: Limit, colocated: int, max_message_bytes: int) -> int:
    """Return the default of max_inflight_bytes: an eighth of the server's share of the limit.

    colocated  number of servers on this machine or in this container

    The result is at most 1 GiB and at least 16 MiB. It is raised to max_message_bytes if that is
    larger, because the largest messages could otherwise never be admitted.
    """
    part = limit.part(colocated) // 8
    return max(min(part, MOST_INFLIGHT), LEAST_INFLIGHT, max_message_bytes)


def transport_bytes(max_message_bytes: int, inflight: int) -> int:
    """Return the maximum number of bytes that gRPC may have received for messages that the server
    has not yet admitted.

    inflight  max_inflight_bytes; incomplete messages may take this many bytes before the server
              closes connections

    The result is at least twice max_message_bytes, because a message exists twice while gRPC passes
    it to the server.
    """
    return max(2 * max_message_bytes, inflight, LEAST_INFLIGHT)


def memory_limit(root: Path = Path("/"), colocated: int = 1) -> Limit:
    """Return, of all memory limits that hold for this process, the one that allows the fewest bytes
    per server.

    root       directory that contains proc and sys; tests use a different one
    colocated  number of servers on this machine or in this container
    """
    return min(_limits(root), key=lambda limit: limit.part(colocated))


def show(size: int) -> str:
    """Return a size in bytes as text with a unit, for example "1.5 GiB"."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} bytes"


def _limits(root: Path) -> Iterator[Limit]:
    """Yield all memory limits that hold for this process.

    root  directory that contains proc and sys
    """
    proc = root / "proc"
    facts = _meminfo(_text(proc / "meminfo"))
    yield Limit(facts.get("MemTotal", NO_LIMIT), "physical memory")
    if _text(proc / "sys/vm/overcommit_memory").strip() == "2" and "CommitLimit" in facts:
        yield Limit(facts["CommitLimit"], "CommitLimit in /proc/meminfo, vm.overcommit_memory=2")
    yield from _resource_limits(_text(proc / "self/limits"))
    mounts = list(_cgroup_mounts(_text(proc / "self/mountinfo")))
    for line in _text(proc / "self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        for mount in mounts:
            if mount.version == 2 and number == "0" and not controllers:
                yield from _walk(root, mount, group, ("memory.max", "memory.high"))
            if mount.version == 1 and "memory" in controllers.split(","):
                yield from _walk(root, mount, group, ("memory.limit_in_bytes",))


def _meminfo(text: str) -> dict[str, int]:
    """Return a dict from name to bytes, for example {"MemTotal": 8589934592}.

    text  contents of /proc/meminfo
    """
    found = re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)
    return {name: int(size) << 10 for name, size in found}


def _resource_limits(text: str) -> Iterator[Limit]:
    """Yield the limits of ``ulimit -d`` (private memory) and ``ulimit -v`` (address space).

    text  contents of /proc/self/limits

    The kernel also counts memory that is reserved but not used. So the yielded limits are smaller
    than the numbers in the file.
    """
    if data := re.search(r"^Max data size\s+(\d+)", text, re.M):
        usable = max(int(data[1]) - DATA_BYTES, 0) // DATA_PARTS
        source = f"RLIMIT_DATA, ulimit -d: {show(int(data[1]))} of private memory"
        yield Limit(usable, source, of_process=True)
    if space := re.search(r"^Max address space\s+(\d+)", text, re.M):
        usable = max(int(space[1]) - ADDRESS_BYTES, 0) // ADDRESS_PARTS
        source = f"RLIMIT_AS, ulimit -v: {show(int(space[1]))} of address space"
        yield Limit(usable, source, of_process=True)


@dataclass(frozen=True, slots=True)
class _Mount:
    """A mounted cgroup hierarchy: its group ``root`` is visible as the directory ``point``."""

    version: int  # of cgroups: 1 or 2
    root: PurePosixPath
    point: PurePosixPath


def _cgroup_mounts(text: str) -> Iterator[_Mount]:
    """Yield the mounted cgroup hierarchies that limit memory.

    text  contents of /proc/self/mountinfo, with lines of the form
          ``ID PARENT DEVICE ROOT POINT ... - TYPE SOURCE OPTIONS``
    """
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        root, point = (PurePosixPath(_unescaped(field)) for field in fields[3:5])
        if kinds[0] == "cgroup2":
            yield _Mount(2, root, point)
        elif kinds[0] == "cgroup" and "memory" in kinds[2].split(","):
            yield _Mount(1, root, point)


def _unescaped(field: str) -> str:
    """Replace octal escapes in a field of /proc/self/mountinfo: ``\\040`` is a space."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)


def _walk(root: Path, mount: _Mount, group: str, files: tuple[str, ...]) -> Iterator[Limit]:
    """Yield the limits of a cgroup and of all groups that contain it, as far as they are mounted.

    root   directory that contains proc and sys
    group  path of the group in its hierarchy, from /proc/self/cgroup
    files  names of the files that contain a limit, for example "memory.max"

    In a container, ``group`` may be outside the mounted part of the hierarchy. Then only the limits
    of the top directory of the mount are yielded.
    """
    path = PurePosixPath(group)
    inside = path.is_relative_to(mount.root) and ".." not in path.parts
    below = path.relative_to(mount.root).parts if inside else ()
    for depth in range(len(below), -1, -1):
        directory = mount.point.joinpath(*below[:depth])
        for name in files:
            text = _text(root / str(directory).lstrip("/") / name).strip()
            if text.isdigit() and int(text) < NO_LIMIT:
                yield Limit(int(text), f"cgroup, {directory / name}")
    if mount.version == 1:
        yield from _above_the_mount(root, mount.point.joinpath(*below))


def _above_the_mount(root: Path, directory: PurePosixPath) -> Iterator[Limit]:
    """Yield the smallest limit of a cgroup (version 1) and of all groups that contain it.

    root       directory that contains proc and sys
    directory  path of the group; its file memory.stat has the limit, which includes those of groups
               that are not mounted
    """
    path = directory / "memory.stat"
    text = _text(root / str(path).lstrip("/"))
    if found := re.search(r"^hierarchical_memory_limit (\d+)$", text, re.M):
        size = int(found[1])
        if size < NO_LIMIT:
            yield Limit(size, f"cgroup, hierarchical_memory_limit in {path}")


def _text(path: Path) -> str:
    """Return the text of a file; "" if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
