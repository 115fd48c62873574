"""A real server with rows in GPU memory gives the same bits as one without.

Everything is done to both: to a server on the fake device, or on a GPU, and to its twin with rows
in host memory and on disk alone.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydantic")  # what a server needs may be missing where the GPU is
pytest.importorskip("lmdb")
pytest.importorskip("uvloop")

from cpukernels import compiler
from gpuserver import GpuServer

from psclient import Client, Follower, admin
from psclient.tools.analysis import analyze
from psclient.tools.ctl import app
from psclient.tools.keys import inspect
from psproto import ps_pb2 as pb
from storage.gpu.cuda import CudaDevice
from storage.gpu.device import NoDevice

DIM, KEYS = 512, 8000
TTL = 1000  # steps: more than the tests make, so that rows are evicted only when they ask for it
TABLES: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam"},
    "adagrad": {"optimizer": "adagrad", "eviction": {"step_ttl": {"steps": TTL}}},
    "sgd": {"optimizer": "sgd", "lr": 1.0, "initializer": "zeros", "durability": "fsync"},
}
BUDGETS = ["--host-bytes", str(24 << 20), "--flush-seconds", "1"]
HBM_BYTES, OF_ADAM = 64 << 20, 32 << 20  # one piece of memory, into which its rows do not fit
LIMITS = json.dumps({"adam": {"hbm_bytes": OF_ADAM}})
HBM = ["--hbm-bytes", str(HBM_BYTES), "--tables", LIMITS]
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no g++ to compile the CUDA kernels")
FAKE = pytest.param("fake", marks=[pytest.mark.slow, needs_compiler])
GPU = pytest.param("gpu", marks=pytest.mark.gpu)


class Twins:
    """Two servers to which the same is done: ``near`` has rows in GPU memory, ``far`` has not."""

    def __init__(self, directory: Path, device: str) -> None:
        def flags(name: str) -> list[str]:
            return [*BUDGETS, "--checkpoint-url", f"file://{directory}/{name}-checkpoints"]

        self.far = GpuServer(directory / "far", "", *flags("far")).start()
        self.near = GpuServer(directory / "near", device, *flags("near"), *HBM).start()
        self.rng, self.step = np.random.default_rng(1), 0
        self.connect()
        for name, settings in TABLES.items():
            self.both(lambda c, n=name, s=settings: c.create_table(n, DIM, **s))

    def connect(self) -> None:
        self.clients = [each.connect() for each in (self.near, self.far)]

    def both(self, do: Callable[[Client], Any]) -> None:
        """Do something to both servers."""
        for client in self.clients:
            do(client)

    def same(self, ask: Callable[[Client], Any]) -> Any:
        """Ask both servers, check that the answers are equal, and return them."""
        near, far = (ask(client) for client in self.clients)
        assert comparable(near) == comparable(far)
        return near

    def train(self, steps: int) -> None:
        """Push to all tables: to some keys often, to others rarely; and read what was pushed."""
        for _ in range(steps):
            self.step += 1
            keys = self.rng.permutation(
                np.concatenate([self.rng.zipf(1.2, 500) % KEYS, self.rng.integers(0, KEYS, 300)])
            )
            gradients = self.rng.standard_normal((len(keys), DIM)).astype(np.float32)
            pushes = {name: (keys, gradients) for name in TABLES}
            reads = dict.fromkeys(TABLES, self.rng.permutation(keys)[:200])
            step = self.step
            self.same(lambda c, p=pushes, r=reads, s=step: list(c.exchange(p, r, step=s).values()))

    def train_until(self, condition: Callable[[], bool]) -> None:
        """Train until rows have moved to GPU memory or from it: this happens between requests."""
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline
            self.train(2)

    def settle(self) -> None:
        """Make all pushes durable, so that a kill loses none of them."""
        self.both(lambda client: client.wait_durable())

    def same_rows(self) -> None:
        """Check that all rows, with optimizer state and metadata, are equal."""
        for name in TABLES:
            self.same(lambda client, n=name: whole(client, n))

    def close(self) -> None:
        for client in self.clients:
            client.close()
        assert [each.stop() for each in (self.near, self.far)] == [0, 0]


def comparable(answer: Any) -> Any:
    if isinstance(answer, np.ndarray):
        return answer.shape, answer.tobytes()
    if isinstance(answer, list | tuple):
        return [comparable(each) for each in answer]
    return answer


def whole(client: Client, table: str, **more: Any) -> list[np.ndarray]:
    """All rows with optimizer state and metadata, by ascending key.

    In place of versions: their order. An eviction is as many changes as slices of rows were looked
    at, which depends on where the rows are.
    """
    batches = [
        each
        for each in admin.read_rows(client, table, **more)
        if not isinstance(each, pb.TableSchema)
    ]
    columns = ("keys", "versions", "steps", "frequencies", "rows")
    found = [np.concatenate([getattr(each, name) for each in batches]) for name in columns]
    order = np.argsort(found[0])
    assert len(np.unique(found[0])) == len(order)
    found[1] = np.unique(found[1], return_inverse=True)[1]
    return [column[order] for column in found]


@pytest.fixture(scope="module", params=[FAKE, GPU])
def shared(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Twins]:
    if request.param == "gpu":
        try:
            CudaDevice()
        except NoDevice as error:
            pytest.skip(f"no GPU: {error}")
    twins = Twins(tmp_path_factory.mktemp("twins"), request.param)
    try:
        yield twins
        twins.close()
    finally:
        for each in (twins.near, twins.far):
            each.process.kill()


@pytest.fixture
def twins(shared: Twins) -> Twins:
    """The servers, after some training: rows are in GPU memory, in host memory and on disk."""
    shared.train(6)
    return shared


def test_rows_are_in_all_tiers_and_pulls_and_pushes_give_the_same_bits(twins: Twins) -> None:
    near = twins.near

    def rows(tier: str) -> float:
        return sum(near.metric("ps_table_rows", name, tier) for name in TABLES)

    twins.train_until(lambda: near.metric("ps_gpu_demotions_total", "adam") > 0)
    twins.train_until(lambda: all(rows(tier) > 100 for tier in ("hbm", "host", "lmdb")))
    twins.same_rows()
    keys = np.arange(0, KEYS, 7)
    for mode in ("train", "serve"):
        twins.same(lambda client, m=mode: client.table("adam").pull(keys, mode=m))
    twins.same(lambda client: client.table("adam").pull_rows(keys).frequencies)
    written = twins.rng.standard_normal((len(keys), DIM)).astype(np.float32)
    twins.both(lambda client: admin.write_rows(client, "sgd", keys, written))
    twins.train(2)
    twins.same_rows()


def test_deleted_and_evicted_rows_are_gone_from_gpu_memory(twins: Twins) -> None:
    assert twins.same(lambda client: client.table("adam").delete(np.arange(40))) > 0
    twins.train(2)
    rows, one = twins.clients[0].table("adagrad").describe().rows, np.ones((1, DIM), np.float32)
    twins.step += TTL + 1
    twins.both(lambda client: client.table("adagrad").push([5], one, step=twins.step))
    twins.both(lambda client: client.evict("adagrad"))
    assert twins.clients[0].table("adagrad").describe().rows == 1 < rows
    twins.same_rows()


def test_a_checkpoint_can_be_restored(twins: Twins) -> None:
    twins.both(lambda client: admin.checkpoint(client, "a"))
    wanted = [twins.same(lambda client, n=name: whole(client, n)) for name in TABLES]
    twins.train(3)
    twins.same(lambda client: whole(client, "adam", checkpoint="a"))
    twins.both(lambda client: admin.restore(client, "a", replace=True))  # they start again
    twins.same_rows()
    got = [whole(twins.clients[0], name) for name in TABLES]
    assert comparable(got) == comparable(wanted)
    twins.train(3)
    twins.same_rows()


def test_analyses_inspection_and_subscribers_see_the_same(twins: Twins) -> None:
    for name in TABLES:
        rows, *_ = twins.same(lambda client, n=name: distributions(client, n))
        assert rows > 0
    keys = list(range(20))
    twins.same(lambda client: [facts(each) for each in inspect(client, "adam", keys)])
    with Follower(twins.near.address) as near, Follower(twins.far.address) as far:
        twins.train(2)
        for follower, client in ((near, twins.clients[0]), (far, twins.clients[1])):
            follower.wait_for(client.wait_durable(), timeout=60)
        for name in TABLES:
            rows = [follower.pull(name, np.arange(KEYS)) for follower in (near, far)]
            assert comparable(rows[0]) == comparable(rows[1])


def distributions(client: Client, table: str) -> Any:
    """What an analysis says of the rows; norms are rounded to float32 where rows are not in host
    memory, so that the mean is compared with fewer digits.
    """
    found = analyze(client, table, norms=[0.5, 3.0])
    histograms = found.frequencies, found.ages, found.norms, found.idle_norms
    lists = found.most_frequent, found.least_frequent, found.largest, found.smallest
    keys = [(each.keys, each.steps, each.frequencies) for each in lists]
    counts = [each.counts for each in histograms]
    return found.rows, found.occurrences, f"{found.norm_mean:.5g}", counts, keys


def facts(key: Any) -> Any:
    found = asdict(key)
    return {name: found[name] for name in found if name not in ("tier", "version", "why")}


def test_psctl_shows_gpu_memory(twins: Twins, capsys: pytest.CaptureFixture[str]) -> None:
    hits = "ps_tier_hits_total", "adam", "hbm"
    twins.train_until(lambda: twins.near.metric(*hits) > 0)
    where = ["--servers", twins.near.address[0]]
    (status,) = json.loads(psctl(capsys, "status", "--output", "json", *where))
    assert 0 < status["gpu_bytes"] <= status["gpu_budget_bytes"] == HBM_BYTES
    assert status["gpu_paused"] is False
    assert "GPU memory" in psctl(capsys, "status", *where)
    table = json.loads(psctl(capsys, "table", "adam", "--output", "json", *where))
    assert table["tiers"]["hbm"]["hits"] > 0
    assert table["cache"]["gpu_promotions"] >= table["tiers"]["hbm"]["rows"] > 0
    assert 0 < table["tiers"]["hbm"]["bytes"] <= OF_ADAM
    assert table["bytes"] < twins.near.metric("ps_memory_budget_bytes") * 1.1
    shown = psctl(capsys, "table", "adam", *where)
    assert "hbm (GPU memory)" in shown
    assert "hit rate of GPU memory" in shown
    assert "rows take " in psctl(capsys, "doctor", *where)


def psctl(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        app(args=arguments, prog_name="psctl")
    return capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_serves_all_rows(twins: Twins, number: int) -> None:
    twins.train(3)
    twins.settle()
    for each in (twins.near, twins.far):
        assert each.stop(number) == (0 if number == signal.SIGTERM else -number)
        each.start()
    twins.same_rows()
    twins.train(5)
    twins.same_rows()


@pytest.mark.slow
@needs_compiler
class TestFailures:
    """The fake device fails as no GPU can be made to."""

    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[GpuServer]:
        server = GpuServer(tmp_path, "fake", *BUDGETS, *HBM).start()
        try:
            yield server
        finally:
            server.process.kill()
            server.wait()

    def test_a_lost_device_ends_the_server_and_no_push_is_lost_or_done_twice(
        self, server: GpuServer
    ) -> None:
        keys, pushes = np.arange(500), 12
        with server.connect() as client:
            table = client.create_table("t", DIM, optimizer="sgd", lr=1.0, initializer="zeros")
            minus = np.full((len(keys), DIM), -1, np.float32)
            for step in range(pushes):
                table.push(keys, minus, step=step)
            assert server.metric("ps_table_rows", "t", "hbm") > 0
            server.fails.write_text("lost")
            pending = client.start_exchange({"t": (keys, minus)}, {}, step=pushes)
            assert server.wait() == 75
            assert "cudaErrorIllegalAddress" in server.errors
            server.fails.unlink()
            server.start()
            pending.result()  # the client sent it again
            assert (table.pull(keys) == pushes + 1).all()
            table.push(keys, minus, step=pushes + 1)
            assert (table.pull(keys) == pushes + 2).all()

    def test_a_full_device_pauses_promotion_and_nothing_else(self, server: GpuServer) -> None:
        server.fails.write_text("full")
        keys = np.arange(3000)
        with server.connect() as client:
            table = client.create_table("t", DIM, optimizer="sgd", lr=1.0, initializer="zeros")
            minus = np.full((len(keys), DIM), -1, np.float32)
            for step in range(10):
                table.push(keys, minus, step=step)
                assert (table.pull(keys) == step + 1).all()
            assert server.metric("ps_gpu_paused") == 1
            assert server.metric("ps_table_rows", "t", "hbm") == 0
            assert server.errors.count("GPU memory is full: no more rows") == 1
