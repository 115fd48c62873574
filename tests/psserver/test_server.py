"""One shard as a process: how it starts, and whose a data directory is."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from servers import free_ports

from psproto.routing import ShardMap, even_map
from psserver import server as module
from psserver.config import ConfigError, load
from psserver.server import HEALTH, OWNER, Server, claim
from storage.errors import Corrupt


class TestClaim:
    def test_a_directory_is_its_shards_from_the_first_start_on(self, tmp_path: Path) -> None:
        for _ in range(2):
            claim(tmp_path, 1, even_map(2))
            assert os.listdir(tmp_path) == [OWNER]

    @pytest.mark.parametrize(("shard", "shards"), [(0, 2), (1, 3), (0, 1)])
    def test_another_shard_or_another_number_of_them_is_refused_with_both_named(
        self, tmp_path: Path, shard: int, shards: int
    ) -> None:
        claim(tmp_path, 1, even_map(2))
        with pytest.raises(ConfigError) as caught:
            claim(tmp_path, shard, even_map(shards))
        assert str(caught.value) == (
            f"data_dir: {tmp_path} is of shard 1 of 2 (shard map of epoch 1), and this is shard"
            f" {shard} of {shards} (shard map of epoch 1); for another number of shards:"
            " psctl checkpoint, psserver on new directories, psctl restore"
        )
        claim(tmp_path, 1, even_map(2))

    def test_another_map_of_as_many_shards_is_refused(self, tmp_path: Path) -> None:
        claim(tmp_path, 0, even_map(2))
        moved = ShardMap(2, even_map(2).shards, even_map(2).shard_of_bucket)
        with pytest.raises(ConfigError, match=r"epoch 1\), and this is .* epoch 2\)"):
            claim(tmp_path, 0, moved)

    def test_a_damaged_note_is_refused_by_name(self, tmp_path: Path) -> None:
        claim(tmp_path, 0, even_map(2))
        path = tmp_path / OWNER
        data = path.read_bytes()
        for at in range(0, len(data), 7):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(Corrupt, match=rf"^{path}: "):
                claim(tmp_path, 0, even_map(2))


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


class TestRestart:
    """A server that is to start anew becomes the same command again."""

    @pytest.mark.parametrize(("number", "again"), [(None, True), (signal.SIGTERM, False)])
    def test_a_signal_on_the_way_ends_it_for_good(
        self, monkeypatch: pytest.MonkeyPatch, number: signal.Signals | None, again: bool
    ) -> None:
        class Restarting:
            def __init__(self, _: object, restart: Callable[[], None]) -> None:
                self._restart = restart

            async def listen(self) -> None:
                pass

            async def open(self) -> None:
                self._restart()

            async def close(self) -> None:
                if number is not None:
                    signal.raise_signal(number)
                    await asyncio.sleep(0.01)  # the loop hears of it

        monkeypatch.setattr(module, "Server", Restarting)
        monkeypatch.setattr(module, "warm", lambda: None)
        assert asyncio.run(module._serve(load([]))) is again
