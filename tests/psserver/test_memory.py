"""The memory limit of a process, over trees of /proc and /sys as kernels show them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from psserver.config import load
from psserver.memory import (
    ADDRESS_BYTES,
    ADDRESS_PARTS,
    BASE_BYTES,
    DATA_BYTES,
    DATA_PARTS,
    GPU_BYTES,
    LEAST_TABLES,
    TOOL_BYTES,
    Limit,
    Plan,
    default_inflight,
    memory_limit,
    show,
)
from storage.gpu.gpu import PINNED_BYTES

MIB, GIB = 1 << 20, 1 << 30
PHYSICAL = 64 * GIB
V2 = "30 24 0:26 {root} {point} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "33 28 0:29 {root} {point} rw,nosuid - cgroup cgroup rw,memory"
UNLIMITED_V1 = "9223372036854771712"


def tree(root: Path, files: dict[str, str]) -> Path:
    """Write files below ``root``, and a /proc/meminfo unless they have one."""
    memory = f"MemTotal:       {PHYSICAL >> 10} kB\nCommitLimit:    {GIB >> 10} kB\n"
    for name, text in {"proc/meminfo": memory, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(group: str, root: str = "/", point: str = "/sys/fs/cgroup") -> dict[str, str]:
    return {
        "proc/self/cgroup": f"0::{group}\n",
        "proc/self/mountinfo": V2.format(root=root, point=point) + "\n",
    }


def v1(group: str, root: str = "/", point: str = "/sys/fs/cgroup/memory") -> dict[str, str]:
    return {
        "proc/self/cgroup": f"9:cpu,cpuacct:/elsewhere\n4:memory:{group}\n0::/\n",
        "proc/self/mountinfo": V1.format(root=root, point=point) + "\n",
    }


CASES: list[tuple[str, dict[str, str], int, str]] = [
    ("no cgroup at all", {}, PHYSICAL, "physical memory"),
    (
        "v2: the own group",
        {**v2("/a/b"), "sys/fs/cgroup/a/b/memory.max": f"{GIB}\n"},
        GIB,
        "cgroup, /sys/fs/cgroup/a/b/memory.max",
    ),
    (
        "v2: a group above, as systemd's slices and SLURM's jobs",
        {
            **v2("/system.slice/job_1/step_0/task_0"),
            "sys/fs/cgroup/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/system.slice/job_1/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/system.slice/job_1/step_0/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/job_1/step_0/task_0/memory.max": "max\n",
        },
        2 * GIB,
        "cgroup, /sys/fs/cgroup/system.slice/job_1/memory.max",
    ),
    (
        "v2: memory.high slows a process down to a stop",
        {
            **v2("/a"),
            "sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/a/memory.high": f"{3 * GIB}\n",
        },
        3 * GIB,
        "cgroup, /sys/fs/cgroup/a/memory.high",
    ),
    (
        "v2: a namespace, whose root is the own group",
        {**v2("/"), "sys/fs/cgroup/memory.max": f"{GIB}\n"},
        GIB,
        "cgroup, /sys/fs/cgroup/memory.max",
    ),
    (
        "v2: no namespace, and the mount shows the container's part alone",
        {**v2("/docker/1f", root="/docker/1f"), "sys/fs/cgroup/memory.max": f"{GIB}\n"},
        GIB,
        "cgroup, /sys/fs/cgroup/memory.max",
    ),
    (
        "v2: no namespace, and a group below the container's",
        {
            **v2("/docker/1f/x", root="/docker/1f"),
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/x/memory.max": f"{GIB}\n",
        },
        GIB,
        "cgroup, /sys/fs/cgroup/x/memory.max",
    ),
    (
        "v2: a process outside the namespace's root",
        {**v2("/../other"), "sys/fs/cgroup/memory.max": f"{GIB}\n"},
        GIB,
        "cgroup, /sys/fs/cgroup/memory.max",
    ),
    (
        "v2: mounted elsewhere, a space in its path",
        {**v2("/a", point="/mnt/c\\040g"), "mnt/c g/a/memory.max": f"{GIB}\n"},
        GIB,
        "cgroup, /mnt/c g/a/memory.max",
    ),
    (
        "v1: the own group",
        {
            **v1("/a/b"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{UNLIMITED_V1}\n",
            "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": f"{GIB}\n",
        },
        GIB,
        "cgroup, /sys/fs/cgroup/memory/a/b/memory.limit_in_bytes",
    ),
    (
        "v1: a group above",
        {
            **v1("/slurm/uid_1/job_2/step_0"),
            "sys/fs/cgroup/memory/slurm/uid_1/job_2/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/slurm/uid_1/job_2/step_0/memory.limit_in_bytes": UNLIMITED_V1,
        },
        2 * GIB,
        "cgroup, /sys/fs/cgroup/memory/slurm/uid_1/job_2/memory.limit_in_bytes",
    ),
    (
        "v1: a container that sees the host's path",
        {
            **v1("/docker/1f", root="/docker/1f"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
        },
        GIB,
        "cgroup, /sys/fs/cgroup/memory/memory.limit_in_bytes",
    ),
    (
        "v1: a group above that is not mounted",
        {
            **v1("/docker/1f", root="/docker/1f"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
            "sys/fs/cgroup/memory/memory.stat": f"cache 1\nhierarchical_memory_limit {GIB}\n",
        },
        GIB,
        "cgroup, hierarchical_memory_limit in /sys/fs/cgroup/memory/memory.stat",
    ),
    (
        "v1 and v2 together: the limit is v1's",
        {
            "proc/self/cgroup": "4:memory:/a\n0::/b\n",
            "proc/self/mountinfo": V1.format(root="/", point="/sys/fs/cgroup/memory")
            + "\n"
            + V2.format(root="/", point="/sys/fs/cgroup/unified")
            + "\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{GIB}\n",
        },
        GIB,
        "cgroup, /sys/fs/cgroup/memory/a/memory.limit_in_bytes",
    ),
    (
        "no overcommit",
        {"proc/sys/vm/overcommit_memory": "2\n"},
        GIB,
        "CommitLimit in /proc/meminfo, vm.overcommit_memory=2",
    ),
    (
        "ulimit -d",
        {"proc/self/limits": f"Max data size             {GIB}           unlimited       bytes\n"},
        (GIB - DATA_BYTES) // DATA_PARTS,
        "RLIMIT_DATA, ulimit -d: 1 GiB of private memory",
    ),
    (
        "ulimit -v",
        {"proc/self/limits": f"Max address space         {8 * GIB}    unlimited     bytes\n"},
        (8 * GIB - ADDRESS_BYTES) // ADDRESS_PARTS,
        "RLIMIT_AS, ulimit -v: 8 GiB of address space",
    ),
    (
        "no ulimit",
        {"proc/self/limits": "Max address space         unlimited     unlimited     bytes\n"},
        PHYSICAL,
        "physical memory",
    ),
    (
        "damaged files are no limits",
        {**v2("/a"), "sys/fs/cgroup/a/memory.max": "what\n", "proc/self/limits": "?"},
        PHYSICAL,
        "physical memory",
    ),
]


@pytest.mark.parametrize(
    ("files", "size", "source"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_the_least_limit_counts_and_its_source_is_named(
    tmp_path: Path, files: dict[str, str], size: int, source: str
) -> None:
    of_process = source.startswith("RLIMIT")
    assert memory_limit(tree(tmp_path, files)) == Limit(size, source, of_process)


@pytest.mark.parametrize(
    ("colocated", "part", "source"),
    [(1, 5 * GIB // 4, "RLIMIT_AS"), (4, 5 * GIB // 4, "RLIMIT_AS"), (8, GIB, "cgroup")],
)
def test_colocated_servers_do_not_divide_what_ulimit_gives_to_each(
    tmp_path: Path, colocated: int, part: int, source: str
) -> None:
    limits = f"Max address space         {8 * GIB}    unlimited     bytes\n"
    files = {**v2("/a"), "sys/fs/cgroup/a/memory.max": f"{8 * GIB}\n", "proc/self/limits": limits}
    limit = memory_limit(tree(tmp_path, files), colocated)
    assert limit.source.startswith(source)
    assert Plan(limit=limit, colocated=colocated, inflight=0, transport=0).part == part


def test_this_machine_has_a_limit() -> None:
    limit = memory_limit()
    assert MIB < limit.bytes < 1 << 50
    assert limit.source


def plan(limit: int, **changes: Any) -> Plan:
    settings = {"colocated": 1, "inflight": GIB, "transport": 128 * MIB}
    return Plan(limit=Limit(limit, "test"), **{**settings, **changes})


@pytest.mark.parametrize("colocated", [1, 2, 7])
def test_colocated_servers_together_stay_below_the_limit(colocated: int) -> None:
    each = plan(PHYSICAL, colocated=colocated)
    parts = each.tables, BASE_BYTES, each.inflight, each.transport, each.backlog, each.tool
    total = colocated * sum(parts)
    assert 0.85 * PHYSICAL < total < PHYSICAL
    assert each.problem() is None


def test_a_limit_that_leaves_nothing_is_refused_with_all_parts_of_it() -> None:
    assert plan(2 * GIB, colocated=2, inflight=GIB).problem() == (
        "no memory is left for tables: the limit is 2 GiB (test), which 2 shards share; a server"
        " needs 256 MiB itself, 1 GiB for requests in flight, 128 MiB for messages that arrive and"
        " 64 MiB for the log; raise the limit, or lower max_inflight_bytes and max_message_bytes,"
        " or set host_bytes"
    )


def test_a_server_with_a_gpu_leaves_memory_to_cuda() -> None:
    """Page-locked memory is a part of it, which never grows."""
    without, using = plan(8 * GIB), plan(8 * GIB, gpu=GPU_BYTES)
    assert using.reserve == without.reserve + GPU_BYTES
    assert without.tables - using.tables == pytest.approx(GPU_BYTES * 9 / 10, abs=1)
    assert GPU_BYTES > 2 * PINNED_BYTES
    assert "256 MiB itself, 256 MiB for CUDA, " in (plan(GIB, gpu=GPU_BYTES).problem() or "")


def test_only_a_server_with_hbm_bytes_plans_memory_for_cuda() -> None:
    assert load([]).memory.gpu == 0
    assert load(["--hbm-bytes", "33554432"]).memory.gpu == GPU_BYTES
    assert load(["--hbm-bytes", "33554432"]).host_bytes < load([]).host_bytes


def test_a_small_server_starts_without_memory_for_psctl() -> None:
    """Its tables get the least memory first, then psctl gets its part, then the tables the rest."""
    sizes = range(300 * MIB, 600 * MIB, MIB // 2)
    plans = [plan(size, inflight=64 * MIB, transport=128 * MIB) for size in sizes]
    first = next(at for at, each in enumerate(plans) if each.problem() is None)
    assert plans[first].tool < MIB
    assert plans[first - 1].tool == 0
    for one, next_ in pairwise(plans):
        assert one.tool <= next_.tool <= TOOL_BYTES
        assert one.tables <= next_.tables
    assert all(each.problem() is None for each in plans[first:])
    assert plans[-1].tool == TOOL_BYTES


def test_an_operator_can_run_psctl_in_the_container_of_a_server() -> None:
    """It shares the limit of the container, but not the limit of a process."""
    assert plan(4 * GIB).tool == TOOL_BYTES
    assert plan(8 * GIB, colocated=4).tool == TOOL_BYTES // 4
    assert Plan(Limit(GIB, "ulimit", of_process=True), 1, GIB // 8, GIB // 8).tool == 0


def test_by_default_a_small_container_has_room_for_tables() -> None:
    limit = Limit(768 * MIB, "test")
    made = plan(limit.bytes, inflight=default_inflight(limit, 1, 64 * MIB))
    assert made.problem() is None
    assert made.tables > LEAST_TABLES


@pytest.mark.parametrize(
    ("limit", "message", "default"),
    [
        (80 * MIB, MIB, 16 * MIB),
        (256 * MIB, 64 * MIB, 64 * MIB),
        (1600 * MIB, 64 * MIB, 200 * MIB),
        (64 * GIB, 64 * MIB, GIB),
        (GIB, GIB, GIB),
    ],
)
def test_by_default_the_largest_message_may_be_in_flight(
    limit: int, message: int, default: int
) -> None:
    assert default_inflight(Limit(limit, "test"), 1, message) == default


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (GIB, "1 GiB")]
)
def test_sizes_are_shown_as_people_write_them(size: int, text: str) -> None:
    assert show(size) == text
