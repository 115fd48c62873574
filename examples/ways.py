"""Five ways to store the embeddings of users and items, each with a model of its own.

    hashing               an id uses a bucket of a fixed table
    multi-hash            an id uses a row in each of several parts; 95 % fewer parameters
    everything            every id that was ever pushed has a row
    admission             an id has a row from its second occurrence on
    admission + eviction  the same; the rows of ids that were idle for two weeks are evicted

All have the same model, optimizer and initial values. There are few contexts, so every way has a
row for each. The sizes of the fixed tables are computed from the number of ids in the stream, which
in practice would have to be guessed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from clicks import FACTORS, Keys, Rows, gradients
from cluster import require_empty
from tail import LONG, Scale, Seen

import psclient
from psclient import Client, Table
from psclient.multihash import KHash, MultiHash, PulledParts, QuotientRemainder

LOAD = 0.25  # ids per bucket of hashing; 22 % of the ids then share a bucket
FEWER = 20  # ratio of hashing's parameters to those of multi-hash
SHARED = 1e-4  # share of the ids that may share all rows with another id, with multi-hash
ADMITTED = 2  # occurrences after which an id is admitted
IDLE_DAYS = 14  # two half-lives of an item

LR = 0.2
LR_SHARED = 0.1  # learning rate of multi-hash, where a row gets the gradients of many ids
ACCUMULATED = 0.1  # initial value of Adagrad's accumulator
INITIAL_STD = 0.02


class Feature(Protocol):
    """Maps the keys of a field to rows of tables, and gradients back to these rows.

    tables  the tables that contain the rows
    """

    tables: tuple[Table, ...]

    def set_aside(self) -> int | None:
        """Return the number of rows of a fixed table; None if rows are created on demand."""

    def collisions(self, keys: Keys) -> float:
        """Return the fraction of distinct keys that share all their rows with another key."""

    def batches(self, keys: Keys, batch: psclient.Batch) -> dict[str, psclient.Batch]:
        """Return the keys of the rows to pull, by table name.

        keys   int64[n]
        batch  psclient.Batch of the same keys, which a feature may return unchanged
        """

    def compose(
        self, batches: Mapping[str, psclient.Batch], rows: Mapping[str, Rows]
    ) -> PulledParts:
        """Compute embeddings from pulled rows.

        batches  result of ``batches``
        rows     pulled rows, by table name
        """

    def gradients(self, pulled: PulledParts, by: Rows) -> dict[str, tuple[psclient.Batch, Rows]]:
        """Return (keys, gradients) to push, by table name.

        pulled  result of ``compose``
        by      float32[n, dim], gradients of the embeddings
        """


class Own(Feature):
    """Feature with one row per key."""

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
    """Feature whose rows are chosen by hashes of the key, so that keys may share rows."""

    def __init__(self, parts: MultiHash) -> None:
        self.tables = parts.tables[:1]  # one table has all parts
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
    """Results of a way at the end. All but the AUC count users and items together."""

    name: str
    collisions: float  # share of the ids that share all their rows with another id
    rows: int
    bytes: int  # memory on the servers, with counters
    counter_bytes: int  # memory of the admission counters
    parameters: int  # numbers in the fixed tables, or in the rows of dynamic tables
    auc: float  # on the held-out days


@dataclass(slots=True)
class Way:
    """One way to store embeddings: the features of its model, and measurements of each day."""

    name: str
    features: dict[str, Feature]
    rows: list[int] = field(default_factory=list)  # of users and items, at the end of each day
    bytes: list[int] = field(default_factory=list)  # their memory on the servers
    counter_bytes: list[int] = field(default_factory=list)  # the part of it for admission counters
    aucs: list[float] = field(default_factory=list)  # AUC of each day's last predictions

    def measure(self, ps: Client) -> None:
        """Ask the servers for the rows and bytes of users and items, and append them."""
        names = [table.name for name in LONG for table in self.features[name].tables]
        infos = [ps.describe_table(name) for name in names]
        self.rows.append(sum(info.rows for info in infos))
        self.bytes.append(sum(info.bytes for info in infos))
        self.counter_bytes.append(sum(info.counter_bytes for info in infos))

    def result(self, seen: Mapping[str, Seen], auc: float) -> Result:
        """Return the results of this way. Rows and bytes are those of the last ``measure``.

        seen  ids of the stream, by field ("user", "item")
        auc   AUC on the held-out days
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
    """Create the tables of the five ways; return the ways in the order of the module docstring.

    seen   ids of the stream, by field; the sizes of fixed tables are computed from their number
    scale  length of the stream
    seed   seed of the initial values of rows

    Ends the example with an error if a table has rows already.
    """
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
        require_empty(ps, made.name)
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
    """Return the number of rows of the fixed table for hashing: LOAD ids per row on average."""
    return round(len(seen.keys) / LOAD)


def part_sizes(seen: Seen, count: int | None = None) -> tuple[int, ...]:
    """Return the number of rows of each part of multi-hash.

    All parts together have ``count / FEWER`` rows. The number of parts is the smallest with which
    at most SHARED of the ids share all their rows with another id.

    count  number of rows to compare with; default: the number of buckets of hashing
    """
    rows = (buckets(seen) if count is None else count) // FEWER
    parts = 2
    while (rows // parts) ** parts < len(seen.keys) / SHARED and parts < rows // 2:
        parts += 1
    return (rows // parts,) * parts
