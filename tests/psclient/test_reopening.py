"""A server whose name was gone, or whose address changed, is reached again at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from names import Names
from pods import Pod, info
from servers import eventually, free_ports

import psclient
from psclient.channel import REOPEN_SECONDS, Channel
from psclient.errors import Unavailable
from psclient.routes import Route
from psproto import ps_pb2 as pb
from psserver.errors import OtherShard, Starting

METHOD = "/ps.v1.InfoService/GetServerInfo"
REQUEST = pb.GetServerInfoRequest().SerializeToString()
GONE_SECONDS = 11.0  # gRPC would look the name up about 9 s and 16 s after it was gone
SOON = 2.0  # maximum seconds after which a server whose name is back is reached


@pytest.fixture
def port() -> int:
    return free_ports(1)


@pytest.fixture
def start(port: int) -> Iterator[Callable[[int, Any], Pod]]:
    """start(number, says): a server at 127.0.0.number."""
    made: list[Pod] = []

    def run(number: int, says: Any) -> Pod:
        made.append(Pod(f"127.0.0.{number}", port, says))
        return made[-1]

    yield run
    for pod in made:
        pod.stop()


@pytest.fixture
def names() -> Iterator[Names]:
    server = Names()
    yield server
    server.close()


@pytest.fixture
def channel(names: Names, port: int) -> Iterator[Channel]:
    made = Channel(Route(f"dns://127.0.0.1:{names.port}/ps-0.ps:{port}"))
    yield made
    made.close()


def unary(channel: Channel) -> bytes:
    return channel.call(METHOD, REQUEST, 1.0)


def stream(channel: Channel) -> bytes:
    return channel.read(channel.open_stream(METHOD, iter([REQUEST])))


def until_served(ask: Callable[[Channel], bytes], channel: Channel, seconds: float) -> float:
    """Ask again and again; return the seconds until the first answer."""
    begun = time.monotonic()
    while True:
        try:
            ask(channel)
            return time.monotonic() - begun
        except grpc.RpcError:
            time.sleep(0.1)
        assert time.monotonic() - begun < seconds


@pytest.mark.slow
@pytest.mark.parametrize("ask", [unary, stream])
def test_a_name_that_was_gone_is_looked_up_as_soon_as_it_is_back(
    names: Names, channel: Channel, start: Callable[[int, Any], Pod], ask: Any
) -> None:
    names.zone["ps-0.ps"] = ["127.0.0.10"]
    first = start(10, info(0, 1))
    until_served(ask, channel, 10.0)
    del names.zone["ps-0.ps"]
    first.stop()
    end = time.monotonic() + GONE_SECONDS
    while time.monotonic() < end:
        with pytest.raises(grpc.RpcError):
            ask(channel)
        time.sleep(0.1)
    start(11, info(0, 1))
    names.zone["ps-0.ps"] = ["127.0.0.11"]
    assert until_served(ask, channel, 30.0) < SOON


@pytest.mark.slow
def test_a_name_is_not_looked_up_more_often_than_needed(names: Names, channel: Channel) -> None:
    begun = time.monotonic()
    while time.monotonic() < begun + 3.0:
        with pytest.raises(grpc.RpcError):
            unary(channel)
    looks = len({round(at, 1) for at, _ in names.asked})
    assert looks <= 2 * (3.0 / REOPEN_SECONDS + 1)


class TestReopening:
    @pytest.fixture
    def direct(self, port: int) -> Iterator[Channel]:
        made = Channel(Route(f"127.0.0.10:{port}"))
        yield made
        made.close()

    def test_a_new_address_is_used_by_the_next_call(
        self, direct: Channel, start: Callable[[int, Any], Pod], port: int
    ) -> None:
        start(10, info(0, 1))
        start(11, info(1, 2))
        first = unary(direct)
        opened = direct._opened
        direct.route.address = f"127.0.0.11:{port}"
        assert unary(direct) != first
        assert direct._opened is not opened

    def test_a_running_call_ends_on_the_former_channel(
        self, direct: Channel, start: Callable[[int, Any], Pod], port: int
    ) -> None:
        slow = start(10, info(0, 1))
        start(11, info(0, 1))
        slow.may_answer.clear()
        first = direct.start(METHOD, REQUEST, 20.0)
        direct.route.address = f"127.0.0.11:{port}"
        unary(direct)
        slow.may_answer.set()
        direct.result(first)
        eventually(lambda: not direct._replaced[0].calls)
        direct.route.address = f"127.0.0.10:{port}"
        unary(direct)
        assert direct._replaced == []  # no call runs on them: they were closed

    @pytest.mark.parametrize(
        ("says", "reopens"),
        [
            (None, True),
            (OtherShard("shard 1 of 2", "shard 0 of 2"), True),
            (Starting(), False),
            (info(0, 1), False),
        ],
        ids=["nobody listens", "another shard", "an error of the right shard", "an answer"],
    )
    def test_only_a_server_that_was_not_reached_is_connected_to_again(
        self,
        direct: Channel,
        start: Callable[[int, Any], Pod],
        monkeypatch: pytest.MonkeyPatch,
        says: Any,
        reopens: bool,
    ) -> None:
        monkeypatch.setattr("psclient.channel.REOPEN_SECONDS", 0.0)
        failed: list[Route] = []
        monkeypatch.setattr(direct.route, "_on_failed", failed.append)
        if says is not None:
            start(10, says)
        opened = []
        for _ in range(2):
            with suppress(grpc.RpcError):
                unary(direct)
            eventually(lambda: direct._opened is not None and not direct._opened.calls)
            opened.append(direct._opened)
        assert (opened[0] is not opened[1]) is reopens
        assert failed == [direct.route] * (2 if reopens else 0)

    def test_a_closed_channel_closes_the_former_ones(
        self, direct: Channel, start: Callable[[int, Any], Pod], port: int
    ) -> None:
        start(10, info(0, 1))
        unary(direct)
        direct.route.address = f"127.0.0.11:{port}"
        with pytest.raises(grpc.RpcError):
            unary(direct)
        direct.close()
        with pytest.raises(Unavailable):
            unary(direct)
        for each in direct._all():
            with pytest.raises(ValueError, match="closed"):
                each.channel.unary_unary(METHOD)(REQUEST)


def test_every_connection_of_clients_and_servers_is_a_channel() -> None:
    """So all of them find a server again that was gone: nothing else opens a gRPC channel."""
    root = Path(psclient.__file__).parents[1]
    opening = [
        str(path.relative_to(root))
        for package in ("psclient", "psserver", "storage")
        for path in sorted((root / package).rglob("*.py"))
        if "secure_channel(" in path.read_text()
    ]
    assert opening == ["psclient/channel.py"]
