"""Measure the cost of checkpoints for pushes, and the speed of restore and replay.

cost     Push the standard work in alternating time windows with and without a checkpoint. The cost
         is the share of pushes lost if a checkpoint were taken once per minute. The shard also
         flushes once per window, because the log of a minute would not fit on every disk. A second
         shard flushes twice per window: row "local" is the cost of the additional flush.
restore  Restore a checkpoint of one shard onto an empty shard. Compare with reading its files (from
         the disk, and from the page cache), and with touching as much new memory. A virtual machine
         returns unused memory to its host after some seconds, and gets it back slowly. Therefore
         each step is measured twice: on an idle machine, and right after a process has touched and
         freed twice as much memory.
replay   Start a shard that replays its log.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Report, arguments
from benchmarks.servers import Server
from benchmarks.step import fill
from benchmarks.work import Ids, Work, keys_of, standard_work
from psclient import Client, Table, admin, calls, restores
from psproto import ps_pb2 as pb

DIM = 32
MINUTE = 60.0
CHUNK = 4 << 20  # bytes per read
NEVER = 1e6  # seconds
IDLE_SECONDS = 20.0  # seconds after which the host has reclaimed free memory
TITLES = {  # kinds of checkpoints in the section "cost"
    "none": "none",
    "full": "named, full",
    "incremental": "named, incremental",
    "local": "local, one more",
}


def shard(directory: Path, url: str, *, flush_seconds: float = NEVER) -> Server:
    """Return a server that is not started yet.

    directory      directory for its data and for what it logs
    url            URL under which it stores checkpoints
    flush_seconds  time between flushes (writes of changed rows to disk)
    """
    flags = ["--checkpoint-url", url, "--flush-seconds", str(flush_seconds)]
    return Server(directory, *flags, "--log-keep-bytes", "0")


@contextmanager
def running(server: Server) -> Iterator[Client]:
    """Run a server during a block; yield a client that is connected to it."""
    server.start()
    try:
        with Client([server.address], timeout=120.0) as client:
            yield client
    finally:
        server.stop()


def rate(push: Callable[[int], None], seconds: float, at: list[int]) -> float:
    """Call ``push`` for ``seconds``; return the number of calls per second.

    push  does one push; called with the number of the push
    at    at[0] is the number of the next push; it is incremented
    """
    start, done = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        push(at[0])
        at[0] += 1
        done += 1
    return done / elapsed


def pusher(table: Table, keys: Ids, work: Work) -> Callable[[int], None]:
    """Return a function that pushes step ``i`` of the standard work to a table."""
    steps = standard_work(work, 64)

    def push(i: int) -> None:
        _, distinct, gradients = steps[i % len(steps)]
        table.push(keys[distinct], gradients, step=i)

    return push


def cost(report: Report, directory: Path, work: Work, window: float, rounds: int) -> None:
    """Run the section "cost" of the report.

    directory  directory for all files
    window     seconds per window
    rounds     windows per kind of checkpoint
    """
    url = f"file://{directory}/cost-checkpoints"
    plain = shard(directory / "plain", url, flush_seconds=window)
    local = shard(directory / "local", url, flush_seconds=window / 2)
    keys = keys_of(np.arange(work.rows))
    rates: dict[str, list[float]] = {"none": [], "full": [], "incremental": [], "local": []}
    spent: dict[str, list[float]] = {name: [] for name in rates}
    sizes: dict[str, list[int]] = {name: [] for name in rates}
    with running(plain) as client, running(local) as other:
        pushes = {}
        for name, one in (("plain", client), ("local", other)):
            table = one.create_table("rows", DIM, lr=0.05)
            fill(table, keys)
            pushes[name] = pusher(table, keys, work)
        at = [0]
        for name in ("plain", "local"):
            rate(pushes[name], 2.0, at)
        for i in range(rounds):
            rates["none"].append(rate(pushes["plain"], window, at))
            for kind, base in (("full", None), ("incremental", f"full-{i}")):
                words = (client, f"{kind}-{i}", base, spent[kind], sizes[kind])
                taking = threading.Thread(target=_take, args=words)
                taking.start()
                rates[kind].append(rate(pushes["plain"], window, at))
                taking.join()
            rates["local"].append(rate(pushes["local"], window, at))
            shutil.rmtree(directory / "cost-checkpoints")
    report.section(
        f"cost of a checkpoint per minute, {work.rows:,} rows, dim {DIM}, windows of {window:g} s",
        [_cost_row(kind, rates, spent[kind], sizes[kind], window) for kind in TITLES],
    )


def _cost_row(
    kind: str, rates: dict[str, list[float]], spent: list[float], sizes: list[int], window: float
) -> dict[str, Any]:
    """Return a row of the section "cost".

    kind    kind of checkpoint, a key of TITLES
    rates   pushes per second in each window, by kind
    spent   seconds of each checkpoint
    sizes   bytes of each checkpoint
    window  seconds per window
    """
    none, some = (float(np.median(rates[each])) for each in ("none", kind))
    lost = (none - some) / none * window / MINUTE
    return {
        "checkpoint": TITLES[kind],
        "pushes/s": some,
        "lowest": min(rates[kind]),
        "highest": max(rates[kind]),
        "MB": float(np.median(sizes)) / 1e6 if spent else None,
        "takes s": float(np.median(spent)) if spent else None,
        "% of a minute (<= 5)": None if kind == "none" else 100 * lost,
    }


def _take(
    client: Client, name: str, base: str | None, spent: list[float], sizes: list[int]
) -> None:
    """Take a checkpoint; append its seconds to ``spent`` and its bytes to ``sizes``.

    base  checkpoint that it builds on; None: take a full checkpoint
    """
    start = time.perf_counter()
    sizes.append(admin.checkpoint(client, name, parent=base).bytes)
    spent.append(time.perf_counter() - start)


def restore(report: Report, directory: Path, rows: int) -> None:
    """Run the section "restore" of the report.

    directory  directory for all files
    rows       number of rows of the table
    """
    url = f"file://{directory}/checkpoints"
    source = shard(directory / "source", url)
    with running(source) as client:
        fill(client.create_table("rows", DIM, lr=0.05), keys_of(np.arange(rows)))
        start = time.perf_counter()
        admin.checkpoint(client, "full")
        taken = time.perf_counter() - start
    shutil.rmtree(directory / "source")
    os.sync()  # otherwise later steps wait for what the source wrote
    paths = sorted((directory / "checkpoints").rglob("*.blocks"))
    paths += sorted((directory / "checkpoints").rglob("*.records"))
    size = sum(path.stat().st_size for path in paths)
    disk = size / _seconds(lambda: _each(_read_direct, paths)) / 1e6
    cached = size / _seconds(lambda: _each(_read, paths)) / 1e6
    new = {"take, with nobody pushing": taken}
    new |= _restored(shard(directory / "new", url), rows, lambda: time.sleep(IDLE_SECONDS))
    shutil.rmtree(directory / "new")
    had = _restored(shard(directory / "had", url), rows, lambda: _touch(2 * size))
    time.sleep(IDLE_SECONDS)
    new["memory: touch as much"], had["memory: touch as much"] = _touch(size), _touch(size)
    bound = min(500.0, disk)
    report.section(
        f"restore of one shard, {rows:,} rows, {size / 1e6:,.0f} MB; reading the files:"
        f" {disk:,.0f} MB/s from the disk, {cached:,.0f} MB/s from the page cache",
        [
            {
                "step": name,
                "s": seconds,
                "MB/s": size / seconds / 1e6,
                f"x {bound:.0f} MB/s (>= 1)": size / seconds / 1e6 / bound,
                "memory had before: s": had.get(name),
                "its MB/s": size / had[name] / 1e6 if name in had else None,
                "x": size / had[name] / 1e6 / bound if name in had else None,
            }
            for name, seconds in new.items()
        ],
    )


def _restored(target: Server, rows: int, before: Callable[[], Any]) -> dict[str, float]:
    """Restore the checkpoint "full" onto an empty shard; return the seconds of each step, by name.

    rows    number of rows that the table must have afterwards
    before  called right before each step, outside of its time
    """
    with running(target) as client:
        step, id = pb.RestoreRequest, "0" * 16
        request = pb.PrepareRestoreRequest(name="full", id=id)
        steps: dict[str, Callable[[], Any]] = {
            "verify": lambda: admin.verify(client, "full"),
            "restore: prepare": lambda: calls.on_all(client, "PrepareRestore", request, None),
            "restore: start anew": lambda: _start_anew(client, id),
        }
        spent = {}
        for name, call in steps.items():
            before()
            spent[name] = _seconds(call)
        restores.take_step(client, calls.links(client)[0], id, step.STEP_RELEASE)
        assert client.describe_table("rows").rows == rows
    loaded = float(target.logged("recovered")["seconds"])
    whole = spent["restore: prepare"] + spent["restore: start anew"]
    return {**spent, "  of which loading": loaded, "restore: whole": whole}


def _touch(size: int) -> float:
    """Return the seconds that a new process needs to touch ``size`` bytes of new memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_touch_here, (size,))


