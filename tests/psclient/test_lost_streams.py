"""A shard is lost while it answers a long call, which is repeated where that is harmless."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from fakes import fake_server

from psclient import Client, admin, calls, repairs, rows
from psclient.errors import CheckpointUnfit, TableNotFound, Unavailable
from psclient.tools import analysis
from psproto import ps_pb2 as pb

ADVICE = "the operation was not completed: repeat it once the shard serves"


class Lossy:
    """A method whose first ``losses`` calls send some of the replies, then lose the shard."""

    def __init__(self, replies: list[Any], sent: int, losses: int = 1) -> None:
        self.replies, self.sent, self.losses = replies, sent, losses
        self.calls = 0

    def __call__(self, request: bytes, context: Any) -> Iterator[bytes]:
        self.calls += 1
        lost = self.calls <= self.losses
        for reply in self.replies[: self.sent if lost else None]:
            yield reply.SerializeToString()
        if lost:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the shard is away")


@contextmanager
def served(name: str, method: Callable[[bytes, Any], Iterator[bytes]]) -> Iterator[Client]:
    with fake_server({}, streams={name: method}) as address, Client([address], timeout=60) as one:
        yield one


def table_replies() -> list[pb.Delta]:
    """The replies of ReadRows: a head without rows, then two messages with one row each."""
    schema = pb.TableSchema(name="t", dim=2)
    head = pb.Delta(header=pb.DeltaHeader(schema=schema, width=2))
    return [head, *(_row(key) for key in (1, 2))]


def _row(key: int) -> pb.Delta:
    numbers = np.array([key], "<u8").tobytes()
    values = np.zeros(2, "<f4").tobytes()
    columns = {"keys": numbers, "versions": numbers, "steps": numbers, "frequencies": numbers}
    return pb.Delta(header=pb.DeltaHeader(width=2), rows=values, **columns)


def keys_of(client: Client) -> list[int]:
    batches = [b for b in rows.read_rows(client, "t") if isinstance(b, rows.RowBatch)]
    return [int(key) for batch in batches for key in batch.keys]


@pytest.mark.parametrize("sent", [0, 1])
def test_rows_are_read_once_if_the_shard_is_lost_before_it_sends_some(sent: int) -> None:
    method = Lossy(table_replies(), sent, losses=3)
    with served("CheckpointService/ReadRows", method) as client:
        assert keys_of(client) == [1, 2]
    assert method.calls == 4


def test_rows_that_arrived_are_not_read_again_and_the_error_says_what_to_do() -> None:
    method = Lossy(table_replies(), 2)
    with served("CheckpointService/ReadRows", method) as client:
        with pytest.raises(Unavailable, match=f"the shard is away; {ADVICE}"):
            keys_of(client)
        assert method.calls == 1
        assert keys_of(client) == [1, 2]


def test_a_call_is_repeated_only_until_the_timeout_of_the_client() -> None:
    method = Lossy(table_replies(), 0, losses=1 << 30)
    with (
        fake_server({}, streams={"CheckpointService/ReadRows": method}) as address,
        Client([address], timeout=1.0) as client,
        pytest.raises(Unavailable, match=ADVICE),
    ):
        keys_of(client)
    assert method.calls > 2


def test_an_error_that_would_come_again_is_raised_at_once() -> None:
    def refuse(request: bytes, context: Any) -> Iterator[bytes]:
        info = pb.ErrorInfo(reason="TABLE_NOT_FOUND").SerializeToString()
        status = pb.Status(code=5, message="table 't' does not exist")
        status.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=info)
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(grpc.StatusCode.NOT_FOUND, status.message)
        yield b""

    with (
        served("CheckpointService/ReadRows", refuse) as client,
        pytest.raises(TableNotFound, match=r"does not exist$"),
    ):
        keys_of(client)


def test_a_checkpoint_is_verified_from_the_start_if_a_shard_is_lost_in_the_middle() -> None:
    replies = [pb.CheckpointProgress(bytes=at, total=3) for at in (1, 2, 3)]
    method = Lossy(replies, 2)
    with served("CheckpointService/VerifyCheckpoint", method) as client:
        assert admin.verify(client, "monday") == 3
    assert method.calls == 2


def test_damaged_blocks_are_listed_once() -> None:
    damaged = pb.DamagedBlock(number=7, rows=2, lost_rows=1, problem="wrong checksum")
    replies = [pb.VerifyRowsResponse(bytes=1, total=2), pb.VerifyRowsResponse(damaged=damaged)]
    method = Lossy(replies, 1)
    with served("AnalysisService/VerifyRows", method) as client:
        assert [block.number for block in repairs.verify_rows(client, "t")] == [7]
    method = Lossy([*replies, pb.VerifyRowsResponse(bytes=2, total=2)], 2)
    with (
        served("AnalysisService/VerifyRows", method) as client,
        pytest.raises(Unavailable, match=ADVICE),
    ):
        repairs.verify_rows(client, "t")


def test_an_analysis_begins_again_unless_rows_were_passed_on() -> None:
    some = pb.AnalyzeResponse(
        keys=np.array([1], "<u8").tobytes(),
        frequencies=np.array([1], "<u8").tobytes(),
        steps=np.array([1], "<i8").tobytes(),
        versions=np.array([1], "<u8").tobytes(),
        norms=np.array([1], "<f8").tobytes(),
    )
    last = pb.AnalyzeResponse(summary=pb.Summary(rows=1))
    method = Lossy([pb.AnalyzeResponse(done=1, total=2), last], 1)
    with served("AnalysisService/Analyze", method) as client:
        (summary,) = analysis._summaries(client, pb.AnalyzeRequest(table="t"), None, None)
    assert (summary.rows, method.calls) == (1, 2)
    seen: list[int] = []
    request = pb.AnalyzeRequest(table="t")
    method = Lossy([some, last], 1)
    with (
        served("AnalysisService/Analyze", method) as client,
        pytest.raises(Unavailable, match=ADVICE),
    ):
        analysis._summaries(client, request, lambda each: seen.append(len(each.keys)), None)
    assert (seen, method.calls) == ([1], 1)


def test_a_call_that_changes_something_is_never_repeated() -> None:
    method = Lossy([pb.CheckpointProgress()], 0)
    with served("CheckpointService/WriteCheckpoint", method) as client:
        with pytest.raises(Unavailable, match=ADVICE):
            admin.checkpoint(client, "monday")
        assert method.calls == 1
        last = calls.on_all(client, "WriteCheckpoint", pb.WriteCheckpointRequest(), None)
        assert last == [pb.CheckpointProgress()]


def test_a_server_that_does_not_wait_for_the_barrier_takes_no_checkpoint() -> None:
    part = pb.CheckpointProgress(part=pb.CheckpointPart(version=7))
    method = Lossy([part], 0, losses=0)
    with (
        served("CheckpointService/WriteCheckpoint", method) as client,
        pytest.raises(
            CheckpointUnfit, match=r"^checkpoint 'monday' was not completed: a server of"
        ),
    ):
        admin.checkpoint(client, "monday", until_barrier="epoch/1")
