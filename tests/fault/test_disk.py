"""A disk that is full, breaks, or loses its power under a running shard.

The oracle of the first two cases: SGD with learning rate 1 on rows that start at 0, and pushes of
-1 to all keys. Every row must then be the number of acknowledged pushes. A refused push must be in
no row. A push whose reply was lost must be in all rows or in none.

Each test runs twice: all rows in memory, and nearly all rows on disk only.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fault import disks
from fault.nursery import Nursery, Shard
from servers import eventually, free_ports

from psclient import Client, Table
from psclient.errors import PsError, ResourceExhausted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DIM = 16
KEYS = np.arange(500)
ONES = np.full((len(KEYS), DIM), -1.0, np.float32)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(params=[False, True], ids=["in memory", "on disk"])
def shard(
    request: pytest.FixtureRequest, nursery: Nursery, tmp_path: Path
) -> Iterator[Callable[..., Shard]]:
    made: list[Shard] = []
    memory = 2 << 20 if request.param else 256 << 20

    def make(directory: Path, flags: str = "") -> Shard:
        common = f"--port {free_ports(1)} --metrics-port 0 --host-bytes {memory}"
        words = f"{common} --data-dir {directory} {flags}".split()
        out = tmp_path / f"{len(made)}.log"
        made.append(Shard(nursery, out, *words, cold=request.param).start())
        made[-1].wait()
        return made[-1]

    yield make
    for each in made:
        each.kill()


def client_of(shard: Shard, timeout: float = 20.0) -> Client:
    return Client([f"127.0.0.1:{shard.flags[1]}"], timeout=timeout)


def plain(client: Client, name: str = "t") -> Table:
    return client.create_table(name, DIM, optimizer="sgd", lr=1.0, initializer="zeros")


def count(table: Table) -> int:
    """Return the number of pushes in the rows, which must all agree."""
    values = np.unique(table.pull(KEYS))
    assert len(values) == 1, f"half applied: {values}"
    return int(values[0])


# ---- full


def fill(path: Path) -> None:
    """Fill the rest of the disk."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def until_refused(table: Table) -> int:
    """Push until the disk is full. Return the number of acknowledged pushes."""
    done, refused = 0, None
    while refused is None:
        try:
            table.push(KEYS, ONES)
            done += 1
        except ResourceExhausted as error:
            refused = error
    assert refused.reason == "DISK_FULL"
    assert refused.retry_after
    assert "no room for" in str(refused)
    return done


@pytest.mark.parametrize("restart", [0, signal.SIGKILL, signal.SIGTERM])
def test_a_full_disk_refuses_pushes_whole_and_serves_pulls(
    shard: Callable[..., Shard], restart: int
) -> None:
    with disks.small(96) as disk:
        # nothing of the log is given back, so that the disk stays full
        flags = "--segment-bytes 2097152 --flush-seconds 0.3 --log-keep-bytes 1000000000"
        one = shard(disk / "shard", flags)
        with client_of(one) as client, client_of(one, timeout=1.5) as hasty:
            table = plain(client)
            quick = hasty.table("t")
            pushed = 0
            for _ in range(30):
                table.push(KEYS, ONES)
                pushed += 1
            if one.cold:
                eventually(lambda: table.describe().tiers["lmdb"].rows == len(KEYS))
            fill(disk / "ballast")
            pushed += until_refused(quick)
            large = np.arange(10**6, 10**6 + 5000)
            calls: list[Callable[[], object]] = [
                lambda: quick.push(KEYS, ONES),
                lambda: quick.push(KEYS, ONES, durability="applied"),
                lambda: quick.push(large, np.ones((5000, DIM), np.float32)),
                lambda: quick.exchange(KEYS, (KEYS, ONES)),
            ]
            for call in calls:
                with pytest.raises(ResourceExhausted) as caught:
                    call()
                assert caught.value.reason == "DISK_FULL"
                assert count(quick) == pushed
            assert client.list_tables()[0].rows == len(KEYS)
            for _ in range(2 if restart else 0):
                fill(disk / "more")
                one.kill(restart)
                one.start().wait()
                assert count(quick) == pushed
                with pytest.raises(ResourceExhausted):
                    quick.push(large, np.ones((5000, DIM), np.float32))
                assert count(quick) == pushed
            (disk / "ballast").unlink()
            (disk / "more").unlink(missing_ok=True)
            for _ in range(300):
                table.push(KEYS, ONES, durability="fsync")
                pushed += 1
            assert count(table) == pushed
            time.sleep(1.5)  # checkpoints go on
            one.kill()
            one.start().wait()
            assert count(table) == pushed
            recovered = [line for line in one.log() if line["event"] == "recovered"]
            assert recovered[-1]["records"] < 300


