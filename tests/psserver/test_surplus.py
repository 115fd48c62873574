"""A server whose number is not below the number of shards: alive, never ready, and harmless."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from servers import Labels, free_ports, scrape, serve

from psclient.status import status

CALLS = [
    "InfoService/GetServerInfo",
    "TableService/ListTables",
    "RowService/Pull",
    "RowService/Stream",
    "CheckpointService/WriteCheckpoint",
]
READY = ("ps_ready", Labels())


def healthy(channel: grpc.Channel, name: str) -> int:
    request = health_pb2.HealthCheckRequest(service=name)
    return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=60).status)


def reason(error: grpc.RpcError) -> tuple[str, dict[str, str]]:
    """Return the reason in a status, and its metadata."""
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    info = ErrorInfo.FromString(Status.FromString(details).details[0].value)
    return info.reason, dict(info.metadata)


def test_it_says_what_to_do_and_serves_nothing(tmp_path: Path) -> None:
    port, data = free_ports(2), tmp_path / "data"
    flags = ["--shard", "3", "--shards", "3", "--port", str(port)]
    flags += ["--metrics-port", str(port + 1), "--data-dir", str(data)]
    process = serve(*flags)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(30)
            serving = health_pb2.HealthCheckResponse.SERVING
            assert healthy(channel, "liveness") == serving
            assert healthy(channel, "readiness") != serving
            for call in CALLS:
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(f"/ps.v1.{call}")(b"", timeout=60)
                assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
                assert reason(caught.value) == ("NOT_A_SHARD", {"shard": "3", "shards": "3"})
        assert scrape(port + 1)[READY] == 0
        found = status([f"127.0.0.1:{port}"])[0]
        assert (found.state, found.ready) == ("misplaced", False)
        assert "kubectl scale --replicas=3" in str(found.problem)
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    said = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    advice = next(each["advice"] for each in said if each["event"] == "not a shard of the cluster")
    assert "take a checkpoint" in advice
    assert "restore the checkpoint there" in advice
    assert not data.exists()
