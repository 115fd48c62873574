"""Ids without end: five ways to keep their embeddings, side by side on one drifting click stream.

    python examples/longtail.py [--quick] [--html longtail.html]
                                [--shards 2 | --servers host:port,host:port]

    hashing               a bucket of a fixed table for each id
    multi-hash            a row in each of several small tables, with 95 % fewer parameters
    everything            a row for every id that was ever pushed
    admission             a row from the second occurrence on
    admission + eviction  and none for an id that was not seen for two weeks

The stream is generated (clicks.py), so that its truth is known; docs/longtail.md says why it is
made as it is, and discusses the results.  Users and items have a popularity with a long tail, and
drift: a place in the ranking has one holder after the other, each with a key of its own.  Contexts
are few, and kept in full by each way.

All five learn the same factorization machine from the same batches in one pass, with the rows of
all in one round trip a step.  The last tenth of the stream is held out: nothing is pushed, and
pulls are serving pulls.  The example fails unless

    hashing               gives more than 20 % of the ids a bucket that another one has, too,
    multi-hash            gives less than 0.2 per mille all their rows in common with another one,
                          on 95 % fewer parameters,
    admission + eviction  keeps at most 30 % of the rows, at an AUC within 0.001 of everything,

and everything reaches --min-share of what can be known: (AUC - 0.5) / (best - 0.5).  These are
claims published for DeepRec.  With --quick the stream is a seventh of it, too short to tell AUCs
apart to 0.001, so that one is loosened to 0.004.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from auc import auc
from clicks import (
    CONTEXTS,
    FACTORS,
    Batch,
    Floats,
    Keys,
    Rows,
    gradients,
    keys_of,
    popular,
    predict,
    probability,
    scatter,
    share,
)
from cluster import servers
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as Grid

import psclient
from psclient import Client, Table
from psclient.multihash import KHash, MultiHash, PulledParts, QuotientRemainder

LONG = ("user", "item")  # the fields whose ids have no end

# ---- the stream
EXPONENT = 1.2  # of Zipf's law
FIRST = 21  # how much Mandelbrot shifts it: the most popular id has about 1 % of the clicks
HALF_LIVES = {"user": 28, "item": 7}  # days after which half of the places have another holder
DAYS = 30
HELD_OUT = 3  # of the days, the last ones

# ---- the ways
LOAD = 0.25  # ids for each bucket: where hashing gives 22 % a bucket that is another one's
FEWER = 20  # times as many parameters has hashing as multi-hash
SHARED = 1e-4  # of the ids, at most, are to share all rows of multi-hash
ADMITTED = 2  # occurrences
IDLE_DAYS = 14  # two half-lives of an item

# ---- the model
LR = 0.2
LR_SHARED = 0.1  # of multi-hash: a row takes the gradients of many ids
ACCUMULATED = 0.1  # Adagrad's initial accumulator
INITIAL_STD = 0.02

# ---- what is claimed
MIN_COLLISIONS = 0.2  # of hashing, as a share of the ids
MAX_COLLISIONS = 2e-4  # of multi-hash
MIN_SAVED = 0.95  # of hashing's parameters, by multi-hash
MAX_ROWS = 0.3  # of everything's, by admission and eviction

WINDOW = 20  # steps at the end of a day that a figure of that day is of
LINES = 9  # in place of the bar where there is no terminal

Ranks = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much of the stream there is."""

    steps: int  # a day
    batch: int  # impressions a step
    max_loss: float  # of AUC, by admission and eviction

    def __str__(self) -> str:
        impressions = DAYS * self.steps * self.batch
        return f"{impressions:,} impressions, {DAYS} days of {self.steps} steps of {self.batch:,}"


FULL = Scale(steps=70, batch=4096, max_loss=0.001)
QUICK = Scale(steps=20, batch=2048, max_loss=0.004)


def ranks(generator: np.random.Generator, size: int) -> Ranks:
    """uint64[size] ranks from 0 on, drawn in proportion to about (rank + FIRST)^-EXPONENT."""
    tail = (1 - generator.random(size)) ** (-1 / (EXPONENT - 1)) - 1
    return np.asarray(np.minimum(FIRST * tail, 2.0**62).astype(np.uint64))