def _touch_here(size: int) -> float:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    return _seconds(lambda: array[:: mmap.PAGESIZE].fill(1))


def _start_anew(client: Client, id: str) -> None:
    """Commit a prepared restore; wait until the shard has restarted and loaded the rows."""
    link = calls.links(client)[0]
    for step in (pb.RestoreRequest.STEP_HOLD, pb.RestoreRequest.STEP_COMMIT):
        restores.take_step(client, link, id, step)
    restores.await_phases(client, [pb.RestoreStatus.PHASE_LOADED])


def replay(report: Report, directory: Path, work: Work, size: int) -> None:
    """Run the section "replay" of the report, with a log of about ``size`` bytes.

    directory  directory for all files
    """
    server = shard(directory / "replay", f"file://{directory}/none")
    keys = keys_of(np.arange(work.rows))
    with running(server) as client:
        table = client.create_table("rows", DIM, lr=0.05)
        fill(table, keys)
        push = pusher(table, keys, work)
        i = 0
        while _bytes(server.data / "log") < size:
            for _ in range(20):
                push(i)
                i += 1
    start = time.perf_counter()
    with running(server):
        took = time.perf_counter() - start
    recovered = server.logged("recovered")
    speed = recovered["record_bytes"] / recovered["seconds"] / 1e6
    report.section(
        f"replay of the log, {work.rows:,} rows, dim {DIM}",
        [
            {
                "records": recovered["records"],
                "MB": recovered["record_bytes"] / 1e6,
                "s": recovered["seconds"],
                "whole start s": took,
                "MB/s (>= 200)": speed,
            }
        ],
    )


