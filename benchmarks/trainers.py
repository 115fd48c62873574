"""Measure how long a PyTorch training loop waits for rows and pushes, with and without a pipeline.

One process trains an MLP (multilayer perceptron) on rows of one table on one server. A step is the
time from one batch to the next. Its compute is the forward and backward pass and the step of the
dense optimizer; the rest is "outside". All loops take turns.

    alone           the same model on rows that stay in this process; nothing is sent
    blocking        a pull, then a push, each waited for
    exact           EmbeddingGroup.pipeline with staleness 0, whose results equal those of
                    "blocking"
    staleness 1     with staleness 1
    staleness 2     with staleness 2
    exchange alone  no model: only the message that "exact" must wait for, and its reply. It pushes
                    the gradients of a batch, and pulls the rows that the next batch has in common

"outside, own" is the processor time of the loop's thread outside of compute; the rest of the time
outside it waits. "cores busy" is the processor time of the trainer and the server, divided by the
time of the loop. With as many cores as the machine has, only less work could make the loop faster.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.report import Report, arguments
from benchmarks.servers import cpu, shards
from benchmarks.step import fill
from benchmarks.work import Work, keys_of, standard_work
from psclient import Client, Table
from psclient.torch import Embedding, EmbeddingGroup, RowOptimizer

FIELDS = 10  # keys per sample
MODELS = {"small": [128, 64], "large": [512, 256]}  # widths of the hidden layers
WARM = 3  # steps at the start of each turn that are not measured
TARGETS = {"exact": 0.65, "staleness 1": 0.25}  # of the time outside, compared with "blocking"
STEP = 1.25  # target: a step with staleness 1, compared with "alone"

Batch = tuple[Tensor, Tensor]  # keys int64[samples, FIELDS], labels float32[samples]


@dataclass
class Times:
    """Seconds of the measured steps of one loop.

    steps    of each whole step
    compute  of each step's forward pass, backward pass and dense optimizer
    own      processor time of the loop's thread outside of compute, of each step
    busy     processor time of trainer and server, over all measured turns
    wall     time of all measured turns
    """

    steps: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    busy: float = 0.0
    wall: float = 0.0

    @property
    def outside(self) -> float:
        """Median of the time outside compute, in seconds."""
        return float(np.median(np.subtract(self.steps, self.compute)))

    @property
    def step(self) -> float:
        """Median of the whole step, in seconds."""
        return float(np.median(self.steps))


class Model:
    """The dense part of one loop.

    hidden  widths of the hidden layers
    width   length of the input of a sample
    """

    def __init__(self, hidden: list[int], width: int) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for each in hidden:
            layers += [nn.Linear(width, each), nn.ReLU()]
            width = each
        self._net = nn.Sequential(*layers, nn.Linear(width, 1))
        self._optimizer = torch.optim.SGD(self._net.parameters(), lr=0.01)

    def compute(self, rows: Tensor, labels: Tensor) -> None:
        """Do the forward and backward pass of rows float32[samples, FIELDS, dim]."""
        logits = self._net(rows.flatten(1))[:, 0]
        loss = functional.binary_cross_entropy_with_logits(logits, labels)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        loss.item()


Outputs = Iterator[tuple[Batch, Tensor]]


class NoModel:
    """Stands in for a Model, and computes nothing."""

    def compute(self, rows: Tensor, labels: Tensor) -> None:
        pass


class Loop:
    """A training loop: yields each batch with its rows, and pushes after it.

    outputs  function that returns (batch, rows) of each batch of a turn
    push     pushes the gradients of a batch
    """

    def __init__(
        self,
        model: Model | NoModel,
        outputs: Callable[[list[Batch]], Any],
        push: Callable[[], None],
        pids: Iterable[int],
    ) -> None:
        self._model, self._outputs, self._push = model, outputs, push
        self._pids = [os.getpid(), *pids]
        self.times = Times()

    def turn(self, batches: list[Batch]) -> None:
        """Train on some batches, and measure all but the first WARM steps."""
        with self._outputs(batches) as outputs:
            begin = used = before = 0.0
            for number, ((_, labels), rows) in enumerate(outputs):
                started, working = time.perf_counter(), time.thread_time()
                self._model.compute(rows, labels)
                computed, worked = time.perf_counter() - started, time.thread_time() - working
                self._push()
                now, spent = time.perf_counter(), time.thread_time()
                if number > WARM:
                    self.times.steps.append(now - begin)
                    self.times.compute.append(computed)
                    self.times.own.append(spent - used - worked)
                if number == WARM:
                    before, first = sum(map(cpu, self._pids)), now
                begin, used = now, spent
            self.times.busy += sum(map(cpu, self._pids)) - before
            self.times.wall += now - first


def loops(hidden: list[int], table: Table, pids: list[int]) -> dict[str, Loop]:
    """Return the loops by name (see the module docstring).

    pids  process ids of the servers
    """
    width = FIELDS * table.dim

    def loop(outputs: Any, push: Callable[[], None]) -> Loop:
        return Loop(Model(hidden, width), outputs, push, pids)

    made = {"alone": loop(_alone(table.dim), lambda: None)}
    group, rows = _group(table)
    made["blocking"] = loop(_blocking(group), rows.step)
    for name, staleness in (("exact", 0), ("staleness 1", 1), ("staleness 2", 2)):
        group, rows = _group(table)
        made[name] = loop(_pipeline(group, staleness), rows.step)
    made["exchange alone"] = Loop(NoModel(), *_exchanges(table), pids)
    return made


def _group(table: Table) -> tuple[EmbeddingGroup, RowOptimizer]:
    group = EmbeddingGroup(table.client, {"f": Embedding(table)})
    return group, group.optimizer()


def _alone(dim: int) -> Any:
    """Return rows of random numbers, gathered by the places of the batch's keys."""

    @contextmanager
    def outputs(batches: list[Batch]) -> Iterator[Outputs]:
        found = [np.unique(keys, return_inverse=True) for keys, _ in batches]
        leaves = [torch.randn(len(distinct), dim, requires_grad=True) for distinct, _ in found]

        def each() -> Outputs:
            for batch, leaf, (_, places) in zip(batches, leaves, found, strict=True):
                yield batch, functional.embedding(torch.from_numpy(places), leaf)

        yield each()

    return outputs


