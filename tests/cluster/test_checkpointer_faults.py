"""What goes wrong at a cut of a trainer, and cuts of several ranks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cuts
import numpy as np
import pytest
from cuts import DENSE, Trainer, assert_once, one_more, settle
from servers import Cluster

from psclient import Client, admin
from psclient.errors import BarrierMissed, DataLoss, InvalidArgument, TrainerBehind

pytestmark = pytest.mark.slow
cluster, table, trainer = cuts.cluster, cuts.table, cuts.trainer


def test_a_shard_that_is_killed_while_it_waits_costs_one_checkpoint_at_most(
    cluster: Cluster, trainer: Callable[..., Trainer]
) -> None:
    one = trainer()
    one.resume()
    one.run(4)
    assert one.ck._writing is not None
    one.ck._writing.ready()
    os.kill(cluster.pids(1)[-1], signal.SIGKILL)
    one.run(10)
    one.ck.close()
    assert one.ck.failure is None
    with one_more(one) as client:
        assert admin.checkpoint(client, f"free-{one.name}").name == f"free-{one.name}"
    one.client.close()
    other = trainer()
    assert other.resume().step == 11
    assert_once(other.client, one.name, 10)


def test_a_cut_that_does_not_come_in_time_is_given_up_and_named(
    trainer: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    one = trainer(timeout=0.2)
    one.resume()
    one.run(4)
    assert one.ck._writing is not None
    writing = one.ck._writing
    writing.join()
    assert isinstance(writing.error, BarrierMissed)
    assert f"barrier '{writing.name}' was not placed within 0.2 s" in str(writing.error)
    one.ck._timeout = 60.0
    one.run(5)  # takes another one
    one.end()
    assert f"no checkpoint of this cut: {writing.error}" in capsys.readouterr().err
    assert one.ck.failure is None
    assert trainer().resume().step == 6


def test_an_error_of_save_ends_the_cut_and_is_raised(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    one = trainer()
    one.resume()
    one.run(5)

    def save(path: Path) -> None:
        (path / "half").write_text("half")
        raise OSError("the disk is full")

    one._save = save  # type: ignore[method-assign]
    with pytest.raises(OSError, match=r"the disk is full"):
        one.run(10)
    assert list((tmp_path / "run").glob(".partial*")) == []
    with one_more(one) as client:
        assert admin.checkpoint(client, f"free-{one.name}").name == f"free-{one.name}"
    one.die()
    assert trainer().resume("once").step == 6


def test_old_cuts_that_cannot_be_removed_do_not_harm_the_new_one(
    trainer: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = trainer(keep=1)
    one.resume()
    (tmp_path / "run" / "step-000000000000" / "STATE").write_text("damaged")
    one.run(5)
    one.ck.close()
    assert "old cuts remain: " in capsys.readouterr().err
    one.run(7)
    one.die()
    other = trainer()
    assert other.resume("rewind").step == 6


def test_an_error_at_the_end_of_a_cut_leaves_the_cut_before(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer()
    one.resume()
    one.run(5)
    settle(one)

    def complete(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(one.ck._directory, "complete", complete)
    one.run(10)
    with pytest.raises(OSError, match=r"the disk is full"):
        one.ck.close()
    one.client.close()
    other = trainer()
    assert other.resume("once").step == 6
    assert other.ck._directory.partials() == []


def test_what_an_interrupted_cut_left_is_removed(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    one = trainer()
    one.resume()
    one.run(8)
    settle(one)
    partial = one.ck._directory.partial(10, "0" * 8, f"orphan-{one.name}")
    (partial / DENSE).write_text("1")
    admin.checkpoint(one.client, f"orphan-{one.name}")
    one.die()
    other = trainer()
    assert other.resume("once").step == 6
    assert list((tmp_path / "run").glob(".partial*")) == []
    assert f"orphan-{one.name}" not in [each.name for each in admin.checkpoints(other.client)]


@pytest.mark.parametrize("what", ["changed", "missing", "truncated"])
def test_a_damaged_cut_is_named(trainer: Callable[..., Trainer], tmp_path: Path, what: str) -> None:
    one = trainer()
    one.resume()
    one.run(5)
    one.end()
    cut = tmp_path / "run" / "step-000000000005"
    if what == "changed":
        (cut / "STATE").write_text((cut / "STATE").read_text().replace('"step": 5', '"step": 6'))
    elif what == "missing":
        (cut / "STATE").unlink()
    else:
        (cut / DENSE).write_text("")
    with pytest.raises(DataLoss, match=re.escape(str(cut))):
        trainer().ck.resume("rewind")


def test_wrong_calls_are_named(trainer: Callable[..., Trainer], table: str) -> None:
    one = trainer()
    with pytest.raises(InvalidArgument, match=r"^resume must be called before at$"):
        one.ck.at(1, save=one._save)
    with pytest.raises(
        InvalidArgument, match=r"^policy must be one of rewind, once, ahead or None"
    ):
        one.ck.resume("back")
    one.resume()
    one.run(3)
    with pytest.raises(InvalidArgument, match=r"^step must be an integer in 4\.\."):
        one.ck.at(3, save=one._save)
    with pytest.raises(InvalidArgument, match=r"^position must be made of"):
        one.ck.at(5, save=one._save, position={1: 2})
    with pytest.raises(InvalidArgument, match=r"^resume must be called before the first push"):
        one.ck.resume()


# ---- psctl


def psctl(cluster: Cluster, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from psclient.tools.ctl import main; main()", *words]
    environment = {**os.environ, "PSCTL_SERVERS": ",".join(cluster.addresses)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_psctl_takes_a_checkpoint_up_to_a_barrier(cluster: Cluster, table: str) -> None:
    with Client(cluster.addresses) as client:
        client.table(table).push([1, 2, 3], np.ones((3, 1)))
        with psctl(cluster, "checkpoint", table, "--until-barrier", "epoch/1") as command:
            assert command.stderr is not None
            line = command.stderr.readline()
            assert line == "all shards wait for barrier epoch/1, at most 600 s\n"
            client.table(table).push([4], np.ones((1, 1)))
            versions = client.barrier("epoch/1")
            client.table(table).push([5], np.ones((1, 1)))
        assert command.returncode == 0
        stored = admin.describe(client, table)
        assert (stored.versions, stored.rows) == (tuple(versions), {table: 4})
        words = "checkpoint", f"{table}-2", "--until-barrier", "b", "--barrier-timeout", "0.3"
        with psctl(cluster, *words) as command:
            assert command.stderr is not None
            told = command.stderr.read()
        assert command.returncode == 1
        assert "barrier 'b' was not placed within 0.3 s" in told


# ---- several ranks


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: list[Any] = [None] * size
        self.gate = threading.Barrier(size)

    def of(self, rank: int) -> Any:
        return Rank(self, rank)


class Rank:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank, self.size = threads, rank, threads.size

    def gather(self, value: Any) -> list[Any]:
        self.threads.values[self.rank] = value
        self.threads.gate.wait(60)
        values = list(self.threads.values)
        self.threads.gate.wait(60)
        return values


def together(trainers: list[Trainer], work: Callable[[Trainer], Any]) -> list[Any]:
    """Run ``work`` of each rank on a thread; return the results, or raise the first error."""
    with ThreadPoolExecutor(len(trainers)) as pool:
        return [each.result(120) for each in [pool.submit(work, one) for one in trainers]]


def test_ranks_are_cut_together_and_each_pushes_once(
    cluster: Cluster, trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    def ranks() -> list[Trainer]:
        threads = Threads(2)
        return [trainer(ranks=threads.of(rank)) for rank in range(2)]

    with Client(cluster.addresses) as client:
        client.create_table("other", 1, optimizer="sgd", lr=1.0, initializer="zeros")
    first = ranks()
    first[1].table, first[1].name = first[1].client.table("other"), "other"
    together(first, lambda one: one.resume())
    together(first, lambda one: one.run(12))
    first[0].ck.close()
    for each in first:
        each.client.close()
    second = ranks()
    second[1].table, second[1].name = second[1].client.table("other"), "other"
    starts = together(second, lambda one: one.resume("once"))
    assert [(each.step, each.position) for each in starts] == [(11, {"batch": 10})] * 2
    together(second, lambda one: one.run(20))
    second[0].end()
    for name in (first[0].name, "other"):
        assert_once(trainer().client, name, 20)
    third = ranks()
    with pytest.raises(TrainerBehind, match=r"the cut has 2 ranks, and the trainer now has 1"):
        trainer().ck.resume("once")
    together(third, lambda one: one.resume())
    steps = iter((25, 30))
    with pytest.raises(
        InvalidArgument, match=r"^step must be equal on all ranks, got \[(25, 30|30, 25)\]"
    ):
        together(third, lambda one: one.ck.at(next(steps), save=one._save))
