"""Kill shards at random moments while trainers push, and check that each push took effect once.

    python -m tests.fault.crash --cycles 1000 --seed 7
    python -m tests.fault.crash --cycles 200 --seed 7 --cold    nearly all rows only on disk

The oracle: SGD with learning rate 1 on rows that start at 0. Push i has the gradient -4^(i % 8) for
the keys of group i // 8. Each base-4 digit of a row then shows how often its push was applied: 0
means that an acknowledged push was lost, 2 or 3 that it was applied more than once. Some groups are
deleted once they are complete, and must stay deleted. In each cycle an alteration gives the table
another serving default; all shards and subscribers must have it afterwards.

Kills happen while pushes are in flight, during flushes (which run all the time) and during
recoveries. With --cold, memory is so small that nearly all rows are on disk only, shards with even
numbers give up all rows in memory after each flush, and most kills are at the beginning or end of a
step of a flush, of a demotion, of a promotion, or of moving rows between blocks: see moments.py.
Subscribers are attached all the time. One stops and continues from its tokens. After
each cycle the trainers pause, and the subscribers' rows must equal the shards' rows. The seed
decides what is done and when; the outcome also depends on the machine's timing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs by itself
sys.path.extend(str(Path(__file__).parents[2] / each) for each in ("", "proto"))

from fault import moments
from fault.nursery import Nursery, Shard
from fault.watchers import TIMEOUT, Watchers
from servers import free_ports

from psclient import Client

DIGITS = 8
ONCE = float(sum(4**digit for digit in range(DIGITS)))  # every digit is 1
ROUND = 20  # cycles until all is verified and new trainers begin
TRAINERS = 4
STARTING = 0.04  # seconds that a start takes, about
FLAGS = "--metrics-port 0 --flush-seconds 0.1 --segment-bytes 1048576 --log-keep-bytes 0"
FLAGS += " --fsync-seconds 0.02"
COLD = 0.75  # share of the rows that must be only on disk, with --cold
ENOUGH = 100  # cycles after which each kind of moment must have come
CONTROLLED = 0.8  # share of the kills that are at a chosen moment, with --cold


class Sizes(NamedTuple):
    """How large rows and memory are."""

    dim: int
    memory: int  # bytes for the tables of a shard


ROOMY = Sizes(1, 1 << 30)
TINY = Sizes(64, 2 << 20)


@dataclass
class Series:
    """The pushes of one trainer to groups of ``width`` keys: its progress and its deletes."""

    base: int
    width: int
    dim: int
    done: int = 0  # pushes acknowledged
    deleted: list[int] = field(default_factory=list)  # groups

    def keys(self, group: int) -> np.ndarray:
        return np.arange(self.width) + (self.base + group * self.width)

    def gradients(self) -> np.ndarray:
        return np.full((self.width, self.dim), -(4.0 ** (self.done % DIGITS)), np.float32)

    def expected(self, group: int) -> float:
        digits = min(max(self.done - group * DIGITS, 0), DIGITS)
        return float(sum(4**digit for digit in range(digits)))


class Pause:
    """A gate at which trainers of several processes pause between two pushes."""

    def __init__(self, context: Any, trainers: int) -> None:
        self.wanted = context.Event()
        self.gate = context.Barrier(trainers + 1)

    def keep(self) -> None:
        """Pause here while the gate is closed. Called by trainers."""
        if self.wanted.is_set():
            self.gate.wait(TIMEOUT)
            self.gate.wait(TIMEOUT)

    @contextmanager
    def all_still(self) -> Iterator[None]:
        """Close the gate and wait for all trainers. BrokenBarrierError if a trainer has failed."""
        self.wanted.set()
        self.gate.wait(TIMEOUT)
        yield
        self.wanted.clear()
        self.gate.wait(TIMEOUT)


def train(
    number: int,
    addresses: list[str],
    table: str,
    dim: int,
    seed: str,
    stop: Any,
    pause: Pause,
    began: Any,
    answers: Any,
) -> None:
    """Push until asked to stop, then report the progress."""
    rng = random.Random(f"{seed} {number}")
    base = number << 40
    small, large = Series(base, 6, dim), Series(base + (1 << 39), 2000, dim)
    try:
        transport: Any = ("stream", "unary")[number % 2]
        with Client(addresses, timeout=TIMEOUT, transport=transport) as client:
            rows = client.table(table)
            began.put(True)
            while not stop.is_set():
                pause.keep()
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
        pause.gate.abort()
        answers.put((number, [small, large], f"{type(error).__name__}: {error}"))


def digits(got: np.ndarray, want: float) -> str:
    """Return a description of the rows that differ from ``want``."""
    bad = got.reshape(-1)[got.reshape(-1) != want]
    return f"{len(bad)} rows are not {want} but {sorted(set(bad.tolist()))[:5]}"


def verify(client: Client, table: str, every: list[Series], default: float) -> list[str]:
    """Return the differences between the rows and the acknowledged pushes.

    default  serving default that the table was given last
    """
    rows, wrong = client.table(table), []
    if rows.describe().serving_default != default:
        wrong.append(f"serving default {rows.describe().serving_default}, not {default}")
    for series in every:
        groups = -(-series.done // DIGITS)
        for first in range(0, groups, max(1, 40_000 // series.width)):
            some = range(first, min(groups, first + max(1, 40_000 // series.width)))
            keys = np.concatenate([series.keys(group) for group in some])
            got = rows.pull_rows(keys)
            values = got.embeddings.reshape(len(some), -1)
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
def shards_of(
    nursery: Nursery, directory: Path, count: int, memory: int, cold: bool, url: str = ""
) -> Iterator[list[Shard]]:
    """Start shards, and stop them at the end.

    memory  bytes for the tables of each
    cold    those with even numbers give up all rows in memory after each flush
    url     place for their checkpoints; "": none
    """
    port = free_ports(count)
    shards = []
    for number in range(count):
        flags = f"--shard {number} --shards {count} --port {port + number} {FLAGS}".split()
        flags += ["--host-bytes", str(memory)]
        flags += ["--data-dir", str(directory / f"shard-{number}")]
        flags += ["--checkpoint-url", url] if url else []
        squeezed = cold and not number % 2
        shards.append(Shard(nursery, directory / f"{number}.log", *flags, cold=squeezed))
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


class Killer:
    """Kills shards and lets them recover.

    cold   most kills are at a moment of a flush or of a move between the tiers
    early  number of further kills during a recovery
    came   kills at a chosen moment, by what happened; those that did not come in time are at ""
    """

    def __init__(self, rng: random.Random, shards: list[Shard], cold: bool) -> None:
        self.early = 0
        self.came: Counter[str] = Counter()
        self._rng, self._shards, self._cold = rng, shards, cold

    def kill_one(self) -> None:
        rng = self._rng
        shard = rng.choice(self._shards)
        time.sleep(rng.choice((0.05, 0.3, 0.8)) * rng.random())
        if self._cold and rng.random() < CONTROLLED:
            what, moment = moments.draw(rng)
            self.came[what if shard.kill_at(moment) else ""] += 1
        else:
            shard.kill()
        time.sleep(rng.choice((0.0, 0.0, 0.1)))
        shard.start()
        while rng.random() < 0.35:
            time.sleep(rng.uniform(0.0, STARTING))
            self.early += not shard.said("ready")
            shard.kill()
            shard.start()
        shard.wait()


class Temperature:
    """Adds up where the rows of a table were, each time that it is asked to look."""

    def __init__(self) -> None:
        self.rows = self.cold = self.promotions = self.demotions = self.reflushed = 0

    def look(self, client: Client, table: str) -> None:
        info = client.describe_table(table)
        self.rows += info.rows
        self.cold += info.tiers["lmdb"].rows
        self.promotions += info.cache.promotions
        self.demotions += info.cache.demotions
        self.reflushed += info.cache.reflushed_blocks


def run(
    cycles: int,
    seed: int,
    shards: int,
    say: Callable[[str], None] = print,
    *,
    cold: bool = False,
) -> list[str]:
    """Run the cycles and return all errors, which should be none."""
    dim, memory = TINY if cold else ROOMY
    say(f"seed {seed}, {cycles} cycles, {shards} shards, {TRAINERS} trainers")
    rng = random.Random(seed)
    spawn = multiprocessing.get_context("spawn")
    wrong: list[str] = []
    started, done, pushed = time.monotonic(), 0, 0
    with (
        tempfile.TemporaryDirectory(prefix="ps-crash-") as directory,
        Nursery() as nursery,
        shards_of(nursery, Path(directory), shards, memory, cold) as alive,
        ExitStack() as stack,
    ):
        addresses = addresses_of(alive)
        watchers = stack.enter_context(Watchers(addresses))
        killer, temperature = Killer(rng, alive, cold), Temperature()
        before: tuple[str, list[Series], float] | None = None
        pool = stack.enter_context(ThreadPoolExecutor(1))
        while done < cycles and not wrong:
            table = f"round-{done}"
            with Client(addresses, timeout=TIMEOUT) as client:
                client.create_table(table, dim, optimizer="sgd", lr=1.0, initializer="zeros")
            stop, began, answers = spawn.Event(), spawn.SimpleQueue(), spawn.SimpleQueue()
            pause = Pause(spawn, TRAINERS)
            trainers = [
                spawn.Process(
                    target=train,
                    args=(n, addresses, table, dim, f"{seed} {done}", stop, pause, began, answers),
                    daemon=True,
                )
                for n in range(TRAINERS)
            ]
            for trainer in trainers:
                trainer.start()
            for _ in trainers:
                assert began.get()
            with Client(addresses, timeout=TIMEOUT) as client, suppress(BrokenBarrierError):
                for _ in range(min(ROUND, cycles - done)):
                    away = rng.random() < 0.5
                    if away:
                        watchers.resumer.stop()
                    done += 1
                    altering = pool.submit(client.alter_table, table, serving_default=float(done))
                    killer.kill_one()
                    altering.result()
                    if away:
                        watchers.resumer.resume()
                    with pause.all_still():
                        wrong += watchers.differ(client, table, float(done))
                        temperature.look(client, table)
            stop.set()
            ends = [answers.get() for _ in trainers]
            for trainer in trainers:
                trainer.join()
            wrong += [f"trainer {n}: {error}" for n, _, error in ends if error]
            every = [series for _, both, _ in ends for series in both]
            pushed += sum(series.done for series in every)
            with Client(addresses, timeout=TIMEOUT) as client:
                wrong += verify(client, table, every, float(done))
                if before is not None:
                    wrong += verify(client, *before)
                    client.drop_table(before[0])
            before = table, every, float(done)
            say(
                f"{done} cycles, {killer.early} more kills in a recovery, {pushed} pushes,"
                f" {time.monotonic() - started:.0f} s, subscribers compared in"
                f" {watchers.compared} rows: {'; '.join(wrong[:5]) or 'all as it should'}"
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
        if cold:
            if done >= ENOUGH and temperature.cold < COLD * temperature.rows:
                wrong.append(f"{temperature.cold} of {temperature.rows} rows were only on disk")
            if done >= ENOUGH and (missed := moments.STEPS.keys() - killer.came.keys()):
                wrong.append(f"no kill was at a moment of a {', '.join(sorted(missed))}")
            say(
                f"{temperature.cold / max(1, temperature.rows):.0%} of the rows were only on disk;"
                f" {temperature.promotions} promotions, {temperature.demotions} demotions and"
                f" {temperature.reflushed} blocks flushed again, at least; kills at a moment of a"
                f" {', '.join(f'{what}: {n}' for what, n in sorted(killer.came.items()) if what)};"
                f" {killer.came['']} moments did not come"
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
    parser.add_argument("--cold", action="store_true", help="nearly all rows only on disk")
    given = parser.parse_args()

    def say(text: str) -> None:
        print(text, flush=True)

    wrong = run(given.cycles, given.seed, given.shards, say, cold=given.cold)
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
