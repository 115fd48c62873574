"""Compute summary statistics of a table of a running cluster, or of a table in a checkpoint.

    with Client(addresses) as ps:
        result = analyze(ps, "user", frequencies=[3], ages=[5000], norms=[0.01])
        result.admitted(3), result.idle(5000), result.small(0.01)  # numbers of rows, exact

An analysis changes nothing. The servers read every row once, in slices so short that pulls and
pushes are not delayed. So rows are read at different times, and rows that are created during the
analysis may be missing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient import admin, calls, checked
from psclient.client import Client
from psclient.errors import InvalidArgument
from psclient.tools.summary import Analysis, Histogram, RowColumns, RowList, Sink, Tier
from psproto import ps_pb2 as pb

SERVICE = "AnalysisService"
Columns = pb.AnalyzeRequest.Columns
METADATA_BYTES = 32  # server memory for the metadata of one row, in bytes
LISTS = (  # lists of extreme rows: (field of Summary, measure, -1: largest first or 1: smallest)
    ("most_frequent", "frequencies", -1.0),
    ("least_frequent", "frequencies", 1.0),
    ("largest", "norms", -1.0),
    ("smallest", "norms", 1.0),
)


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
    progress: calls.OnProgress | None = None,
) -> Analysis:
    """Compute summary statistics of a live table, or of a table in a checkpoint.

    table        name of the table
    checkpoint   name of the checkpoint; None: the live table
    frequencies  admission thresholds for which the result has exact counts of rows, in addition to
                 the powers of two
    ages         step TTLs for which the result has exact counts, in addition to the powers of two
    norms        norm thresholds for which the result has exact counts, in addition to 1, 2 and 5
                 times powers of ten
    grace        grace period of the norm rule, in steps
    top          number of rows in each list of extreme rows, at most 1000
    sink         called with the rows themselves (RowColumns), in no particular order, by one thread
                 at a time; called once with no rows if the table is empty
    embeddings   pass embeddings to the sink too
    progress     called with (done, total): rows of a live table, or bytes of a checkpoint

    Raises TableNotFound, CheckpointNotFound, DataLoss, and InvalidArgument for an invalid
    threshold.
    """
    start = time.perf_counter()
    asked = {"frequencies": frequencies, "ages": ages, "norms": norms}
    columns = Columns.COLUMNS_EMBEDDING if embeddings else Columns.COLUMNS_METADATA
    if sink is None:
        columns = Columns.COLUMNS_UNSPECIFIED
    request = _request(table, checkpoint, asked, grace=grace, top=top, columns=columns)
    summaries = _summaries(client, request, sink, progress)
    when = admin.describe(client, checkpoint).time if checkpoint else time.time()
    thresholds = {name: tuple(map(float, values)) for name, values in asked.items()}
    seconds = time.perf_counter() - start
    result = _merged(summaries, table, checkpoint, thresholds, when, seconds, top)
    if sink is not None and not result.rows:
        sink(_no_rows(result.dim if embeddings else None))
    return result


def _request(
    table: str, checkpoint: str | None, asked: Mapping[str, Any], **others: Any
) -> pb.AnalyzeRequest:
    """Return the request for an analysis. Raises InvalidArgument for an invalid threshold.

    asked   the caller's thresholds: frequencies, ages, norms
    others  fields of the request: grace, top, columns
    """
    stored = "" if checkpoint is None else checked.name("checkpoint", checkpoint)
    try:
        return pb.AnalyzeRequest(table=table, checkpoint=stored, **asked, **others)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            "frequencies and ages must be non-negative integers, and norms must be numbers:"
            f" {error}"
        ) from error


def _summaries(
    client: Client,
    request: pb.AnalyzeRequest,
    sink: Sink | None,
    progress: calls.OnProgress | None,
) -> list[pb.Summary]:
    """Run an analysis on all shards at the same time; return the summary of each shard.

    sink      receives the rows that the shards read
    progress  called with (done, total) of all shards together
    """
    amounts = [(0, 0)] * len(calls.links(client))

    def take(shard: int, message: pb.AnalyzeResponse) -> None:
        if sink is not None and message.keys:
            sink(_columns(message))
        amounts[shard] = (message.done, message.total)
        if progress is not None:
            progress(*map(sum, zip(*amounts, strict=True)))

    repeat = calls.Repeat(client._timeout, lambda message: bool(message.keys))
    last = calls.all_streams(
        client, "Analyze", request, pb.AnalyzeResponse, take, service=SERVICE, repeat=repeat
    )
    return [message.summary for message in last]


def _no_rows(dim: int | None) -> RowColumns:
    """Return a RowColumns without rows.

    dim  length of its (zero) embeddings; None: it has no embeddings
    """
    none = np.empty(0, np.uint64)
    matrix = None if dim is None else np.empty((0, dim), np.float32)
    return RowColumns(none, none, none.view(np.int64), none, none.view(np.float64), "", matrix)


def _columns(message: pb.AnalyzeResponse) -> RowColumns:
    """Return the rows in a message as a RowColumns."""
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
    """Combine the summaries of all shards into one Analysis.

    parts  summary of each shard
    when   time of the analysis, or of the checkpoint, in seconds since 1970
    top    number of rows in each list of extreme rows

    The other arguments are fields of the Analysis.
    """
    schema = parts[0].schema
    rows = sum(part.rows for part in parts)
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
        tiers=_tiers(parts),
        index_bytes=sum(part.index_bytes for part in parts),
        waiting=sum(part.waiting for part in parts),
        waiting_bytes=sum(part.waiting_bytes for part in parts),
        reuses=_histogram([part.reuses for part in parts]),
        first_pushes=sum(part.first_pushes for part in parts),
        pull_reuses=_histogram([part.pull_reuses for part in parts]),
        **{
            name: _list([getattr(part, name) for part in parts], field, sign, top)
            for name, field, sign in LISTS
        },
    )


def _tiers(parts: Sequence[pb.Summary]) -> tuple[Tier, ...]:
    """Add up the sizes of each tier over all shards."""
    tiers: dict[str, Tier] = {}
    for each in (tier for part in parts for tier in part.tiers):
        old = tiers.get(each.name, Tier(each.name, 0, 0))
        tiers[each.name] = Tier(
            each.name, old.rows + each.rows, old.bytes + each.bytes, each.on_disk
        )
    return tuple(tiers.values())


def _histogram(parts: Sequence[pb.Histogram]) -> Histogram:
    """Add up the counts of the histograms of all shards. All have the same edges."""
    edges = np.array(parts[0].edges, np.float64)
    return Histogram(edges, np.sum([part.counts for part in parts], axis=0, dtype=np.int64))


def _list(parts: Sequence[pb.RowList], field: str, sign: float, top: int) -> RowList:
    """Combine the shards' lists of extreme rows into one list of at most ``top`` rows.

    parts  list of each shard
    field  name of the measure, "frequencies" or "norms"
    sign   -1: largest first; 1: smallest first

    Among equal values, smaller keys come first.
    """
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
