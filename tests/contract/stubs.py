"""A client made of the generated stubs alone, as another language would have it.

It uses nothing of psclient, codec or routing. Routing is computed here as ps.proto defines it.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from psproto import ps_pb2 as pb
from psproto import ps_pb2_grpc

DIM = 2
WAIT = 20.0  # seconds
MASK = 2**64 - 1


def shard_of(key: int, shard_map: pb.ShardMap) -> int:
    x = key & MASK
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & MASK
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & MASK
    x ^= x >> 31
    bucket = x >> 52
    return int.from_bytes(shard_map.shard_of_bucket[2 * bucket : 2 * bucket + 2], "little")


def keys_of(shard: int, shard_map: pb.ShardMap, count: int) -> list[int]:
    """The first keys from 0 on that belong to a shard."""
    found: list[int] = []
    key = 0
    while len(found) < count:
        if shard_of(key, shard_map) == shard:
            found.append(key)
        key += 1
    return found


def uint64(keys: Any) -> bytes:
    return b"".join((key & MASK).to_bytes(8, "little") for key in keys)


def float32(numbers: Any) -> bytes:
    return np.asarray(numbers, "<f4").tobytes()


def push_request(table: str, keys: Any, gradients: Any, **header: Any) -> pb.PushRequest:
    return pb.PushRequest(
        header=pb.PushHeader(table=table, **header),
        keys=uint64(keys),
        gradients=float32(gradients),
    )


def pull_request(table: str, keys: Any, **header: Any) -> pb.PullRequest:
    return pb.PullRequest(header=pb.PullHeader(table=table, **header), keys=uint64(keys))


def embeddings(response: pb.PullResponse) -> list[list[float]]:
    array = np.frombuffer(response.embeddings, "<f4").reshape(-1, response.header.dim)
    return array.tolist()  # type: ignore[no-any-return]


class Peer:
    """One server behind generated stubs."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(
            address, options=[("grpc.max_receive_message_length", 64 << 20)]
        )
        self.tables = ps_pb2_grpc.TableServiceStub(self.channel)
        self.rows = ps_pb2_grpc.RowServiceStub(self.channel)
        self.log = ps_pb2_grpc.LogServiceStub(self.channel)
        self.info = ps_pb2_grpc.InfoServiceStub(self.channel)
        self.server = self.info.GetServerInfo(
            pb.GetServerInfoRequest(), timeout=WAIT, wait_for_ready=True
        )

    def keys(self, count: int) -> list[int]:
        return keys_of(self.server.shard, self.server.shard_map, count)

    def create(self, name: str, **schema: Any) -> None:
        schema = {
            "dim": DIM,
            "optimizer": pb.Rule(name="sgd", parameters={"lr": 1.0}),
            "initializer": pb.Rule(name="zeros"),
            **schema,
        }
        request = pb.CreateTableRequest(schema=pb.TableSchema(name=name, **schema))
        self.tables.CreateTable(request, timeout=WAIT)

    def raw(self, method: str, data: bytes) -> bytes:
        """A unary call of bytes that need not be a message."""
        return self.channel.unary_unary(f"/ps.v1.{method}")(data, timeout=WAIT)  # type: ignore[no-any-return]


class Conversation:
    """The Stream method, one request at a time or many."""

    def __init__(self, peer: Peer) -> None:
        self._requests: queue.SimpleQueue[pb.StreamRequest | None] = queue.SimpleQueue()
        self.responses = peer.rows.Stream(iter(self._requests.get, None), timeout=WAIT)
        self._next = 100

    def send(self, exchange: pb.ExchangeRequest, timeout_ms: int = 0) -> int:
        self._next += 1
        header = pb.StreamRequestHeader(id=self._next, timeout_ms=timeout_ms)
        self._requests.put(pb.StreamRequest(header=header, exchange=exchange))
        return self._next

    def ask(self, exchange: pb.ExchangeRequest, timeout_ms: int = 0) -> pb.StreamResponse:
        id = self.send(exchange, timeout_ms)
        response = next(self.responses)
        assert response.id == id
        return response  # type: ignore[no-any-return]

    def end(self) -> None:
        self._requests.put(None)
        assert list(self.responses) == []
        assert self.responses.code() is grpc.StatusCode.OK


def reasons(status: Any) -> tuple[str, str, dict[str, str], bool]:
    """Code, reason, metadata of an error, and whether it asks to be tried again."""
    info, retry = ErrorInfo(), RetryInfo()
    assert status.details[0].type_url == "type.googleapis.com/google.rpc.ErrorInfo"
    info.ParseFromString(status.details[0].value)
    again = [d for d in status.details if d.type_url == "type.googleapis.com/google.rpc.RetryInfo"]
    for detail in again:
        retry.ParseFromString(detail.value)
        assert 0 < retry.retry_delay.ToTimedelta().total_seconds() <= 5
    assert info.domain == "ps.v1"
    assert status.message
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    return code.name, info.reason, dict(info.metadata), bool(again)


def refusal(call: Callable[[], object]) -> tuple[str, str, dict[str, str], bool]:
    """The same of a unary call, from its trailer."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    status = Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    return reasons(status)


APPLIED, LOG, FSYNC = pb.DURABILITY_APPLIED, pb.DURABILITY_LOG, pb.DURABILITY_FSYNC


def delete_request(table: str, keys: Any, **header: Any) -> pb.DeleteRequest:
    return pb.DeleteRequest(header=pb.PushHeader(table=table, **header), keys=uint64(keys))


def durable(peer: Peer) -> int:
    return int(peer.info.GetServerInfo(pb.GetServerInfoRequest()).durable_version)
