"""Kill shards at random moments while trainers push, and look whether each push took effect once.

    python -m tests.fault.crash --cycles 1000 --seed 7

The oracle: SGD with learning rate 1 on rows that start at 0, and in push i the gradient -4^(i % 8)
for the keys of group i // 8. A digit of a row, in base 4, says how often its push was applied: 0 is
a push that was acknowledged and lost, 2 or 3 one that was applied twice. Some groups are deleted
once they are complete, and must stay deleted.

Kills come while pushes are under way, during checkpoints (they are made all the time) and during
recoveries. The seed decides what is done and when; what it meets depends on the machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs by itself

from fault.nursery import Nursery, Shard
from servers import free_ports

from psclient import Client

DIGITS = 8
ONCE = float(sum(4**digit for digit in range(DIGITS)))  # every digit is 1
ROUND = 20  # cycles until all is verified and new trainers begin
TRAINERS = 4
STARTING = 0.04  # seconds that a start takes, about
TIMEOUT = 90.0  # seconds that a trainer goes on repeating a push
FLAGS = "--metrics-port 0 --checkpoint-seconds 0.1 --segment-bytes 1048576 --log-keep-bytes 0"
FLAGS += " --memory-bytes 1073741824 --fsync-seconds 0.02"


@dataclass
class Series:
    """The pushes of one trainer to groups of ``width`` keys: how far it came, what it deleted."""

    base: int
    width: int
    done: int = 0  # pushes acknowledged
    deleted: list[int] = field(default_factory=list)  # groups

    def keys(self, group: int) -> np.ndarray:
        return np.arange(self.width) + (self.base + group * self.width)

    def gradients(self) -> np.ndarray:
        return np.full((self.width, 1), -(4.0 ** (self.done % DIGITS)), np.float32)

    def expected(self, group: int) -> float:
        digits = min(max(self.done - group * DIGITS, 0), DIGITS)
        return float(sum(4**digit for digit in range(digits)))


def train(
    number: int,
    addresses: list[str],
    table: str,
    seed: str,
    stop: Any,
    began: Any,
    answers: Any,
) -> None:
    """Push until told to stop, then say how far it came."""
    rng = random.Random(f"{seed} {number}")
    base = number << 40
    small, large = Series(base, 6), Series(base + (1 << 39), 2000)
    try:
        transport: Any = ("stream", "unary")[number % 2]
        with Client(addresses, timeout=TIMEOUT, transport=transport) as client:
            rows = client.table(table)
            began.put(True)
            while not stop.is_set():
                series = large if rng.random() < 0.03 else small
                group = series.done // DIGITS
                keys = series.keys(group)
                level: Any = rng.choice((None, "log", "fsync"))
                rows.push(keys, series.gradients(), step=series.done, durability=level)
                series.done += 1
                if rng.random() < 0.1:
                    got = rows.pull(keys)
                    assert (got == series.expected(group)).all(), (
                        f"read after a push: {digits(got, series.expected(group))}"
                    )
                if series.done % DIGITS == 0 and rng.random() < 0.2:
                    rows.delete(keys, durability=level)
                    series.deleted.append(group)
        answers.put((number, [small, large], None))
    except BaseException as error:
        began.put(True)
        answers.put((number, [small, large], f"{type(error).__name__}: {error}"))


def digits(got: np.ndarray, want: float) -> str:
    """What is wrong with rows that should all be ``want``."""
    bad = got.reshape(-1)[got.reshape(-1) != want]
    return f"{len(bad)} rows are not {want} but {sorted(set(bad.tolist()))[:5]}"


def verify(client: Client, table: str, every: list[Series]) -> list[str]:
    """What the rows say against what was acknowledged."""
    rows, wrong = client.table(table), []
    for series in every:
        groups = -(-series.done // DIGITS)
        for first in range(0, groups, max(1, 40_000 // series.width)):
            some = range(first, min(groups, first + max(1, 40_000 // series.width)))
            keys = np.concatenate([series.keys(group) for group in some])
            got = rows.pull_rows(keys)
            values = got.embeddings.reshape(len(some), series.width)
            found = got.found.reshape(len(some), series.width)
            for at, group in enumerate(some):
                if group in series.deleted:
                    if found[at].any():
                        wrong.append(f"group {group} of {series.base:#x} was deleted, and is there")
                    continue
                want = series.expected(group)
                if not found[at].all() or (values[at] != want).any():
                    wrong.append(f"group {group} of {series.base:#x}: {digits(values[at], want)}")
    return wrong


@contextmanager
def shards_of(nursery: Nursery, directory: Path, count: int) -> Iterator[list[Shard]]:
    """Running shards, ended at the end."""
    port = free_ports(count)
    shards = []
    for number in range(count):
        flags = f"--shard {number} --shards {count} --port {port + number} {FLAGS}".split()
        flags += ["--data-dir", str(directory / f"shard-{number}")]
        shards.append(Shard(nursery, directory / f"{number}.log", *flags))
    try:
        for shard in shards:
            shard.start()
        for shard in shards:
            shard.wait()
        yield shards
    finally:
        for shard in shards:
            shard.kill()


def addresses_of(shards: list[Shard]) -> list[str]:
    return [f"127.0.0.1:{shard.flags[shard.flags.index('--port') + 1]}" for shard in shards]


def kill_some(rng: random.Random, shards: list[Shard], cycles: int) -> int:
    """Kill ``cycles`` times and start again; how many of them hit a recovery."""
    early = 0
    for _ in range(cycles):
        shard = rng.choice(shards)
        if rng.random() < 0.35:  # in the middle of its start
            time.sleep(rng.uniform(0.0, STARTING))
            early += not shard.said("ready")
        else:
            shard.wait()
            time.sleep(rng.choice((0.05, 0.3, 1.2)) * rng.random())
        shard.kill()
        time.sleep(rng.choice((0.0, 0.0, 0.1)))
        shard.start()
    for shard in shards:
        shard.wait()
    return early


def run(cycles: int, seed: int, shards: int, say: Callable[[str], None] = print) -> list[str]:
    """All that was wrong, which is nothing."""
    say(f"seed {seed}, {cycles} cycles, {shards} shards, {TRAINERS} trainers")
    rng = random.Random(seed)
    spawn = multiprocessing.get_context("spawn")
    wrong: list[str] = []
    started, done, pushed, early = time.monotonic(), 0, 0, 0
    with (
        tempfile.TemporaryDirectory(prefix="ps-crash-") as directory,
        Nursery() as nursery,
        shards_of(nursery, Path(directory), shards) as alive,
    ):
        addresses = addresses_of(alive)
        before: tuple[str, list[Series]] | None = None
        while done < cycles and not wrong:
            table = f"round-{done}"
            with Client(addresses, timeout=TIMEOUT) as client:
                client.create_table(table, 1, optimizer="sgd", lr=1.0, initializer="zeros")
            stop, began, answers = spawn.Event(), spawn.SimpleQueue(), spawn.SimpleQueue()
            trainers = [
                spawn.Process(
                    target=train,
                    args=(n, addresses, table, f"{seed} {done}", stop, began, answers),
                    daemon=True,
                )
                for n in range(TRAINERS)
            ]
            for trainer in trainers:
                trainer.start()
            for _ in trainers:
                assert began.get()
            count = min(ROUND, cycles - done)
            early += kill_some(rng, alive, count)
            done += count
            stop.set()
            ends = [answers.get() for _ in trainers]
            for trainer in trainers:
                trainer.join()
            wrong += [f"trainer {n}: {error}" for n, _, error in ends if error]
            every = [series for _, both, _ in ends for series in both]
            pushed += sum(series.done for series in every)
            with Client(addresses, timeout=TIMEOUT) as client:
                wrong += verify(client, table, every)
                if before is not None:
                    wrong += verify(client, *before)
                    client.drop_table(before[0])
            before = table, every
            say(
                f"{done} cycles, {early} of them in a recovery, {pushed} pushes,"
                f" {time.monotonic() - started:.0f} s: {'; '.join(wrong[:5]) or 'all as it should'}"
            )
        if before is not None and not wrong:
            for shard in alive:
                shard.kill(15)
                shard.start().wait()
            with Client(addresses, timeout=TIMEOUT) as client:
                wrong += verify(client, *before)
        recovered = [
            line for shard in alive for line in shard.log() if line["event"] == "recovered"
        ]
        torn = sum(1 for line in recovered if line["torn_bytes"])
        replayed = sum(line["records"] for line in recovered)
        rows = sum(line["rows"] for line in recovered)
        say(
            f"{len(recovered)} recoveries, {torn} with a torn tail, {replayed} records and"
            f" {rows} rows of blocks read"
        )
        unexpected = {
            line["event"]
            for shard in alive
            for line in shard.log()
            if line.get("level") in ("warning", "error", "critical")
        }
        if unexpected:
            say(f"warnings of shards: {sorted(unexpected)}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--shards", type=int, default=2)
    given = parser.parse_args()
    wrong = run(given.cycles, given.seed, given.shards, lambda text: print(text, flush=True))
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
