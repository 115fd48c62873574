"""Examples of the messages with live figures: every field is set."""

from __future__ import annotations

from google.protobuf.message import Message

from psproto import ps_pb2 as pb

TIMING = pb.Timing(count=3, seconds=0.5, bounds=[0.001, 1.0], buckets=[2, 1, 0])
TABLE = pb.TableStatus(
    name="users",
    rows=300,
    bytes=1 << 20,
    tiers=[pb.TierStats(tier="host", rows=300, bytes=4096, hits=5, misses=6)],
    requests=7,
    pulled_keys=8,
    pushed_keys=9,
    damaged_blocks=1,
    lost_rows=2,
)
METHOD = pb.MethodStatus(method="Pull", requests=3, keys=300, bytes=1 << 20, latency=TIMING)
COUNT = pb.ErrorCount(method="Pull", code="NOT_FOUND", reason="TABLE_NOT_FOUND", count=2)
RECENT = pb.RecentError(
    time=1.5, method="Pull", code="NOT_FOUND", reason="TABLE_NOT_FOUND", message="no", count=2
)
ENGINE = pb.EngineStatus(busy_seconds=1.5, waiting=2, queue_wait=TIMING, failures=3)
LOG = pb.LogStatus(
    written_version=5,
    durable_version=4,
    first_version=1,
    bytes=1 << 20,
    backlog_bytes=7,
    write=TIMING,
    fsync=TIMING,
)
FEED = pb.FeedStatus(
    subscribers=1, lag_versions=2, lag_seconds=0.5, bytes=3, messages=4, freshness=TIMING
)
STORAGE = pb.StorageStatus(
    flush_age_seconds=1.5,
    flushes=2,
    flush_failure="disk full",
    flush=TIMING,
    checkpoint_age_seconds=0.0,
    checkpoint_write=TIMING,
    checkpoint_failures=1,
    restore="weekly",
    restore_phase="held",
    work="it takes checkpoint 'hourly'",
)
BUDGET = pb.Budget(name="host_bytes", used=5, limit=1 << 30)
LANES = pb.LaneStatus(clients=2, bytes=1 << 20)
STATUS = pb.GetStatusResponse(
    release="0.3.0",
    shard=1,
    shards=2,
    cluster="ads",
    advertise="ps-1.ps:7000",
    start=(1 << 63) + 1,
    time=1.5,
    uptime_seconds=2.5,
    phase=pb.PHASE_READY,
    phase_seconds=0.5,
    version=300,
    rows=300,
    table_count=1,
    tables=[TABLE],
    methods=[METHOD],
    errors=[COUNT],
    recent_errors=[RECENT],
    engine=ENGINE,
    log=LOG,
    subscribers=FEED,
    storage=STORAGE,
    budgets=[BUDGET],
    lanes=LANES,
    streams=3,
    cpu_seconds=4.5,
    certificate_expires=1e9,
    gpu_paused=True,
    damaged_blocks=1,
    requests_waiting=6,
    request_queue=TIMING,
)
LIVE: list[Message] = [
    *(TIMING, TABLE, METHOD, COUNT, RECENT, ENGINE, LOG, FEED, STORAGE, BUDGET, LANES),
    *(pb.GetStatusRequest(), STATUS),
]