class Stream:
    """A month of clicks with known probabilities; the same for the same seed and scale."""

    def __init__(self, seed: int, scale: Scale) -> None:
        self.scale = scale
        self.learnt = (DAYS - HELD_OUT) * scale.steps  # steps; those from here on are held out
        self.steps = DAYS * scale.steps
        self._seed = seed

    def ids(self, name: str, step: int) -> Keys:
        """The keys int64[batch] of a long field at a step."""
        generator = np.random.default_rng([self._seed, step, LONG.index(name)])
        return self._holders(name, ranks(generator, self.scale.batch), step)

    def batch(self, step: int) -> Batch:
        generator = np.random.default_rng([self._seed, step, len(LONG)])
        contexts = popular(generator, CONTEXTS, self.scale.batch)
        keys = {name: self.ids(name, step) for name in LONG}
        keys["context"] = keys_of("context", contexts, self._seed)
        truth = probability(keys)
        clicks = (generator.random(self.scale.batch) < truth).astype(np.float32)
        return Batch(keys=keys, clicks=clicks, truth=truth)

    def _holders(self, name: str, places: Ranks, step: int) -> Keys:
        """Who holds each place at a step.

        All stay for two half-lives and places change hands at moments of their own, so that after
        one half-life half of the places have another holder.
        """
        mixed = scatter(places)
        phase = (mixed >> np.uint64(40)) / 2.0**24
        holder = phase + step / (2 * HALF_LIVES[name] * self.scale.steps)
        return keys_of(name, mixed + holder.astype(np.uint64), self._seed)


@dataclass(frozen=True, slots=True)
class Seen:
    """The distinct keys of a field in the part of the stream that is learnt from."""

    keys: Keys  # int64[n], ascending
    counts: NDArray[np.int64]  # [n] occurrences

    @classmethod
    def of(cls, stream: Stream, name: str) -> "Seen":
        steps = [stream.ids(name, step) for step in range(stream.learnt)]
        return cls(*np.unique(np.concatenate(steps), return_counts=True))

    def at_least(self, occurrences: int) -> float:
        """The share of the keys with so many."""
        return float((self.counts >= occurrences).mean())


# ---- five ways


class Feature(Protocol):
    """How the keys of a field become rows of tables."""

    tables: tuple[Table, ...]

    def set_aside(self) -> int | None:
        """Rows that it was made with; None if there are as many as come into being."""

    def collisions(self, keys: Keys) -> float:
        """Share of distinct keys that share all they have with another one."""

    def batches(self, keys: Keys, batch: psclient.Batch) -> dict[str, psclient.Batch]:
        """What to pull for keys, which ``batch`` is made of, too: by table."""

    def compose(
        self, batches: Mapping[str, psclient.Batch], rows: Mapping[str, Rows]
    ) -> PulledParts:
        """Embeddings from what came back."""

    def gradients(self, pulled: PulledParts, by: Rows) -> dict[str, tuple[psclient.Batch, Rows]]:
        """What to push, from the gradients by the embeddings: by table."""


class Own(Feature):
    """A row of its own for each key."""

    def __init__(self, table: Table) -> None:
        self.tables = (table,)

    def set_aside(self) -> None:
        return None

    def collisions(self, keys: Keys) -> float:
        return 0.0

    def batches(self, keys: Keys, batch: psclient.Batch) -> dict[str, psclient.Batch]:
        return {self.tables[0].name: batch}

    def compose(
        self, batches: Mapping[str, psclient.Batch], rows: Mapping[str, Rows]
    ) -> PulledParts:
        name = self.tables[0].name
        return PulledParts(rows[name], {name: batches[name]}, ())

    def gradients(self, pulled: PulledParts, by: Rows) -> dict[str, tuple[psclient.Batch, Rows]]:
        return {name: (batch, by) for name, batch in pulled.batches.items()}


