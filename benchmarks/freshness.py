"""Measure how soon followers see pushes, what subscribers cost, and how many bytes they receive.

fresh    Push 50,000 changed rows per second to four followers, each a process. One follower is
         stopped (SIGSTOP) during the middle third of the time. The latency of a push is the time
         from its reply until the follower's ``pull`` returns its rows. The limit is the time from
         the reply until the push is on disk, because only durable versions are streamed.
stopped  Push the standard work at full speed, in turns with 0, 1 and 16 subscribers that do not
         read. Measure pushes per second and the memory of the server.
bytes    Update 1 % of a table for a minute, and count the bytes sent to three subscribers: one that
         follows all the time, one that was away and then gets merged changes, and one that was away
         until the log was truncated (it gets a catch-up).
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.followers import FOLLOWERS, Followers, watching_disk
from benchmarks.report import Report, arguments
from benchmarks.servers import cpu, free_ports, rss, wait_until_ready
from benchmarks.step import fill
from benchmarks.work import Ids, Work, keys_of, standard_work
from psclient import Client, Subscriber, Table

DIM = 32
RATE = 50_000  # changed rows per second
TARGET_MS = 50.0
ROW = 8 + 4 * DIM  # bytes of a key and its embedding
NEVER = "1000000"  # seconds
TITLES = {  # kinds of subscribers in the section "bytes"
    "live": "follows, every change",
    "coalesced": "was away, newest values of 32 MB of log at a time",
    "catch-up": "was away, the log has been truncated: catch-up",
}


class Server(NamedTuple):
    """A server process that runs the only shard of a cluster, with a log."""

    address: str  # "host:port"
    metrics: int  # port of its metrics
    pid: int  # process id


@contextmanager
def serving(directory: Path, *flags: str) -> Iterator[Server]:
    """Run a server process during a block.

    directory  its data directory
    flags      additional options of ``psserver serve``
    """
    directory.mkdir(parents=True, exist_ok=True)
    port = free_ports(2)
    command = [sys.executable, "-m", "psserver", "serve", "--port", str(port)]
    command += ["--metrics-port", str(port + 1), "--data-dir", str(directory), *flags]
    with (directory.parent / f"{directory.name}.err").open("ab") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True)
    try:
        wait_until_ready(process)
        yield Server(f"127.0.0.1:{port}", port + 1, process.pid)
    finally:
        process.terminate()
        process.wait(60)


# ---- fresh


class Pushed(NamedTuple):
    """Result of ``push_at``."""

    acknowledged: NDArray[np.float64]  # when each push was answered, in monotonic seconds
    late: float  # how far the pusher was behind its schedule at the end, in seconds
    rows: int  # rows pushed


def push_at(
    table: Table, keys: Ids, work: Work, seconds: float, level: Any, stop_at: dict[float, Any]
) -> Pushed:
    """Push RATE rows per second to a table, for ``seconds``.

    keys     int64[rows], the key of each id
    level    durability of the pushes
    stop_at  functions to call meanwhile, by the time in seconds since the start
    """
    steps = standard_work(work, 64)
    acknowledged: list[float] = []
    rows = 0
    waiting = sorted(stop_at.items())
    start = due = time.monotonic()
    while due - start < seconds:
        while waiting and due - start >= waiting[0][0]:
            waiting.pop(0)[1]()
        time.sleep(max(due - time.monotonic(), 0))
        _, distinct, gradients = steps[len(acknowledged) % len(steps)]
        table.push(keys[distinct], gradients, step=len(acknowledged), durability=level)
        acknowledged.append(time.monotonic())
        rows += len(distinct)
        due += len(distinct) / RATE
    return Pushed(np.array(acknowledged), max(time.monotonic() - due, 0), rows)


def delays(pushed: Pushed, first: int, seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the seconds from the reply to each push until a follower saw it, float64[n].

    first  version of the first push; push i has version ``first + i``
    seen   float64[m, 2]: (version, monotonic seconds) of each change that the follower saw
    """
    versions = first + np.arange(len(pushed.acknowledged))
    order = np.argsort(seen[:, 0], kind="stable")
    at = np.searchsorted(seen[order, 0], versions)
    return np.asarray(seen[order, 1][at] - pushed.acknowledged)


