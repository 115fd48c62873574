"""JSON of every command of psctl, and every exit status, as docs/psctl.md describes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer
from fakes import fake_server
from servers import Cluster, free_ports
from typer.testing import CliRunner, Result

from psclient import Client
from psclient.errors import PermissionDenied
from psclient.tools import ctl, importer
from psclient.tools.commands.exits import Exit
from psclient.tools.commands.output import plain
from psclient.tools.importer import ImportIncomplete
from psproto import ps_pb2 as pb

DOCS = Path(__file__).parents[3] / "docs" / "psctl.md"
STREAMS = {"tail", "top"}  # commands that print one JSON value per line
KEYS = np.arange(300)


def commands() -> list[str]:
    group: Any = typer.main.get_command(ctl.app)
    return sorted(group.commands)


def psctl(servers: list[str], *words: str, typed: str | None = None) -> Result:
    environment = {"PSCTL_SERVERS": ",".join(servers), "COLUMNS": "80"}
    return CliRunner().invoke(ctl.app, words, env=environment, input=typed)


class Run(NamedTuple):
    """One run of psctl with --output json."""

    status: int
    values: list[Any]  # values of stdout
    stderr: str


def run(servers: list[str], *words: str) -> Run:
    done = psctl(servers, *words, "--output", "json")
    if words[0] in STREAMS:
        values = [json.loads(line) for line in done.stdout.splitlines()]
    else:
        values = [json.loads(done.stdout)] if done.stdout else []
    return Run(done.exit_code, values, done.stderr)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Runs of all commands against one cluster, in an order in which all of them succeed."""

    cluster: Cluster
    runs: dict[str, list[Run]]


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    files = tmp_path_factory.mktemp("psctl")
    np.save(files / "rows.npy", np.ones((20, 4), np.float32))
    cluster = Cluster(2, "--checkpoint-url", f"file://{files}/checkpoints").start()
    runs: dict[str, list[Run]] = {}

    def do(*words: str) -> None:
        runs.setdefault(words[0], []).append(run(cluster.addresses, *words))

    try:
        do("create", "t", "--dim", "4", "--eviction", "step_ttl:steps=5")
        do("create", "t", "--dim", "4", "--eviction", "step_ttl:steps=5")
        do("create", "s", "--dim", "4", "--admission", "sketch")
        with Client(cluster.addresses) as client:
            client.table("t").push(KEYS, np.ones((len(KEYS), 4)))
            client.wait_durable()
        do("status")
        do("doctor")
        do("top", "--once", "--interval", "0.2")
        do("tables")
        do("table", "t")
        do("alter", "t", "lr=0.25", "max_step_ahead=0")
        do("alter", "t", "lr=0.25")
        do("checkpoint", "a")
        do("checkpoint", "b", "--incremental-from", "a", "--keep", "1")
        do("checkpoint", "c", "--keep", "1")
        do("checkpoints")
        do("verify", "c")
        do("verify")
        do("repair", "t", "--from", "c")
        do("export", "t", "--out", str(files / "t.parquet"))
        do("export", "c", "--out", str(files / "all"))
        do(
            "export",
            "t",
            "--checkpoint",
            str(files / "checkpoints" / "c"),
            "--out",
            str(files / "u"),
        )
        do("import", "s", str(files / "rows.npy"), "--dry-run")
        do("import", "t", str(files / "rows.npy"), "--journal", str(files))
        do("analyze", "t", "--keys", "int64")
        do("analyze", "t", "--checkpoint", "c")
        do("inspect", "t", "7", "--embeddings")
        do("bench", "--seconds", "0.5", "--warmup", "0", "--keys", "500", "--batch", "10")
        do("evict", "t", "--dry-run")
        do("evict", "s")
        do("tail", "--table", "t", "--start", "snapshot", "--limit", "3")
        do("restore", "c", "--table", "t", "--into", "new")
        do("restore", "c", "--replace")
        do("restore", "--abort")
        do("drop", "t", "--yes")
        do("checkpoint", "d")
        do("delete", "d", "--dry-run")
        do("prune", "--keep", "1")
        yield Scenario(cluster, runs)
    finally:
        assert cluster.stop() == 0


def documented() -> dict[str, tuple[set[str], set[str]]]:
    """Return (fields, fields that may be missing) of each command's JSON, from docs/psctl.md."""
    found = {}
    for line in DOCS.read_text().splitlines():
        if match := re.match(r"\| `(\w+)` \|[^|]*\| (.*) \|$", line):
            always, _, sometimes = match[2].partition("sometimes")
            found[match[1]] = tuple(
                set(re.findall(r"`(\w+)`", text)) for text in (always, sometimes)
            )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_the_json_of_every_command_has_the_documented_fields(
    scenario: Scenario, command: str
) -> None:
    always, sometimes = documented()[command]
    assert scenario.runs[command], f"{command} is not in the scenario"
    for each in scenario.runs[command]:
        assert each.status == Exit.OK, each
        assert all("note" in json.loads(line) for line in each.stderr.splitlines())
        for value in each.values if command in STREAMS else each.values[:1]:
            objects = value if isinstance(value, list) else [value]
            assert objects
            for found in objects:
                assert always <= set(found) <= always | sometimes


