"""What /metrics exposes: what docs/metrics.md lists, as Prometheus wants it, from the start."""

from __future__ import annotations

import asyncio
import gc
import re
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from deploy.tools import program
from peers import Peer, until, with_server
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as open_metrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from servers import free_ports

from psproto import codec
from psproto import ps_pb2 as pb
from psserver import datadir
from psserver.config import load
from psserver.exchange import Exchanges
from psserver.metrics.access import AccessCollector
from psserver.metrics.budgets import _gpu
from psserver.metrics.certificates import CertificateCollector
from psserver.metrics.reading import read_at_once
from psserver.metrics.samples import counter
from psserver.metrics.tables import GPU_COUNTERS
from psserver.security.guard import guard_of
from psserver.server import Server
from psserver.stats import ServiceStats

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (\w*) ?\| (.+?) \| (.+?) \|$", re.M)
KEYS = np.arange(10, dtype=np.uint64)
GRADIENTS = np.ones((10, 4), np.float32)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Described(NamedTuple):
    """A metric as the page of the documentation, or a server, describes it."""

    type: str
    labels: tuple[str, ...]
    unit: str
    meaning: str


def described(metrics: Iterator[Metric]) -> dict[str, Described]:
    found = {}
    for metric in metrics:
        name = metric.name + "_total" * (metric.type == "counter")
        last = metric.name.rpartition("_")[2]
        unit = last if last in ("bytes", "seconds") else ""
        labels = tuple(sorted(getattr(metric, "_labelnames", ())))
        found[name] = Described(metric.type, labels, unit, metric.documentation)
    return found


def documented() -> dict[str, Described]:
    rows = ROW.findall((ROOT / "docs/metrics.md").read_text())
    assert len({name for name, *_ in rows}) == len(rows)
    return {
        name: Described(kind, tuple(sorted(re.findall(r"`(\w+)`", labels))), unit, meaning)
        for name, kind, labels, unit, meaning, _ in rows
    }


def with_a_gpu() -> Iterator[Metric]:
    """The metrics that only a server with a GPU has."""
    gpu: Any = SimpleNamespace(budget=SimpleNamespace(held=1, limit=2), paused=False)
    yield from _gpu(gpu)
    for family in GPU_COUNTERS:
        yield counter(family.name, family.help, labels=family.labels)


class OfGpu(Collector):
    def collect(self) -> Iterator[Metric]:
        yield from with_a_gpu()


def exchange(*, push: bool, pull: bool) -> codec.Exchange:
    header = pb.PushHeader(table="t", dtype=pb.DTYPE_FLOAT32)
    pushes = [codec.PushMessage(header, KEYS, None, GRADIENTS)]
    pulls = [codec.PullMessage(pb.PullHeader(table="t"), KEYS)]
    return codec.Exchange(pushes if push else [], pulls if pull else [])


async def work(peer: Peer) -> None:
    """Use every method over gRPC, and subscribe."""
    watching = peer.many("LogService/Subscribe", pb.SubscribeRequest(start=2).SerializeToString())
    await watching.read()
    both = exchange(push=True, pull=True)
    await peer.call("RowService/Exchange", codec.encode_exchange(both))
    await peer.call("RowService/Push", codec.encode_push(both.pushes[0]))
    await peer.call("RowService/Pull", codec.encode_pull(both.pulls[0]))
    await peer.call("RowService/Delete", codec.encode_delete(pb.PushHeader(table="t"), KEYS[:1]))
    stream = peer.stream()
    for id, (push, pull) in enumerate(((True, True), (True, False), (False, True)), 1):
        header = pb.StreamRequestHeader(id=id)
        message = codec.encode_stream_request(header, exchange(push=push, pull=pull))
        await stream.write(message)
        await stream.read()
    await stream.done_writing()
    fresh = peer.server._feed.source.freshness.seconds  # type: ignore[union-attr]
    await until(lambda: fresh.total >= 4)
    watching.cancel()


