"""Every error has one status code and one documented reason: the trees, the dict and ps.proto."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo

from psproto import codec
from psproto import ps_pb2 as pb
from psserver import errors as refusals
from psserver.errors import (
    BadRequest,
    DeadlinePassed,
    Draining,
    LogDiverged,
    NoLog,
    NotAlterable,
    Overloaded,
    Refused,
    SessionExpired,
    StepTooFar,
    TooLarge,
    VersionCompacted,
    VersionInFuture,
    WrongShard,
)
from psserver.status import CODES, status_of
from storage import errors as storage_errors
from storage.errors import (
    Compacted,
    Corrupt,
    DiskFull,
    LogFailed,
    NoRoom,
    OutOfMemory,
    RowOverflow,
    SchemaMismatch,
    StorageError,
    UnknownFormat,
    UnknownTable,
)

ROOT = Path(__file__).parents[2]
OWN_REASON = (BadRequest, TooLarge)  # told apart by a reason that each place gives


def kinds(root: type[Exception]) -> list[type[Exception]]:
    """All below a root."""
    below = [kind for child in root.__subclasses__() for kind in (child, *kinds(child))]
    return [kind for kind in below if kind.__module__ in ("psserver.errors", "storage.errors")]


LEAVES = [*kinds(Refused), *kinds(StorageError)]


def documented() -> dict[str, str]:
    """reason -> name of its status code, from the comment at the top of ps.proto."""
    text = (ROOT / "proto/psproto/ps.proto").read_text()
    comment = text[: text.index("syntax =")]
    block = comment[comment.index("Errors are gRPC status codes") :].replace("//", "")
    found: dict[str, str] = {}
    for code, reasons in re.findall(r"^ {3}([A-Z_]+) {2,}((?:.+\n)(?: {20,}.+\n)*)", block, re.M):
        for reason in re.findall(r"[A-Z_]{4,}", re.sub(r"\([^)]*\)", "", reasons)):
            assert reason not in found
            found[reason] = code
    return found


@cache
def calls() -> list[tuple[Path, ast.Call]]:
    """Every call in the source of the server."""
    return [
        (path, node)
        for path in (ROOT / "psserver").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def given(kind: type[Exception]) -> Iterator[str]:
    """The reasons that the source gives to errors of a kind."""
    for path, call in calls():
        if getattr(call.func, "id", "") == kind.__name__:
            first = call.args[0]
            assert isinstance(first, ast.Constant), f"{path}:{call.lineno} gives no literal"
            yield first.value


def reasons(kind: type[Exception]) -> set[str]:
    """All reasons with which an error of this kind may reach a client."""
    if kind in OWN_REASON:
        return set(given(kind))
    return {CODES[kind][1] or kind.reason}  # type: ignore[attr-defined]


def details(status: Any) -> dict[type[Message], Message]:
    found: dict[type[Message], Message] = {}
    for detail in status.details:
        for kind in (ErrorInfo, RetryInfo):
            if detail.Is(kind.DESCRIPTOR):
                found[kind] = kind.FromString(detail.value)
    assert len(found) == len(status.details)
    return found


def test_the_comment_in_ps_proto_can_be_read() -> None:
    assert documented()["MALFORMED_MESSAGE"] == "INVALID_ARGUMENT"
    assert documented()["OVERLOADED"] == "RESOURCE_EXHAUSTED"
    assert documented()["DRAINING"] == "UNAVAILABLE"
    assert len(documented()) >= 17


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_every_error_has_a_code_of_its_own(kind: type[Exception]) -> None:
    assert kind in CODES


def test_nothing_else_has_a_code() -> None:
    assert set(CODES) == {codec.Malformed, *LEAVES}


@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.__name__)
def test_every_reason_is_documented_under_its_code(kind: type[Exception]) -> None:
    assert reasons(kind)
    for reason in reasons(kind):
        assert documented().get(reason) == CODES[kind][0].name, reason


def test_every_documented_reason_can_occur() -> None:
    assert set().union(*(reasons(kind) for kind in CODES)) == set(documented())


@pytest.mark.parametrize("module", [refusals, storage_errors], ids=lambda module: module.__name__)
def test_the_tree_in_the_docstring_is_the_tree(module: Any) -> None:
    listed = re.findall(r"^(?:\* |  - )(\w+)", module.__doc__, re.M)
    defined = [
        name
        for name, thing in vars(module).items()
        if isinstance(thing, type) and thing.__module__ == module.__name__
    ]
    assert listed == defined
    for name in defined:
        assert vars(module)[name].__doc__


EXAMPLES: list[tuple[Exception, str, str, dict[str, str], float | None]] = [
    (codec.Malformed("bad"), "INVALID_ARGUMENT", "MALFORMED_MESSAGE", {}, None),
    (BadRequest("NON_FINITE", "bad"), "INVALID_ARGUMENT", "NON_FINITE", {}, None),
    (RowOverflow("t", 1, 1e30), "INVALID_ARGUMENT", "ROW_OVERFLOW", {}, None),
    (UnknownTable("t"), "NOT_FOUND", "TABLE_NOT_FOUND", {}, None),
    (SchemaMismatch("t", "dim", 1, 2), "FAILED_PRECONDITION", "SCHEMA_MISMATCH", {}, None),
    (refusals.Unauthenticated("no"), "UNAUTHENTICATED", "UNAUTHENTICATED", {}, None),
    (
        refusals.PermissionDenied("ops", "drop", "t"),
        "PERMISSION_DENIED",
        "PERMISSION_DENIED",
        {"principal": "ops", "verb": "drop", "table": "t"},
        None,
    ),
    (
        refusals.BudgetExceeded("too fast", 0.25),
        "RESOURCE_EXHAUSTED",
        "BUDGET_EXCEEDED",
        {},
        0.25,
    ),
    (WrongShard("t", 1, 2, 0, 9), "FAILED_PRECONDITION", "WRONG_SHARD", {"epoch": "9"}, None),
    (SessionExpired("gone"), "FAILED_PRECONDITION", "SESSION_EXPIRED", {}, None),
    (NoLog(), "FAILED_PRECONDITION", "NO_LOG", {}, None),
    (LogDiverged("another"), "FAILED_PRECONDITION", "LOG_DIVERGED", {}, None),
    (
        NotAlterable("t", "dim", "no", "lr"),
        "FAILED_PRECONDITION",
        "NOT_ALTERABLE",
        {"field": "dim"},
        None,
    ),
    (
        StepTooFar("t", 1000, 5, 100),
        "OUT_OF_RANGE",
        "STEP_TOO_FAR",
        {"table_step": "5", "max_step_ahead": "100"},
        None,
    ),
    (VersionInFuture("later"), "OUT_OF_RANGE", "VERSION_IN_FUTURE", {}, None),
    (
        VersionCompacted(3, 9, 5),
        "OUT_OF_RANGE",
        "VERSION_COMPACTED",
        {"log_horizon": "9", "tombstone_horizon": "5"},
        None,
    ),
    (Compacted(7), "OUT_OF_RANGE", "VERSION_COMPACTED", {}, None),
    (TooLarge("TOO_MANY_KEYS", "big"), "RESOURCE_EXHAUSTED", "TOO_MANY_KEYS", {}, None),
    (OutOfMemory(1, 2, 3), "RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", {}, None),
    (NoRoom(1, 2, 3, "t: ", False), "RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", {}, None),
    (DiskFull("log", 9), "RESOURCE_EXHAUSTED", "DISK_FULL", {}, 1.0),
    (Overloaded("busy"), "RESOURCE_EXHAUSTED", "OVERLOADED", {}, 0.1),
    (DeadlinePassed("late"), "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", {}, None),
    (Corrupt("file at byte 9", "bad"), "DATA_LOSS", "DATA_LOSS", {}, None),
    (UnknownFormat("file", 2, 1), "DATA_LOSS", "DATA_LOSS", {}, None),
    (Draining("stopping"), "UNAVAILABLE", "DRAINING", {}, 1.0),
    (LogFailed("sync"), "UNAVAILABLE", "DRAINING", {}, 1.0),
    *(
        (kind("so"), CODES[kind][0].name, kind.reason, {}, kind.retry_after)  # type: ignore[attr-defined]
        for kind in (
            refusals.RestoreConflict,
            refusals.NotEmpty,
            refusals.Busy,
            refusals.BarrierMissed,
            refusals.CheckpointBusy,
            refusals.CheckpointUnfit,
            refusals.CheckpointExists,
            refusals.CheckpointNeeded,
            refusals.UnknownCall,
        )
    ),
    *(
        (kind(), CODES[kind][0].name, kind.reason, {}, kind.retry_after)  # type: ignore[attr-defined]
        for kind in (refusals.NoCheckpointUrl, refusals.Restoring, refusals.Starting)
    ),
    (
        refusals.NotAShard(3, 2),
        "FAILED_PRECONDITION",
        "NOT_A_SHARD",
        {"shard": "3", "shards": "2"},
        None,
    ),
    (refusals.OtherShard("shard 0 of 2", "shard 1 of 2"), "UNAVAILABLE", "OTHER_SHARD", {}, 0.5),
    (refusals.TableLoading("t"), "UNAVAILABLE", "TABLE_LOADING", {}, 1.0),
    (storage_errors.StoreFailed("file", "io"), "UNAVAILABLE", "STORE_FAILED", {}, None),
    (
        storage_errors.UnknownCheckpoint("x", "file"),
        "NOT_FOUND",
        "CHECKPOINT_NOT_FOUND",
        {},
        None,
    ),
]


@pytest.mark.parametrize(
    ("error", "code", "reason", "metadata", "retry_after"),
    EXAMPLES,
    ids=[type(example[0]).__name__ for example in EXAMPLES],
)
def test_an_error_travels_with_its_code_message_reason_and_delay(
    error: Exception, code: str, reason: str, metadata: dict[str, str], retry_after: float | None
) -> None:
    status = status_of(error)
    assert status.code == grpc.StatusCode[code].value[0]
    assert status.message == str(error) != ""
    found = details(status)
    assert found.pop(ErrorInfo) == ErrorInfo(reason=reason, domain="ps.v1", metadata=metadata)
    if retry_after is not None:
        delay = found.pop(RetryInfo).retry_delay
        assert delay.seconds + delay.nanos / 1e9 == pytest.approx(retry_after)
    assert not found


def test_there_is_an_example_of_every_error() -> None:
    assert {type(example[0]) for example in EXAMPLES} == set(CODES)


def test_delays_are_given_where_ps_proto_says_so() -> None:
    text = (ROOT / "proto/psproto/ps.proto").read_text()
    promised = set(re.findall(r"([A-Z_]{4,}) \(RetryInfo[;)]", text))
    assert promised == {reason for _, _, reason, _, delay in EXAMPLES if delay is not None}


@pytest.mark.parametrize("letter", ["n", "\u00e4", "\U0001f600"])
def test_a_long_message_is_cut(letter: str) -> None:
    status = status_of(BadRequest("INVALID_ARGUMENT", letter * 20_000))
    kept = 1021 // len(letter.encode())
    assert status.message == letter * kept + "..."
    whole = letter * (1024 // len(letter.encode()))
    assert status_of(BadRequest("INVALID_ARGUMENT", whole)).message == whole


class Child(UnknownTable):
    """An error that nobody listed."""


def test_an_error_below_a_listed_one_travels_as_that_one() -> None:
    assert status_of(Child("t")) == status_of(UnknownTable("t"))


@pytest.mark.parametrize("error", [ZeroDivisionError("secret"), KeyError("secret")])
def test_an_error_nobody_expected_is_internal_and_tells_its_kind_alone(error: Exception) -> None:
    status = status_of(error)
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert status.message == f"internal error: {type(error).__name__}"
    assert details(status) == {ErrorInfo: ErrorInfo(reason="INTERNAL", domain="ps.v1")}


def test_a_status_in_a_stream_has_the_bytes_of_google_rpc_status() -> None:
    for example in EXAMPLES:
        status = status_of(example[0])
        data = status.SerializeToString(deterministic=True)
        mirrored = pb.Status.FromString(data)
        assert mirrored.SerializeToString(deterministic=True) == data
        assert (mirrored.code, mirrored.message) == (status.code, status.message)
        info = pb.ErrorInfo.FromString(mirrored.details[0].value)
        assert (info.reason, info.domain, dict(info.metadata)) == (
            example[2],
            "ps.v1",
            example[3],
        )