@pytest.mark.slow
def test_the_values_are_those_of_the_text(scenario: Scenario) -> None:
    runs = {name: [each.values[0] for each in some] for name, some in scenario.runs.items()}
    assert [each["created"] for each in runs["create"]] == [True, False, True]
    assert [each["rows"] for each in runs["tables"][0]] == [0, len(KEYS)]
    assert [each["changed"] for each in runs["alter"]] == [["lr", "max_step_ahead"], []]
    assert [each["deleted"] for each in runs["checkpoint"]] == [[], [], ["b", "a"], []]
    assert [each["name"] for each in runs["checkpoints"][0]] == ["c"]
    assert runs["verify"][1] == {"checkpoint": None, "bytes": None, "damaged": []}
    assert runs["repair"][0] == {"table": "t", "lost": 0, "restored": 0, "deleted": 0, "left": 0}
    assert [file["rows"] for file in runs["export"][0]["files"]] == [len(KEYS)]
    assert [file["table"] for file in runs["export"][1]["files"]] == ["s", "t"]
    assert (runs["import"][0]["rows"], runs["import"][1]["rows"]) == (20, 20)
    assert (runs["analyze"][0]["rows"], runs["analyze"][1]["rows"]) == (len(KEYS), len(KEYS))
    assert runs["inspect"][0][0]["key"] == 7
    assert runs["inspect"][0][0]["embedding"] == [1.0] * 4
    assert runs["drop"][0]["table"] == "t"
    assert runs["delete"][0] == {"deleted": ["d"], "dry_run": True}
    assert runs["prune"][0] == {"deleted": ["c"], "dry_run": False}


REQUIRED = {  # words after the command, so that it is complete
    "alter": ("t", "lr=1"),
    "create": ("t", "--dim=1"),
    "evict": ("t",),
    "table": ("t",),
    "drop": ("t", "--yes"),
    "checkpoint": ("c",),
    "restore": ("c",),
    "delete": ("c",),
    "prune": ("--keep=1",),
    "repair": ("t", "--delete-missing"),
    "export": ("t", "--out=x"),
    "import": ("t", "x.npy"),
    "analyze": ("t",),
    "inspect": ("t", "1"),
    "tail": ("--start=never",),
    "top": ("--once", "--interval=0.1"),
}


EXPECTED = {"tail": Exit.FAILED, "top": Exit.OK}  # if no shard answers


@pytest.mark.parametrize("command", commands())
def test_every_command_reports_an_error_as_json(command: str) -> None:
    gone = f"127.0.0.1:{free_ports(1)}"
    done = psctl([gone], command, *REQUIRED.get(command, ()), "--output", "json")
    expected = EXPECTED.get(command, Exit.UNREACHABLE)
    assert done.exit_code == expected
    if command in ("status", "doctor", "top"):  # they show what is wrong
        assert "unreachable" in done.stdout
        assert json.loads(done.stdout)
        assert done.stderr == ""
        return
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    error = json.loads(line)["error"]
    assert set(error) == {"type", "reason", "message", "status", "retry_after"}
    assert error["status"] == expected
    assert error["message"]


def test_wrong_usage_is_reported_as_json() -> None:
    for words in (["nothing"], ["table"], ["tables", "--servers="], ["restore"]):
        done = psctl(["127.0.0.1:1"], *words, "--output=json")
        assert (done.exit_code, done.stdout) == (Exit.USAGE, "")
        [line] = done.stderr.splitlines()
        assert json.loads(line)["error"]["status"] == Exit.USAGE


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), None),
        ([np.inf, 1.5], [None, 1.5]),
        (np.array([[1, 2]], np.uint64), [[1, 2]]),
        (np.float32(0.5), 0.5),
        ({Exit.FAILED: Exit.USAGE, "a": (True, None)}, {"1": 2, "a": [True, None]}),
        (Path("/a"), "/a"),
    ],
)
def test_values_that_json_does_not_have_are_converted(value: Any, expected: Any) -> None:
    assert plain(value) == expected


# ---- exit statuses


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Return the address of a shard that has no tables."""
    methods = {
        "CheckpointService/Restore": lambda _, __: pb.RestoreStatus().SerializeToString(),
        "TableService/ListTables": lambda _, __: pb.ListTablesResponse().SerializeToString(),
    }
    with fake_server(methods) as address:
        yield address


def incomplete(_: Any, __: Any, **___: Any) -> int:
    raise ImportIncomplete("t", 1, 2, OSError("the disk is gone"))


@pytest.mark.parametrize("status", list(Exit), ids=lambda each: each.name)
def test_every_exit_status_can_be_provoked(
    status: Exit, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, servers = PROVOKED[status]
    if status is Exit.INCOMPLETE:
        monkeypatch.setattr(importer, "open_source", lambda *_, **__: FILES)
        monkeypatch.setattr(importer, "resumed", lambda *_: (0, 0))
        monkeypatch.setattr(importer, "write", incomplete)
        words = (*words, "--journal", str(tmp_path))
    if status is Exit.NOT_PERMITTED:
        monkeypatch.setattr(Client, "list_tables", refuse)
    if status is Exit.INTERRUPTED:
        monkeypatch.setattr(Client, "list_tables", interrupt)
    done = psctl([servers or address], *words)
    assert done.exit_code == status, done.output
    assert (done.stderr == "") == (status is Exit.OK)


def refuse(_: Client) -> None:
    raise PermissionDenied("shard 0: no right to read all tables")


def interrupt(_: Client) -> None:
    raise KeyboardInterrupt


FILES = SimpleNamespace(id="x", notes=())  # an import reads them


PROVOKED = {  # words, and the servers: "" is a shard without tables
    Exit.OK: (("tables",), ""),
    Exit.FAILED: (("drop", "t", "--yes"), ""),
    Exit.USAGE: (("drop",), ""),
    Exit.UNREACHABLE: (("tables",), "127.0.0.1:1"),
    Exit.INCOMPLETE: (("import", "t", "x.npy"), ""),
    Exit.NOT_PERMITTED: (("tables",), ""),
    Exit.INTERRUPTED: (("tables",), ""),
}


def test_the_documentation_lists_the_exit_statuses() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", DOCS.read_text(), re.MULTILINE)
    assert rows == [(str(each.value), each.meaning) for each in Exit]
