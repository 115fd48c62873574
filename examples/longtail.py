"""Five ways to store embeddings of an unbounded set of ids, compared on one drifting click stream.

    python examples/longtail.py [--quick] [--html longtail.html]
                                [--shards 2 | --servers host:port,host:port]

The stream is generated (tail.py): a few users and items are popular, most are rare, and new ones
replace old ones. The ways (ways.py) are hashing into a fixed table, multi-hash, and three dynamic
tables: one that keeps a row for every id ("everything"), one that admits ids at their second
occurrence, and one that also evicts idle ids.

All five train the same factorization machine on the same batches in one pass. One round trip per
step carries the rows of all five. The last tenth of the stream is held out for the final AUC: it is
predicted with pulls in mode "serve", and nothing is pushed. The example fails unless

    hashing               more than 20 % of the ids share their bucket with another id
    multi-hash            less than 0.2 per mille of the ids share all their rows with another id,
                          with 95 % fewer parameters
    admission + eviction  keeps at most 30 % of the rows, with an AUC within 0.001 of "everything"
    everything            reaches 70 % of the possible AUC: (AUC - 0.5) / (best AUC - 0.5)

The first three claims were published for DeepRec; docs/longtail.md discusses the results. With
--quick the stream has a ninth of the length. The limits are then 60 % of the possible AUC and an
AUC within 0.004, because the models learn less and AUCs are less precise.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from auc import auc
from bar import Bar
from clicks import Batch, Floats, Rows, predict, share
from cluster import arguments as cluster_arguments
from cluster import servers
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as Grid
from tail import HELD_OUT, LONG, Scale, Seen, Stream
from ways import Result, Way, embeddings, make_ways

import psclient
from psclient import Client

MIN_COLLISIONS = 0.2  # share of the ids that must share their row with another id, with hashing
MAX_COLLISIONS = 2e-4  # share of the ids that may share all rows with another id, with multi-hash
MIN_SAVED = 0.95  # share of hashing's parameters that multi-hash saves
MAX_ROWS = 0.3  # share of the rows of "everything" that admission and eviction keep

WINDOW = 20  # the AUC of a day covers this many steps at its end
LINES = 9  # number of lines to print instead of the bar if there is no terminal
WIDTH = 100  # characters per line if there is no terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Length of the stream, and the limits that the results must keep with this length."""

    scale: Scale
    max_loss: float  # AUC that admission and eviction may lose
    min_share: float  # share of the possible AUC that "everything" must reach


FULL = Size(scale=Scale(steps=70, batch=4096), max_loss=0.001, min_share=0.7)
QUICK = Size(scale=Scale(steps=15, batch=2048), max_loss=0.004, min_share=0.6)


# ---- learning


class Window:
    """Collects the clicks, true probabilities and predictions of each way, to compute AUCs.

    ways  number of ways
    """

    def __init__(self, ways: int) -> None:
        self._columns: list[list[NDArray[Any]]] = [[] for _ in range(2 + ways)]

    def add(self, batch: Batch, predicted: list[Floats]) -> None:
        values: list[NDArray[Any]] = [batch.clicks, batch.truth, *predicted]
        for column, part in zip(self._columns, values, strict=True):
            column.append(part)

    def aucs(self) -> tuple[float, list[float]]:
        """Return (AUC of the true probabilities, AUC of each way)."""
        clicks, truth, *ways = (np.concatenate(column) for column in self._columns)
        return auc(clicks, truth), [auc(clicks, predicted) for predicted in ways]


