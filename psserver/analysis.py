"""What a table holds, and what is known of a key. Nothing is changed.

    Analyze   every row goes by once, a slice at a time, and into a Summary
    Inspect   rows and counters as of one version, then the deletes that are remembered

Everything here blocks, and runs on threads of its own. A slice of a live table is read by the
engine, so that each row is whole, which takes some 50 us; all other work on it is done here, most
of it in one kernel without the interpreter's lock. Slices are small, so that a pull that meets one
waits little, and together have 1/81 of a processor, so that few do. A checkpoint needs no engine,
but cores and the lock that the engine wants too: it has a tenth.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from psproto import ps_pb2 as pb
from psproto import routing
from psserver.checkpoints import Checkpoints, number_in, require_width, schema_in
from psserver.engine import Engine
from psserver.errors import BadRequest, TooLarge, WrongShard
from psserver.schemas import write_schema
from psserver.shard import Holdings, Known, Shard, Tombstones
from storage import checkpoint as files
from storage.admission import Counter
from storage.analysis import Extremes, Histogram, RowColumns, Summary
from storage.errors import Compacted, UnknownTable
from storage.eviction import FIRST_STEP
from storage.kernels import Keys, Rows, measure
from storage.records import Cause, Delete, decode
from storage.schema import TableSchema
from storage.tiers.base import FREQUENCY, KEY, STEP, VERSION, Scan
from storage.versionlog import VersionLog

Slice = TypeVar("Slice")
Result = TypeVar("Result")
Columns = pb.AnalyzeRequest.Columns

SLICE_ROWS = 2_048  # read by the engine at once
SLICE_BYTES = 1 << 20  # of embeddings
SPARED = 80  # times the work on a slice, the pause after it
SPARED_STORED = 9  # the same for pieces of checkpoints, which have another 10 %
LONGEST = 1.0  # seconds of a pause beside the engine: a server that stops waits for it
TELL_SECONDS = 5.0  # between two messages without columns: each wakes both sides for a while
MESSAGE_BYTES = 1 << 20  # of columns in a message, about
MAX_EDGES = 256  # asked for, of each histogram
MAX_TOP = 1000
MAX_INSPECTED = 1000
DEAD = 1024  # changes whose tombstones are looked through at once
LAST_STEP = 1 << 48  # an age or a grace is at most this
ALL = (1 << 48) - 1  # versions


class Pace:
    """Takes slices for all who do such work, one after the other, and pauses after each.

    spared  how many times as long as a slice took, of processor time, the pause after it is
    """

    def __init__(self, engine: Engine, spared: float = SPARED) -> None:
        self._engine = engine
        self._spared = spared
        self._turn = threading.Lock()

    def run(self, read: Callable[[], Slice], work: Callable[[Slice], Result]) -> Result:
        """``read`` on the engine thread, ``work`` on this one on what it returned; then pause."""

        def timed() -> tuple[Slice, float]:
            start = time.thread_time()
            return read(), time.thread_time() - start

        with self._turn:
            found, took = self._engine.run(timed)
            start = time.thread_time()
            done = work(found)
            time.sleep(self._spared * (took + time.thread_time() - start))
        return done

    def beside(self, work: Callable[[], Result]) -> Result:
        """``work`` on this thread, which needs no engine; then pause, up to LONGEST."""
        with self._turn:
            start = time.thread_time()
            done = work()
            time.sleep(min(self._spared * (time.thread_time() - start), LONGEST))
        return done


class Analyses:
    """What one shard says about its tables. Thread-safe.

    log  None: what it would tell about deletes is not told
    """

    def __init__(
        self,
        shard: Shard,
        engine: Engine,
        checkpoints: Checkpoints,
        log: VersionLog | None,
        pace: Pace | None = None,
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._checkpoints = checkpoints
        self._log = log
        self._pace = pace or Pace(engine)
        self._pace_stored = pace or Pace(engine, SPARED_STORED)

    # ---- tables

    def analyze(self, request: pb.AnalyzeRequest) -> Iterator[pb.AnalyzeResponse]:
        """Sum up a table, of this shard or of a checkpoint; the last message has the summary."""
        summary = _summary(request)
        if request.checkpoint:
            yield from self._stored(request, summary)
        else:
            yield from self._live(request, summary)

    def _live(self, request: pb.AnalyzeRequest, summary: Summary) -> Iterator[pb.AnalyzeResponse]:
        progress = self._checkpoints.progress()  # ends the work when the server does
        held = self._engine.run(lambda: self._shard.holdings(request.table))
        outbox = _Outbox(request, held.stats.rows)

        def work(found: tuple[RowColumns, Rows | None]) -> list[pb.AnalyzeResponse]:
            rows, embeddings = found
            summary.add(rows, held.step)
            return list(outbox.put(rows, embeddings, summary.rows))

        for read in self._slices(request, held):
            progress.tell(0)
            yield from self._pace.run(read, work)
        yield from outbox.rest()
        told = _told(summary, held.schema, held.step)
        told.version, told.last_version = held.version, self._shard.version
        for name, _, size in held.tiers:
            told.tiers.add(name=name, rows=summary.tiers.get(name, 0), bytes=size)
        told.index_bytes, told.waiting = held.stats.index_bytes, held.stats.waiting
        told.waiting_bytes = held.stats.counter_bytes
        yield pb.AnalyzeResponse(done=outbox.done, total=outbox.done, summary=told)

    def _slices(
        self, request: pb.AnalyzeRequest, held: Holdings
    ) -> Iterator[Callable[[], tuple[RowColumns, Rows | None]]]:
        """What the engine is to do: read some rows as they are then, with embeddings if wanted."""
        dim = held.schema.dim
        most = max(1, min(SLICE_ROWS, SLICE_BYTES // (4 * dim)))
        wanted = request.columns == Columns.COLUMNS_EMBEDDING

        def read(
            tier: str, scan: Scan, places: NDArray[np.int64]
        ) -> tuple[RowColumns, Rows | None]:
            if not self._shard.holds(held.number):
                raise UnknownTable(request.table)
            norms = np.empty(len(places), np.float64)
            meta = scan.measure(places, norms)
            if not (there := meta[:, VERSION] != 0).all():  # some went since they were found
                meta, norms, places = meta[there], norms[there], places[there]
            matrix = None
            if wanted:
                matrix = np.empty((len(places), dim), np.float32)
                scan.read(places, matrix)
            columns = meta[:, KEY], meta[:, VERSION], meta[:, STEP].view(np.int64)
            return RowColumns(*columns, meta[:, FREQUENCY], norms, tier), matrix

        for tier, scan, _ in held.tiers:
            start: int | None = 0
            while start is not None:
                places, start = scan.find(start, 0, ALL, most)
                if len(places):
                    yield partial(read, tier, scan, places)

    def _stored(self, request: pb.AnalyzeRequest, summary: Summary) -> Iterator[pb.AnalyzeResponse]:
        """Each part is read twice: ages are counted back from the largest step in it."""
        work, beside = self._checkpoints, self._pace_stored.beside
        checkpoint = work.open(request.checkpoint)
        schema = schema_in(checkpoint, request.table)
        progress = work.progress()
        parts = work.share(checkpoint)
        outbox = _Outbox(
            request, 2 * sum(e.parts[p].bytes for e in checkpoint.chain for p in parts)
        )
        wanted = request.columns == Columns.COLUMNS_EMBEDDING
        newest, size, waiting = FIRST_STEP, 0, 0

        def largest(pieces: Iterator[files.Piece]) -> int | None:
            """The largest step of the next piece; None: there is none."""
            if (piece := next(pieces, None)) is None:
                return None
            require_width(checkpoint, schema, piece.rows)
            return int(piece.steps.max(initial=FIRST_STEP))

        def summed(
            pieces: Iterator[files.Piece], step: int
        ) -> tuple[RowColumns, Rows | None, int] | None:
            """The next piece summed up, embeddings if wanted, its bytes; None: there is none."""
            if (piece := next(pieces, None)) is None:
                return None
            columns = piece[1:]
            copies = map(np.array, columns[:-1])  # see Piece
            norms = _norms(piece.rows, schema.dim)
            rows = RowColumns._make([*copies, norms, "checkpoint"])
            summary.add(rows, step)
            matrix = np.array(piece.rows[:, : schema.dim]) if wanted else None
            return rows, matrix, sum(column.nbytes for column in columns)

        for part in parts:
            number = number_in(checkpoint, part, request.table)
            asked = work.store, checkpoint, part, [number], progress.tell
            step, pieces = FIRST_STEP, files.rows_of(*asked)
            while (found := beside(partial(largest, pieces))) is not None:
                step = max(step, found)
                yield from outbox.tell(progress.bytes)
            newest, pieces = max(newest, step), files.rows_of(*asked)
            while (done := beside(partial(summed, pieces, step))) is not None:
                rows, matrix, more = done
                size += more
                yield from outbox.put(rows, matrix, progress.bytes)
            if isinstance(schema.admission, Counter):  # checkpoints hold no sketches
                counters = files.counters_of(*asked)
                while (some := beside(partial(next, counters, None))) is not None:
                    waiting += len(some[1])
        yield from outbox.rest()
        told = _told(summary, schema, newest)
        told.waiting = waiting
        told.version = told.last_version = max(checkpoint.manifest.versions)
        told.tiers.add(name="checkpoint", rows=summary.rows, bytes=size)
        yield pb.AnalyzeResponse(done=progress.bytes, total=progress.bytes, summary=told)

    # ---- keys

    def inspect(self, request: pb.InspectRequest) -> pb.InspectResponse:
        """What the shard knows of keys."""
        keys = self._keys(request)
        known = self._engine.run(lambda: self._shard.known(request.table, keys))
        gone, horizon = self._gone(known, keys)
        response = pb.InspectResponse(
            version=known.version,
            created=known.created,
            tombstone_horizon=horizon,
            step=known.step,
            admission=write_schema(known.schema).admission,
        )
        norms = _norms(known.embeddings, known.embeddings.shape[1])
        for i, key in enumerate(keys.tolist()):
            facts = response.keys.add(key=key, gone=gone.get(key, ()))
            if known.versions[i]:
                facts.state = pb.KeyFacts.STATE_ROW
                facts.tier, facts.version = known.tiers[i], int(known.versions[i])
                facts.step, facts.frequency = int(known.steps[i]), int(known.frequencies[i])
                facts.norm = norms[i]
                if request.embeddings:
                    facts.embedding.extend(known.embeddings[i].tolist())
            elif known.waiting[i]:
                facts.state, facts.waiting = pb.KeyFacts.STATE_WAITING, int(known.waiting[i])
            elif facts.gone:
                facts.state = pb.KeyFacts.STATE_GONE
            elif known.forgets:
                facts.state, facts.why = pb.KeyFacts.STATE_UNKNOWN, known.forgets
            elif horizon >= known.created:  # equal behind a restore, whose tables begin there
                facts.state = pb.KeyFacts.STATE_UNKNOWN
                facts.why = f"deletes up to version {horizon} may be forgotten"
            else:
                facts.state = pb.KeyFacts.STATE_NEW
        return response

    def _keys(self, request: pb.InspectRequest) -> Keys:
        """The keys of a request; refuses what is no key of this shard."""
        shard, where = self._shard, f"table {request.table[:200]!r}"
        if len(request.keys) % 8:
            raise BadRequest("INVALID_ARGUMENT", f"{where}: {len(request.keys)} bytes of keys")
        keys = np.frombuffer(request.keys, "<u8")
        if len(keys) > MAX_INSPECTED:
            raise TooLarge(
                "TOO_MANY_KEYS", f"{where}: {len(keys)} keys, the limit is {MAX_INSPECTED}"
            )
        repeated, stray = routing.check(keys, shard.shard_map, shard.number)
        if stray >= 0:
            key, shard_map = keys[stray], shard.shard_map
            belongs = int(routing.owners(keys[stray : stray + 1], shard_map)[0])
            raise WrongShard(request.table, int(key), belongs, shard.number, shard_map.epoch)
        if repeated:
            raise BadRequest("INVALID_ARGUMENT", f"{where}: keys must be distinct")
        return keys

    def _gone(self, known: Known, keys: Keys) -> tuple[dict[int, list[pb.KeyFacts.Gone]], int]:
        """By key, the deletes up to the version known of that are remembered; and the horizon."""
        found: dict[int, list[pb.KeyFacts.Gone]] = {}
        at = known.created
        while True:
            dead = self._engine.run(lambda at=at: self._shard.tombstones(at, DEAD))  # type: ignore[misc]
            dead = [each for each in dead if each.version <= known.version]
            if not dead:
                return found, self._shard.tombstone_horizon
            at = dead[-1].version
            mine = [each for each in dead if each.table == known.number]
            gone = np.concatenate([np.empty(0, np.uint64), *(each.keys for each in mine)])
            change = np.repeat(np.arange(len(mine)), [len(each.keys) for each in mine])
            hits = np.flatnonzero(np.isin(gone, keys))
            told = {i: self._told_of(mine[i]) for i in np.unique(change[hits]).tolist()}
            for key, i in zip(gone[hits].tolist(), change[hits].tolist(), strict=True):
                found.setdefault(key, []).append(told[i])

    def _told_of(self, dead: Tombstones) -> pb.KeyFacts.Gone:
        """A delete, with what its record says if the log still has it."""
        gone = pb.KeyFacts.Gone(version=dead.version, cause=Cause(dead.cause).name.lower())
        if self._log is None:
            return gone
        try:
            frames = self._log.read(dead.version - 1, upto=dead.version)
        except Compacted:
            return gone
        for frame in frames[:1]:
            record = decode(frame)
            if isinstance(record, Delete):
                gone.time_us, gone.step = record.origin.time_us, record.origin.step
        return gone


class _Outbox:
    """Messages on their way: the rows that are wanted, and now and then how far the work is."""

    def __init__(self, request: pb.AnalyzeRequest, total: int) -> None:
        self.done = 0
        self._total = total
        self._columns = request.columns
        self._held: list[tuple[RowColumns, Rows | None]] = []
        self._bytes = 0
        self._told = time.monotonic()

    def put(self, rows: RowColumns, matrix: Rows | None, done: int) -> Iterator[pb.AnalyzeResponse]:
        """Send rows if they are wanted; ``done``: how far the work is with them."""
        self.done = done
        if not self._columns:
            yield from self.tell(done)
            return
        if self._held and self._held[0][0].tier != rows.tier:
            yield from self.rest()
        self._held.append((rows, matrix))
        self._bytes += sum(column.nbytes for column in rows[:-1])
        self._bytes += 0 if matrix is None else matrix.nbytes
        if self._bytes >= MESSAGE_BYTES:
            yield from self.rest()

    def tell(self, done: int) -> Iterator[pb.AnalyzeResponse]:
        """Say how far the work is, if it was not said just now."""
        self.done = done
        if time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            yield pb.AnalyzeResponse(done=done, total=max(done, self._total))

    def rest(self) -> Iterator[pb.AnalyzeResponse]:
        """Send what waits."""
        if not self._held:
            return
        rows, matrices = zip(*self._held, strict=True)
        message = pb.AnalyzeResponse(
            done=self.done, total=max(self.done, self._total), tier=rows[0].tier
        )
        for field in _COLUMNS:
            column = np.concatenate([getattr(each, field) for each in rows])
            setattr(message, field, column.tobytes())
        if self._columns == Columns.COLUMNS_EMBEDDING:
            message.embeddings = np.concatenate(matrices).tobytes()
        self._held, self._bytes = [], 0
        yield message


_COLUMNS = ("keys", "versions", "steps", "frequencies", "norms")


def _summary(request: pb.AnalyzeRequest) -> Summary:
    """An empty summary as a request wants it; BadRequest if it breaks a rule."""
    _require("frequencies", request.frequencies, 1, (1 << 32) - 1)
    _require("ages", request.ages, 0, LAST_STEP)
    _require("norms", request.norms, math.ulp(0.0), 1.8e308)
    _require("grace", [request.grace], 0, LAST_STEP)
    if request.top > MAX_TOP:
        raise BadRequest("INVALID_ARGUMENT", f"top must be in 0..{MAX_TOP}, got {request.top}")
    if request.columns not in Columns.values():
        raise BadRequest("INVALID_ARGUMENT", f"columns {request.columns} is unknown")
    asked = request.frequencies, request.ages, request.norms
    return Summary(*asked, grace=request.grace, top=request.top)


def _require(field: str, values: Sequence[float], least: float, most: float) -> None:
    """BadRequest unless all edges, and not too many, are in a range."""
    if len(values) > MAX_EDGES:
        raise BadRequest(
            "INVALID_ARGUMENT", f"{field}: {len(values)} edges, the limit is {MAX_EDGES}"
        )
    for value in values:
        if not least <= value <= most or math.isinf(value):
            rule = f"in {least:g}..{most:g}" if least >= 1 or not least else "finite and above 0"
            raise BadRequest("INVALID_ARGUMENT", f"{field} must be {rule}, got {value!r}")


def _norms(matrix: Rows, dim: int) -> NDArray[np.float64]:
    norms = np.empty(len(matrix), np.float64)
    measure(np.array(matrix), np.arange(len(matrix)), dim, norms)
    return norms


# ---- messages


def _told(summary: Summary, schema: TableSchema, step: int) -> pb.Summary:
    return pb.Summary(
        schema=write_schema(schema),
        width=schema.width,
        step=step if step > FIRST_STEP else 0,
        rows=summary.rows,
        occurrences=summary.occurrences,
        norm_sum=summary.norm_sum,
        frequencies=_histogram(summary.frequencies),
        frequency_sums=summary.frequencies.sums.tolist(),
        ages=_histogram(summary.ages),
        norms=_histogram(summary.norms),
        idle_norms=_histogram(summary.idle_norms),
        grace=summary.grace,
        most_frequent=_list(summary.most_frequent),
        least_frequent=_list(summary.least_frequent),
        largest=_list(summary.largest),
        smallest=_list(summary.smallest),
    )


def _histogram(histogram: Histogram) -> pb.Histogram:
    return pb.Histogram(edges=histogram.edges.tolist(), counts=histogram.counts.tolist())


def _list(extremes: Extremes) -> pb.RowList:
    rows = extremes.rows
    return pb.RowList(
        keys=rows.keys.tolist(),
        versions=rows.versions.tolist(),
        steps=rows.steps.tolist(),
        frequencies=rows.frequencies.tolist(),
        norms=rows.norms.tolist(),
        tiers=extremes.tiers.tolist(),
    )