class Hashed(Feature):
    """Rows that hashes of the key choose."""

    def __init__(self, parts: MultiHash) -> None:
        self.tables = parts.tables[:1]  # all parts are in one
        self._parts = parts

    def set_aside(self) -> int:
        return sum(self._parts.sizes)

    def collisions(self, keys: Keys) -> float:
        return self._parts.collisions(keys)

    def batches(self, keys: Keys, batch: psclient.Batch) -> dict[str, psclient.Batch]:
        return self._parts.batches(keys)

    def compose(
        self, batches: Mapping[str, psclient.Batch], rows: Mapping[str, Rows]
    ) -> PulledParts:
        return self._parts.compose(batches, rows)

    def gradients(self, pulled: PulledParts, by: Rows) -> dict[str, tuple[psclient.Batch, Rows]]:
        return self._parts.gradients(pulled, by)


@dataclass(slots=True)
class Way:
    """A model of its own, and what became of it day by day."""

    name: str
    features: dict[str, Feature]
    rows: list[int] = field(default_factory=list)  # of the long fields, at the end of each day
    bytes: list[int] = field(default_factory=list)
    aucs: list[float] = field(default_factory=list)  # at the end of each day, before learning

    def measure(self, ps: Client) -> None:
        """Note the rows and bytes of the long fields, as the servers count them."""
        names = [table.name for name in LONG for table in self.features[name].tables]
        infos = [ps.describe_table(name) for name in names]
        self.rows.append(sum(info.rows for info in infos))
        self.bytes.append(sum(info.bytes for info in infos))

    def batches(
        self, keys: Mapping[str, Keys], shared: Mapping[str, psclient.Batch]
    ) -> dict[str, psclient.Batch]:
        result = {}
        for name, feature in self.features.items():
            result.update(feature.batches(keys[name], shared[name]))
        return result

    def compose(
        self, batches: Mapping[str, psclient.Batch], rows: Mapping[str, Rows]
    ) -> dict[str, PulledParts]:
        return {name: feature.compose(batches, rows) for name, feature in self.features.items()}

    def gradients(
        self, pulled: Mapping[str, PulledParts], error: Rows
    ) -> dict[str, tuple[psclient.Batch, Rows]]:
        by = gradients(embeddings(pulled), error)
        result = {}
        for name, feature in self.features.items():
            result.update(feature.gradients(pulled[name], by[name]))
        return result


def embeddings(pulled: Mapping[str, PulledParts]) -> dict[str, Rows]:
    return {name: parts.embeddings for name, parts in pulled.items()}


def make_ways(ps: Client, seen: Mapping[str, Seen], scale: Scale, seed: int) -> list[Way]:
    """The five of the module's docstring, in its order, with their tables."""
    admission = {"admission": "counter", "admission_args": {"threshold": ADMITTED}}
    eviction = {"eviction": {"step_ttl": {"steps": IDLE_DAYS * scale.steps}}}

    def table(way: str, name: str, lr: float = LR, **rules: Any) -> Table:
        made = ps.create_table(
            f"{way.replace(' + ', '-')}.{name}",
            dim=1 + FACTORS,
            optimizer="adagrad",
            lr=lr,
            optimizer_args={"initial_accumulator": ACCUMULATED},
            initializer="normal",
            initializer_args={"std": INITIAL_STD},
            seed=seed,
            **rules,
        )
        if ps.describe_table(made.name).rows:
            sys.exit(f"table {made.name!r} is trained already; this example needs fresh servers")
        return made

    def hashing(way: str, name: str) -> Feature:
        return Hashed(KHash(table(way, name), [buckets(seen[name])]))

    def multi_hash(way: str, name: str) -> Feature:
        return Hashed(QuotientRemainder(table(way, name, LR_SHARED), part_sizes(seen[name])))

    def dynamic(**rules: Any) -> Any:
        return lambda way, name: Own(table(way, name, **rules))

    makers = {
        "hashing": hashing,
        "multi-hash": multi_hash,
        "everything": dynamic(),
        "admission": dynamic(**admission),
        "admission + eviction": dynamic(**admission, **eviction),
    }
    return [
        Way(way, {name: make(way, name) for name in LONG} | {"context": Own(table(way, "context"))})
        for way, make in makers.items()
    ]