def _bytes(directory: Path) -> int:
    """Return the size of the log in bytes, without its last segment, which is preallocated."""
    sizes = sorted(path.stat().st_size for path in directory.glob("*.log"))
    return sum(sizes[:-1])


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _each(call: Callable[[Path], None], paths: Sequence[Path]) -> None:
    for path in paths:
        call(path)


def _read(path: Path) -> None:
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _read_direct(path: Path) -> None:
    """Read a file from the disk, bypassing the page cache."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # the file system has no direct reads
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = mmap.mmap(-1, CHUNK)
    try:
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    finally:
        buffer.close()


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables."""
    parser = arguments(__doc__)
    sections = ("cost", "restore", "replay")
    parser.add_argument(
        "--only",
        choices=sections,
        action="append",
        help="Run only this section; may be repeated. Default: all.",
    )
    options = parser.parse_args(words)
    wanted = options.only or sections
    report = Report("checkpoint", options.json)
    rows = 500_000 if options.quick else 5_000_000
    work = Work(rows=rows)
    window, rounds = (5.0, 2) if options.quick else (10.0, 4)
    with ExitStack() as stack:

        def fresh() -> Path:
            return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ps-bench-")))

        if "cost" in wanted:
            cost(report, fresh(), work, window, rounds)
        if "restore" in wanted:
            restore(report, fresh(), rows)
        if "replay" in wanted:
            replay(report, fresh(), work, (300 if options.quick else 2000) << 20)
    report.close()


if __name__ == "__main__":
    main()
