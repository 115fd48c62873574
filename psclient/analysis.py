"""What a table holds, and what is known of a key: of a running cluster, or of a checkpoint.

    with Client(addresses) as ps:
        found = analyze(ps, "user", frequencies=[3], ages=[5000], norms=[0.01])
        found.admitted(3), found.idle(5000), found.small(0.01)     # rows, exactly
        inspect(ps, "user", [42])[0].reason

Nothing is changed by either. An analysis reads every row once, each as it is at that moment, in
slices that leave trainers undisturbed: a row that is created meanwhile may be missing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from psclient import admin, export
from psclient.batch import Rows
from psclient.client import Client
from psclient.errors import InvalidArgument
from psproto import ps_pb2 as pb
from psproto import routing

SERVICE = "AnalysisService"
Columns = pb.AnalyzeRequest.Columns
METADATA_BYTES = 24  # of a row, in memory
MOST_KEYS = 1000  # inspected in one message
STATES = {
    pb.KeyFacts.STATE_ROW: "row",
    pb.KeyFacts.STATE_WAITING: "waiting",
    pb.KeyFacts.STATE_GONE: "gone",
    pb.KeyFacts.STATE_NEW: "new",
    pb.KeyFacts.STATE_UNKNOWN: "unknown",
}


@dataclass(frozen=True, slots=True)
class RowColumns:
    """What an analysis saw of some rows of one tier."""

    keys: NDArray[np.uint64]  # [n]
    frequencies: NDArray[np.uint64]
    steps: NDArray[np.int64]  # of the last push
    versions: NDArray[np.uint64]  # of the last push
    norms: NDArray[np.float64]  # L2, of the embedding
    tier: str
    embeddings: Rows | None  # float32[n, dim]


Sink = Callable[[RowColumns], None]


# ---- tables


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """How many values lie between edges; what is counted on either side of an edge is exact.

    counts[i] is of edges[i-1] <= value < edges[i]; of ages, of edges[i-1] < value <= edges[i].
    """

    edges: NDArray[np.float64]  # [k], ascending
    counts: NDArray[np.int64]  # [k + 1]

    def behind(self, edge: float) -> int:
        """How many values are behind an edge: from it on or, of ages, above it."""
        return int(self.counts[self.position(edge) + 1 :].sum())

    def before(self, edge: float) -> int:
        """All other values."""
        return int(self.counts[: self.position(edge) + 1].sum())

    def position(self, edge: float) -> int:
        """Of an edge; InvalidArgument for a number that is none."""
        at = int(np.searchsorted(self.edges, edge))
        if at == len(self.edges) or self.edges[at] != edge:
            raise InvalidArgument(f"{edge:g} is no edge of this histogram: name it to analyze()")
        return at


@dataclass(frozen=True, slots=True)
class Tier:
    """Rows of one tier, over all shards."""

    name: str
    rows: int
    bytes: int  # taken, unused room included


@dataclass(frozen=True, slots=True, eq=False)
class RowList:
    """Some rows, from the most extreme on."""

    keys: NDArray[np.uint64]
    versions: NDArray[np.uint64]
    steps: NDArray[np.int64]
    frequencies: NDArray[np.uint64]
    norms: NDArray[np.float64]
    tiers: tuple[str, ...]
    shards: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Analysis:
    """A table, summed up over all shards."""

    table: str
    checkpoint: str | None
    asked: dict[str, tuple[float, ...]]  # thresholds: frequencies, ages, norms
    time: float  # seconds since 1970: of the analysis, or when the checkpoint was complete
    seconds: float  # that it took
    dim: int
    row_bytes: int  # embedding, state and metadata
    optimizer: str
    versions: tuple[int, ...]  # of the shards, when the analysis began
    step: int  # the largest that was pushed
    rows: int
    shard_rows: tuple[int, ...]
    occurrences: int  # pushed, of all rows
    norm_mean: float
    frequencies: Histogram
    occurrences_between: NDArray[np.int64]  # [k + 1], occurrences of the rows in each count of it
    ages: Histogram  # steps since the last push
    norms: Histogram
    idle_norms: Histogram  # of rows of an age of at least ``grace``
    grace: int
    tiers: tuple[Tier, ...]
    index_bytes: int
    waiting: int  # keys that are counted towards admission
    waiting_bytes: int
    most_frequent: RowList
    least_frequent: RowList
    largest: RowList
    smallest: RowList

    @property
    def bytes(self) -> int:
        """Taken by all of it."""
        return sum(tier.bytes for tier in self.tiers) + self.index_bytes + self.waiting_bytes

    def admitted(self, threshold: int) -> int:
        """Rows whose keys occurred at least so often: what that threshold would have admitted."""
        return self.frequencies.behind(threshold)

    def dropped(self, threshold: int) -> int:
        """Occurrences whose gradients that threshold would have dropped.

        All of the other rows, and of these all but the last of the first ``threshold``; fewer
        where several come in one push.
        """
        below = self.occurrences_between[: self.frequencies.position(threshold) + 1]
        return int(below.sum()) + self.admitted(threshold) * (threshold - 1)

    def idle(self, ttl: int) -> int:
        """Rows that a step TTL of so many steps evicts."""
        return self.ages.behind(ttl)

    def small(self, threshold: float) -> int:
        """Rows that the norm rule with this threshold evicts, under ``grace``."""
        return self.idle_norms.before(threshold)


def analyze(
    client: Client,
    table: str,
    *,
    checkpoint: str | None = None,
    frequencies: Sequence[int] = (),
    ages: Sequence[int] = (),
    norms: Sequence[float] = (),
    grace: int = 0,
    top: int = 10,
    sink: Sink | None = None,
    embeddings: bool = False,
    progress: admin.Tell | None = None,
) -> Analysis:
    """Sum up a table as it is, or as a checkpoint has it.

    frequencies  thresholds of occurrences to be told of exactly, beside powers of two
    ages         TTLs in steps, alike
    norms        norms, beside 1, 2 and 5 times powers of ten
    grace        of the norm rule, in steps
    top          rows in each list of extremes, up to 1000
    sink         is given the rows themselves, too, in no order; not by two threads at once; of a
                 table without rows, none of them once
    embeddings   with their embeddings
    progress     is told rows, of a checkpoint bytes, done and in all

    Raises TableNotFound, CheckpointNotFound, DataLoss, InvalidArgument for a bad threshold.
    """
    start = time.perf_counter()
    columns = Columns.COLUMNS_EMBEDDING if embeddings else Columns.COLUMNS_METADATA
    try:
        request = pb.AnalyzeRequest(
            table=table,
            checkpoint=checkpoint or "",
            frequencies=frequencies,
            ages=ages,
            norms=norms,
            grace=grace,
            top=top,
            columns=columns if sink is not None else Columns.COLUMNS_UNSPECIFIED,
        )
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"thresholds must be numbers, whole and not negative but for norms: {error}"
        ) from error
    told = [(0, 0)] * len(admin._links(client))

    def tell(shard: int, message: pb.AnalyzeResponse) -> None:
        if sink is not None and message.keys:
            sink(_columns(message))
        told[shard] = (message.done, message.total)
        if progress is not None:
            progress(*map(sum, zip(*told, strict=True)))

    last = admin._all_streams(client, "Analyze", request, pb.AnalyzeResponse, tell, service=SERVICE)
    summaries = [message.summary for message in last]
    when = admin.describe(client, checkpoint).time if checkpoint else time.time()
    asked = {
        "frequencies": tuple(map(float, frequencies)),
        "ages": tuple(map(float, ages)),
        "norms": tuple(map(float, norms)),
    }
    seconds = time.perf_counter() - start
    found = _merged(summaries, table, checkpoint, asked, when, seconds, top)
    if sink is not None and not found.rows:
        sink(_nothing(found.dim if embeddings else None))
    return found


def _nothing(dim: int | None) -> RowColumns:
    """No rows; None: without embeddings."""
    none = np.empty(0, np.uint64)
    matrix = None if dim is None else np.empty((0, dim), np.float32)
    return RowColumns(none, none, none.view(np.int64), none, none.view(np.float64), "", matrix)


def _columns(message: pb.AnalyzeResponse) -> RowColumns:
    n = len(message.keys) // 8
    flat = np.frombuffer(message.embeddings, "<f4")
    return RowColumns(
        np.frombuffer(message.keys, "<u8"),
        np.frombuffer(message.frequencies, "<u8"),
        np.frombuffer(message.steps, "<i8"),
        np.frombuffer(message.versions, "<u8"),
        np.frombuffer(message.norms, "<f8"),
        message.tier,
        flat.reshape(n, -1) if len(flat) else None,
    )


def _merged(
    parts: Sequence[pb.Summary],
    table: str,
    checkpoint: str | None,
    asked: dict[str, tuple[float, ...]],
    when: float,
    seconds: float,
    top: int,
) -> Analysis:
    """One analysis of the summaries of all shards."""
    schema = parts[0].schema
    rows = sum(part.rows for part in parts)
    tiers: dict[str, list[int]] = {}
    for tier in (tier for part in parts for tier in part.tiers):
        held = tiers.setdefault(tier.name, [0, 0])
        held[0] += tier.rows
        held[1] += tier.bytes
    lists = {
        name: _list([getattr(part, name) for part in parts], field, sign, top)
        for name, field, sign in (
            ("most_frequent", "frequencies", -1.0),
            ("least_frequent", "frequencies", 1.0),
            ("largest", "norms", -1.0),
            ("smallest", "norms", 1.0),
        )
    }
    return Analysis(
        table=table,
        checkpoint=checkpoint,
        asked=asked,
        time=when,
        seconds=seconds,
        dim=schema.dim,
        row_bytes=4 * parts[0].width + METADATA_BYTES,
        optimizer=schema.optimizer.name,
        versions=tuple(part.version for part in parts),
        step=max((part.step for part in parts if part.rows), default=0),
        rows=rows,
        shard_rows=tuple(part.rows for part in parts),
        occurrences=sum(part.occurrences for part in parts),
        norm_mean=sum(part.norm_sum for part in parts) / rows if rows else 0.0,
        frequencies=_histogram([part.frequencies for part in parts]),
        occurrences_between=np.sum([part.frequency_sums for part in parts], axis=0, dtype=np.int64),
        ages=_histogram([part.ages for part in parts]),
        norms=_histogram([part.norms for part in parts]),
        idle_norms=_histogram([part.idle_norms for part in parts]),
        grace=parts[0].grace,
        tiers=tuple(Tier(name, *held) for name, held in tiers.items()),
        index_bytes=sum(part.index_bytes for part in parts),
        waiting=sum(part.waiting for part in parts),
        waiting_bytes=sum(part.waiting_bytes for part in parts),
        **lists,
    )


def _histogram(parts: Sequence[pb.Histogram]) -> Histogram:
    edges = np.array(parts[0].edges, np.float64)
    return Histogram(edges, np.sum([part.counts for part in parts], axis=0, dtype=np.int64))


def _list(parts: Sequence[pb.RowList], field: str, sign: float, top: int) -> RowList:
    """The most extreme of the shards' extremes; of equal values, those of the least keys."""
    keys = np.concatenate([np.array(part.keys, np.uint64) for part in parts])
    values = np.concatenate([np.array(getattr(part, field), np.float64) for part in parts])
    ranks = np.where(np.isnan(values), np.inf, sign * values)
    order = np.lexsort((keys, ranks))[:top]
    tiers = [tier for part in parts for tier in part.tiers]

    def column(name: str, dtype: Any) -> NDArray[Any]:
        whole = np.concatenate([np.array(getattr(part, name), dtype) for part in parts])
        chosen: NDArray[Any] = whole[order]
        return chosen

    return RowList(
        keys[order],
        column("versions", np.uint64),
        column("steps", np.int64),
        column("frequencies", np.uint64),
        column("norms", np.float64),
        tuple(tiers[i] for i in order.tolist()),
        np.repeat(np.arange(len(parts)), [len(part.keys) for part in parts])[order],
    )


