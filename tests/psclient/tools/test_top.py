"""psctl top: rates between two samples, what fits into a terminal, keys, dead shards."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from fakes import fake_server
from rich.console import Console
from servers import free_ports
from typer.testing import CliRunner

from psclient.status import ShardStatus
from psclient.tools import ctl, topview
from psclient.tools.rates import Sample, ShardRates, quantile, sample
from psclient.tools.topview import SORTS, VIEWS, WIDER, Look, screen
from psproto import ps_pb2 as pb

MAIN = "from psclient.tools.ctl import main; main()"
BOUNDS = [0.001, 0.01, 0.1]


def figures(at: float, *, start: int = 1, requests: int = 0, fast: int = 0) -> pb.GetStatusResponse:
    """Return the figures of a shard ``at`` seconds after its start.

    requests  number of requests so far, with 10 keys and 100 bytes each
    fast      number of requests among them that took less than 1 ms; the others 1 to 10 ms
    """
    live = pb.GetStatusResponse(
        phase=pb.PHASE_READY, shards=1, start=start, uptime_seconds=at, rows=7, cpu_seconds=at / 2
    )
    method = live.methods.add(method="Pull", requests=requests, keys=requests * 10)
    method.bytes = requests * 100
    method.latency.bounds.extend(BOUNDS)
    method.latency.buckets.extend([fast, requests - fast, 0, 0])
    live.engine.busy_seconds = at / 4
    live.tables.add(name="t", rows=7, bytes=70, requests=requests, pulled_keys=requests * 10)
    live.budgets.add(name="host_bytes", used=70, limit=100)
    live.recent_errors.add(time=at, method="Pull", code="UNAVAILABLE", message="a\nb", count=2)
    live.errors.add(method="Pull", code="UNAVAILABLE", count=int(at))
    return live


def status(live: pb.GetStatusResponse | None, shard: int = 0) -> ShardStatus:
    state = "unreachable" if live is None else "ready"
    problem = "it is gone" if live is None else None
    return ShardStatus(shard=shard, address=f"h:{shard}", state=state, problem=problem, live=live)


def between(old: list[ShardStatus], new: list[ShardStatus]) -> Sample:
    return sample(old, new, time=100.0, seconds=2.0)


# ---- rates


def test_rates_are_differences_per_second_of_the_server() -> None:
    found = between(
        [status(figures(10, requests=100, fast=50))], [status(figures(12, requests=300, fast=150))]
    )
    [shard], [table], [error] = found.shards, found.tables, found.errors
    assert (shard.requests_per_second, shard.keys_per_second) == (100, 1000)
    assert (shard.bytes_per_second, shard.errors_per_second) == (10_000, 1)
    assert (shard.engine_busy, shard.cpu) == (0.25, 0.5)
    assert (shard.memory_bytes, shard.memory_limit_bytes, shard.disk_bytes) == (70, 100, None)
    assert shard.p50_seconds == pytest.approx(0.001)
    assert shard.p99_seconds == pytest.approx(0.001 + 0.98 * 0.009)
    assert (table.rows, table.requests_per_second, table.pulled_keys_per_second) == (7, 100, 1000)
    assert (error.shard, error.count) == (0, 2)


RATES = ("requests_per_second", "p50_seconds", "p99_seconds", "engine_busy", "cpu")


@pytest.mark.parametrize(
    "before",
    [
        [],
        [status(None)],
        [status(figures(10, start=2, requests=500))],  # restarted since
        [status(figures(13, requests=500))],  # an answer that came late
    ],
)
def test_rates_of_a_shard_that_cannot_be_compared_are_unknown(before: list[ShardStatus]) -> None:
    found = between(before, [status(figures(12, requests=300))])
    [shard], [table] = found.shards, found.tables
    assert [getattr(shard, each) for each in RATES] == [None] * len(RATES)
    assert (shard.rows, table.rows, table.requests_per_second) == (7, 7, None)


def test_a_dead_shard_is_in_the_sample_and_the_others_count() -> None:
    old = [status(figures(10, requests=100)), status(figures(10, requests=100), 1)]
    found = between(old, [status(None), status(figures(12, requests=300), 1)])
    assert [(each.state, each.requests_per_second) for each in found.shards] == [
        ("unreachable", None),
        ("ready", 100),
    ]
    assert [each.requests_per_second for each in found.tables] == [100]


def test_tables_are_summed_over_shards() -> None:
    old = [status(figures(10), i) for i in range(2)]
    found = between(old, [status(figures(12, requests=100 * i), i) for i in range(2)])
    [table] = found.tables
    assert (table.rows, table.bytes, table.requests_per_second) == (14, 140, 50)


@pytest.mark.parametrize(
    ("buckets", "share", "expected"),
    [
        ([0, 0, 0, 0], 0.5, None),
        ([10, 0, 0, 0], 0.5, 0.0005),
        ([0, 0, 10, 0], 1.0, 0.1),
        ([5, 5, 0, 0], 0.75, 0.0055),
        ([0, 0, 0, 3], 0.5, 0.1),  # longer than all bounds
    ],
)
def test_quantiles_of_a_histogram(buckets: list[int], share: float, expected: float | None) -> None:
    found = quantile(pb.Timing(bounds=BOUNDS, buckets=buckets), share)
    assert found == (None if expected is None else pytest.approx(expected))


# ---- what fits into a terminal


def drawn(found: Sample, look: Look, width: int, height: int) -> list[str]:
    """Return the lines that a terminal shows."""
    with open(os.devnull, "w") as nowhere:
        console = Console(width=width, height=height, record=True, highlight=False, file=nowhere)
        console.print(screen(found, look, width, height, keys=True))
        return console.export_text().splitlines()


WIDEST = ShardRates(
    **dict.fromkeys(ShardRates.__dataclass_fields__, 123_456_789_012.0)  # type: ignore[arg-type]
    | {
        "shard": 63,
        "address": "ps-63.ps.default.svc.cluster.local:7000",
        "state": "unreachable",
        "problem": "x" * 300,
        "phase": "ready",
        "engine_busy": 0.999,
        "cpu": 12.5,
        "queue_wait_seconds": 0.000999,
        "turn_wait_seconds": 0.000999,
        "p50_seconds": 0.0099,
        "p99_seconds": 5999,
        "bytes_per_second": 999.4 * 1024,
        **{f"{of}_bytes": 999.4 * 1024**3 for of in ("memory", "gpu", "disk")},
        **{f"{of}_limit_bytes": 999.4 * 1024**3 for of in ("memory", "gpu", "disk")},
        **dict.fromkeys(("uptime_seconds", "lag_seconds", "flush_age_seconds"), 5999.0),
    }
)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("width", "height"), [(80, 24), (100, 12), (160, 40), (WIDER, 45), (topview.WIDEST, 50)]
)
@pytest.mark.parametrize("shards", [1, 3, 64])
def test_everything_fits(view: Any, width: int, height: int, shards: int) -> None:
    old = [status(figures(10), i) for i in range(shards)]
    found = between(old, [status(figures(12, requests=10**6), i) for i in range(shards)])
    widest = WIDEST if width != WIDER else replace(WIDEST, gpu_bytes=None, gpu_limit_bytes=None)
    found = replace(found, shards=[replace(widest, shard=i) for i in range(shards)])
    lines = drawn(found, Look(view=view, sort="requests"), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert lines[0].rstrip().endswith(f"q quit  s sort:requests  t show:{view}")
    if view in ("all", "shards") and width == 80:
        heads = next(line for line in lines if "req/s" in line and "p50" in line)
        assert heads.split() == [
            *("#", "state", "req/s", "keys/s", "B/s", "p50", "p99"),
            *("busy", "wait", "mem", "disk", "lag"),
        ]
    cut = [line for line in lines if "…" in line.replace("ps-63.ps.default.svc.cl…", "")]
    assert all("xxx" in line for line in cut)
    if shards == 64 and view == "shards" and height < 64:
        assert lines[-1].split()[1] == "more"


def test_a_dead_shard_is_shown_with_its_problem() -> None:
    old = [status(figures(10)), status(figures(10), 1)]
    lines = drawn(between(old, [status(figures(12)), status(None, 1)]), Look(), 80, 24)
    assert lines[0].startswith("1 of 2 shards ready")
    assert any(re.match(r"\s*1  unreachable( +-)+$", line.rstrip()) for line in lines)
    assert any("it is gone" in line for line in lines)


def test_keys_choose_what_is_sorted_and_shown() -> None:
    look = Look()
    assert [(look.press("s"), look.sort)[1] for _ in SORTS] == [*SORTS[1:], SORTS[0]]
    assert [(look.press("t"), look.view)[1] for _ in VIEWS] == [*VIEWS[1:], VIEWS[0]]
    look.press("x")
    assert look == Look()


def test_shards_are_sorted_by_the_chosen_column() -> None:
    old = [status(figures(10), i) for i in range(3)]
    found = between(old, [status(figures(12, requests=10 * (i % 2)), i) for i in range(3)])
    lines = drawn(found, Look(view="shards", sort="requests"), 80, 24)
    assert [line.split()[0] for line in lines if "ready " in line][1:] == ["1", "0", "2"]


@pytest.mark.parametrize(
    ("format", "value", "expected"),
    [
        (topview.count, None, "-"),
        (topview.count, 0.0, "0"),
        (topview.count, 0.52, "0.5"),
        (topview.count, 9.96, "10"),
        (topview.count, 999.6, "1.0k"),
        (topview.count, 12_345.0, "12k"),
        (topview.count, 1.5e15, "1500T"),
        (topview.size, 999.0, "999B"),
        (topview.size, 1024.0, "1.0KiB"),
        (topview.size, 1500.0 * 1024, "1.5MiB"),
        (topview.size, 999.6 * 1024**2, "1.0GiB"),
        (topview.size, 12.0 * 1024**3, "12GiB"),
        (topview.size, 5000.0 * 1024**5, "5000PiB"),
        (topview.duration, None, "-"),
        (topview.duration, 0.0, "0us"),
        (topview.duration, 0.00085, "850us"),
        (topview.duration, 0.0012, "1.2ms"),
        (topview.duration, 99.0, "99s"),
        (topview.duration, 300.0, "5min"),
        (topview.duration, 7200.0, "2h"),
        (topview.duration, 864_000.0, "10d"),
        (topview.percent, 0.256, "26%"),
    ],
)
def test_numbers_are_short(
    format: Callable[[float | None], str], value: float | None, expected: str
) -> None:
    assert format(value) == expected


# ---- the command


@contextmanager
def shard() -> Iterator[str]:
    """Serve a shard with 100 requests per second since its start; yields the address."""
    began = time.monotonic()

    def answer(_: bytes, __: Any) -> bytes:
        seconds = 1 + time.monotonic() - began
        return figures(seconds, requests=int(100 * seconds)).SerializeToString()

    with fake_server({"InfoService/GetStatus": answer}) as address:
        yield address


def psctl(servers: str, *words: str) -> Any:
    environment = {"PSCTL_SERVERS": servers, "COLUMNS": "80"}
    return CliRunner().invoke(ctl.app, ["top", *words], env=environment)


def test_json_has_one_line_per_sample_with_rates_in_each() -> None:
    with shard() as address:
        words = ("--interval", "0.1", "--iterations", "3", "--output", "json")
        done = psctl(address, *words)
    assert (done.exit_code, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert set(line) == {"time", "seconds", "shards", "tables", "errors"}
        [one] = line["shards"]
        assert set(one) == set(ShardRates.__dataclass_fields__)
        assert 50 < one["requests_per_second"] < 150


def test_once_shows_dead_shards_too() -> None:
    with shard() as address:
        done = psctl(f"{address},127.0.0.1:{free_ports(1)}", "--once", "--interval", "0.1")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "unreachable" in done.stdout
    assert "misplaced" in done.stdout  # it is shard 0 of 1, not of 2
    assert max(map(len, done.stdout.splitlines())) <= 80


class Terminal:
    """psctl top in a terminal."""

    def __init__(self, address: str) -> None:
        self.leader, follower = pty.openpty()
        termios.tcsetwinsize(self.leader, (24, 80))
        self.before = termios.tcgetattr(follower)
        self.follower = follower
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "top", "--interval", "0.2"],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env={**os.environ, "PSCTL_SERVERS": address, "TERM": "xterm-256color"},
            start_new_session=True,
        )

    def until(self, text: str, seconds: float = 60.0) -> None:
        """Read what is shown until ``text`` appears in it."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown[-2000:]
            if select.select([self.leader], [], [], 0.2)[0]:
                self.shown += os.read(self.leader, 65_536).decode(errors="ignore")

    def ended(self) -> int:
        """Return the exit status; check that the terminal is as it was before."""
        self.until("\x1b[?1049l")  # leaves the alternate screen
        status = self.process.wait(60)
        assert termios.tcgetattr(self.follower) == self.before
        os.close(self.leader)
        os.close(self.follower)
        return status


@pytest.mark.slow
def test_keys_and_ctrl_c_in_a_terminal() -> None:
    with shard() as address:
        quits, interrupted = Terminal(address), Terminal(address)
        for each in (quits, interrupted):
            each.until("1 of 1 shards ready")
        os.write(quits.leader, b"s")
        quits.until("sort:requests")
        os.write(quits.leader, b"t")
        quits.until("show:shards")
        os.write(quits.leader, b"q")
        assert quits.ended() == 0
        os.killpg(interrupted.process.pid, signal.SIGINT)
        assert interrupted.ended() == 0
