"""The audit log: what is recorded, when, and what is never recorded."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from secured import (
    ID,
    KEYS,
    METHOD,
    Secured,
    bearer,
    create,
    digest,
    outcome,
    requests,
    schema,
    section,
)
from servers import eventually

from psproto import ps_pb2 as pb
from psserver.security.audit import BURST, LONGEST, MOST, Audit
from psserver.security.verbs import METHODS, PATHS
from psserver.unusable import ConfigError

OF_OPS = "a-secret-token"
OPS = section("ops", (["*"], ["*"])).replace(digest("ops"), digest(OF_OPS))
POLICY = OPS + section("reader", (["pull", "drop"], ["t"]))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    made = Secured(tmp_path_factory.mktemp("audited"), POLICY).start()
    with made.channel() as channel:
        create(channel, "t", bearer(OF_OPS))
    made.checkpoint("first")
    yield made
    made.stop()


@pytest.fixture
def channel(server: Secured) -> Iterator[grpc.Channel]:
    with server.channel() as made:
        yield made


def added(server: Secured, act: Any) -> list[dict[str, Any]]:
    """The records that ``act()`` adds, at its return."""
    before = len(server.records())
    act()
    return server.records()[before:]


@dataclass(frozen=True)
class Recorded:
    """What the record of a call has, apart from what all records have."""

    tables: tuple[str, ...] = ()
    details: tuple[tuple[str, Any], ...] = ()
    outcome: str = "OK"


EXPECTED = {
    "CreateTable": Recorded(("t.new",)),
    "AlterTable": Recorded(("t",), (("fields", ["serving_default"]),)),
    "Evict": Recorded(("t",), (("dry_run", False),)),
    "Delete": Recorded(("t",), (("rows", len(KEYS)),)),
    "WriteRows": Recorded(("t",), (("rows", len(KEYS)),)),
    "Barrier": Recorded((), (("name", "mark"),)),
    "WriteCheckpoint": Recorded((), (("name", "later"), ("attempt", ID % 1))),
    "CompleteCheckpoint": Recorded(
        (), (("name", "later"), ("attempt", ID % 1)), "CHECKPOINT_UNFIT"
    ),
    "PrepareRestore": Recorded((), (("name", "first"), ("id", ID % 2), ("replace", True))),
    "Restore": Recorded((), (("id", ID % 9), ("step", "STEP_HOLD")), "RESTORE_CONFLICT"),
    "LoadTable": Recorded(
        ("t",), (("name", "first"), ("id", ID % 4), ("replace", True)), "CANCELLED"
    ),
    "DeleteCheckpoints": Recorded(
        (), (("names", ["first"]), ("keep", 0), ("dry_run", False), ("id", ID % 5)), "CANCELLED"
    ),
    "DropTable": Recorded(("t",)),
}


def test_every_audited_method_is_below() -> None:
    assert set(EXPECTED) == {name for name, path in PATHS.items() if METHODS[path].audited}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_change_is_recorded_before_its_answer(
    server: Secured, channel: grpc.Channel, name: str
) -> None:
    if name not in ("CreateTable", "DropTable"):
        outcome(channel, METHOD["CreateTable"], created("t"), bearer(OF_OPS))
    expected, method = EXPECTED[name], METHOD[name]
    before = len(server.records())
    began = datetime.now(UTC)
    if method.replies and expected.outcome == "OK":
        list(channel.unary_stream(method.path)(requests("t")[name], metadata=bearer(OF_OPS)))
    elif method.replies:  # the call waits; the client leaves
        replies = channel.unary_stream(method.path)(requests("t")[name], metadata=bearer(OF_OPS))
        next(replies)
        replies.cancel()
        eventually(lambda: len(server.records()) > before)
        server.settle()
    else:
        outcome(channel, method, requests("t")[name], bearer(OF_OPS))
    (record,) = server.records()[before:]
    at = datetime.strptime(record.pop("time"), "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    assert timedelta(0) <= at - began < timedelta(minutes=1)
    assert record.pop("peer").startswith("ipv4:127.0.0.1:")
    assert record.pop("seconds") >= 0
    assert record == {
        "shard": 0,
        "method": method.path,
        "principal": "ops",
        "credential": f"token:{digest(OF_OPS)[:8]}",
        "tables": list(expected.tables),
        **dict(expected.details),
        "outcome": expected.outcome,
    }


def created(table: str) -> bytes:
    return bytes(pb.CreateTableRequest(schema=schema(table)).SerializeToString())


def test_reads_and_pushes_are_not_recorded(server: Secured, channel: grpc.Channel) -> None:
    outcome(channel, METHOD["CreateTable"], created("t"), bearer(OF_OPS))

    def act() -> None:
        for name in ("Pull", "Push", "Exchange", "Stream", "Inspect", "ListTables", "GetStatus"):
            assert outcome(channel, METHOD[name], requests("t")[name], bearer(OF_OPS)) == "OK"

    assert added(server, act) == []


@pytest.mark.parametrize(
    ("name", "who", "expected"),
    [
        ("Push", "reader", {"principal": "reader", "verb": "push", "tables": []}),
        ("DropTable", "reader", {"principal": "reader", "verb": "drop", "tables": ["u"]}),
        ("Pull", "stranger", {"principal": None, "credential": None, "verb": "", "tables": []}),
    ],
)
def test_a_refused_attempt_is_recorded(
    server: Secured, channel: grpc.Channel, name: str, who: str, expected: dict[str, Any]
) -> None:
    before = len(server.records())
    code = outcome(channel, METHOD[name], requests("u")[name], bearer(who))
    assert code in ("PERMISSION_DENIED", "UNAUTHENTICATED")
    (record,) = eventually(lambda: server.records()[before:])
    assert record.items() >= {**expected, "outcome": code, "method": PATHS[name]}.items()


def test_a_name_cannot_forge_a_record(server: Secured, channel: grpc.Channel) -> None:
    """A newline, quotes and control characters in a name stay inside the text."""
    evil = 't\n{"principal": "ops"}\r\x1b[2J\u2028"' + "x" * 1000
    before = len(server.records())
    request = pb.DropTableRequest(name=evil).SerializeToString()
    assert outcome(channel, METHOD["DropTable"], request, bearer(OF_OPS)) == "INVALID_ARGUMENT"
    (record,) = eventually(lambda: server.records()[before:])
    assert record["tables"] == [evil[:LONGEST] + "..."]
    assert server.audit.read_bytes().isascii()


def test_no_record_has_a_token_or_a_key(server: Secured) -> None:
    text = server.audit.read_text()
    assert text
    assert OF_OPS not in text
    assert digest(OF_OPS) not in text


# ---- the file, without a server


@dataclass
class Somebody:
    name: str = "ops"
    credential: str = "cn:ops"
    peer: str = "ipv4:127.0.0.1:1"
    method: str = PATHS["DropTable"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(audit: Audit, table: str = "t", error: BaseException | None = None) -> None:
    async def act() -> None:
        async with audit.recorded(Somebody(), [table], {}):
            if error is not None:
                raise error

    asyncio.run(act())


def test_a_rotated_file_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = Audit(path, 3)
    record(audit, "a")
    path.rename(tmp_path / "old")
    record(audit, "b")
    path.unlink()
    record(audit, "c")
    audit.close()
    assert [each["tables"] for each in lines(tmp_path / "old")] == [["a"]]
    assert [(each["shard"], each["tables"]) for each in lines(path)] == [(3, ["c"])]
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_unexpected_error_is_recorded_by_its_reason_alone(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl", 0)
    with pytest.raises(ZeroDivisionError):
        record(audit, error=ZeroDivisionError("the key 4711"))
    audit.close()
    assert [each["outcome"] for each in lines(tmp_path / "audit.jsonl")] == ["INTERNAL"]


def test_a_full_disk_loses_records_but_no_calls(capsys: pytest.CaptureFixture[str]) -> None:
    audit = Audit(Path("/dev/full"), 0)
    record(audit)
    audit.close()
    assert (audit.lines, audit.failed) == (0, 1)
    assert "audit record lost" in capsys.readouterr().out


def test_half_a_line_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up, or a server that dies, may leave the beginning of a record."""
    path, write = tmp_path / "audit.jsonl", os.write
    audit = Audit(path, 0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
        record(audit, "a")
    record(audit, "b")
    record(audit, "c")
    audit.close()
    with path.open("a") as file:
        file.write('{"time": "20')
    again = Audit(path, 0)
    record(again, "d")
    again.close()
    half, b, c, dead, d = path.read_text().splitlines()
    assert (half[:8], dead) == ('{"time":', '{"time": "20')
    assert [json.loads(each)["tables"] for each in (b, c, d)] == [["b"], ["c"], ["d"]]
    assert (audit.lines, audit.failed) == (2, 1)


def test_a_file_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="audit_file: cannot append to"):
        Audit(tmp_path / "missing" / "audit.jsonl", 0)