def learn(ps: Client, stream: Stream, ways: list[Way], display: "Display") -> None:
    """Train all ways on the days that are not held out, in one pass.

    Each batch is predicted before it is learned. At the end of each day, appends rows, bytes and
    AUC to each way.
    """
    push: dict[str, tuple[psclient.Batch, Rows]] = {}
    window = Window(len(ways))
    for step in range(stream.learnt):
        batch = stream.batch(step)
        shared = {name: ps.batch(keys) for name, keys in batch.keys.items()}
        wanted = [way.batches(batch.keys, shared) for way in ways]
        rows = ps.exchange(push, merged(wanted), step=step)
        push, predicted = {}, []
        for way, batches in zip(ways, wanted, strict=True):
            pulled = way.compose(batches, rows)
            predicted.append(predict(embeddings(pulled)))
            error = (predicted[-1] - batch.clicks).astype(np.float32)
            push.update(way.gradients(pulled, error))
        left = -(step + 1) % stream.scale.steps  # of the day
        if left < WINDOW:
            window.add(batch, predicted)
        if not left:
            for way, value in zip(ways, window.aucs()[1], strict=True):
                way.aucs.append(value)
                way.measure(ps)
            window = Window(len(ways))
        display.step(step + 1)
    ps.push(push, step=stream.learnt)
    for way in ways:  # with the last push
        way.measure(ps)


def score(
    ps: Client, stream: Stream, ways: list[Way], display: "Display"
) -> tuple[float, list[float]]:
    """Predict the held-out days with pulls in mode "serve".

    Returns (AUC of the true probabilities, AUC of each way).
    """
    window = Window(len(ways))
    for step in range(stream.learnt, stream.steps):
        batch = stream.batch(step)
        shared = {name: ps.batch(keys) for name, keys in batch.keys.items()}
        wanted = [way.batches(batch.keys, shared) for way in ways]
        rows = ps.pull(merged(wanted), mode="serve")
        composed = (way.compose(batches, rows) for way, batches in zip(ways, wanted, strict=True))
        window.add(batch, [predict(embeddings(pulled)) for pulled in composed])
        display.step(step + 1)
    return window.aucs()


def merged(wanted: list[dict[str, psclient.Batch]]) -> dict[str, psclient.Batch]:
    return {name: batch for batches in wanted for name, batch in batches.items()}