def fresh(report: Report, directory: Path, rows: int, seconds: float, batch: int) -> None:
    """Run the section "fresh" of the report for one batch size.

    directory  data directory of the server
    rows       number of rows of the table
    seconds    duration of the pushes at each level of durability
    """
    keys, work = keys_of(np.arange(rows)), Work(rows=rows, batch=batch)
    lines = []
    with ExitStack() as stack:
        server = stack.enter_context(serving(directory, "--flush-seconds", NEVER))
        client = stack.enter_context(Client([server.address]))
        table = client.create_table("fresh", DIM, lr=0.05)
        fill(table, keys)
        client.wait_durable()
        for level in ("log", "fsync"):
            followers = Followers(server.address, "fresh")
            first = client.wait_durable()[0] + 1
            stopping = {
                seconds / 3: lambda pid=followers.pids[0]: os.kill(pid, signal.SIGSTOP),
                2 * seconds / 3: lambda pid=followers.pids[0]: os.kill(pid, signal.SIGCONT),
            }
            watched: AbstractContextManager[list[tuple[int, float]]] = nullcontext([])
            if level == "log":
                watched = watching_disk(server.address)
            with watched as reached:
                used = cpu(server.pid)
                pushed = push_at(table, keys, work, seconds, level, dict(stopping))
                time.sleep(0.2)
                last = client.wait_durable()[0]
                time.sleep(0.02)
            seen = followers.finish(last)
            used = cpu(server.pid) - used
            assert last == first + len(pushed.acknowledged) - 1
            lines += _fresh_rows(level, seconds, pushed, first, seen, reached)
    distinct, rate = pushed.rows / len(pushed.acknowledged), pushed.rows / seconds
    report.section(
        f"from acknowledged to visible, B = {batch:,} ({distinct:,.0f} distinct), {rows:,} rows,"
        f" {rate:,.0f} changed rows/s, {FOLLOWERS} followers; server: {used / seconds:.2f} cores",
        lines,
    )


def _fresh_rows(
    level: str,
    seconds: float,
    pushed: Pushed,
    first: int,
    seen: dict[int, NDArray[np.float64]],
    reached: list[tuple[int, float]],
) -> list[dict[str, Any]]:
    since = pushed.acknowledged - pushed.acknowledged[0]
    stopped = (since >= seconds / 3 - 0.5) & (since < 2 * seconds / 3)
    by_follower = {number: delays(pushed, first, times) for number, times in seen.items()}
    always = np.concatenate([by_follower[n] for n in range(1, FOLLOWERS)])
    meanwhile = np.concatenate([by_follower[n][stopped] for n in range(1, FOLLOWERS)])
    resumed = by_follower[0]
    going_on = pushed.acknowledged[0] + 2 * seconds / 3
    behind = (resumed > TARGET_MS / 1e3) & (since >= 2 * seconds / 3)
    caught = (pushed.acknowledged[behind] + resumed[behind]).max(initial=going_on) - going_on
    before = resumed[since < seconds / 3 - 0.5]
    after = resumed[(since >= 2 * seconds / 3 + caught)]
    rows = [
        ("three that go on", always),
        ("  while the fourth is stopped", meanwhile),
        ("the fourth, before it is stopped", before),
        (f"the fourth, once caught up ({caught:.2f} s)", after),
    ]
    if reached:
        rows.insert(0, ("on disk: the limit", delays(pushed, first, np.array(reached))))
    return [
        {
            "acknowledged at": level,
            "visible in": title,
            "pushes": len(times),
            "p50 ms": float(np.median(times) * 1e3),
            "p99 ms (<= 50)": float(np.quantile(times, 0.99) * 1e3),
            "most ms": float(times.max() * 1e3),
        }
        for title, times in rows
        if len(times)
    ]


# ---- stopped


