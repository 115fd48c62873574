"""Server information, reflection, health and stops through generated stubs alone."""

from __future__ import annotations

import signal
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from stubs import WAIT, Conversation, Peer, pull_request, refusal

from psproto import ps_pb2 as pb


def test_the_server_tells_what_it_is(peers: list[Peer]) -> None:
    for shard, peer in enumerate(peers):
        info = peer.info.GetServerInfo(pb.GetServerInfoRequest())
        assert (info.shard, info.shard_map.shards, info.shard_map.epoch) == (shard, 2, 1)
        assert len(info.shard_map.shard_of_bucket) == 2 * 4096
        assert info.limits == pb.Limits(message_bytes=64 << 20, keys=4_000_000)
        assert 0 <= info.memory_bytes < info.memory_budget_bytes
        assert info.release


def test_reflection_lists_the_services_and_their_methods(peer: Peer) -> None:
    database = ProtoReflectionDescriptorDatabase(peer.channel)
    assert set(database.get_services()) == {
        "ps.v1.TableService",
        "ps.v1.RowService",
        "ps.v1.LogService",
        "ps.v1.CheckpointService",
        "ps.v1.AnalysisService",
        "ps.v1.InfoService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    rows = DescriptorPool(database).FindServiceByName("ps.v1.RowService")
    assert [method.name for method in rows.methods] == [
        "Pull",
        "Push",
        "Exchange",
        "Delete",
        "Stream",
    ]


@pytest.mark.parametrize(
    "service",
    [
        "",
        "liveness",
        "readiness",
        "ps.v1.TableService",
        "ps.v1.RowService",
        "ps.v1.LogService",
        "ps.v1.CheckpointService",
        "ps.v1.AnalysisService",
        "ps.v1.InfoService",
    ],
)
def test_health_answers(peer: Peer, service: str) -> None:
    stub = health_pb2_grpc.HealthStub(peer.channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_health_of_an_unknown_service_is_not_found(peer: Peer) -> None:
    stub = health_pb2_grpc.HealthStub(peer.channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="x"), timeout=WAIT)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.slow
def test_a_stopping_server_ends_streams_and_says_why(start_cluster: Any, name: str) -> None:
    cluster = start_cluster(1)
    peer = Peer(cluster.addresses[0])
    peer.create(name)
    stream = Conversation(peer)
    pull = pb.ExchangeRequest(pulls=[pull_request(name, [1])])
    assert not stream.ask(pull).HasField("error")
    watch = health_pb2_grpc.HealthStub(peer.channel).Watch(
        health_pb2.HealthCheckRequest(service="readiness"), timeout=WAIT
    )
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    cluster.process.send_signal(signal.SIGTERM)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert refusal(lambda: next(stream.responses)) == ("UNAVAILABLE", "DRAINING", {}, True)
    watch.cancel()
    peer.channel.close()
    assert cluster.stop() == 0