def buckets(seen: Seen) -> int:
    """Of hashing's fixed table."""
    return round(len(seen.keys) / LOAD)


def part_sizes(seen: Seen, count: int | None = None) -> tuple[int, ...]:
    """Of multi-hash: the fewest parts that tell the ids apart, on 1 / FEWER of ``count`` rows.

    count  of hashing's buckets, unless another one is of interest
    """
    rows = (buckets(seen) if count is None else count) // FEWER
    parts = 2
    while (rows // parts) ** parts < len(seen.keys) / SHARED and parts < rows // 2:
        parts += 1
    return (rows // parts,) * parts


# ---- learning


class Window:
    """What each way predicted in the last steps, what could have been known, and what happened."""

    def __init__(self, ways: int) -> None:
        self._columns: list[list[NDArray[Any]]] = [[] for _ in range(2 + ways)]

    def add(self, batch: Batch, predicted: list[Floats]) -> None:
        for column, values in zip(
            self._columns, (batch.clicks, batch.truth, *predicted), strict=True
        ):
            column.append(values)

    def aucs(self) -> tuple[float, list[float]]:
        """Of the truth, and of each way."""
        clicks, truth, *ways = (np.concatenate(column) for column in self._columns)
        return auc(clicks, truth), [auc(clicks, predicted) for predicted in ways]


def learn(ps: Client, stream: Stream, ways: list[Way], display: "Display") -> None:
    """One pass over all but the held-out days; each batch is predicted, then learnt from."""
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
    for way in ways:
        way.rows.pop(), way.bytes.pop()
        way.measure(ps)


def score(
    ps: Client, stream: Stream, ways: list[Way], display: "Display"
) -> tuple[float, list[float]]:
    """AUC over the held-out days, of the truth and of each way, as serving would have it."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A way in the end; rows and bytes are those of users and items."""

    name: str
    collisions: float  # share of the ids that share all they have with another one
    rows: int
    bytes: int
    parameters: int  # numbers that the ways with fixed tables set aside, or that there are
    auc: float  # held out


@dataclass(frozen=True, slots=True)
class Claim:
    """What was to be shown, and whether it was."""

    says: str
    measured: str
    holds: bool


def conclude(ways: list[Way], seen: Mapping[str, Seen], aucs: list[float]) -> list[Result]:
    results = []
    ids = sum(len(seen[name].keys) for name in LONG)
    for way, value in zip(ways, aucs, strict=True):
        sharing, fixed = 0.0, 0
        for name in LONG:
            feature = way.features[name]
            sharing += feature.collisions(seen[name].keys) * len(seen[name].keys)
            fixed += feature.set_aside() or 0
        results.append(
            Result(
                name=way.name,
                collisions=sharing / ids,
                rows=way.rows[-1],
                bytes=way.bytes[-1],
                parameters=(fixed or way.rows[-1]) * (1 + FACTORS),
                auc=value,
            )
        )
    return results


def claims(results: list[Result], best: float, max_loss: float, min_share: float) -> list[Claim]:
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
            f"multi-hash: less than {1000 * MAX_COLLISIONS:g} per mille of them do,",
            f"{1000 * multi.collisions:.3f} per mille",
            multi.collisions < MAX_COLLISIONS,
        ),
        Claim(f"  with {MIN_SAVED:.0%} fewer parameters", f"{saved:.1%} fewer", saved >= MIN_SAVED),
        Claim(
            f"admission + eviction: at most {MAX_ROWS:.0%} of all rows,",
            f"{rows:.1%}",
            rows <= MAX_ROWS,
        ),
        Claim(f"  at an AUC within {max_loss:g} of keeping all", f"{-loss:+.5f}", loss <= max_loss),
        Claim(
            f"everything: {min_share:.0%} of what can be known, or more",
            f"{learnt:.1%}",
            learnt >= min_share,
        ),
    ]