class Page(NamedTuple):
    """The metrics of a server that did some work."""

    described: dict[str, Described]
    text: bytes
    open: str


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    async def act(peer: Peer) -> Page:
        await work(peer)
        registry = peer.server._metrics.registry
        return Page(
            described(registry.collect()),
            generate_latest(registry),
            open_metrics(registry).decode(),
        )

    directory = str(tmp_path_factory.mktemp("metrics"))
    found: Page = with_server(
        act, "--data-dir", directory, "--lane", "on", "--disk-bytes", "1000000000"
    )
    return found


def values(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for metric in text_string_to_metric_families(text)
        for sample in metric.samples
    }


def test_the_page_of_the_documentation_lists_what_a_server_exposes(page: Page) -> None:
    exposed = page.described | described(with_a_gpu())
    listed = documented()
    assert sorted(listed) == sorted(exposed)
    for name, metric in exposed.items():
        assert listed[name] == metric, name


def test_prometheus_finds_nothing_to_complain_about(page: Page, tmp_path: Path) -> None:
    registry = CollectorRegistry()
    registry.register(OfGpu())
    registry.register(CertificateCollector(lambda: {"server": 1.7e9, "ca": 1.8e9}))
    (tmp_path / "policy.toml").touch()
    guard = guard_of(tmp_path / "policy.toml", tmp_path / "audit", shard=0)
    registry.register(AccessCollector(guard))
    for text in (page.text, generate_latest(registry)):
        done = subprocess.run(
            [program("promtool"), "check", "metrics"], input=text, capture_output=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_check_of_prometheus_sees_a_bad_name() -> None:
    bad = b"# HELP ps_requests_counter Of the test.\n# TYPE ps_requests_counter counter\n"
    done = subprocess.run(
        [program("promtool"), "check", "metrics"],
        input=bad + b"ps_requests_counter 1\n",
        capture_output=True,
        check=False,
    )
    assert done.returncode != 0
    assert b"ps_requests_counter" in done.stdout + done.stderr


def test_the_format_that_prometheus_asks_for_has_units(page: Page) -> None:
    units = {metric.name: metric.unit for metric in parse_open(page.open)}
    assert units["ps_request_duration_seconds"] == "seconds"
    assert units["ps_disk_free_bytes"] == "bytes"
    for name, unit in units.items():
        if name.startswith("ps_") and name.endswith(("_seconds", "_bytes")):
            assert unit == name.rpartition("_")[2]


def test_a_request_counts_once_with_its_own_time(page: Page) -> None:
    found = values(page.text.decode())

    def requests(method: str, lane: str) -> float:
        labels = (("lane", lane), ("method", method))
        return found["ps_request_duration_seconds_count", labels]

    for method in ("Exchange", "Push", "Pull"):
        assert (requests(method, "unary"), requests(method, "stream")) == (1, 1)
    assert requests("Delete", "unary") == 1
    parts = {
        dict(labels)["method"]: value
        for (name, labels), value in found.items()
        if name == "ps_requests_total"
    }
    assert parts == {"Push": 4, "Pull": 4, "Delete": 1}  # those of exchanges count too
    size = (("lane", "stream"), ("method", "Exchange"))
    assert found["ps_request_size_bytes_sum", size] == 2 * KEYS.nbytes + GRADIENTS.nbytes
    assert found["ps_response_size_bytes_sum", size] == GRADIENTS.nbytes
    crowds = [value for (name, _), value in found.items() if name == "ps_clients_requests_total"]
    assert sum(crowds) == 7
    assert found["ps_freshness_seconds_count", ()] == 4
    assert found["ps_engine_queue_wait_seconds_count", ()] >= 7
    assert 0 < found["ps_engine_busy_seconds_total", ()] < 60
    assert found["ps_log_fsync_duration_seconds_count", ()] >= 1


def test_a_pull_into_gpu_memory_counts_for_the_lane_cuda() -> None:
    stats, counts = ServiceStats(), object.__new__(Exchanges)
    counts._limits, counts._feed = SimpleNamespace(stats=stats), None  # type: ignore[assignment]
    into = replace(exchange(push=False, pull=True).pulls[0], gpu_room=SimpleNamespace(size=160))
    empty = SimpleNamespace(embeddings=np.empty(0, np.float32))
    counts._count(codec.Exchange([], [into]), SimpleNamespace(pulls=[empty]), 0.0, "shm")  # type: ignore[arg-type]
    counts._count(exchange(push=True, pull=False), codec.Exchanged([], []), 0.0, "shm")
    assert sorted(stats.requests) == [("Pull", "cuda"), ("Push", "shm")]
    assert stats.requests["Pull", "cuda"].sent.sum == 160


def test_every_budget_has_room_left(page: Page) -> None:
    found = values(page.text.decode())
    budgets = {
        dict(labels)["budget"]: (value, found["ps_budget_headroom_bytes", labels])
        for (name, labels), value in found.items()
        if name == "ps_budget_limit_bytes"
    }
    assert sorted(budgets) == [
        *("disk_bytes", "host_bytes", "lane_bytes", "log_backlog", "max_inflight_bytes"),
        *("process", "transport"),
    ]
    for budget, (limit, headroom) in budgets.items():
        assert 0 < headroom <= limit, budget
    limit, headroom = budgets["process"]
    resident = found["process_resident_memory_bytes", ()]
    assert 0.2 * resident < limit - headroom < resident  # without pages of files
    assert 0 < found["ps_disk_free_bytes", ()] < found["ps_disk_size_bytes", ()]


def test_the_garbage_collector_rests_while_tables_are_read() -> None:
    during: list[bool] = []

    def read(fails: bool) -> Iterator[Metric]:
        during.append(gc.isenabled())
        yield counter("ps_x", "Of the test.", 1)
        if fails:
            raise ValueError("of the test")

    assert [each.name for each in read_at_once(lambda: read(fails=False))] == ["ps_x"]
    with pytest.raises(ValueError, match="of the test"):
        read_at_once(lambda: read(fails=True))
    assert during == [False, False]
    assert gc.isenabled()


# ---- before the shard is recovered


def scrape(port: int) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
        return values(reply.read().decode())


def test_metrics_can_be_read_while_a_shard_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovering, go_on = threading.Event(), threading.Event()
    recover = datadir.recover

    def slowly(*arguments: Any) -> Any:
        recovering.set()
        assert go_on.wait(60)
        return recover(*arguments)

    monkeypatch.setattr(datadir, "recover", slowly)

    def phase(found: Samples) -> list[str]:
        return [
            dict(labels)["phase"]
            for (name, labels), value in found.items()
            if name == "ps_phase" and value
        ]

    async def run() -> None:
        port, metrics = free_ports(2), 0
        metrics = port + 1
        flags = ["--port", str(port), "--metrics-port", str(metrics), "--data-dir", str(tmp_path)]
        server = Server(load(flags), lambda: None)
        await server.listen()
        found = await asyncio.to_thread(scrape, metrics)
        assert (found["ps_ready", ()], phase(found)) == (0, ["kernels"])
        opening = asyncio.ensure_future(server.open())
        await asyncio.to_thread(recovering.wait, 60)
        found = await asyncio.to_thread(scrape, metrics)
        assert (found["ps_ready", ()], phase(found)) == (0, ["recovery"])
        assert found["ps_phase_seconds", ()] >= 0
        assert found["ps_disk_free_bytes", ()] > 0
        assert found["ps_budget_headroom_bytes", (("budget", "process"),)] > 0
        assert any(name == "ps_build_info" for name, _ in found)
        assert ("ps_version", ()) not in found
        go_on.set()
        await opening
        found = await asyncio.to_thread(scrape, metrics)
        assert (found["ps_ready", ()], phase(found)) == (1, ["ready"])
        assert ("ps_version", ()) in found
        await server.close()

    asyncio.run(run())
