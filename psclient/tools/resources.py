"""Findings of ``psctl doctor`` in the live figures of a shard: limits, certificate, subscribers."""

from __future__ import annotations

from collections.abc import Iterator

from psclient.tools.figures import size
from psproto import ps_pb2 as pb
from psproto.certfiles import FEW_DAYS

FULL = 0.9  # used part of a limit that is a warning
LAG_SECONDS = 60.0  # age of a change that a subscriber has not received
FLUSH_SECONDS = 900.0  # age of the last flush
CERTIFICATE_SECONDS = FEW_DAYS * 86_400.0  # time until the certificate expires
SPACE = "free space, or enlarge it: docs/runbook.md, full disk"
ADVICE = {  # by name of the limit; a limit that is not here may be used up
    "max_inflight_bytes": "send less at once, or raise max_inflight_bytes",
    "transport": "send less at once, or raise max_inflight_bytes",
    "max_connections": "share clients between threads, or raise max_connections",
    "max_sessions": "raise max_sessions: a client that is forgotten cannot repeat its pushes",
    "max_tables": "drop tables, or raise max_tables",
    "max_subscribers": "end subscribers, or raise max_subscribers",
    "lane_bytes": "raise lane_bytes: further clients on this machine use gRPC",
    "log_backlog": "use a faster disk: pushes wait until their log records are written",
    "process": "lower host_bytes, or give the server more memory: the kernel may kill it",
    "disk": SPACE,
    "disk_bytes": SPACE,
}
MEMORY = "add shards, evict rows, or set data_dir: pushes of new keys will fail with OUT_OF_MEMORY"
FLUSH = "see the log of the server: until a flush succeeds, the version log and restarts get longer"
SUBSCRIBERS = "find the slow subscriber: it, its network or its machine does not keep up"
CERTIFICATE = "renew the certificate; the server reads the new files without a restart"

Found = tuple[str, str, str, str]  # (check, state, facts, advice), as in doctor.Finding


def examine(live: pb.GetStatusResponse) -> Iterator[Found]:
    """Yield the findings about a shard: one per check, or one per limit that is nearly reached."""
    yield from _limits(live)
    if live.HasField("subscribers"):
        yield _subscribers(live.subscribers)
    if live.HasField("storage"):
        yield _flush(live.storage)
    if live.certificate_expires:
        yield _certificate(live.certificate_expires - live.time)


def _limits(live: pb.GetStatusResponse) -> Iterator[Found]:
    """Yield a warning for each limit that is nearly reached; if there is none, one that is ok."""
    advice = ADVICE if live.HasField("storage") else {**ADVICE, "host_bytes": MEMORY}
    full = [
        each
        for each in live.budgets
        if each.limit and each.name in advice and each.used >= FULL * each.limit
    ]
    for each in full:
        count = each.name.startswith("max_") and not each.name.endswith("_bytes")
        used, limit = (each.used, each.limit) if count else (size(each.used), size(each.limit))
        yield "limits", "warning", f"{each.name}: {used} of {limit} are used", advice[each.name]
    if not full:
        yield "limits", "ok", f"no limit is used by {FULL:.0%} or more", ""


def _subscribers(feed: pb.FeedStatus) -> Found:
    """Check that subscribers keep up."""
    found = f"{feed.subscribers} subscribers"
    if feed.subscribers:
        found += f", the slowest lags {feed.lag_versions:,} versions, {feed.lag_seconds:.0f} s"
    late = feed.subscribers and feed.lag_seconds > LAG_SECONDS
    return "subscribers", "warning" if late else "ok", found, SUBSCRIBERS if late else ""


def _flush(storage: pb.StorageStatus) -> Found:
    """Check that the last flush is not old, and did not fail."""
    found = f"the last flush was {storage.flush_age_seconds:.0f} s ago"
    if storage.flush_failure:
        return "flush", "error", f"{found}; it failed: {storage.flush_failure}", FLUSH
    if storage.flush_age_seconds > FLUSH_SECONDS:
        return "flush", "warning", found, FLUSH
    return "flush", "ok", found, ""


def _certificate(seconds: float) -> Found:
    """Check how long the server's certificate is valid; ``seconds``: until it expires."""
    if seconds <= 0:
        return "certificate", "error", f"expired {-seconds / 86_400:.1f} days ago", CERTIFICATE
    soon = seconds < CERTIFICATE_SECONDS
    found = f"expires in {seconds / 86_400:.1f} days"
    return "certificate", "warning" if soon else "ok", found, CERTIFICATE if soon else ""
