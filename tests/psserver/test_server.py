"""A server that starts: what it answers before it is ready, and then."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from servers import free_ports

from psserver import datadir as module
from psserver.config import ConfigError, load
from psserver.listener import HEALTH
from psserver.server import Server
from storage.errors import Corrupt

METHODS = (
    "InfoService/GetServerInfo",
    "RowService/Pull",
    "RowService/Stream",
    "LogService/Nothing",
)


class TestStart:
    """A server in this process, whose recovery waits for the test."""

    def start(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False
    ) -> Any:
        """What a client is told while the shard recovers, and then."""
        recover, go_on = module.recover, threading.Event()

        def recover_later(*args: Any) -> Any:
            go_on.wait()
            if fails:
                raise Corrupt("file", "damaged")
            return recover(*args)

        monkeypatch.setattr(module, "recover", recover_later)
        flags = ["--data-dir", str(directory), "--metrics-port", "0", "--port"]

        async def run() -> Any:
            server = Server(load([*flags, str(port := free_ports(1))]), lambda: None)
            await server.listen()
            opening = asyncio.create_task(server.open())
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                before = await told(channel)
                go_on.set()
                await opening
                after = await told(channel)
            await server.close()
            return before, after

        return asyncio.run(run())

    def test_a_shard_that_recovers_is_alive_and_asks_to_come_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before, after = self.start(tmp_path, monkeypatch)
        starting = ("UNAVAILABLE", "STARTING", 0.5)
        not_ready = {name: "NOT_SERVING" for name in HEALTH}
        assert before == (dict.fromkeys(METHODS, starting), {**not_ready, "liveness": "SERVING"})
        calls, health = after
        assert health == dict.fromkeys(HEALTH, "SERVING")
        assert calls == {
            "InfoService/GetServerInfo": ("OK", "", 0),
            "RowService/Pull": ("INVALID_ARGUMENT", "INVALID_ARGUMENT", 0),
            "RowService/Stream": ("OK", "", 0),
            "LogService/Nothing": ("UNIMPLEMENTED", "", 0),
        }

    def test_a_shard_that_cannot_recover_says_why_and_does_not_listen_any_more(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(ConfigError, match=r"^data_dir: DATA_LOSS: file: damaged$"):
            self.start(tmp_path, monkeypatch, fails=True)


async def told(channel: grpc.aio.Channel) -> tuple[dict[str, Any], dict[str, str]]:
    """What calls end with, and the health, by name."""
    calls = {}
    for method in METHODS:
        call = channel.stream_stream(f"/ps.v1.{method}")(iter([b""][: method[-1] != "m"]))
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError:
            pass
        trailers = dict(await call.trailing_metadata())
        status = Status.FromString(trailers.get("grpc-status-details-bin", b""))
        reason, pause = "", 0.0
        for detail in status.details:
            if detail.Is(ErrorInfo.DESCRIPTOR):
                reason = ErrorInfo.FromString(detail.value).reason
            else:
                pause = RetryInfo.FromString(detail.value).retry_delay.nanos / 1e9
        calls[method] = ((await call.code()).name, reason, pause)
    stub = health_pb2_grpc.HealthStub(channel)
    kinds = health_pb2.HealthCheckResponse.ServingStatus
    health = {
        name: kinds.Name((await stub.Check(health_pb2.HealthCheckRequest(service=name))).status)
        for name in HEALTH
    }
    return calls, health
