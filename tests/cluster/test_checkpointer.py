"""A trainer that ends in the middle and comes back, under each policy, beside one that never did.

The oracle: SGD with learning rate 1 on rows that start at 0. The batch of step t has the gradient
-4^(t % 8) for the keys of group t // 8. Each base-4 digit of a row then shows how often its push
took effect.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import Cluster

from psclient import Client, admin
from psclient.checkpointer import Checkpointer, Start
from psclient.errors import (
    BarrierMissed,
    DataLoss,
    InvalidArgument,
    LogDiverged,
    SessionExpired,
    TrainerBehind,
)
from psclient.pipeline import Pipeline

pytestmark = pytest.mark.slow
DIGITS, WIDTH = 8, 6
DENSE = "dense.json"
_numbers = iter(range(1000))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    url = f"file://{tmp_path_factory.mktemp('stored')}"
    servers = Cluster(2, "--checkpoint-url", url, "--session-pushes", "64").start()
    try:
        yield servers
    finally:
        assert servers.stop() == 0


@pytest.fixture
def table(cluster: Cluster) -> Iterator[str]:
    """Name of a new table, the only one of the cluster."""
    name = f"t{next(_numbers)}"
    with Client(cluster.addresses) as client:
        for each in client.list_tables():
            client.drop_table(each.name)
        client.create_table(name, 1, optimizer="sgd", lr=1.0, initializer="zeros")
    yield name
    with Client(cluster.addresses) as client:
        client.drop_table(name)


def keys_of(step: int) -> np.ndarray:
    return np.arange(WIDTH) + step // DIGITS * WIDTH


def digit(step: int) -> float:
    return float(4 ** (step % DIGITS))


def assert_once(client: Client, table: str, last: int) -> None:
    """Assert that the pushes of the steps up to ``last`` took effect exactly once, on all rows."""
    keys = np.concatenate([keys_of(group * DIGITS) for group in range(last // DIGITS + 1)])
    rows = client.table(table).pull(keys).reshape(-1, WIDTH)
    for group, found in enumerate(rows):
        steps = range(max(1, group * DIGITS), min(last, group * DIGITS + DIGITS - 1) + 1)
        assert set(found.tolist()) == {sum(map(digit, steps))}, f"steps {steps}"


class Trainer:
    """A trainer in this process: its dense state is the sum of what it has pulled and pushed."""

    def __init__(self, cluster: Cluster, table: str, directory: Path, **options: Any) -> None:
        self.client = Client(cluster.addresses, timeout=60)
        self.table, self.name = self.client.table(table), table
        self.piped = options.pop("piped", False)
        self.dense = 0.0
        self.seen: list[int] = []  # steps computed by this process
        self.pipe: Pipeline | None = None
        self.ck = Checkpointer(self.client, directory=directory, **{"every": 5, **options})

    def resume(self, policy: Any = None) -> Start:
        start = self.ck.resume(policy)
        self.dense = 0.0
        if start.path is not None:
            self.dense = json.loads((start.path / DENSE).read_text())
        self.next = start.step
        if self.piped:
            self.pipe = self.ck.pipe = Pipeline(self.client, {"f": self.name}, step=start.step)
        return start

    def run(self, until: int) -> None:
        """Compute the steps up to ``until``, inclusive."""
        if self.pipe is not None:
            for ticket in self.pipe.over(lambda t: {"f": keys_of(t)}, range(self.next, until + 1)):
                gradients = self._compute(ticket.step, ticket.rows[self.name])
                self.pipe.push(ticket, {self.name: gradients})
                self._end(ticket.step)
            return
        for step in range(self.next, until + 1):
            keys = keys_of(step)
            self.table.push(keys, self._compute(step, self.table.pull(keys)), step=step)
            self._end(step)

    def _compute(self, step: int, rows: np.ndarray) -> np.ndarray:
        self.seen.append(step)
        self.dense += float(rows.sum()) + digit(step)
        return np.full((WIDTH, 1), -digit(step), np.float32)

    def _end(self, step: int) -> None:
        self.ck.at(step, save=self._save, position={"batch": step})
        self.next = step + 1

    def _save(self, path: Path) -> None:
        (path / DENSE).write_text(json.dumps(self.dense))

    def die(self) -> None:
        """End as a killed process does: the servers see its connections close, nothing else."""
        if self.ck._writing is not None and self.ck._writing.placed:
            self.ck._writing.join()  # what a test needs to know which cut is the newest
        self.client.close()

    def end(self) -> None:
        self.ck.close()
        self.client.close()


@pytest.fixture
def trainer(cluster: Cluster, table: str, tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    made: list[Trainer] = []

    def make(**options: Any) -> Trainer:
        made.append(Trainer(cluster, table, tmp_path / "run", **options))
        return made[-1]

    yield make
    for each in made:
        each.client.close()


PIPED = pytest.mark.parametrize("piped", [False, True], ids=["blocking", "pipeline"])


@PIPED
def test_rewind_ends_as_if_nothing_had_happened(
    trainer: Callable[..., Trainer], piped: bool
) -> None:
    one = trainer(piped=piped)
    assert one.resume() == Start(1, None, None, 0, 0, None)
    one.run(13)
    one.die()
    other = trainer(piped=piped)
    with pytest.raises(TrainerBehind, match=r"^dense is at step 10, servers saw 13; shard 0 was"):
        other.ck.resume()
    start = other.resume("rewind")
    assert (start.step, start.position, start.gap) == (11, {"batch": 10}, 3)
    other.run(20)
    other.end()
    assert other.seen == list(range(11, 21))
    assert other.dense == twin(20)
    assert_once(trainer().client, one.name, 20)


@PIPED
def test_once_computes_again_and_each_push_takes_effect_once(
    trainer: Callable[..., Trainer], piped: bool
) -> None:
    one = trainer(piped=piped)
    one.resume()
    one.run(13)
    one.die()
    other = trainer(piped=piped)
    start = other.resume("once")
    assert (start.step, start.gap, start.policy) == (11, 3, "once")
    other.run(12)
    other.die()  # and again, before the place of the first death
    third = trainer(piped=piped)
    assert third.resume("once").step == 11
    third.run(21)
    third.end()
    assert_once(trainer().client, one.name, 21)


@PIPED
def test_ahead_leaves_out_what_the_rows_have_seen(
    trainer: Callable[..., Trainer], piped: bool
) -> None:
    one = trainer(piped=piped)
    one.resume()
    one.run(13)
    one.die()
    other = trainer(piped=piped)
    start = other.resume("ahead")
    assert (start.step, start.skip, start.gap) == (14, 3, 3)
    assert start.position == {"batch": 10}
    other.run(14)
    other.die()
    third = trainer(piped=piped)
    assert third.resume("once").step == 14  # its numbers are those since the policy "ahead"
    third.run(18)
    third.end()
    assert_once(trainer().client, one.name, 18)


def test_a_trainer_that_dies_before_its_first_cut_comes_back_from_the_start(
    trainer: Callable[..., Trainer],
) -> None:
    one = trainer()
    one.resume()
    one.run(4)
    one.die()
    other = trainer()
    assert other.resume("once") == Start(1, None, None, 0, 4, "once")
    other.run(5)
    other.end()
    assert_once(trainer().client, one.name, 5)


def test_the_steps_of_other_tables_do_not_count(
    cluster: Cluster, trainer: Callable[..., Trainer], table: str
) -> None:
    one = trainer(tables=[table, "absent"])
    one.resume()
    with Client(cluster.addresses) as client:
        other = client.create_table("other", 1)
        other.push([1], np.ones((1, 1)), step=1000)
    one.run(7)
    one.die()
    start = trainer(tables=[table]).resume("ahead")
    assert (start.step, start.gap) == (8, 2)


def test_rewind_goes_back_to_the_start_before_the_first_cut(
    trainer: Callable[..., Trainer],
) -> None:
    one = trainer()
    one.resume()
    one.run(4)
    one.die()
    other = trainer()
    assert other.resume("rewind") == Start(1, None, None, 0, 4, "rewind")
    other.run(5)
    other.end()
    assert other.dense == twin(5)
    assert_once(trainer().client, one.name, 5)


def test_a_trainer_that_ended_goes_on_without_a_policy(trainer: Callable[..., Trainer]) -> None:
    one = trainer()
    one.resume()
    one.run(10)
    one.end()
    other = trainer()
    start = other.resume()
    assert (start.step, start.gap, start.policy) == (11, 0, None)
    other.run(15)
    other.end()
    assert other.dense == twin(15)


def test_a_refusal_names_steps_versions_and_what_each_policy_does(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    one = trainer()
    one.resume()
    one.run(7)
    one.end()
    with pytest.raises(TrainerBehind) as caught:
        trainer().ck.resume()
    name = newest(tmp_path)
    text = str(caught.value)
    assert text.startswith("dense is at step 5, servers saw 7; shard 0 was at version ")
    assert text.endswith(
        f"call resume with a policy: 'rewind' (restore checkpoint {name!r}, which undoes all pushes"
        " since), 'once' (compute the 2 steps again, each push taking effect once), 'ahead' (keep"
        " the rows, and leave the 2 steps out of the dense state)"
    )


def settle(trainer: Trainer) -> None:
    """Wait until the cut of a trainer is complete, or give up one whose barrier has not come."""
    trainer.ck.close()


def one_more(trainer: Trainer) -> Client:
    return Client(trainer.client._addresses)


def test_more_pushes_than_the_servers_remember_are_refused_by_name(
    trainer: Callable[..., Trainer],
) -> None:
    one = trainer(every=100)
    one.resume()
    one.run(166)
    one.die()
    other = trainer(every=100)
    assert other.resume("once").step == 101
    with pytest.raises(SessionExpired, match=r"must resume with policy 'rewind' instead of 'once'"):
        other.run(101)
    third = trainer(every=100)
    third.resume("rewind")
    third.run(110)
    third.end()
    assert_once(trainer().client, one.name, 110)


def test_servers_that_were_restored_meanwhile_are_named(trainer: Callable[..., Trainer]) -> None:
    one = trainer()
    one.resume()
    one.run(6)
    settle(one)
    with one_more(one) as operator:
        admin.checkpoint(operator, f"by-hand-{one.name}")
        one.run(8)
        settle(one)
        admin.restore(operator, f"by-hand-{one.name}", replace=True)
    with pytest.raises(LogDiverged, match=r"servers were restored while the trainer ran"):
        one.run(10)
    one.client.close()
    other = trainer()
    with pytest.raises(TrainerBehind, match=r"shard 0 has a new log"):
        other.ck.resume()
    with pytest.raises(TrainerBehind, match=r"with policy 'once': the servers were restored"):
        other.ck.resume("once")
    assert other.resume("rewind").step == 6


def test_old_cuts_are_removed_here_and_on_the_servers(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    one = trainer(keep=2)
    one.resume()
    one.run(30)
    one.end()
    left = ["step-000000000025", "step-000000000030"]
    assert sorted(each.name for each in (tmp_path / "run").iterdir()) == sorted(left)
    with one_more(one) as client:
        names = [each.name for each in admin.checkpoints(client) if each.name.startswith("trainer")]
        mine = [name for name in names if name in stored(tmp_path)]
        assert len(mine) == 2


def stored(tmp_path: Path) -> list[str]:
    """Return the names of the checkpoints of all complete cuts, oldest first."""
    return [each.read_text() for each in sorted((tmp_path / "run").glob("step-*/CHECKPOINT"))]


def newest(tmp_path: Path) -> str:
    return stored(tmp_path)[-1]


def parents(trainer: Trainer) -> dict[str, str | None]:
    with one_more(trainer) as client:
        return {each.name: each.parent for each in admin.checkpoints(client)}


def test_cuts_between_full_ones_contain_only_changes(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    one = trainer(full_every=3, keep=1)
    one.resume()
    one.run(10)
    one.ck.close()
    parent = parents(one)[newest(tmp_path)]
    assert parents(one)[parent or ""] is None  # full; it stays, because the newest needs it
    assert stored(tmp_path) == [parent, newest(tmp_path)]
    one.run(20)
    one.die()
    assert parents(one)[newest(tmp_path)] is None
    assert len(stored(tmp_path)) == 1
    other = trainer(full_every=3)
    other.resume()
    other.run(23)
    other.die()
    third = trainer(full_every=3)
    third.resume("rewind")
    third.run(25)
    third.end()
    assert third.dense == twin(25)


# ---- what goes wrong at a cut


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


def twin(steps: int) -> float:
    """Return the dense state of a trainer that was never interrupted."""
    rows: dict[int, float] = {}
    dense = 0.0
    for step in range(1, steps + 1):
        for key in keys_of(step).tolist():
            dense += rows.get(key, 0.0)
            rows[key] = rows.get(key, 0.0) + digit(step)
        dense += digit(step)
    return dense
