"""Every method of every service is admitted by the same rules: enumerated from the descriptors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.rpc.error_details_pb2 import RetryInfo
from peers import Peer, details, refusal, until, with_server

from psproto import codec
from psproto import ps_pb2 as pb
from psserver import door
from psserver.config import load
from psserver.errors import Overloaded
from psserver.limits import CONTROL_BYTES, Limits
from psserver.stats import ServiceStats

SMALLEST = 1 << 16  # of max_message_bytes and max_inflight_bytes
PART = SMALLEST // 2
ARRAYS = {"Pull", "Push", "Exchange", "Delete", "Stream", "WriteRows"}  # messages may be large
METHODS: dict[str, MethodDescriptor] = {
    f"{service.name}/{method.name}": method
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
FOREIGN = {  # methods of other services at the same port: size of the message alone
    "grpc.health.v1.Health/Check": "unary",
    "grpc.health.v1.Health/List": "unary",
    "grpc.health.v1.Health/Watch": "many",
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "stream",
}


async def outcome(peer: Peer, name: str, data: bytes) -> Any:
    """The error that a method answers such a message with; None if it answers well."""
    method = METHODS[name]
    try:
        if method.client_streaming:
            return await _outcome_in_stream(peer, data)
        if method.server_streaming:
            async for _ in peer.many(name, data, timeout=1):
                return None
        await peer.call(name, data)
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def _outcome_in_stream(peer: Peer, data: bytes) -> Any:
    stream = peer.stream()
    await stream.write(codec.encode_stream_request(pb.StreamRequestHeader(id=1), EMPTY) + data)
    answer = await stream.read()
    stream.cancel()
    if answer is grpc.aio.EOF:
        return None
    _, found = codec.decode_stream_response(answer)
    return InStream(found) if isinstance(found, pb.Status) else None


EMPTY = codec.Exchange([], [])


class InStream:
    """An error that came as an answer in a stream."""

    def __init__(self, status: pb.Status) -> None:
        self._status = status

    def code(self) -> grpc.StatusCode:
        return next(code for code in grpc.StatusCode if code.value[0] == self._status.code)

    def trailing_metadata(self) -> Any:
        return (("grpc-status-details-bin", self._status.SerializeToString()),)


def padding(size: int) -> bytes:
    """An unknown field of so many bytes, which any message may have."""
    count = size.to_bytes(4, "little")
    varint, rest = bytearray(), int.from_bytes(count, "little")
    while rest > 127:
        varint.append(rest & 127 | 128)
        rest >>= 7
    varint.append(rest)
    return b"\xfa\x7f" + bytes(varint) + bytes(size)


def test_every_method_of_every_service_has_a_handler_and_no_other_is_there() -> None:
    async def act(peer: Peer) -> set[str]:
        return set(peer.service.methods())

    assert with_server(act) == {f"/ps.v1.{name}" for name in METHODS}


@contextmanager
def draining(peer: Peer) -> Iterator[None]:
    peer.limits.draining = True
    yield
    peer.limits.draining = False


@contextmanager
def restoring(peer: Peer) -> Iterator[None]:
    restores, peer.limits._restores = peer.limits._restores, Held()  # type: ignore[assignment]
    yield
    peer.limits._restores = restores


class Held:
    """A shard between two steps of a restore."""

    held = True


@contextmanager
def full(peer: Peer) -> Iterator[None]:
    limit = peer.limits._config.max_inflight_bytes
    peer.stats.inflight_bytes += limit
    yield
    peer.stats.inflight_bytes -= limit


@contextmanager
def crowded(peer: Peer) -> Iterator[None]:
    most = peer.limits._config.max_calls
    peer.limits._calls += most
    yield
    peer.limits._calls -= most


RULES: dict[str, tuple[Callable[[Peer], Any], tuple[str, str], set[str]]] = {
    "stops": (draining, ("UNAVAILABLE", "DRAINING"), set()),
    "restores": (
        restoring,
        ("UNAVAILABLE", "RESTORING"),
        {
            *("InfoService/GetServerInfo", "InfoService/Diagnose", "InfoService/GetStatus"),
            "CheckpointService/Restore",
        },
    ),
    "has its hands full": (full, ("RESOURCE_EXHAUSTED", "OVERLOADED"), set()),
    "has too many calls": (
        crowded,
        ("RESOURCE_EXHAUSTED", "OVERLOADED"),
        {"LogService/Subscribe"},  # has a limit of its own
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_method_is_refused_with_a_delay_while_the_server(rule: str) -> None:
    state, wanted, exempt = RULES[rule]

    async def act(peer: Peer) -> dict[str, Any]:
        found = {}
        for name in METHODS:
            with state(peer):
                if name == "RowService/Stream" and rule in ("stops", "has too many calls"):
                    continue  # refused as a whole: the next test
                error = await outcome(peer, name, padding(100))
                found[name] = error and (*refusal(error), RetryInfo in details(error))
        await until(lambda: peer.stats.inflight_bytes == 0)
        return found

    found = with_server(act)
    assert {name for name, answer in found.items() if answer != (*wanted, True)} == exempt


@pytest.mark.parametrize("rule", ["stops", "has too many calls"])
def test_a_stream_is_refused_with_a_delay_while_the_server(rule: str) -> None:
    state, wanted, _ = RULES[rule]

    async def act(peer: Peer) -> None:
        with state(peer):
            stream = peer.stream()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
            assert refusal(caught.value) == wanted
            assert RetryInfo in details(caught.value)

    with_server(act)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_refuses_a_message_over_its_limit_before_it_is_parsed(name: str) -> None:
    limit = 1 << 20

    async def act(peer: Peer) -> None:
        large = limit if name.split("/")[1] in ARRAYS else CONTROL_BYTES
        garbage = b"" if METHODS[name].client_streaming else b"\xff" * 100
        error = await outcome(peer, name, padding(large) + garbage)
        assert refusal(error) == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
        await until(lambda: peer.stats.inflight_bytes == 0)

    with_server(act, "--max-message-bytes", str(limit))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_counts_its_message_while_it_is_served(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act(peer: Peer) -> list[int]:
        seen: list[int] = []
        admit = peer.limits.admit

        def noted(size: int, **rules: Any) -> Any:
            reservation = admit(size, **rules)
            seen.append(peer.stats.inflight_bytes)
            return reservation

        monkeypatch.setattr(peer.limits, "admit", noted)
        await outcome(peer, name, padding(1000))
        await until(lambda: peer.stats.inflight_bytes == 0)
        return seen

    (counted,) = with_server(act)
    assert counted >= 1000


@pytest.mark.parametrize("name", FOREIGN)
def test_methods_of_other_services_refuse_large_messages(name: str) -> None:
    data = padding(CONTROL_BYTES)

    async def ask(peer: Peer) -> None:
        match FOREIGN[name]:
            case "unary":
                await peer.call(name, data)
            case "many":
                await peer.many(name, data).read()
            case _:
                call = peer._channel.stream_stream(f"/{name}")()
                await call.write(data)
                await call.read()

    async def act(peer: Peer) -> tuple[str, str]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(peer)
        return refusal(caught.value)

    assert with_server(act) == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")


def test_the_foreign_methods_are_those_that_the_port_has() -> None:
    async def act(peer: Peer) -> set[str]:
        return set(peer.server._listener._door._methods)

    ours = {f"/ps.v1.{name}" for name in METHODS}
    assert with_server(act) - ours == {f"/{name}" for name in FOREIGN}


@pytest.mark.parametrize("name", [name for name, kind in FOREIGN.items() if kind != "unary"])
def test_streams_of_other_services_have_a_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "STREAMS", 2)

    def begin(peer: Peer) -> Any:
        if FOREIGN[name] == "many":
            return peer.many(name, b"")
        return peer._channel.stream_stream(f"/{name}")()

    async def act(peer: Peer) -> tuple[str, str]:
        there = peer.server._listener._door
        open_ones = [begin(peer) for _ in range(2)]
        await until(lambda: there._streams == 2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await begin(peer).read()
        for each in open_ones:
            each.cancel()
        await until(lambda: there._streams == 0)
        return refusal(caught.value)

    assert with_server(act) == ("RESOURCE_EXHAUSTED", "OVERLOADED")


class NotHeld:
    """A shard that is not restored."""

    held = False


def test_a_quiet_connection_is_admitted_while_its_principal_has_more_than_its_share() -> None:
    flags = ["--max-message-bytes", str(SMALLEST), "--max-inflight-bytes", str(8 * PART)]
    config = load(flags, {})
    limits = Limits(config, ServiceStats(), NotHeld())  # type: ignore[arg-type]
    limits.admit(PART, client=limits.client("other", "b"))
    siblings = [limits.client(str(n), "a") for n in range(5)]
    admitted = [limits.admit(PART, client=client) for client in siblings[:4]]
    share = siblings[0].share
    assert all(client.share is share for client in siblings)
    with pytest.raises(Overloaded, match=f"this principal has {4 * PART} bytes in flight"):
        limits.admit(1, client=siblings[0])
    admitted.append(limits.admit(PART // 2, client=siblings[4]))
    for each in admitted:
        each.release()
    assert [client.inflight for client in siblings] == [0] * 5
    assert share.inflight == 0
