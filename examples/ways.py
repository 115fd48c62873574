"""Five ways to keep the embeddings of users and items, each a model of its own.

    hashing               a bucket of a fixed table for each id
    multi-hash            a row in each of several parts of a table, with 95 % fewer parameters
    everything            a row for every id that was ever pushed
    admission             a row from the second occurrence on
    admission + eviction  and none for an id that was not seen for two weeks

All have the same model, optimizer and initial values; contexts are few, and kept in full by each.
A way that needs a size gets it from the number of ids that will come, which is known here and
would have to be guessed elsewhere.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from clicks import FACTORS, Keys, Rows, gradients
from tail import LONG, Scale, Seen

import psclient
from psclient import Client, Table
from psclient.multihash import KHash, MultiHash, PulledParts, QuotientRemainder

LOAD = 0.25  # ids for each bucket: where hashing gives 22 % of them a bucket in common
FEWER = 20  # times as many parameters has hashing as multi-hash
SHARED = 1e-4  # of the ids, at most, are to share all rows of multi-hash
ADMITTED = 2  # occurrences
IDLE_DAYS = 14  # two half-lives of an item

LR = 0.2
LR_SHARED = 0.1  # of multi-hash: a row takes the gradients of many ids
ACCUMULATED = 0.1  # Adagrad's initial accumulator
INITIAL_STD = 0.02


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A way in the end; rows and bytes are those of users and items."""

    name: str
    collisions: float  # share of the ids that share all they have with another one
    rows: int
    bytes: int
    counter_bytes: int  # of these
    parameters: int  # numbers of the fixed tables, used or not; or of the rows
    auc: float  # held out


@dataclass(slots=True)
class Way:
    """A model of its own, and what became of it day by day."""

    name: str
    features: dict[str, Feature]
    rows: list[int] = field(default_factory=list)  # of users and items, at the end of each day
    bytes: list[int] = field(default_factory=list)
    counter_bytes: list[int] = field(default_factory=list)  # of these, for ids without a row
    aucs: list[float] = field(default_factory=list)  # at the end of each day, before learning

    def measure(self, ps: Client) -> None:
        """Note the rows and bytes of users and items, as the servers count them."""
        names = [table.name for name in LONG for table in self.features[name].tables]
        infos = [ps.describe_table(name) for name in names]
        self.rows.append(sum(info.rows for info in infos))
        self.bytes.append(sum(info.bytes for info in infos))
        self.counter_bytes.append(sum(info.counter_bytes for info in infos))

    def result(self, seen: Mapping[str, Seen], auc: float) -> Result:
        """What there is to compare in the end.

        seen  by field, users and items
        auc   held out
        """
        features = {name: self.features[name] for name in LONG}
        counts = {name: len(seen[name].keys) for name in LONG}
        sharing = sum(counts[name] * features[name].collisions(seen[name].keys) for name in LONG)
        fixed = sum(feature.set_aside() or 0 for feature in features.values())
        return Result(
            name=self.name,
            collisions=sharing / sum(counts.values()),
            rows=self.rows[-1],
            bytes=self.bytes[-1],
            counter_bytes=self.counter_bytes[-1],
            parameters=(fixed or self.rows[-1]) * (1 + FACTORS),
            auc=auc,
        )

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
    """The five of the module's docstring, in its order; SystemExit if a table is trained."""
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
