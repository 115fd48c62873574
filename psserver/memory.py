"""Find the memory limit of this process, and divide it.

The limit is the least of: physical memory, the cgroup of this process and every group above it
(v1 and v2), the commit limit where the kernel does not overcommit, and ``ulimit -d`` and ``-v``.
A process that exceeds a cgroup's limit is killed, so the default budget of the tables leaves room
for everything else:

    limit / colocated shards  =  base        the process itself: interpreter, kernels, gRPC
                              +  in flight   max_inflight_bytes
                              +  transport   messages that gRPC has received and nobody has admitted
                              +  backlog     log records and rows in them that are not written yet
                              +  slack       a tenth: heap, tombstones, sessions, pages of files
                              +  tables      memory_bytes
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# Of a server without tables. Measured on x86-64 Linux with Python 3.11: 95 MiB of private memory
# with cached kernels, 222 MiB after compiling all of them. Another 105 MiB are mapped libraries,
# whose pages the kernel can reclaim.
BASE_BYTES = 256 << 20
ADDRESS_BYTES = 3 << 30  # of address space of an idle server: stacks, heaps, reserved ranges
ADDRESS_PARTS = 4  # of address space per byte of a table: tables reserve it, and a file is mapped
DATA_BYTES, DATA_PARTS = 512 << 20, 2  # the same for private memory, which ulimit -d limits
SLACK = 10  # a tenth of what remains
LEAST_TABLES = 16 << 20  # bytes; a server with less is of no use
LEAST_INFLIGHT, MOST_INFLIGHT = 16 << 20, 1 << 30  # bytes, of the default
MOST_BACKLOG = 256 << 20  # bytes
NO_LIMIT = 1 << 60  # v1 writes a huge number where there is none


@dataclass(frozen=True, slots=True)
class Limit:
    """Bytes that a process may use, and where that is written."""

    bytes: int
    source: str

    def __str__(self) -> str:
        return f"{show(self.bytes)} ({self.source})"


@dataclass(frozen=True, slots=True)
class Plan:
    """How one server's part of the limit is divided, in bytes."""

    limit: Limit
    colocated: int  # servers that share the limit
    inflight: int
    transport: int

    @property
    def part(self) -> int:
        """Return this server's part of the limit."""
        return self.limit.bytes // self.colocated

    @property
    def backlog(self) -> int:
        """Return the most bytes that may wait for the log's disk."""
        return min(self.part // 16, MOST_BACKLOG)

    @property
    def reserve(self) -> int:
        """Return the part that no table may take, slack aside."""
        return BASE_BYTES + self.inflight + self.transport + self.backlog

    @property
    def tables(self) -> int:
        """Return what is left for tables; it may be negative."""
        rest = self.part - self.reserve
        return rest - max(rest, 0) // SLACK

    def problem(self) -> str | None:
        """Return why no server fits into the limit, or None."""
        if self.tables >= LEAST_TABLES:
            return None
        shared = f", which {self.colocated} shards share" if self.colocated > 1 else ""
        return (
            f"no memory is left for tables: the limit is {self.limit}{shared}; a server needs"
            f" {show(BASE_BYTES)} itself, {show(self.inflight)} for requests in flight,"
            f" {show(self.transport)} for messages that arrive and {show(self.backlog)} for the"
            " log; raise the limit, or lower max_inflight_bytes and max_message_bytes, or set"
            " memory_bytes"
        )


def default_inflight(limit: Limit, colocated: int, max_message_bytes: int) -> int:
    """Return the default of max_inflight_bytes: an eighth of the memory, 1 GiB at most.

    At least one message, as a larger one could never be admitted.
    """
    part = limit.bytes // colocated // 8
    return max(min(part, MOST_INFLIGHT), LEAST_INFLIGHT, max_message_bytes)


def transport_bytes(max_message_bytes: int, inflight: int) -> int:
    """Return what gRPC may have received of messages that are not admitted yet.

    As much as may be in flight: connections with more unfinished messages are closed. And two whole
    messages at least, as a message exists twice while it is handed over.
    """
    return max(2 * max_message_bytes, inflight, LEAST_INFLIGHT)


def memory_limit(root: Path = Path("/")) -> Limit:
    """Return the least limit that holds for this process; ``root`` holds its proc and sys."""
    return min(_limits(root), key=lambda limit: limit.bytes)


def show(size: int) -> str:
    """Return a size as people write it: 1.5 GiB."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} bytes"


def _limits(root: Path) -> Iterator[Limit]:
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
    """Return the sizes in /proc/meminfo, in bytes."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)
    return {name: int(size) << 10 for name, size in found}


def _resource_limits(text: str) -> Iterator[Limit]:
    """Read the soft limits in /proc/self/limits; both count reserved memory as well."""
    if data := re.search(r"^Max data size\s+(\d+)", text, re.M):
        usable = max(int(data[1]) - DATA_BYTES, 0) // DATA_PARTS
        yield Limit(usable, f"RLIMIT_DATA, ulimit -d: {show(int(data[1]))} of private memory")
    if space := re.search(r"^Max address space\s+(\d+)", text, re.M):
        usable = max(int(space[1]) - ADDRESS_BYTES, 0) // ADDRESS_PARTS
        yield Limit(usable, f"RLIMIT_AS, ulimit -v: {show(int(space[1]))} of address space")


@dataclass(frozen=True, slots=True)
class _Mount:
    """A mounted hierarchy of cgroups: ``root`` of the hierarchy is seen at ``point``."""

    version: int
    root: PurePosixPath
    point: PurePosixPath


def _cgroup_mounts(text: str) -> Iterator[_Mount]:
    """Read /proc/self/mountinfo: ID PARENT DEVICE ROOT POINT ... - TYPE SOURCE OPTIONS."""
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
    """Return a field of mountinfo: the kernel writes spaces as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)


def _walk(root: Path, mount: _Mount, group: str, files: tuple[str, ...]) -> Iterator[Limit]:
    """Read the limits of a group and of all groups above it that are mounted.

    In a container the mount may show only the last part of the group's path, or the path may be
    relative to a namespace. For a path outside the mount, the top of the mount counts.
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
    """Read what v1 reports of the groups above, even of those that are not mounted."""
    path = directory / "memory.stat"
    text = _text(root / str(path).lstrip("/"))
    if found := re.search(r"^hierarchical_memory_limit (\d+)$", text, re.M):
        size = int(found[1])
        if size < NO_LIMIT:
            yield Limit(size, f"cgroup, hierarchical_memory_limit in {path}")


def _text(path: Path) -> str:
    """Return the text of a file; nothing where it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