def test_refused_attempts_are_recorded_at_a_limited_rate(tmp_path: Path) -> None:
    """And those of one principal do not hide those of another."""
    now = [100.0]
    audit = Audit(tmp_path / "audit.jsonl", 0, lambda: now[0])
    for _ in range(1000):
        audit.refused(Somebody(), "PERMISSION_DENIED", "drop", "t")
    audit.refused(Somebody(name="", credential=""), "UNAUTHENTICATED", "", "")
    now[0] += 1
    audit.refused(Somebody(), "PERMISSION_DENIED", "drop", "t")
    audit.close()
    found = lines(tmp_path / "audit.jsonl")
    assert len(found) == BURST + 2
    assert found[-2]["outcome"] == "UNAUTHENTICATED"
    assert found[-1]["suppressed"] == 1000 - BURST


def test_a_record_is_limited(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl", 0)
    audit.refused(Somebody(peer="x" * 10_000), "PERMISSION_DENIED", "drop", "t" * 10_000)

    async def act() -> None:
        async with audit.recorded(Somebody(), [str(at) for at in range(1000)], {}):
            pass

    asyncio.run(act())
    audit.close()
    refused, many = lines(tmp_path / "audit.jsonl")
    assert len(json.dumps(refused)) < 3 * LONGEST + 500
    assert many["tables"] == [*(str(at) for at in range(MOST)), f"... and {1000 - MOST} more"]
