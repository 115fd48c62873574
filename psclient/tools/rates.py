"""Rates of a cluster: what its shards did between two answers to ``psclient.status.status``.

A sample has the same fields whatever the shards answer. Numbers that are not known are None: those
of a shard that did not answer, and rates of a shard that was restarted or asked for the first time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from psclient.status import ShardStatus
from psproto import ps_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRates:
    """One line of ``psctl top``: a shard in one interval."""

    shard: int
    address: str
    state: str  # as in ShardStatus
    problem: str | None
    phase: str | None  # of the server: kernels, gpu, recovery, ready, restoring, draining, ...
    release: str | None
    uptime_seconds: float | None
    rows: int | None
    requests_per_second: float | None
    keys_per_second: float | None
    bytes_per_second: float | None  # of arrays, received and sent
    errors_per_second: float | None
    p50_seconds: float | None  # latency of requests on the server
    p99_seconds: float | None
    engine_busy: float | None  # share of the time in which the engine thread ran, 0..1
    queue_wait_seconds: float | None  # 99th percentile of the waits for the engine thread
    requests_waiting: int | None  # requests that wait for their turn
    turn_wait_seconds: float | None  # 99th percentile of their waits; None: none had to wait
    cpu: float | None  # processor time per time; 2.0: two cores
    memory_bytes: int | None  # of tables; the next is its limit
    memory_limit_bytes: int | None
    gpu_bytes: int | None
    gpu_limit_bytes: int | None
    disk_bytes: int | None  # used on the file system of the data directory; the next is its size
    disk_limit_bytes: int | None
    subscribers: int | None
    lag_versions: int | None  # of the slowest subscriber
    lag_seconds: float | None
    flush_age_seconds: float | None
    lane_clients: int | None  # clients of the same-host lane


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRates:
    """A table in one interval, over all shards that answered."""

    table: str
    rows: int
    bytes: int
    requests_per_second: float | None
    pulled_keys_per_second: float | None
    pushed_keys_per_second: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardError:
    """An error that a shard answered with lately; ``count`` such errors, the newest at ``time``."""

    shard: int
    time: float  # in seconds since 1970
    method: str
    code: str
    reason: str
    message: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The cluster in one interval. Its fields are those of a line of ``psctl top --output json``.

    seconds  length of the interval
    errors   newest first
    """

    time: float  # in seconds since 1970
    seconds: float
    shards: list[ShardRates]
    tables: list[TableRates]
    errors: list[ShardError]


def sample(
    before: Sequence[ShardStatus], now: Sequence[ShardStatus], *, time: float, seconds: float
) -> Sample:
    """Return what happened between two answers of all shards.

    before   the older answers; []: none
    now      the newer answers
    time     when the newer ones came, in seconds since 1970
    seconds  time between them
    """
    former = {each.address: each.live for each in before}
    pairs = [(_comparable(former.get(each.address), each.live), each) for each in now]
    return Sample(
        time=time,
        seconds=seconds,
        shards=[_shard(old, each) for old, each in pairs],
        tables=_tables([(old, each.live) for old, each in pairs if each.live is not None]),
        errors=_errors(now),
    )


def _comparable(
    old: pb.GetStatusResponse | None, new: pb.GetStatusResponse | None
) -> pb.GetStatusResponse | None:
    """Return ``old`` if it comes from the same start of the server as ``new``, else None."""
    if old is None or new is None or old.start != new.start:
        return None
    return old if old.uptime_seconds < new.uptime_seconds else None


def _shard(old: pb.GetStatusResponse | None, status: ShardStatus) -> ShardRates:
    """Return the line of a shard; ``old`` is what it answered before, if that is comparable."""
    new = status.live
    known = pb.GetStatusResponse() if new is None else new
    budgets = {each.name: each for each in known.budgets}
    memory, gpu = budgets.get("host_bytes"), budgets.get("hbm_bytes")
    disk = budgets.get("disk")
    waits = _difference(old and old.engine.queue_wait, known.engine.queue_wait)
    turns = _difference(old and old.request_queue, known.request_queue)
    times = _latency(old, known)

    def rate(count: Callable[[pb.GetStatusResponse], float]) -> float | None:
        if old is None:
            return None
        return max(count(known) - count(old), 0.0) / (known.uptime_seconds - old.uptime_seconds)

    fed = known.subscribers if known.HasField("subscribers") else None
    return ShardRates(
        shard=status.shard,
        address=status.address,
        state=status.state,
        problem=status.problem,
        phase=None if new is None else pb.Phase.Name(new.phase).removeprefix("PHASE_").lower(),
        release=None if new is None else new.release,
        uptime_seconds=None if new is None else new.uptime_seconds,
        rows=None if new is None else new.rows,
        requests_per_second=rate(lambda s: sum(m.requests for m in s.methods)),
        keys_per_second=rate(lambda s: sum(m.keys for m in s.methods)),
        bytes_per_second=rate(lambda s: sum(m.bytes for m in s.methods)),
        errors_per_second=rate(lambda s: sum(e.count for e in s.errors)),
        p50_seconds=quantile(times, 0.5) if old is not None else None,
        p99_seconds=quantile(times, 0.99) if old is not None else None,
        engine_busy=rate(lambda s: s.engine.busy_seconds),
        queue_wait_seconds=quantile(waits, 0.99) if old is not None else None,
        requests_waiting=None if new is None else new.requests_waiting,
        turn_wait_seconds=quantile(turns, 0.99) if old is not None else None,
        cpu=rate(lambda s: s.cpu_seconds),
        memory_bytes=memory.used if memory else None,
        memory_limit_bytes=memory.limit if memory else None,
        gpu_bytes=gpu.used if gpu else None,
        gpu_limit_bytes=gpu.limit if gpu else None,
        disk_bytes=disk.used if disk else None,
        disk_limit_bytes=disk.limit if disk else None,
        subscribers=fed.subscribers if fed else None,
        lag_versions=fed.lag_versions if fed else None,
        lag_seconds=fed.lag_seconds if fed else None,
        flush_age_seconds=known.storage.flush_age_seconds if known.HasField("storage") else None,
        lane_clients=known.lanes.clients if known.HasField("lanes") else None,
    )


