"""Checkpoints that end at a barrier: what is restored is what was there when it was placed."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from homes import Homes, fill

from psproto import ps_pb2 as pb
from psserver.errors import BadRequest, BarrierMissed, CheckpointBusy, Draining
from psserver.pinned import PinnedBase
from psserver.work import Progress

ID = "0123456789abcdef"
READY = pb.CheckpointProgress.STAGE_READY
Make = Callable[..., Homes]


class Waiting:
    """WriteCheckpoint on all shards of a cluster, one thread each, until a barrier is placed."""

    def __init__(
        self, cluster: Homes, pool: ThreadPoolExecutor, name: str, parent: str, seconds: float
    ) -> None:
        self.cluster, self.name, self.parent = cluster, name, parent
        self.attempt = secrets.token_hex(8)
        request = pb.WriteCheckpointRequest(
            name=name,
            attempt=self.attempt,
            parent=parent,
            until_barrier="epoch/1",
            barrier_timeout_ms=int(seconds * 1000),
        )
        self.progress: list[Progress] = []
        self.running: list[Future[pb.CheckpointProgress]] = []
        for node in cluster.nodes:
            self.progress.append(node.checkpoints.work.progress())
            write = node.checkpoints.write
            self.running.append(pool.submit(write, request, self.progress[-1]))

    def ready(self) -> None:
        """Wait until all shards have copied their rows; raise what one of them raises."""
        while not all(each.stage == READY for each in self.progress):
            for each in self.running:
                if each.done():
                    each.result()
            time.sleep(0.001)

    def complete(self) -> pb.CheckpointInfo:
        parts = [each.result(60).part for each in self.running]
        return self.cluster.complete(self.name, self.attempt, parts, self.parent)


@contextmanager
def waiting(
    cluster: Homes, name: str = "cut", parent: str = "", seconds: float = 300.0
) -> Iterator[Waiting]:
    with ThreadPoolExecutor(len(cluster.nodes)) as pool:
        found = Waiting(cluster, pool, name, parent, seconds)
        try:
            yield found
        finally:
            for each in found.progress:
                each.given_up = True


def place(cluster: Homes, name: str = "epoch/1") -> list[int]:
    return [node.shard.barrier(name) for node in cluster.nodes]


def sessions(cluster: Homes) -> list[bytes]:
    return [node.shard.sessions.pack() for node in cluster.nodes]


def assert_free(cluster: Homes) -> None:
    """Assert that no shard waits, holds files or log records, or is busy."""
    for node in cluster.nodes:
        assert node.home.flusher.pins == {}
        with node.checkpoints.work.alone("a test"):
            pass
        node.shard.cuts.placed("epoch/1", lambda: pytest.fail("a cut still waits"))
    assert cluster.checkpoint("another").name == "another"


@pytest.mark.slow
@pytest.mark.parametrize("parent", ["", "full"])
def test_it_has_exactly_what_came_before_the_barrier(make: Make, parent: str) -> None:
    source, target = make(2), make(3)
    fill(source)
    source.checkpoint("full")
    source.push(range(30), 2.0, client=7, sequence=1)
    with waiting(source, parent=parent) as cut:
        cut.ready()
        source.push(range(20, 700), 4.0, step=5, client=7, sequence=2)
        source.delete(range(100, 120))
        place(source, "epoch/2")
        versions = place(source)
        rows, known = source.rows(), sessions(source)
        source.push(range(900), 9.0, client=7, sequence=3)
        source.delete(range(300, 400))
        place(source)  # the first one counts
        info = cut.complete()
    assert list(info.versions) == versions
    target.restore("cut")
    assert target.rows() == rows
    source.restore("cut", replace=True)
    assert source.rows() == rows
    assert sessions(source) == known


def test_a_barrier_may_come_while_rows_are_copied(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = make(1), make(1)
    fill(source)
    found: list[Any] = []
    copy = PinnedBase.rows

    def rows(base: PinnedBase, after: int = 0) -> Iterator[Any]:
        for at, block in enumerate(copy(base, after)):
            if not at:
                source.push(range(20, 700), 4.0, step=5)
                place(source)
                found.append(source.rows())
                source.push(range(900), 9.0)
            yield block

    monkeypatch.setattr(PinnedBase, "rows", rows)
    with waiting(source) as cut:
        cut.complete()
    target.restore("cut")
    assert [target.rows()] == found


def test_a_barrier_that_comes_too_early_is_named(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(1)
    fill(source)
    flusher = source.nodes[0].home.flusher
    flush = flusher._flush

    def late() -> Any:
        place(source)
        source.push([1])
        return flush()

    monkeypatch.setattr(flusher, "_flush", late)
    missed = r"^barrier 'epoch/1' was placed at version \d+, before the shard began to copy"
    with waiting(source) as cut, pytest.raises(BarrierMissed, match=missed):
        cut.complete()
    monkeypatch.undo()
    assert_free(source)


def test_a_barrier_that_never_comes_is_named_and_everything_released(make: Make) -> None:
    source = make(2)
    fill(source)
    with waiting(source, seconds=0.2) as cut:
        for each in cut.running:
            with pytest.raises(
                BarrierMissed, match=r"^barrier 'epoch/1' was not placed within 0\.2 s"
            ):
                each.result(60)
    assert_free(source)


def test_it_ends_when_the_client_is_gone(make: Make) -> None:
    source = make(1)
    fill(source)
    with waiting(source) as cut:
        cut.ready()
        cut.progress[0].given_up = True
        with pytest.raises(Draining):
            cut.running[0].result(60)
    assert_free(source)


def test_a_shard_that_waits_refuses_other_operations_by_name(make: Make) -> None:
    source = make(1)
    fill(source)
    busy = r"it takes checkpoint 'cut' up to barrier 'epoch/1'"
    with waiting(source) as cut:
        cut.ready()
        with pytest.raises(CheckpointBusy, match=busy):
            source.checkpoint("other")
        with pytest.raises(CheckpointBusy, match=busy):
            source.nodes[0].prepare("cut", ID, replace=True)
        place(source)
        cut.complete()
    assert_free(source)


def test_a_shard_that_restarts_while_it_waits_has_no_part_of_it(make: Make) -> None:
    source = make(2)
    fill(source)
    with waiting(source) as cut:
        cut.ready()
        cut.progress[1].given_up = True
        with pytest.raises(Draining):
            cut.running[1].result(60)
        source.nodes[1].reopen()
        place(source)
        assert cut.running[0].result(60).part.version
    assert_free(source)
    with waiting(source) as cut:  # a further attempt removes what the first one left
        cut.ready()
        place(source)
        assert cut.complete().name == "cut"


def test_its_name_must_be_one_of_a_barrier(make: Make) -> None:
    node = make(1).nodes[0]
    request = pb.WriteCheckpointRequest(name="a", attempt=ID, until_barrier="no/../where")
    with pytest.raises(BadRequest, match=r"^field 'until_barrier': barrier name must be 1\.\.128"):
        node.checkpoints.write(request, node.checkpoints.work.progress())
