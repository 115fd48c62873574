"""Details of errors, and answers, that are not valid messages: clients raise PsErrors, no other."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from fakes import Method, fake_server, info

from psclient import Client, Table, discovery
from psclient.errors import InvalidArgument, PsError, ServerFailure, error_of
from psclient.rows import warm_start
from psclient.status import status
from psclient.tools.doctor import examine
from psproto import ps_pb2 as pb

NONSENSE = b"\xff"  # not a protobuf message
TEXT = b"\x0a\x01\xff"  # a message whose first field, a string, is not UTF-8
MESSAGE = "broken on purpose|: no"  # of the call, or of the details if they have one
INFO, RETRY = (f"type.googleapis.com/google.rpc.{name}" for name in ("ErrorInfo", "RetryInfo"))


def detail(url: str, value: bytes) -> bytes:
    """An encoded status with one detail."""
    made = pb.Status(code=9, message="no")
    made.details.add(type_url=url, value=value)
    return made.SerializeToString()


DETAILS = {  # values of the trailer grpc-status-details-bin
    "no status": NONSENSE,
    "a status cut short": detail(INFO, b"0123456789")[:-3],
    "a message that is no text": b"\x12\x01\xff",
    "no ErrorInfo": detail(INFO, NONSENSE),
    "a reason that is no text": detail(INFO, TEXT),
    "no RetryInfo": detail(RETRY, NONSENSE),
}
SCHEMA = pb.DescribeTableResponse(
    schema=pb.TableSchema(name="t", dim=2, durability=pb.DURABILITY_APPLIED)
)


def use(address: str, work: Callable[[Client], object], **options: Any) -> None:
    with Client([address], timeout=3.0, **options) as client:
        work(client)


# what a user may do: (method that fails, the call)
WAYS: dict[str, tuple[str, Callable[[str], object]]] = {
    "connect": ("InfoService/GetServerInfo", lambda a: use(a, lambda c: c.list_tables())),
    "search": (
        "InfoService/GetServerInfo",
        lambda a: Client(a.replace("127.0.0.1", "shards.test"), timeout=3.0).list_tables(),
    ),
    "a call to all shards": (
        "TableService/DescribeTable",
        lambda a: use(a, lambda c: c.describe_table("t")),
    ),
    "a pull": (
        "RowService/Exchange",
        lambda a: use(a, lambda c: c.pull({"t": [1]}), transport="unary"),
    ),
    "a push": (
        "RowService/Exchange",
        lambda a: use(a, lambda c: c.push({"t": ([1], np.ones((1, 2)))}), transport="unary"),
    ),
    "a delete": ("RowService/Delete", lambda a: use(a, lambda c: Table(c, "t", 2).delete([1]))),
    "a call to one shard": (
        "CheckpointService/ListCheckpoints",
        lambda a: use(a, lambda c: warm_start(c, "c", "t", "into")),
    ),
    "status": ("InfoService/GetServerInfo", lambda a: status([a])),
    "doctor": ("InfoService/Diagnose", lambda a: examine([a])),
}
REPORTS = ("status", "doctor")  # report a failure, instead of raising it


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the name shards.test lead to this machine."""
    monkeypatch.setattr(discovery, "look_up", lambda n: [n.replace("shards.test", "127.0.0.1")])


def server(method: str, answer: Method) -> Any:
    """A server that answers the calls of this test, ``method`` with ``answer``."""
    good: dict[str, Method] = {
        "InfoService/GetServerInfo": lambda _, __: info(),
        "TableService/DescribeTable": lambda _, __: SCHEMA.SerializeToString(),
        "CheckpointService/Restore": lambda _, __: b"",
    }
    return fake_server({**good, method: answer}, threads=4)


def refusing(details: bytes) -> Method:
    def refuse(_: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "broken on purpose")
        raise AssertionError

    return refuse


@pytest.mark.parametrize(
    ("way", "details"),
    [
        pytest.param(way, details, marks=[pytest.mark.slow] * (way == "search"))
        for way in WAYS
        for details in DETAILS
        if way != "search" or details in ("no status", "no ErrorInfo")  # a search takes 3 s
    ],
)
def test_an_error_with_malformed_details_is_raised_with_its_message(way: str, details: str) -> None:
    method, work = WAYS[way]
    with server(method, refusing(DETAILS[details])) as address:
        if way in REPORTS:
            assert re.search(MESSAGE, str(work(address)))
            return
        with pytest.raises(PsError, match=MESSAGE) as caught:
            work(address)
    assert not caught.value.reason


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] * (way == "search")) for way in WAYS]
)
def test_an_answer_that_is_no_message_is_a_ps_error(way: str) -> None:
    method, work = WAYS[way]
    with server(method, lambda _, __: NONSENSE) as address:
        if way in REPORTS:
            assert "its answer is not a valid message" in str(work(address))
            return
        with pytest.raises(PsError, match="message"):
            work(address)


@pytest.mark.parametrize("details", DETAILS)
def test_a_status_within_a_stream_keeps_the_class_of_its_code(details: str) -> None:
    data = DETAILS[details]
    inner = data if details.startswith("no ") or "reason" in details else b""
    made = pb.Status.FromString(inner) if inner and inner != NONSENSE else pb.Status()
    made.code, made.message = 3, "dim must be 4"
    error = error_of(made, "s")
    assert type(error) is InvalidArgument
    assert (str(error), error.reason, error.retry_after) == ("s: dim must be 4", "", None)


def test_a_time_to_wait_that_is_negative_means_at_once() -> None:
    made = pb.Status(code=9)
    made.details.add(type_url=RETRY, value=b"\x0a\x0b\x08" + b"\xff" * 9 + b"\x01")
    error = error_of(made, "s")
    assert type(error) is ServerFailure
    assert error.retry_after == 0.0
