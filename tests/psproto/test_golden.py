"""Every message of ps.proto has the bytes of its golden file, which mean the same to protobuf."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message
from live_examples import LIVE
from wire_examples import (
    BF16,
    CACHE,
    DAMAGED,
    DESCRIBED,
    F16,
    F32,
    GOLDEN,
    KINDS,
    LIMITS,
    PULL,
    PULLED,
    PUSH,
    SCHEMA,
    SHARD_MAP,
    STATS,
    STATUS,
    STREAM_HEADER,
    TIER,
    U64,
    as_message,
    content,
    f4,
    golden,
    u4,
    u8,
)

from psproto import codec
from psproto import ps_pb2 as pb
from psproto.codec import (
    Exchanged,
)

MEANING = {
    "PullRequest": pb.PullRequest(
        header=pb.PullHeader(table="users", mode=pb.MODE_SERVE, min_version=3),
        keys=u8(7, U64, 0).tobytes(),
    ),
    "PushRequest": pb.PushRequest(
        header=pb.PushHeader(
            table="users", dtype=BF16, step=-1, lr=0.5, client_id=1 << 63, sequence=2
        ),
        keys=u8(5, 1 << 63).tobytes(),
        counts=u4(1, 2**32 - 1).tobytes(),
        gradients=bytes.fromhex("803f 00c0 003f 4040"),
    ),
    "PullResponse": pb.PullResponse(
        header=pb.PullResponseHeader(version=300, dim=2, dtype=F32),
        embeddings=f4(1.0, 2.0, -3.0, 4.0).tobytes(),
        versions=u8(9, 0).tobytes(),
        steps=u8(2**64 - 4, 0).tobytes(),
        frequencies=u8(1 << 40, 0).tobytes(),
    ),
}

EDGES = pb.Histogram(edges=[0.0, 0.5, 2.0], counts=[0, 1, 300, 1 << 40])
ROW_LIST = pb.RowList(
    keys=[7, U64],
    versions=[9, 300],
    steps=[-4, 5],
    frequencies=[2**32 - 1, 1],
    norms=[0.5, 0.0],
    tiers=["host", "lmdb"],
)
SUMMARY = pb.Summary(
    schema=SCHEMA,
    width=32,
    version=9,
    last_version=300,
    step=-5,
    rows=2,
    occurrences=1 << 32,
    norm_sum=0.5,
    frequencies=EDGES,
    frequency_sums=[0, 1, 300, 1 << 41],
    ages=EDGES,
    norms=EDGES,
    idle_norms=EDGES,
    grace=100,
    tiers=[pb.Summary.Tier(name="host", rows=2, bytes=1 << 21)],
    index_bytes=1 << 19,
    waiting=3,
    waiting_bytes=1 << 12,
    most_frequent=ROW_LIST,
    least_frequent=ROW_LIST,
    largest=ROW_LIST,
    smallest=ROW_LIST,
    reuses=EDGES,
    first_pushes=5,
    pull_reuses=EDGES,
)
FACTS = pb.KeyFacts(
    key=U64,
    state=pb.KeyFacts.STATE_ROW,
    tier="host",
    version=300,
    step=-5,
    frequency=4,
    norm=0.5,
    embedding=[0.5, -2.0],
    waiting=2,
    gone=[pb.KeyFacts.Gone(version=8, cause="step_ttl", time_us=1, step=0)],
    why="no",
)

# Messages without arrays are protobuf's to encode; here an example of each.
PART = pb.CheckpointPart(path="0/000001.blocks", bytes=1 << 21, checksum="0f", version=9)
FINDING = pb.Finding(check="disk", state=pb.Finding.STATE_ERROR, found="full", advice="free some")
LANE = pb.Lane(path="/data/lane.sock", token=bytes(range(16)))
SLICE = pb.Slice(region=1, offset=64, size=16)
LANE_REGION = pb.LaneRegion(region=1, kind=pb.LANE_KIND_MEMFD, size=1 << 22)
LANE_PUSH = pb.LanePush(
    header=pb.PushHeader(table="users", sequence=2),
    keys=SLICE,
    counts=pb.Slice(region=1, offset=80, size=8),
    gradients=pb.Slice(region=1, offset=88, size=64),
)
LANE_PULL = pb.LanePull(
    header=pb.PullHeader(table="users"), keys=SLICE, room=pb.Slice(region=1, offset=152, size=64)
)
SMALL = [
    EDGES,
    ROW_LIST,
    SUMMARY,
    FACTS,
    pb.AnalyzeRequest(
        table="users",
        checkpoint="daily",
        frequencies=[3],
        ages=[0, 5000],
        norms=[0.01],
        grace=100,
        top=10,
        columns=pb.AnalyzeRequest.COLUMNS_EMBEDDING,
    ),
    pb.AnalyzeResponse(
        done=1,
        total=2,
        keys=bytes(8),
        versions=bytes(8),
        steps=bytes(8),
        frequencies=bytes(8),
        norms=bytes(8),
        tier="host",
        embeddings=bytes(8),
        summary=SUMMARY,
    ),
    pb.InspectRequest(table="users", keys=bytes(8), embeddings=True),
    pb.InspectResponse(
        keys=[FACTS],
        version=300,
        created=1,
        tombstone_horizon=7,
        step=-5,
        admission=pb.Rule(name="counter", parameters={"threshold": 3}),
    ),
    PART,
    pb.CheckpointTable(name="users", rows=7, schema=SCHEMA),
    pb.CheckpointInfo(
        name="daily",
        parent="first",
        shards=2,
        versions=[9, 300],
        bytes=1 << 21,
        time_us=1,
        tables=[pb.CheckpointTable(name="users", rows=7)],
        problem="gone",
    ),
    pb.CheckpointProgress(bytes=5, total=6, part=PART, rows=7),
    pb.CompleteCheckpointRequest(name="daily", attempt="a", parent="first", parts=[PART]),
    pb.ListCheckpointsRequest(name="daily"),
    pb.ListCheckpointsResponse(checkpoints=[pb.CheckpointInfo(name="daily")]),
    pb.LoadTableRequest(name="daily", table="users", into="people"),
    pb.PrepareRestoreRequest(name="daily", id="x", replace=True),
    pb.ReadRowsRequest(table="users", checkpoint="daily"),
    pb.RestoreRequest(id="x", step=1),  # type: ignore[arg-type]
    pb.RestoreStatus(id="x", name="daily", phase=1, why="no"),  # type: ignore[arg-type]
    pb.VerifyCheckpointRequest(name="daily"),
    pb.VerifyRowsRequest(table="users", keys=True),
    pb.VerifyRowsResponse(bytes=300, total=1 << 20, damaged=DAMAGED),
    DAMAGED,
    pb.DeleteCheckpointsRequest(id="x", names=["daily"], keep=3, dry_run=True),
    pb.ContinueRequest(id="x", step=1),  # type: ignore[arg-type]
    pb.ContinueResponse(),
    pb.WriteCheckpointRequest(
        name="daily",
        attempt="a",
        parent="first",
        until_barrier="epoch/1",
        barrier_timeout_ms=600_000,
    ),
    pb.WriteRowsRequest(
        table="users", width=1, keys=bytes(8), rows=bytes(4), steps=bytes(8), frequencies=bytes(8)
    ),
    pb.WriteRowsResponse(version=9),
    pb.Rule(name="adam", parameters={"lr": 0.001, "beta1": 0.9}),
    SCHEMA,
    STATS,
    TIER,
    CACHE,
    pb.CreateTableRequest(schema=SCHEMA),
    pb.CreateTableResponse(schema=SCHEMA, stats=STATS),
    pb.DescribeTableRequest(name="users"),
    DESCRIBED,
    pb.ListTablesRequest(),
    pb.ListTablesResponse(tables=[DESCRIBED]),
    pb.AlterTableRequest(schema=SCHEMA, fields=["lr", "evictions"]),
    pb.AlterTableResponse(schema=SCHEMA, stats=STATS, version=300, dropped_counters=7),
    pb.DropTableRequest(name="users"),
    pb.DropTableResponse(),
    pb.EvictRequest(table="users", dry_run=True),
    pb.EvictResponse(evicted={"norm": 3, "capacity": 0}, rows=9, version=300),
    PULL.header,
    PULLED.header,
    PUSH.header,
    pb.PushResponse(version=300, duplicate=True, achieved=pb.DURABILITY_LOG, durable_version=299),
    pb.DeleteResponse(
        version=300, duplicate=True, achieved=pb.DURABILITY_LOG, durable_version=299, deleted=2
    ),
    pb.WaitDurableRequest(version=300),
    pb.WaitDurableResponse(durable_version=301, epoch=2**64 - 3),
    pb.History(epochs=[5, 2**64 - 2], ends=[300]),
    pb.BarrierRequest(name="epoch-1"),
    pb.BarrierResponse(version=302, epoch=5),
    pb.SubscribeRequest(
        token=b"t",
        start=pb.START_EARLIEST,
        tables=["users", "items"],
        content=pb.CONTENT_KEYS,
        dtype=BF16,
        coalesce_ms=1,
        coalesce_rows=2,
        progress_ms=3,
        chunk_bytes=4,
    ),
    pb.DeltaHeader(
        kind=pb.DeltaHeader.KIND_DELETES,
        table="users",
        dim=1,
        width=2,
        dtype=F16,
        version=3,
        more=True,
        token=b"t",
        head=4,
        time_us=5,
        barrier="b",
        schema=SCHEMA,
        cause="norm",
    ),
    STREAM_HEADER,
    STATUS,
    STATUS.details[0],
    pb.ErrorInfo(reason="WRONG_SHARD", domain="ps.v1", metadata={"epoch": "1"}),
    pb.RetryInfo(retry_delay=pb.RetryInfo.Delay(seconds=1, nanos=500_000_000)),
    SHARD_MAP,
    LIMITS,
    FINDING,
    pb.DiagnoseRequest(),
    pb.DiagnoseResponse(findings=[FINDING], time=1.5),
    pb.GetServerInfoRequest(),
    pb.GetServerInfoResponse(
        release="0.1.0",
        shard=1,
        shard_map=SHARD_MAP,
        limits=LIMITS,
        version=5,
        memory_bytes=1,
        memory_budget_bytes=2,
        lineage=bytes(range(16)),
        durable_version=4,
    ),
    *LIVE,
    LANE,
    SLICE,
    LANE_REGION,
    LANE_PUSH,
    LANE_PULL,
    pb.LaneRequest(
        id=300,
        timeout_ms=1500,
        pushes=[LANE_PUSH],
        pulls=[LANE_PULL],
        token=LANE.token,
        regions=[LANE_REGION],
    ),
]


@pytest.mark.parametrize("name", KINDS)
def test_our_bytes_never_change(name: str) -> None:
    assert KINDS[name].encode(KINDS[name].example).hex() == golden(name).hex()


@pytest.mark.parametrize("name", MEANING)
def test_golden_bytes_mean_to_protobuf_what_they_say(name: str) -> None:
    assert content(KINDS[name].message.FromString(golden(name))) == MEANING[name]


@pytest.mark.parametrize("name", KINDS)
def test_golden_bytes_mean_to_protobuf_what_they_mean_to_us(name: str) -> None:
    kind = KINDS[name]
    assert content(kind.message.FromString(golden(name))) == content(as_message(kind.example))
    assert kind.encode(kind.decode(golden(name))) == golden(name)


@pytest.mark.parametrize("message", SMALL, ids=lambda message: message.DESCRIPTOR.name)
def test_the_bytes_of_messages_without_arrays_never_change(message: Message) -> None:
    data = golden(message.DESCRIPTOR.name)
    assert message.SerializeToString(deterministic=True).hex() == data.hex()
    assert type(message).FromString(data) == message


def test_every_message_of_the_contract_has_golden_bytes() -> None:
    named = {message.DESCRIPTOR.name for message in SMALL} | set(KINDS)
    assert named == set(pb.DESCRIPTOR.message_types_by_name)
    assert named == {path.stem for path in GOLDEN.iterdir()}


def test_an_error_in_a_stream_is_the_status_under_the_request_s_id() -> None:
    data = codec.encode_stream_response(300, STATUS)
    assert data.hex() == "08ac021a19" + STATUS.SerializeToString().hex()
    assert pb.StreamResponse.FromString(data) == pb.StreamResponse(id=300, error=STATUS)
    assert codec.decode_stream_response(data) == (300, STATUS)


def test_a_stream_response_of_id_0_without_parts_is_read_back() -> None:
    data = codec.encode_stream_response(0, Exchanged([], []))
    assert pb.StreamResponse.FromString(data) == pb.StreamResponse(exchange=pb.ExchangeResponse())
    assert codec.decode_stream_response(data) == (0, Exchanged([], []))


def test_a_checkpoint_request_of_an_older_client_waits_for_no_barrier() -> None:
    data = bytes.fromhex("0a056461696c791201611a056669727374")
    expected = pb.WriteCheckpointRequest(name="daily", attempt="a", parent="first")
    assert pb.WriteCheckpointRequest.FromString(data) == expected
    assert not expected.until_barrier