# ---- files


def beside(path: Path) -> Path:
    """A file to be written in the place of ``path`` until it is whole: empty, and there.

    InvalidArgument if it cannot be: now, and not when the work is done.
    """
    if path.is_dir():
        raise InvalidArgument(f"{path} is a directory, not a file to be written")
    found = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        found.touch()
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be written: {error.strerror}") from error
    return found


class ParquetSink:
    """Rows of an analysis as a Parquet file, which is whole, or not there under its name.

    key uint64 | frequency uint64 | step int64 | version uint64 | norm float64 | tier string
    | embedding float32[dim]

    ``embedding`` only where the analysis has it. Memory does not grow with the table.
    """

    def __init__(self, path: Path) -> None:
        """InvalidArgument if pyarrow is missing; and from ``with``, if no file can be there."""
        self.rows = 0
        self._arrow, self._parquet = export._pyarrow()
        self._path = path
        self._writer: Any = None
        self._held: list[Any] = []  # record batches
        self._waiting = 0  # rows in them

    def __call__(self, columns: RowColumns) -> None:
        """Take rows."""
        arrow = self._arrow
        arrays = {
            "key": arrow.array(columns.keys),
            "frequency": arrow.array(columns.frequencies),
            "step": arrow.array(columns.steps),
            "version": arrow.array(columns.versions),
            "norm": arrow.array(columns.norms),
            "tier": arrow.array([columns.tier] * len(columns.keys), arrow.string()),
        }
        if columns.embeddings is not None:
            arrays["embedding"] = export._arrow(arrow, columns.embeddings)
        self._held.append(arrow.record_batch(list(arrays.values()), names=list(arrays)))
        self._waiting += len(columns.keys)
        if self._waiting >= export.GROUP_ROWS:
            self._write()

    def __enter__(self) -> Self:
        self._beside = beside(self._path)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._write()
            if self._writer is not None:
                self._writer.close()
                if kind is None:
                    os.replace(self._beside, self._path)
        finally:
            self._beside.unlink(missing_ok=True)

    def _write(self) -> None:
        """Write what waits as a row group."""
        if not self._held:
            return
        table = self._arrow.Table.from_batches(self._held)
        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self._beside, table.schema)
        self._writer.write_table(table)
        self.rows += self._waiting
        self._held, self._waiting = [], 0