def stopped(report: Report, directory: Path, rows: int, window: float, rounds: int) -> None:
    """Run the section "stopped" of the report.

    directory  directory for the data of the servers
    rows       number of rows of the table
    window     seconds to push with each number of subscribers
    rounds     how often to do so
    """
    keys = keys_of(np.arange(rows))
    lines = []
    for batch in (1_000, 10_000):
        steps = standard_work(Work(rows=rows, batch=batch), 64)
        home = directory / str(batch)
        with serving(home, "--flush-seconds", "20") as server, Client([server.address]) as one:
            table = one.create_table("rows", DIM, lr=0.05)
            fill(table, keys)
            rates: dict[int, list[float]] = {0: [], 1: [], 16: []}
            memory: dict[int, list[int]] = {count: [] for count in rates}
            for turn in range(rounds + 1):
                for count in np.roll(list(rates), turn).tolist():
                    with idle_subscribers(server.address, count):
                        push_for(table, keys, steps, 1.0)  # fills the connections' buffers
                        rate = push_for(table, keys, steps, window)
                        one.wait_durable()
                        if turn:
                            rates[count].append(rate)
                            memory[count].append(rss(server.pid))
        lines += [_stopped_row(batch, count, rates, memory) for count in rates]
    report.section(f"stopped subscribers, {rows:,} rows, {rounds} turns of {window:g} s", lines)


@contextmanager
def idle_subscribers(address: str, count: int) -> Iterator[None]:
    """Keep ``count`` subscribers of a server that do not read during a block."""
    with ExitStack() as stack:
        idle = [stack.enter_context(Subscriber([address], start="latest")) for _ in range(count)]
        for each in idle:
            each.next(30)  # returns once it is subscribed
        yield


def _stopped_row(
    batch: int, count: int, rates: dict[int, list[float]], memory: dict[int, list[int]]
) -> dict[str, Any]:
    """Return a row of the section "stopped".

    batch   ids per push
    count   number of subscribers that do not read
    rates   pushes per second in each turn, by number of subscribers
    memory  bytes of memory of the server after each turn, by number of subscribers
    """
    kept = float(np.median(np.array(rates[count]) / rates[0]))  # in each turn
    base, used = (float(np.median(memory[each])) for each in (0, count))
    return {
        "B": batch,
        "stopped subscribers": count,
        "pushes/s": float(np.median(rates[count])),
        "lowest": min(rates[count]),
        "highest": max(rates[count]),
        "% slower (<= 5)": 100 * (1 - kept) if count else None,
        "server MB": used / 1e6,
        "MB more each": (used - base) / count / 1e6 if count else None,
    }


def push_for(table: Table, keys: Ids, steps: Sequence[Any], seconds: float) -> float:
    """Push for ``seconds``, one push after the other; return pushes per second.

    keys   int64[rows], the key of each id
    steps  steps of the standard work, used in a cycle
    """
    start, done = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        _, distinct, gradients = steps[done % len(steps)]
        table.push(keys[distinct], gradients, step=done)
        done += 1
    return done / elapsed


# ---- bytes


def sent(server: Server) -> float:
    """Return the bytes that the server has sent to subscribers, from its metrics."""
    page = urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics", timeout=30)
    with page:
        for line in page.read().decode().splitlines():
            if line.startswith("ps_subscriber_bytes_total"):
                return float(line.split()[1])
    raise RuntimeError("the metrics have no count of bytes sent to subscribers")


class Came(NamedTuple):
    """Amount of data that a subscriber received."""

    rows: int
    bytes: float
    seconds: float  # time until it had received everything
    mode: str  # "tail" (only new changes), "catch_up" or "snapshot": how the subscription started


def read_up_to(server: Server, version: int, **options: Any) -> Came:
    """Subscribe, read all changes up to ``version``, and return how much data was received.

    options  arguments of Subscriber
    """
    before, start, rows, mode = sent(server), time.perf_counter(), 0, "tail"
    with Subscriber([server.address], **options) as changes:
        for change in changes:
            mode = change.kind if change.kind in ("snapshot", "catch_up") else mode
            rows += len(change.keys)
            if change.version >= version and not change.more:
                break
    return Came(rows, sent(server) - before, time.perf_counter() - start, mode)


def updates(table: Table, keys: Ids, share: Ids, seconds: float) -> int:
    """Push 1,000 rows ten times per second, for ``seconds``; return the number of row changes.

    keys   int64[rows], the key of each id
    share  ids of the rows to change: first each of them once, then random ones
    """
    rng = np.random.default_rng(1)
    gradients = rng.standard_normal((1000, DIM), dtype=np.float32)
    due, count = time.monotonic(), int(10 * seconds)
    each = [share[i : i + 1000] for i in range(0, len(share), 1000)]  # each row at least once
    for i in range(count):
        part = each[i] if i < len(each) else rng.choice(share, 1000, replace=False)
        time.sleep(max(due - time.monotonic(), 0))
        table.push(keys[part], gradients[: len(part)], step=i)
        due += 0.1
    return 1000 * count


