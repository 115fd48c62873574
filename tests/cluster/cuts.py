"""A trainer that takes checkpoints, and can end in the middle and come back.

The oracle: SGD with learning rate 1 on rows that start at 0. The batch of step t has the gradient
-4^(t % 8) for the keys of group t // 8. Each base-4 digit of a row then shows how often its push
took effect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import Cluster

from psclient import Client, admin
from psclient.checkpointer import Checkpointer, Start
from psclient.pipeline import Pipeline

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


def settle(trainer: Trainer) -> None:
    """Wait until the cut of a trainer is complete, or give up one whose barrier has not come."""
    trainer.ck.close()


def one_more(trainer: Trainer) -> Client:
    return Client(trainer.client._addresses)


def stored(tmp_path: Path) -> list[str]:
    """Return the names of the checkpoints of all complete cuts, oldest first."""
    return [each.read_text() for each in sorted((tmp_path / "run").glob("step-*/CHECKPOINT"))]


def newest(tmp_path: Path) -> str:
    return stored(tmp_path)[-1]


def parents(trainer: Trainer) -> dict[str, str | None]:
    with one_more(trainer) as client:
        return {each.name: each.parent for each in admin.checkpoints(client)}


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