# ---- growth


@dataclass(frozen=True, slots=True)
class Moment:
    """What a history remembers of an analysis."""

    time: float  # seconds since 1970
    table: str
    checkpoint: str | None
    rows: int
    bytes: int
    waiting: int
    occurrences: int
    step: int


def remember(path: Path, found: Analysis) -> None:
    """Append an analysis to a history, a file of one JSON object a line."""
    moment = Moment(
        round(found.time, 3),
        found.table,
        found.checkpoint,
        found.rows,
        found.bytes,
        found.waiting,
        found.occurrences,
        found.step,
    )
    with path.open("a") as file:
        file.write(json.dumps(asdict(moment)) + "\n")


def history(path: Path, table: str) -> list[Moment]:
    """What a history has of a table, by time; InvalidArgument names a line that has no analysis."""
    found = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                moment = Moment(**json.loads(line))
                float(moment.time), int(moment.rows), int(moment.bytes)
            except (TypeError, ValueError) as error:
                raise InvalidArgument(f"{path}: line {number} has no analysis: {error}") from error
            if moment.table == table:
                found.append(moment)
    return sorted(found, key=lambda moment: moment.time)


# ---- keys


@dataclass(frozen=True, slots=True)
class Gone:
    """A delete that is remembered."""

    version: int  # of the shard, with which the row went
    cause: str  # request, step_ttl, time_ttl, norm, capacity
    time: float | None  # seconds since 1970; None: it is not in the log any more
    step: int | None  # the largest that had been pushed to the table; None alike

    def __str__(self) -> str:
        what = "deleted on request" if self.cause == "request" else f"evicted by {self.cause}"
        at = f"version {self.version}"
        if self.step is not None:
            at += f", step {self.step}"
        if self.time is not None:
            at += time.strftime(", %Y-%m-%d %H:%M:%S", time.localtime(self.time))
        return f"{what} at {at}"