# ---- broken


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("fdatasync", "the version log failed"),
        ("pwritev", "the version log failed"),
        ("fdatasync pwritev", "the version log failed"),
        ("lmdb", "the base failed"),
    ],
)
def test_a_failed_write_or_sync_ends_the_process_and_nothing_acknowledged_is_lost(
    shard: Callable[..., Shard], tmp_path: Path, what: str, told: str
) -> None:
    one = shard(tmp_path / "shard", "--flush-seconds 0.2 --segment-bytes 1048576")
    rng = random.Random(what)
    with client_of(one, timeout=60.0) as client:
        table = plain(client)
        pushed, stop = [0], threading.Event()
        failures: list[BaseException] = []

        def push() -> None:
            try:
                while not stop.is_set():
                    table.push(KEYS, ONES, durability=rng.choice(("log", "fsync")))  # type: ignore[arg-type]
                    pushed[0] += 1
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=push)
        thread.start()
        for cycle in range(1, 5):
            time.sleep(rng.uniform(0.05, 0.5))
            one.broken.write_text(what)
            one.ended()
            events = [line["event"] for line in one.log()]
            assert events.count(told) == cycle
            one.broken.unlink()
            one.start().wait()
            acknowledged = pushed[0]
            time.sleep(0.2)
            with client_of(one) as other:
                assert count(other.table("t")) >= acknowledged
        stop.set()
        thread.join()
        assert failures == []
        assert pushed[0] > 20
        assert count(table) == pushed[0]


# ---- power

FLUSH = 0.1  # seconds within which what was handed over is on disk
ASKED = os.environ.get("PS_POWER_CUTS")  # then nothing else should keep the disk busy
CUTS = int(ASKED or "20")


class Trainer(threading.Thread):
    """A thread that pushes to new keys, one by one, and records when each was acknowledged."""

    def __init__(self, client: Client, number: int, level: str) -> None:
        super().__init__()
        self.level = level
        self.first = number << 40
        self.acknowledged: list[float] = []  # monotonic seconds; of key first, first + 1, ...
        self._client = client
        self._going = True

    def run(self) -> None:
        table = self._client.table("t")
        one = np.full((1, DIM), -1.0, np.float32)
        while self._going:
            try:
                key = self.first + len(self.acknowledged)
                table.push(np.array([key]), one, durability=self.level)  # type: ignore[arg-type]
            except PsError:
                return
            self.acknowledged.append(time.monotonic())

    def stop(self) -> None:
        self._going = False


class Probe(threading.Thread):
    """A thread that syncs a small file repeatedly and records the longest time."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.longest = 0.0  # seconds
        self._path = path
        self._going = True

    def run(self) -> None:
        with suppress(OSError), self._path.open("wb", buffering=0) as file:
            while self._going:
                file.write(bytes(512))
                began = time.monotonic()
                try:
                    os.fdatasync(file.fileno())
                finally:
                    self.longest = max(self.longest, time.monotonic() - began)
                time.sleep(0.05)

    def stop(self) -> None:
        self._going = False
        self.join()


def test_a_power_failure_takes_nothing_synced_and_little_else(
    shard: Callable[..., Shard],
) -> None:
    rng = random.Random(1)
    lost_by_level, acknowledged = {"log": 0, "fsync": 0}, 0
    slowest: list[float] = []  # seconds that a sync of another file took meanwhile, by cut
    oldest = []  # seconds from the acknowledgement of the first push lost to the cut, by cut
    with disks.battery(192) as power:
        flags = "--flush-seconds 0.15 --segment-bytes 1048576"
        one = shard(power.where / "shard", flags)
        with client_of(one) as client:
            plain(client)
        kept: dict[int, int] = {}  # trainer's first key: how many of its pushes must be there
        for cycle in range(1, CUTS + 1):
            client = client_of(one)
            client.table("t")
            trainers = [
                Trainer(client, 4 * cycle + n, "fsync" if n % 2 and cycle % 2 else "log")
                for n in range(4)
            ]
            oldest.append(0.0)
            probe = Probe(power.where / "probe")
            for thread in (*trainers, *[probe] * bool(ASKED)):
                thread.start()
            time.sleep(rng.choice((0.1, 0.5)) * (1 + rng.random()))
            at = time.monotonic()
            power.cut()
            one.kill()
            if ASKED:
                probe.stop()
            slowest.append(probe.longest)
            for trainer in trainers:
                trainer.stop()
            client.close()
            for trainer in trainers:
                trainer.join()
            power.unmount()
            power.mount()
            one.start().wait()
            with client_of(one) as fresh:
                table = fresh.table("t")
                for trainer in trainers:
                    times = trainer.acknowledged
                    acknowledged += len(times)
                    asked = trainer.first + np.arange(len(times) + 2)
                    values = table.pull(asked)
                    assert (values == values[:, :1]).all()
                    there = values[:, 0]
                    assert set(there.tolist()) <= {0.0, 1.0}, "applied twice"
                    found = int(there.sum())
                    assert (there[:found] == 1).all(), "a hole in the order of the pushes"
                    lost = times[found:]
                    lost_by_level[trainer.level] += len(lost)
                    if lost:
                        oldest[-1] = max(oldest[-1], at - lost[0])
                    kept[trainer.first] = found
                for first, found in kept.items():
                    if found:
                        some = first + np.array([0, found // 2, found - 1])
                        assert (table.pull(some) == 1).all(), "lost by a later failure"
        torn = sum(bool(line["torn_bytes"]) for line in one.log() if line["event"] == "recovered")
    print(
        f"{CUTS} cuts, {acknowledged} pushes acknowledged, lost {lost_by_level},"
        f" the oldest {max(oldest) * 1000:.0f} ms before its cut; {torn} torn tails"
    )
    assert lost_by_level["fsync"] == 0
    if ASKED:
        late = [each for each in zip(oldest, slowest, strict=True) if each[0] > FLUSH]
        print(f"older than {FLUSH} s: {late} (the disk's own slowest sync meanwhile)")
        assert all(age <= FLUSH + 2 * sync for age, sync in late)
    assert acknowledged > 20 * CUTS