def _latency(old: pb.GetStatusResponse | None, new: pb.GetStatusResponse) -> pb.Timing:
    """Return the latencies of the requests since ``old``, of all methods together."""
    former = {} if old is None else {each.method: each.latency for each in old.methods}
    total = pb.Timing()
    for each in new.methods:
        _add(total, _difference(former.get(each.method), each.latency))
    return total


def _difference(old: pb.Timing | None, new: pb.Timing) -> pb.Timing:
    """Return the operations in ``new`` that are not in ``old``; None: there are none in it."""
    if old is None or list(old.bounds) != list(new.bounds):
        return new
    counts = [max(b - a, 0) for a, b in zip(old.buckets, new.buckets, strict=True)]
    seconds = max(new.seconds - old.seconds, 0.0)
    return pb.Timing(count=sum(counts), seconds=seconds, bounds=new.bounds, buckets=counts)


def _add(total: pb.Timing, more: pb.Timing) -> None:
    """Add the operations in ``more`` to ``total``, if their buckets are the same."""
    if not total.buckets:
        total.CopyFrom(more)
    elif list(total.bounds) == list(more.bounds):
        for i, count in enumerate(more.buckets):
            total.buckets[i] += count
        total.count += more.count
        total.seconds += more.seconds


def quantile(timing: pb.Timing, share: float) -> float | None:
    """Return the duration that the share ``share`` of the operations did not exceed; None: no data.

    It is interpolated within a bucket. A duration in the last bucket, which has no upper bound,
    counts as the last bound.
    """
    left, lower = share * sum(timing.buckets), 0.0
    if not sum(timing.buckets) or not timing.bounds:
        return None
    for count, upper in zip(timing.buckets, timing.bounds, strict=False):
        if count and left <= count:
            return float(lower + (upper - lower) * left / count)
        left, lower = left - count, upper
    return float(timing.bounds[-1])


def _tables(
    pairs: Sequence[tuple[pb.GetStatusResponse | None, pb.GetStatusResponse]],
) -> list[TableRates]:
    """Return the tables of all shards, by name.

    pairs  (older answer or None, newer answer) of each shard that answered
    """
    rows: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    rates: dict[str, list[float]] = {}  # requests, pulled keys and pushed keys per second
    for old, new in pairs:
        former = {} if old is None else {each.name: each for each in old.tables}
        for each in new.tables:
            rows[each.name] += each.rows
            sizes[each.name] += each.bytes
            if old is None or (then := former.get(each.name)) is None:
                continue
            seconds = new.uptime_seconds - old.uptime_seconds
            sums = rates.setdefault(each.name, [0.0, 0.0, 0.0])
            for i, field in enumerate(("requests", "pulled_keys", "pushed_keys")):
                sums[i] += max(getattr(each, field) - getattr(then, field), 0) / seconds
    return [
        TableRates(
            table=name,
            rows=rows[name],
            bytes=sizes[name],
            requests_per_second=rates[name][0] if name in rates else None,
            pulled_keys_per_second=rates[name][1] if name in rates else None,
            pushed_keys_per_second=rates[name][2] if name in rates else None,
        )
        for name in sorted(rows)
    ]


def _errors(now: Sequence[ShardStatus]) -> list[ShardError]:
    """Return the recent errors of all shards, newest first."""
    found = [
        ShardError(
            shard=status.shard,
            time=each.time,
            method=each.method,
            code=each.code,
            reason=each.reason,
            message=each.message,
            count=each.count,
        )
        for status in now
        if status.live is not None
        for each in status.live.recent_errors
    ]
    return sorted(found, key=lambda each: -each.time)