@dataclass(frozen=True, slots=True, eq=False)
class KeyInfo:
    """What the servers know of a key."""

    key: int  # as it was asked for
    shard: int
    state: str  # row, waiting, gone, new, unknown
    tier: str | None  # of its row, as all up to the embedding
    version: int | None
    step: int | None
    frequency: int | None
    norm: float | None
    embedding: NDArray[np.float32] | None
    waiting: int  # occurrences that are counted towards admission
    threshold: int | None  # at which it is admitted
    gone: tuple[Gone, ...]  # deletes of it that are remembered, by version
    why: str

    @property
    def reason(self) -> str:
        """Where its row is, or why it has none, as a sentence."""
        match self.state:
            case "row":
                return f"has a row in tier {self.tier}"
            case "waiting":
                return f"waits for admission with {self.waiting} of {self.threshold} occurrences"
            case "gone":
                return str(self.gone[-1])
            case "new":
                return "was never pushed"
        return f"was never pushed, or that is forgotten: {self.why}"


def inspect(
    client: Client, table: str, keys: Sequence[int] | NDArray[Any], *, embeddings: bool = False
) -> list[KeyInfo]:
    """What the servers know of keys, in their order; any 64-bit keys, duplicates too.

    Raises TableNotFound.
    """
    asked = [int(key) for key in keys]
    if strange := [key for key in asked if not -(1 << 63) <= key < 1 << 64]:
        raise InvalidArgument(f"key {strange[0]} has more than 64 bits")
    every = np.array([key % (1 << 64) for key in asked], np.uint64)
    distinct, inverse = np.unique(every, return_inverse=True)
    cluster = client._connect()
    owners = routing.owners(distinct, cluster.shard_map)
    found: list[Any] = [None] * len(distinct)
    for shard, link in enumerate(cluster.links):
        mine = np.flatnonzero(owners == shard)
        for at in range(0, len(mine), MOST_KEYS):
            some = mine[at : at + MOST_KEYS]
            request = pb.InspectRequest(
                table=table, keys=distinct[some].tobytes(), embeddings=embeddings
            )
            answer = admin._call(
                client, link, "Inspect", request, pb.InspectResponse, service=SERVICE
            )
            for i, facts in zip(some.tolist(), answer.keys, strict=True):
                found[i] = (shard, facts, answer.admission)
    if not asked:
        client.describe_table(table)  # TableNotFound
    return [_key(key, *found[i]) for key, i in zip(asked, inverse.tolist(), strict=True)]


def _key(key: int, shard: int, facts: pb.KeyFacts, admission: pb.Rule) -> KeyInfo:
    there = facts.state == pb.KeyFacts.STATE_ROW
    threshold = admission.parameters.get("threshold") if admission.name else None
    return KeyInfo(
        key,
        shard,
        STATES.get(facts.state, "unknown"),
        facts.tier if there else None,
        facts.version if there else None,
        facts.step if there else None,
        facts.frequency if there else None,
        facts.norm if there else None,
        np.array(facts.embedding, np.float32) if facts.embedding else None,
        facts.waiting,
        None if threshold is None else int(threshold),
        tuple(
            Gone(
                gone.version,
                gone.cause,
                gone.time_us / 1e6 if gone.HasField("time_us") else None,
                gone.step if gone.HasField("step") else None,
            )
            for gone in facts.gone
        ),
        facts.why,
    )
