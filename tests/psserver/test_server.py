"""A server that starts: what it answers before it is ready, and then."""

from __future__ import annotations

import asyncio
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from servers import free_ports

from psserver import datadir as module
from psserver.addresses import join
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
        unknown = {"LogService/Nothing": ("UNIMPLEMENTED", "", 0)}
        assert before == (
            dict.fromkeys(METHODS, starting) | unknown,
            {**not_ready, "liveness": "SERVING"},
        )
        calls, health = after
        assert health == dict.fromkeys(HEALTH, "SERVING")
        assert calls == {
            "InfoService/GetServerInfo": ("OK", "", 0),
            "RowService/Pull": ("INVALID_ARGUMENT", "INVALID_ARGUMENT", 0),
            "RowService/Stream": ("OK", "", 0),
            **unknown,
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
        while True:
            call = channel.stream_stream(f"/ps.v1.{method}")(iter([b""][: method[-1] != "m"]))
            try:
                async for _ in call:
                    pass
            except grpc.aio.AioRpcError:
                pass
            trailers = dict(await call.trailing_metadata())
            # if the reply overtakes the message, gRPC's client reports an error of its own
            if trailers or (await call.code()) is not grpc.StatusCode.INTERNAL:
                break
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


class TestAddresses:
    """A server listens for clients and for scrapes on the same address, of any family."""

    @pytest.mark.parametrize(
        ("host", "reached"),
        [
            ("127.0.0.1", ["127.0.0.1"]),
            ("localhost", ["127.0.0.1"]),
            ("::1", ["::1"]),
            ("[::1]", ["::1"]),
            ("::", ["::1", "127.0.0.1"]),
            ("[::]", ["::1", "127.0.0.1"]),
            ("0.0.0.0", ["127.0.0.1"]),  # noqa: S104
        ],
    )
    def test_both_ports_answer(self, host: str, reached: list[str]) -> None:
        if ":" in host and not ipv6():
            pytest.skip("this machine has no IPv6")
        port = free_ports(2)
        flags = [
            "--plaintext",
            "--host",
            host,
            "--port",
            str(port),
            "--metrics-port",
            str(port + 1),
        ]

        async def run() -> None:
            server = Server(load(flags), lambda: None)
            await server.listen()
            try:
                for each in reached:
                    async with grpc.aio.insecure_channel(join(each, port)) as channel:
                        assert (await told(channel))[1]["liveness"] == "SERVING"
                    url = f"http://{join(each, port + 1)}/metrics"
                    page = await asyncio.to_thread(lambda u=url: urllib.request.urlopen(u).read())  # noqa: S310
                    assert b"\nps_ready 0.0\n" in page
            finally:
                await server._listener.stop(0)
                server._close_http()

        asyncio.run(run())

    @pytest.mark.parametrize("setting", ["port", "metrics_port"])
    def test_a_port_in_use_is_named_with_a_remedy(self, setting: str) -> None:
        async def run(taken: int) -> None:
            ports = {"port": free_ports(1), "metrics_port": 0, setting: taken}
            flags = ["--port", str(ports["port"]), "--metrics-port", str(ports["metrics_port"])]
            await Server(load(flags), lambda: None).listen()

        with socket.create_server(("127.0.0.1", 0)) as other:
            taken = other.getsockname()[1]
            with pytest.raises(ConfigError) as caught:
                asyncio.run(run(taken))
        assert str(caught.value) == (
            f"{setting}: cannot listen on 127.0.0.1:{taken}: Address already in use; stop the"
            " process that uses it, or choose another port"
        )

    def test_an_address_of_another_machine_is_named(self) -> None:
        async def run() -> None:
            flags = [
                "--plaintext",
                "--host",
                "192.0.2.1",
                "--port",
                str(free_ports(1)),
                "--metrics-port",
                "0",
            ]
            await Server(load(flags), lambda: None).listen()

        with pytest.raises(ConfigError, match=r"this machine does not have that address$"):
            asyncio.run(run())


def ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True
