"""Train tables that are ten times as large as the memory of their server, and compare with a twin.

    python examples/larger_than_memory.py [--quick]

Two servers train the same model on the same stream of clicks (tail.py), with the same seeds. One of
them may use only a tenth of the memory that the rows need; its other rows are on disk only. The
*twin* has room for all rows. Tiers change no arithmetic, so every prediction of both must be equal,
and with it the AUC to its last digit. The example fails if it is not.

A step is one round trip per server: an exchange pushes the gradients of the last batch and pulls
the rows of the next batch. Before it, the limited server is asked to read the rows of the batch
after that from the disk (prefetch), while the trainer computes.

Each key has a row of 64 numbers and as many numbers of optimizer state. With much smaller rows, a
tenth of the memory would not even hold the index, which has an entry of about 30 bytes for each
row, in memory or not.
"""

import argparse
import sys
import time
from dataclasses import dataclass

import numpy as np
from auc import auc
from bar import Bar
from clicks import FIELDS, Batch, Floats, Keys, Rows, gradients, predict
from cluster import local_cluster
from rich.console import Console
from rich.table import Table as Grid
from tail import Scale, Seen, Stream

from psclient import Client

FACTORS = 63  # numbers in a row besides the weight
ROW_BYTES = 2 * 4 * (1 + FACTORS) + 32  # embedding, Adagrad's state, metadata
TIMES = 10  # size of the rows, divided by the memory of the limited server
LR = 0.2
INITIAL_STD = 0.02
LINES = 10  # number of lines to print instead of the bar if there is no terminal
MIB = 1 << 20

FULL = Scale(steps=30, batch=4096)
QUICK = Scale(steps=10, batch=2048)