def streamed(report: Report, directory: Path, rows: int, seconds: float) -> None:
    """Run the section "bytes" of the report.

    directory  data directory of the server
    rows       number of rows of the table
    seconds    duration of the updates
    """
    keys = keys_of(np.arange(rows))
    share = np.random.default_rng(2).choice(rows, rows // 100, replace=False)
    name: dict[str, Any] = {"tables": ["rows"]}
    segments = ("--segment-bytes", str(4 << 20))  # the log is truncated by whole segments
    came: dict[str, Came] = {}
    with ExitStack() as stack:
        flags = ("--flush-seconds", NEVER, *segments)
        server = stack.enter_context(serving(directory, *flags))
        client = stack.enter_context(Client([server.address]))
        table = client.create_table("rows", DIM, lr=0.05)
        fill(table, keys)
        client.wait_durable()
        with Subscriber([server.address], start="latest", **name) as changes:
            changes.next(30)
            tokens = changes.tokens()
        last = int(client.wait_durable()[0] + 10 * seconds)
        live = threading.Thread(
            target=lambda: came.update(live=read_up_to(server, last, tokens=tokens, **name))
        )
        live.start()
        changed = updates(table, keys, share, seconds)
        assert client.wait_durable()[0] == last
        live.join()
        came["coalesced"] = read_up_to(server, last, tokens=tokens, coalesce_ms=1000, **name)
    short = ("--flush-seconds", "1", "--log-keep-bytes", "0", *segments)
    with serving(directory, *short) as server, Client([server.address]) as client:
        table = client.table("rows")
        while read_mode(server, tokens) != "catch_up":
            table.push(keys[share[:1]], np.zeros((1, DIM), np.float32))
            time.sleep(0.5)
        version = client.wait_durable()[0]
        came["catch-up"] = read_up_to(server, version, tokens=tokens, **name)
    report.section(
        f"bytes for {seconds:g} s of updates: {changed:,} changes of {len(share):,} of {rows:,}"
        f" rows (the table: {rows * ROW / 1e6:,.0f} MB of keys and embeddings)",
        [_bytes_row(how, each, rows, len(share)) for how, each in came.items()],
    )


def _bytes_row(how: str, came: Came, rows: int, changed: int) -> dict[str, Any]:
    """Return a row of the section "bytes".

    how      kind of subscriber, a key of TITLES
    came     amount of data that it received
    rows     number of rows of the table
    changed  number of distinct rows that were changed
    """
    return {
        "a subscriber that": TITLES[how],
        "rows sent": came.rows,
        "MB": came.bytes / 1e6,
        "x keys and embeddings (<= 1.2)": came.bytes / (came.rows * ROW),
        "rows sent, x distinct": came.rows / changed,
        "% of the table": 100 * came.bytes / (rows * ROW),
        "s": came.seconds,
    }


def read_mode(server: Server, tokens: tuple[bytes, ...]) -> str:
    """Return the kind of the first change of a subscription that starts at ``tokens``."""
    with Subscriber([server.address], tables=["rows"], tokens=tokens) as changes:
        change = changes.next(60)
        assert change is not None
        return change.kind


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--only", choices=("fresh", "stopped", "bytes"), help="Run only this section. Default: all."
    )
    options = parser.parse_args(words)
    report = Report("freshness", options.json)
    quick = options.quick
    with ExitStack() as stack:

        def new(name: str) -> Path:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ps-bench-")))
            return path / name

        if options.only in (None, "fresh"):
            for batch in (1_000, 10_000):
                rows, seconds = (100_000, 3.0) if quick else (2_000_000, 15.0)
                fresh(report, new("fresh"), rows, seconds, batch)
                gc.collect()
        if options.only in (None, "stopped"):
            rows, window, rounds = (100_000, 0.5, 2) if quick else (2_000_000, 1.0, 9)
            stopped(report, new("stopped"), rows, window, rounds)
        if options.only in (None, "bytes"):
            rows, seconds = (500_000, 6.0) if quick else (5_000_000, 60.0)
            streamed(report, new("bytes"), rows, seconds)
    report.close()


if __name__ == "__main__":
    main()
