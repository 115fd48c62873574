"""Every method of every service refuses callers without the right, before anything happens.

The methods are those that the server itself lists by reflection.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from peers import details
from secured import (
    Method,
    Recording,
    Secured,
    bearer,
    call,
    create,
    enumerated,
    exchange,
    outcome,
    requests,
    section,
    streamed,
)

from psproto import codec
from psproto import ps_pb2 as pb
from psserver.security.verbs import ANY, LANE, METHODS, PATHS, VERBS

OPS = section("ops", (["*"], ["*"]))
ELSEWHERE = section("elsewhere", (VERBS, ["other"]))  # every verb, but on another table
NOBODY = section("nobody")
READER = section("reader", (["pull"], ["t"]))
GONE = section("gone", (["*"], ["*"]))
POLICY = OPS + ELSEWHERE + NOBODY + READER
SURE = [path for path in METHODS if path != LANE]
CLOSED = [path for path in SURE if METHODS[path].verbs]
ROWS = ["Pull", "Push", "Exchange", "Delete", "Stream", "Subscribe", "WriteRows"]
REPORTS = ["ReadRows", "Analyze", "Inspect", "VerifyRows", "DescribeTable"]
TABLES = ["CreateTable", "AlterTable", "DropTable", "Evict", "LoadTable"]
BY_TABLE = [*ROWS, *REPORTS, *TABLES]  # a right on another table does not help
STRANGERS = {
    "without credentials": ((), "UNAUTHENTICATED"),
    "unknown token": (bearer("stranger"), "UNAUTHENTICATED"),
    "two tokens": ((*bearer("ops"), *bearer("ops")), "UNAUTHENTICATED"),
    "another scheme": ((("authorization", "Basic b3Bz"),), "UNAUTHENTICATED"),
    "revoked token": (bearer("gone"), "UNAUTHENTICATED"),
    "no rights": (bearer("nobody"), "PERMISSION_DENIED"),
}


def short(path: str) -> str:
    return path.rpartition("/")[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    made = Secured(tmp_path_factory.mktemp("secured"), POLICY + GONE).start()
    with made.channel() as channel:
        for table in ("t", "other", "u"):
            create(channel, table, bearer("gone"))
    made.checkpoint("first")
    made.change(POLICY)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def channel(server: Secured) -> Iterator[grpc.Channel]:
    with server.channel() as made:
        yield made


@pytest.fixture(scope="module")
def methods(channel: grpc.Channel) -> dict[str, Method]:
    return {method.path: method for method in enumerated(channel, bearer("ops"))}


def test_every_method_has_a_rule(methods: dict[str, Method]) -> None:
    assert sorted(methods) == sorted(SURE)


def test_the_rules_are_those_of_the_services_in_ps_proto() -> None:
    services = pb.DESCRIPTOR.services_by_name.values()
    ours = [
        f"/{service.full_name}/{method.name}" for service in services for method in service.methods
    ]
    assert sorted(ours) == sorted(PATHS.values())
    assert {verb for path in SURE for verb in METHODS[path].verbs} - {ANY} <= set(VERBS)


def test_every_method_has_a_request_below(methods: dict[str, Method]) -> None:
    assert set(requests("t")) == {short(path) for path in methods}


@pytest.mark.parametrize("path", CLOSED, ids=short)
@pytest.mark.parametrize("who", STRANGERS)
def test_a_stranger_is_refused_before_anything_is_decoded(
    server: Secured, channel: grpc.Channel, methods: dict[str, Method], path: str, who: str
) -> None:
    metadata, expected = STRANGERS[who]
    before, reached = server.state(), len(Recording.reached)
    for data in (requests("t")[short(path)], b"\xff"):  # the latter is no message
        assert outcome(channel, methods[path], data, metadata) == expected
    assert Recording.reached[reached:] == []
    assert server.state() == before


@pytest.mark.parametrize("name", BY_TABLE)
def test_a_right_on_one_table_is_none_on_another(
    server: Secured, channel: grpc.Channel, methods: dict[str, Method], name: str
) -> None:
    before, reached = server.state(), len(Recording.reached)
    method, data = methods[PATHS[name]], requests("t")[name]
    assert outcome(channel, method, data, bearer("elsewhere")) == "PERMISSION_DENIED"
    # methods about rows check the rights while they decode the request
    assert Recording.reached[reached:] == ([name] if name in ROWS else [])
    assert server.state() == before


@pytest.mark.parametrize("path", [path for path in SURE if path not in CLOSED], ids=short)
def test_health_checks_need_no_credentials(
    channel: grpc.Channel, methods: dict[str, Method], path: str
) -> None:
    assert outcome(channel, methods[path], b"") == "OK"


def test_a_forbidden_table_looks_like_one_that_does_not_exist(
    channel: grpc.Channel, methods: dict[str, Method]
) -> None:
    for name in set(BY_TABLE) - {"Stream"}:
        said = []
        for table in ("t", "x"):
            with pytest.raises(grpc.RpcError) as caught:
                call(channel, methods[PATHS[name]], requests(table)[name], bearer("elsewhere"))
            error: Any = caught.value
            said.append((error.code(), error.details().replace(f"'{table}", "'")))
        assert said[0] == said[1], name


def test_the_list_of_tables_has_only_those_with_a_right(
    channel: grpc.Channel, methods: dict[str, Method]
) -> None:
    def listed(who: str) -> list[str]:
        method = methods[PATHS["ListTables"]]
        answer = pb.ListTablesResponse.FromString(call(channel, method, b"", bearer(who)))
        return [each.schema.name for each in answer.tables]

    assert listed("ops") == ["other", "t", "u"]
    assert listed("reader") == ["t"]
    assert listed("elsewhere") == ["other"]


@pytest.mark.parametrize("name", ["Exchange", "Stream"])
def test_an_exchange_is_refused_as_a_whole(
    server: Secured, channel: grpc.Channel, methods: dict[str, Method], name: str
) -> None:
    """A push that is allowed is not applied if another part of its message is forbidden."""
    before = server.state()
    data = codec.encode_exchange(exchange("other", "t"))
    if name == "Stream":
        data = streamed(1, "other", "t")
    method = methods[PATHS[name]]
    assert outcome(channel, method, bytes(data), bearer("elsewhere")) == "PERMISSION_DENIED"
    assert server.state() == before
    good = streamed(2, "other") if name == "Stream" else requests("other")["Exchange"]
    assert outcome(channel, method, good, bearer("elsewhere")) == "OK"
    assert server.state() != before


def test_an_error_names_principal_verb_and_table(
    channel: grpc.Channel, methods: dict[str, Method]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, methods[PATHS["DropTable"]], requests("t")["DropTable"], bearer("elsewhere"))
    error: Any = caught.value
    assert "principal 'elsewhere' lacks the verb 'drop' on table 't'" in error.details()
    assert dict(details(error)[ErrorInfo].metadata) == {
        "principal": "elsewhere",
        "verb": "drop",
        "table": "t",
    }


def test_a_large_message_is_checked_as_well(
    server: Secured, channel: grpc.Channel, methods: dict[str, Method]
) -> None:
    """A message with many parts is decoded on another thread than a small one."""
    before = server.state()
    many = codec.encode_exchange(exchange(*["other"] * 1000, "t"))
    method = methods[PATHS["Exchange"]]
    assert outcome(channel, method, bytes(many), bearer("elsewhere")) == "PERMISSION_DENIED"
    assert server.state() == before


def test_with_all_rights_every_method_is_reached(
    channel: grpc.Channel, methods: dict[str, Method]
) -> None:
    """So the refusals above are not those of requests that could never have done anything."""
    for path in CLOSED:
        reached = len(Recording.reached)
        outcome(channel, methods[path], requests("u")[short(path)], bearer("ops"))
        if path in PATHS.values():
            assert Recording.reached[reached:] == [short(path)], path
