"""Kill trainers and shards at random moments, let the trainer come back, and check what it became.

    python -m tests.fault.resume --policy rewind --cycles 100 --seed 7
    python -m tests.fault.resume --cycles 100                            all three policies

Each cycle starts a trainer process that resumes, and kills it, or a shard, or first a shard and
then the trainer, at a random moment: while it resumes (and restores), trains, makes a cut, or
saves. A killed shard starts again at once. The trainer uses the blocking client or a pipeline, in
turns.

In the end a trainer resumes and is not killed. Then:

    rewind  dense state and all rows are equal, bit for bit, to those of a twin: a trainer of the
            same steps that was never killed
    once    each batch took effect exactly once: in the rows and in the dense state
    ahead   no batch took effect twice. Those whose push was in progress at a kill may be lost

The oracle of once and ahead: SGD with learning rate 1 on rows that start at 0. The batch of step t
has the gradient -4^(t % 8) for the keys of group t // 8. Each base-4 digit of a row then shows how
often its push took effect. The dense state is an integer; step t adds 4^t to it. So its digits show
how often each step was computed. The seed decides what is done and when; the outcome also depends
on the timing of the machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs by itself
sys.path.extend(str(Path(__file__).parents[2] / each) for each in ("", "proto"))

from fault.crash import addresses_of, shards_of
from fault.nursery import Nursery, Shard

from psclient import Client
from psclient.checkpointer import Checkpointer
from psclient.errors import DeadlineExceeded, PsError, ResourceExhausted, Unavailable
from psclient.pipeline import Pipeline

POLICIES = ("rewind", "once", "ahead")
DIGITS, WIDTH, DIM = 8, 40, 4
EVERY = 20  # steps from cut to cut
RESUMED = 0.8  # share of the kills that come after the trainer has resumed
TIMEOUT = 60.0
LONGEST = 600.0  # seconds that the last trainer of a run may take
DENSE = "dense.json"
PASSING = (Unavailable, DeadlineExceeded, ResourceExhausted)  # a shard is away or busy
ROUNDS = 10  # attempts to resume, of one process


# ---- the trainer, in its own process


class Digits:
    """What is trained under once and ahead: its numbers show what took effect, and how often."""

    table = "digits"

    def __init__(self) -> None:
        self.dense = 0

    @staticmethod
    def create(client: Client) -> None:
        client.create_table(Digits.table, DIM, optimizer="sgd", lr=1.0, initializer="zeros")

    def keys(self, step: int) -> np.ndarray:
        return np.arange(WIDTH) + step // DIGITS * WIDTH

    def gradients(self, step: int, rows: np.ndarray) -> np.ndarray:
        self.dense += 4**step
        return np.full((WIDTH, DIM), -(4.0 ** (step % DIGITS)), np.float32)

    def pack(self) -> str:
        return hex(self.dense)

    def unpack(self, text: str) -> None:
        self.dense = int(text, 16)


class Numbers:
    """What is trained under rewind: every step depends on the rows and on all steps before."""

    table = "numbers"

    def __init__(self) -> None:
        self.dense = np.linspace(-1, 1, DIM, dtype=np.float32)

    @staticmethod
    def create(client: Client) -> None:
        client.create_table(Numbers.table, DIM, optimizer="adam", lr=0.05, seed=3)

    def keys(self, step: int) -> np.ndarray:
        return np.sort(np.random.default_rng(step).choice(WIDTH * 20, WIDTH, replace=False))

    def gradients(self, step: int, rows: np.ndarray) -> np.ndarray:
        error = rows * self.dense - np.float32(np.sin(step))
        self.dense = self.dense - np.float32(0.01) * (error * rows).mean(0)
        return error * self.dense

    def pack(self) -> str:
        return self.dense.tobytes().hex()

    def unpack(self, text: str) -> None:
        self.dense = np.frombuffer(bytes.fromhex(text), np.float32)


def train(policy: str, addresses: list[str], home: Path, staleness: int | None) -> None:
    """Resume and train until the file ``home/stop`` exists; then write what it became to
    ``home/out.json``. Creates the file ``home/began`` when it has resumed.

    staleness  of the pipeline; None: use the blocking client
    """
    directory, stop, out = home / "trainer", home / "stop", home / "out.json"
    try:
        model = Numbers() if policy == "rewind" else Digits()
        with Client(addresses, timeout=TIMEOUT) as client:
            model.create(client) if not directory.exists() else None
            ck = Checkpointer(client, directory=directory, every=EVERY, keep=2, full_every=3)
            start = resumed(ck, policy)
            (home / "began").touch()
            if start.path is not None:
                model.unpack(json.loads((start.path / DENSE).read_text()))
            step = start.step - 1

            def save(path: Path) -> None:
                (path / DENSE).write_text(json.dumps(model.pack()))

            def steps() -> Any:
                at = start.step
                while not stop.exists():
                    yield at
                    at += 1

            if staleness is None:
                table = client.table(model.table)
                for step in steps():
                    keys = model.keys(step)
                    table.push(keys, model.gradients(step, table.pull(keys)), step=step)
                    ck.at(step, save=save)
            else:
                features = {"f": model.table}
                pipe = Pipeline(client, features, staleness=staleness, step=start.step)
                ck.pipe = pipe
                with pipe:
                    for ticket in pipe.over(lambda at: {"f": model.keys(at)}, steps()):
                        step, rows = ticket.step, ticket.rows[model.table]
                        pipe.push(ticket, {model.table: model.gradients(step, rows)})
                        ck.at(step, save=save)
            ck.close()
        out.write_text(json.dumps({"step": step, "dense": model.pack()}))
    except BaseException:
        out.write_text(json.dumps({"error": traceback.format_exc()}))
        raise


def resumed(ck: Checkpointer, policy: Any) -> Any:
    """Resume; again, if a shard is away meanwhile, as a supervisor would."""
    for _ in range(ROUNDS):
        try:
            return ck.resume(policy)
        except PsError as error:
            if not isinstance(error, PASSING) and error.reason != "RESTORE_FAILED":
                raise
            time.sleep(0.5)
    return ck.resume(policy)


# ---- the run


class Run:
    """One policy: its shards, the directory of its trainers, and what was killed."""

    def __init__(self, policy: str, rng: random.Random, shards: list[Shard], home: Path) -> None:
        self.policy, self.rng, self.shards, self.home = policy, rng, shards, home
        self.addresses = addresses_of(shards)
        self.directory = home / "trainer"
        self.out, self.began = home / "out.json", home / "began"
        self.killed: Counter[str] = Counter()
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["psclient.checkpointer", "psclient.pipeline"])
        self._cycle = 0

    def start(self) -> Any:
        self._cycle += 1
        most = 1 if self.policy == "rewind" else 2
        staleness = (None, *range(most))[self._cycle % (most + 1)]
        for each in (self.out, self.began):
            each.unlink(missing_ok=True)
        given = self.policy, self.addresses, self.home, staleness
        trainer = self._processes.Process(target=train, args=given, daemon=True)
        trainer.start()
        return trainer

    def cycle(self) -> str | None:
        """Start a trainer, kill something; return an error of the trainer, or None."""
        rng, trainer = self.rng, self.start()
        what = rng.choices(("trainer", "shard", "both"), (6, 2, 2))[0]
        if rng.random() < RESUMED:
            while trainer.is_alive() and not self.began.exists():
                time.sleep(0.02)
        time.sleep(rng.choice((0.3, 1.0, 2.5)) * rng.random())
        if what != "trainer":
            shard = rng.choice(self.shards)
            shard.kill()
            shard.start()
            if what == "shard":
                shard.wait()
            time.sleep(rng.choice((0.1, 1.0)) * rng.random())
        self.killed[what] += 1
        self.killed["while it resumed"] += not self.began.exists()
        error = self._error() if not trainer.is_alive() else None
        trainer.kill()
        trainer.join()
        for shard in self.shards:
            assert shard.alive(), shard.tail()
        return error

    def finish(self) -> dict[str, Any]:
        """Let a trainer resume and train on to a further cut; return what it became."""
        trainer = self.start()
        deadline, before = time.monotonic() + LONGEST, self.cuts()
        while trainer.is_alive() and time.monotonic() < deadline and self.cuts() <= before:
            time.sleep(0.1)
        (self.home / "stop").touch()
        trainer.join(max(1.0, deadline - time.monotonic()))
        if trainer.is_alive() or not self.out.exists():
            trainer.kill()
            return {"error": "the last trainer did not end"}
        return json.loads(self.out.read_text())  # type: ignore[no-any-return]

    def cuts(self) -> int:
        """Return the step of the newest complete cut."""
        found = [int(each.name[5:]) for each in self.directory.glob("step-*")]
        return max(found, default=0)

    def _error(self) -> str | None:
        return self.out.read_text() if self.out.exists() else "the trainer ended without a word"


def verify(run: Run, end: dict[str, Any]) -> list[str]:
    """Return what is wrong after a run."""
    with Client(run.addresses, timeout=TIMEOUT) as client:
        if run.policy == "rewind":
            return _compare(client, end)
        return _count(client, end, run)


def _compare(client: Client, end: dict[str, Any]) -> list[str]:
    """Train a twin, in a table of the same name and seed, and compare."""
    table = client.table(Numbers.table)
    rows = table.pull_rows(np.arange(WIDTH * 20))
    client.drop_table(Numbers.table)
    twin = Numbers()
    twin.create(client)
    table = client.table(Numbers.table)
    for step in range(1, end["step"] + 1):
        keys = twin.keys(step)
        table.push(keys, twin.gradients(step, table.pull(keys)), step=step)
    other, wrong = table.pull_rows(np.arange(WIDTH * 20)), []
    if twin.pack() != end["dense"]:
        wrong.append(f"dense is {end['dense']}, that of the twin {twin.pack()}")
    for name in ("embeddings", "found", "steps", "frequencies"):
        if getattr(rows, name).tobytes() != getattr(other, name).tobytes():
            wrong.append(f"rows differ from those of the twin in {name}")
    return wrong


def _count(client: Client, end: dict[str, Any], run: Run) -> list[str]:
    """Count how often each step took effect on the rows, and in the dense state."""
    last, once, wrong = end["step"], run.policy == "once", []
    groups = last // DIGITS + 1
    table, lost = client.table(Digits.table), 0
    rows = np.concatenate(
        [
            table.pull(np.arange(at * WIDTH, min(groups, at + 500) * WIDTH))
            for at in range(0, groups, 500)
        ]
    )
    rows = rows.astype(np.int64).reshape(groups, WIDTH * DIM)
    dense = int(end["dense"], 16)
    computed = Counter[int]()
    for step in range(1, last + 1):
        found = set((rows[step // DIGITS] >> (2 * (step % DIGITS)) & 3).tolist())
        times = dense >> (2 * step) & 3
        computed[times] += 1
        lost += 0 in found
        if found - {0, 1} or times > 1 or (once and (found != {1} or times != 1)):
            wrong.append(f"step {step}: {sorted(found)} times in rows, {times} in the dense state")
    kills = sum(run.killed[what] for what in ("trainer", "both"))
    run.killed["steps lost in rows"] = lost
    run.killed["steps not in dense"] = computed[0]
    if lost > 2 * kills:  # a pipeline has two pushes in progress
        wrong.append(f"{lost} steps were lost in {kills} kills")
    return wrong


def run(
    policy: str, cycles: int, seed: int, say: Callable[[str], None] = print, shards: int = 2
) -> list[str]:
    """Run the cycles of one policy and return all errors, which should be none."""
    rng, began = random.Random(f"{policy} {seed}"), time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="ps-resume-") as path,
        Nursery() as nursery,
        shards_of(nursery, Path(path), shards, 1 << 28, False, f"file://{path}/stored") as alive,
    ):
        one = Run(policy, rng, alive, Path(path))
        for done in range(1, cycles + 1):
            if error := one.cycle():
                return [f"cycle {done} of {policy}: {error}"]
            if done % 20 == 0:
                seconds = time.monotonic() - began
                say(f"{policy}: {done} cycles, cut at {one.cuts()}, {seconds:.0f} s")
        end = one.finish()
        wrong = [end["error"]] if "error" in end else verify(one, end)
        say(
            f"{policy}: {cycles} cycles, seed {seed}: {end.get('step')} steps, killed"
            f" {dict(one.killed)}, {time.monotonic() - began:.0f} s:"
            f" {'; '.join(wrong[:5]) or 'all as it should'}"
        )
        if wrong and (kept := Path(path)).exists():
            shutil.copytree(kept, Path(tempfile.mkdtemp(prefix="ps-resume-kept-")) / "run")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", choices=POLICIES, action="append")
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()

    def say(text: str) -> None:
        print(text, flush=True)

    wrong = [
        each
        for policy in given.policy or POLICIES
        for each in run(policy, given.cycles, given.seed, say)
    ]
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