class Model:
    """The factorization machine of clicks.py on one server, and what it has predicted.

    ps  client of the server
    """

    def __init__(self, ps: Client, seed: int, *, prefetch: bool) -> None:
        self._ps = ps
        self._prefetch = prefetch
        self._push: dict[str, tuple[Keys, Rows]] = {}
        self.predicted: list[Floats] = []
        self.seconds = 0.0  # spent in calls of the client
        for field in FIELDS:
            ps.create_table(
                field,
                dim=1 + FACTORS,
                optimizer="adagrad",
                lr=LR,
                initializer="normal",
                initializer_args={"std": INITIAL_STD},
                seed=seed,
            )

    def learn(self, step: int, batch: Batch, following: Batch | None) -> None:
        """Predict a batch, then compute its gradients, which the next step pushes.

        following  the next batch; None: there is none
        """
        start = time.perf_counter()
        if self._prefetch and following is not None:
            self._ps.prefetch(following.keys)
        rows = self._ps.exchange(push=self._push, pull=batch.keys, step=step)
        self.seconds += time.perf_counter() - start
        predicted = predict(rows)
        gradient = gradients(rows, (predicted - batch.clicks).astype(np.float32))
        self._push = {field: (batch.keys[field], gradient[field]) for field in FIELDS}
        self.predicted.append(predicted)

    def auc(self, clicks: list[Rows]) -> float:
        """Return the AUC over the last third of the batches, each predicted before it was learned.

        clicks  of all batches
        """
        first = 2 * len(clicks) // 3
        return auc(np.concatenate(clicks[first:]), np.concatenate(self.predicted[first:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a server has of all tables, and the requests that it served."""

    rows: int
    host_rows: int  # in memory
    memory: int  # bytes, with the index
    disk: int  # bytes
    hits: int  # keys with a row that was in memory when they were pulled or pushed
    misses: int  # keys with a row that was on disk only

    @classmethod
    def by(cls, ps: Client) -> "Held":
        infos = [ps.describe_table(field) for field in FIELDS]
        tiers = [tier for info in infos for tier in info.tiers.values()]
        memory = [tier for tier in tiers if not tier.on_disk]
        return cls(
            rows=sum(info.rows for info in infos),
            host_rows=sum(tier.rows for tier in memory),
            memory=sum(info.bytes for info in infos),
            disk=sum(tier.bytes for tier in tiers if tier.on_disk),
            hits=sum(tier.hits for tier in memory),
            misses=sum(tier.misses for tier in memory),
        )

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


class Display(Bar):
    """Progress bar that shows speed, rows and hit rate of the limited server."""

    def __init__(self, console: Console, ps: Client, steps: int) -> None:
        super().__init__(console, steps, LINES)
        self._ps = ps

    def step(self, step: int) -> None:
        self._update(step)

    def _figures(self, step: int) -> str:
        held = Held.by(self._ps)
        rate = step / (time.monotonic() - self._start)
        return (
            f"{rate:3.0f} steps/s  {held.rows:,} rows, {held.host_rows / held.rows:.0%} in memory"
            f"  hits {held.hit_rate:.1%}"
        )


def budget(stream: Stream) -> tuple[int, int]:
    """Return (bytes of all rows that the stream will create, memory of the limited server)."""
    size = sum(len(Seen.of(stream, field).keys) for field in ("user", "item")) * ROW_BYTES
    return size, max(size // TIMES, MIB)


def train(stream: Stream, models: list[Model], display: Display) -> list[Rows]:
    """Train all models on the steps that are not held out; return the clicks of each step."""
    clicks, batch = [], stream.batch(0)
    for step in range(stream.learnt):
        following = stream.batch(step + 1) if step + 1 < stream.learnt else None
        for model in models:
            model.learn(step, batch, following)
        clicks.append(batch.clicks)
        display.step(step + 1)
        if following is not None:
            batch = following
    return clicks


def results(limited: Held, twin: Held, aucs: tuple[float, float], memory: int) -> Grid:
    """Return a table that compares the limited server with its twin.

    aucs    of the limited server and of its twin
    memory  bytes that the limited server may use
    """
    grid = Grid("", "limited", "twin", title="The same model, with and without room for its rows")
    for column in grid.columns[1:]:
        column.justify = "right"
    grid.add_row("memory limit, MB", f"{memory / 1e6:.1f}", "none")
    both = limited, twin
    grid.add_row("rows", *(f"{held.rows:,}" for held in both))
    grid.add_row("rows in memory", *(f"{held.host_rows:,}" for held in both))
    grid.add_row("memory, MB", *(f"{held.memory / 1e6:.1f}" for held in both))
    grid.add_row("disk, MB", *(f"{held.disk / 1e6:.1f}" for held in both))
    grid.add_row("keys found in memory", *(f"{held.hit_rate:.2%}" for held in both))
    grid.add_row("AUC", *(f"{value:.17g}" for value in aucs))
    return grid


def problem(aucs: tuple[float, float], limited: Held, size: int, memory: int) -> str | None:
    """Return why the example fails, or None.

    aucs    of the limited server and of its twin
    size    bytes of all rows
    memory  bytes that the limited server may use
    """
    if aucs[0] != aucs[1]:
        return f"expected the AUC of the twin, {aucs[1]!r}, got {aucs[0]!r}"
    if limited.rows * ROW_BYTES < 0.9 * size:
        return f"expected {size // ROW_BYTES:,} rows, got {limited.rows:,}"
    if limited.host_rows * ROW_BYTES > 1.05 * memory:
        return f"{limited.host_rows:,} rows do not fit into {memory:,} bytes of memory"
    return None


def main() -> None:
    arguments = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 110)
    start = time.monotonic()
    stream = Stream(arguments.seed, QUICK if arguments.quick else FULL)
    size, memory = budget(stream)
    console.print(
        f"{size // ROW_BYTES:,} rows of {ROW_BYTES} bytes: {size / 1e6:,.0f} MB; memory of the"
        f" limited server: {memory / 1e6:,.1f} MB",
        highlight=False,
    )
    with (
        local_cluster(1, "--host-bytes", str(memory)) as small,
        local_cluster(1) as large,
        Client(small) as limited,
        Client(large) as twin,
    ):
        models = [
            Model(limited, arguments.seed, prefetch=True),
            Model(twin, arguments.seed, prefetch=False),
        ]
        with Display(console, limited, stream.learnt) as display:
            clicks = train(stream, models, display)
        aucs = models[0].auc(clicks), models[1].auc(clicks)
        held = Held.by(limited)
        console.print(results(held, Held.by(twin), aucs, memory))
    console.print(
        f"time in calls: limited {models[0].seconds:.1f} s, twin {models[1].seconds:.1f} s;"
        f" stopped cleanly, {time.monotonic() - start:.1f} s in all",
        highlight=False,
    )
    if why := problem(aucs, held, size, memory):
        sys.exit(why)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="Use a stream of a sixth of the length."
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="Seed of all random numbers (default: %(default)s).",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