class Display:
    """A bar on a terminal, a few lines elsewhere."""

    def __init__(self, console: Console, ways: list[Way], steps: int) -> None:
        self._console = console
        self._ways = ways
        self._steps = steps
        self._progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps)

    def __enter__(self) -> "Display":
        self._start = time.monotonic()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, step: int) -> None:
        if self._console.is_terminal:
            self._progress.update(self._task, completed=step, description=self._figures(step))
        elif step * LINES // self._steps > (step - 1) * LINES // self._steps:
            self._console.print(f"step {step:>5}  {self._figures(step)}", highlight=False)

    def _figures(self, step: int) -> str:
        rate = step / (time.monotonic() - self._start)
        rows = (f"{way.name} {way.rows[-1]:,}" for way in self._ways if way.rows)
        return f"{rate:.0f} steps/s  rows: {', '.join(rows)}"


def main() -> None:
    arguments = parse_arguments()
    if arguments.html:
        try:
            import longtail_plots
        except ModuleNotFoundError:
            sys.exit("plots need the extra 'report' (pip install '.[server,report]'), or --html ''")
    console = Console()
    start = time.monotonic()
    scale = QUICK if arguments.quick else FULL
    stream = Stream(arguments.seed, scale)
    with servers(arguments.servers, arguments.shards) as addresses, Client(addresses) as ps:
        console.print(f"{len(addresses)} shards ready: {', '.join(addresses)}", highlight=False)
        seen = {name: Seen.of(stream, name) for name in LONG}
        console.print(law(stream, seen))
        ways = make_ways(ps, seen, scale, arguments.seed)
        with Display(console, ways, stream.steps) as display:
            learn(ps, stream, ways, display)
            best, aucs = score(ps, stream, ways, display)
        results = conclude(ways, seen, aucs)
        console.print(side_by_side(results, best))
    console.print(f"stopped cleanly, {time.monotonic() - start:.1f} s in all", highlight=False)
    if arguments.html:
        figure = longtail_plots.figure(ways, results, seen, best)
        arguments.html.write_text(longtail_plots.page(figure))
        console.print(f"plots: {arguments.html}", highlight=False)
    held = claims(results, best, scale.max_loss, arguments.min_share)
    console.print(verdict(held))
    if broken := [claim for claim in held if not claim.holds]:
        sys.exit("; ".join(f"{claim.says.strip()}: {claim.measured}" for claim in broken))


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
    names = ("way", "collide", "rows", "bytes", "parameters", "AUC", "- everything")
    grid = Grid(*names, title="Users and items, in the end; AUC of the days held out")
    for column in grid.columns[1:]:
        column.justify = "right"
    everything = results[2]
    for result in results:
        grid.add_row(
            result.name,
            f"{result.collisions:.3%}",
            f"{result.rows:,}",
            f"{result.bytes:,}",
            f"{result.parameters:,}",
            f"{result.auc:.4f}",
            "" if result is everything else f"{result.auc - everything.auc:+.4f}",
        )
    grid.add_section()
    grid.add_row("the truth", "", "", "", "", f"{best:.4f}", f"{best - everything.auc:+.4f}")
    return grid


def verdict(held: list[Claim]) -> Grid:
    grid = Grid("claim", "measured", "", title="Claims")
    grid.columns[1].justify = "right"
    for claim in held:
        grid.add_row(claim.says, claim.measured, "holds" if claim.holds else "[red]does not hold")
    return grid


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Five ways to keep embeddings of ids without end.")
    parser.add_argument("--quick", action="store_true", help="a seventh of the stream")
    parser.add_argument(
        "--html",
        type=lambda text: Path(text) if text else None,
        default=Path("longtail.html"),
        help="where plots go; '' for none",
    )
    parser.add_argument("--shards", type=int, default=2, help="of the cluster started here")
    parser.add_argument("--servers", help="host:port,... of a running cluster to use instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--min-share", type=float, default=0.6, help="fail below this share")
    return parser.parse_args()


if __name__ == "__main__":
    main()