# ---- results


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim about the results, the measured value, and whether the claim holds."""

    says: str
    measured: str
    holds: bool


def claims(results: list[Result], best: float, size: Size) -> list[Claim]:
    """Check all claims.

    results  of the five ways, in the order of ``make_ways``
    best     AUC of the true probabilities
    """
    hashing, multi, everything, _, both = results
    saved = 1 - multi.parameters / hashing.parameters
    rows, loss = both.rows / everything.rows, everything.auc - both.auc
    learnt = share(everything.auc, best)
    return [
        Claim(
            f"hashing: more than {MIN_COLLISIONS:.0%} of the ids collide",
            f"{hashing.collisions:.1%}",
            hashing.collisions > MIN_COLLISIONS,
        ),
        Claim(
            f"multi-hash: less than {1000 * MAX_COLLISIONS:g} per mille",
            f"{1000 * multi.collisions:.3f} per mille",
            multi.collisions < MAX_COLLISIONS,
        ),
        Claim(
            f"multi-hash: {MIN_SAVED:.0%} fewer parameters or more than that",
            f"{saved:.2%}",
            saved >= MIN_SAVED,
        ),
        Claim(
            f"admission + eviction: at most {MAX_ROWS:.0%} of the rows",
            f"{rows:.1%}",
            rows <= MAX_ROWS,
        ),
        Claim(
            f"admission + eviction: AUC within {size.max_loss:g}",
            f"{-loss:+.5f}",
            loss <= size.max_loss,
        ),
        Claim(
            f"everything: {size.min_share:.0%} of what can be known",
            f"{learnt:.1%}",
            learnt >= size.min_share,
        ),
    ]


class Display(Bar):
    """Progress bar that shows the current number of rows of two of the five ways."""

    def __init__(self, console: Console, ways: list[Way], steps: int) -> None:
        super().__init__(console, steps, LINES)
        self._ways = ways

    def step(self, step: int) -> None:
        self._update(step)

    def _figures(self, step: int) -> str:
        rate = step / (time.monotonic() - self._start)
        shown = ("everything", "admission + eviction")
        rows = {way.name: way.rows[-1] / 1e6 for way in self._ways if way.rows}
        told = ", ".join(f"{name} {rows.get(name, 0):.2f} M rows" for name in shown)
        return f"{rate:3.0f} steps/s  {told}"


def main() -> None:
    arguments = parse_arguments()
    if arguments.html:
        try:
            import plots
        except ModuleNotFoundError as missing:
            sys.exit(f"{missing}; plots need pip install '.[server,report]', or --html ''")
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    start = time.monotonic()
    size = QUICK if arguments.quick else FULL
    stream = Stream(arguments.seed, size.scale)
    with servers(arguments.servers, arguments.shards) as addresses, Client(addresses) as ps:
        console.print(f"{len(addresses)} shards ready: {', '.join(addresses)}", highlight=False)
        seen = {name: Seen.of(stream, name) for name in LONG}
        console.print(law(stream, seen))
        ways = make_ways(ps, seen, size.scale, arguments.seed)
        with Display(console, ways, stream.steps) as display:
            learn(ps, stream, ways, display)
            best, aucs = score(ps, stream, ways, display)
    results = [way.result(seen, value) for way, value in zip(ways, aucs, strict=True)]
    console.print(side_by_side(results, best))
    checked = claims(results, best, size)
    console.print(verdict(checked))
    if arguments.html:
        arguments.html.write_text(plots.page(stream, seen, ways, results))
        console.print(f"plots: {arguments.html}", highlight=False)
    console.print(f"stopped cleanly, {time.monotonic() - start:.1f} s in all", highlight=False)
    if broken := [claim for claim in checked if not claim.holds]:
        sys.exit("; ".join(f"{claim.says}, but it is {claim.measured}" for claim in broken))


def law(stream: Stream, seen: Mapping[str, Seen]) -> Grid:
    grid = Grid("field", "ids", "once", "twice", "10 times or more", "most frequent")
    grid.title = f"{stream.scale}, {HELD_OUT} days held out"
    for column in grid.columns[1:]:
        column.justify = "right"
    for name, those in seen.items():
        once, twice = 1 - those.at_least(2), those.at_least(2) - those.at_least(3)
        top = those.counts.max() / those.counts.sum()
        shares = (once, twice, those.at_least(10), top)
        grid.add_row(name, f"{len(those.keys):,}", *(f"{value:.1%}" for value in shares))
    return grid


def side_by_side(results: list[Result], best: float) -> Grid:
    names = ("way", "collide", "rows", "MB", "counters", "M params", "AUC", "lost")
    grid = Grid(*names, title="Users and items in the end; AUC of the days held out")
    grid.columns[0].no_wrap = True
    for column in grid.columns[1:]:
        column.justify = "right"
    everything = results[2]
    for result in results:
        grid.add_row(
            result.name,
            f"{result.collisions:.3%}",
            f"{result.rows:,}",
            f"{result.bytes / 1e6:.1f}",
            f"{result.counter_bytes / 1e6:.1f}",
            f"{result.parameters / 1e6:.2f}",
            f"{result.auc:.4f}",
            f"{everything.auc - result.auc:+.4f}",
        )
    grid.add_section()
    grid.add_row("the truth", "", "", "", "", "", f"{best:.4f}", f"{everything.auc - best:+.4f}")
    return grid


def verdict(checked: list[Claim]) -> Grid:
    grid = Grid("claim", "measured", "", title="Claims")
    grid.columns[1].justify = "right"
    for claim in checked:
        grid.add_row(claim.says, claim.measured, "holds" if claim.holds else "[red]does not hold")
    return grid


def html(text: str) -> Path | None:
    return Path(text) if text else None


def parse_arguments() -> argparse.Namespace:
    parser = cluster_arguments(__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="Use only a ninth of the stream, and less strict limits.",
    )
    parser.add_argument(
        "--html",
        type=html,
        default="longtail.html",
        metavar="FILE",
        help="HTML file to write plots to (default: %(default)s). --html '' writes none.",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