def _blocking(group: EmbeddingGroup) -> Any:
    @contextmanager
    def outputs(batches: list[Batch]) -> Iterator[Outputs]:
        yield ((batch, group({"f": batch[0]})["f"]) for batch in batches)

    return outputs


def _pipeline(group: EmbeddingGroup, staleness: int) -> Any:
    @contextmanager
    def outputs(batches: list[Batch]) -> Iterator[Outputs]:
        with group.pipeline(batches, lambda batch: {"f": batch[0]}, staleness=staleness) as turns:
            yield ((batch, seen["f"]) for batch, seen in turns)

    return outputs


def _exchanges(table: Table) -> tuple[Any, Callable[[], None]]:
    """Return what a Loop needs to exchange only: its outputs and its push."""
    unsent: deque[tuple[Any, Any]] = deque()  # (push, keys to pull) of each batch

    @contextmanager
    def outputs(batches: list[Batch]) -> Iterator[Outputs]:
        found = [np.unique(keys) for keys, _ in batches]
        for keys, following in pairwise([*found, found[0]]):
            shared = table.client.batch(np.intersect1d(keys, following))
            gradients = np.full((len(keys), table.dim), 1e-3, np.float32)
            unsent.append(((table.client.batch(keys), gradients), shared))
        yield ((batch, torch.empty(0)) for batch in batches)

    def push() -> None:
        given, shared = unsent.popleft()
        table.exchange(shared, given)

    return outputs, push


def rows_of(made: dict[str, Loop]) -> list[dict[str, Any]]:
    """Return the rows of the report."""
    base, alone = made["blocking"].times, made["alone"].times
    return [
        {
            "loop": name,
            "step p50 ms": loop.times.step * 1e3,
            "compute p50 ms": float(np.median(loop.times.compute)) * 1e3,
            "outside p50 ms": loop.times.outside * 1e3,
            "outside, own p50 ms": float(np.median(loop.times.own)) * 1e3,
            "outside / blocking": loop.times.outside / base.outside if name != "alone" else None,
            "target": TARGETS.get(name),
            "step / alone": loop.times.step / alone.step if name != "exchange alone" else None,
            "step target": STEP if name == "staleness 1" else None,
            "cores busy": loop.times.busy / loop.times.wall,
            "steps": len(loop.times.steps),
        }
        for name, loop in made.items()
    ]


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--samples", type=int, default=1000, help="Samples per batch (default: %(default)s)."
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("trainers", options.json)
    work = Work(rows=50_000 if options.quick else 300_000, batch=options.samples * FIELDS)
    rounds, count = (2, 15) if options.quick else (6, 40)
    keys = keys_of(np.arange(work.rows))
    drawn = standard_work(work, rounds * count)
    rng = np.random.default_rng(3)
    data = [
        (
            torch.from_numpy(keys[ids].reshape(-1, FIELDS)),
            torch.from_numpy(rng.random(options.samples, np.float32)),
        )
        for ids, _, _ in drawn
    ]
    distinct = np.mean([len(step[1]) for step in drawn])
    for model, hidden in MODELS.items():
        with shards(1) as (addresses, pids), Client(addresses) as client:
            table = client.create_table("t", work.dim, optimizer="adagrad", lr=0.05)
            fill(table, keys)
            made = loops(hidden, table, pids)
            for loop in made.values():
                loop.turn(data[: WARM + 5])
                loop.times = Times()
            for turn in range(rounds):
                for loop in made.values():
                    loop.turn(data[turn * count : (turn + 1) * count])
            report.section(
                f"{model} model, hidden layers {hidden}, {options.samples:,} samples of {FIELDS}"
                f" keys ({distinct:,.0f} distinct), {work.rows:,} rows of {work.dim}",
                rows_of(made),
            )
    report.close()


if __name__ == "__main__":
    main()
