"""psctl status, tables, table, create, drop, as they are typed, and the help of all commands."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import typer
from servers import Cluster, eventually, free_ports
from typer.testing import CliRunner, Result

from psclient import Client
from psclient import status as states
from psclient.errors import InvalidArgument, TableNotFound, Unavailable
from psclient.status import status
from psclient.tools import ctl
from psclient.tools.commands.shell import Exit
from psclient.tools.rules import parse_rule, rule_text
from psproto import RELEASE
from psproto import ps_pb2 as pb

Connect = Callable[..., Client]


def psctl(servers: list[str], *words: str, typed: str | None = None, exit: Exit = Exit.OK) -> str:
    environment = {"PSCTL_SERVERS": ",".join(servers), "COLUMNS": "80"}
    done: Result = CliRunner().invoke(ctl.app, words, env=environment, input=typed)
    assert done.exit_code == exit, (done.exception, done.output)
    return done.output


@pytest.fixture(scope="module")
def own() -> Iterator[Cluster]:
    """Return a cluster without tables of other tests."""
    cluster = Cluster(2).start()
    try:
        yield cluster
    finally:
        assert cluster.stop() == 0


@pytest.fixture
def here(own: Cluster) -> list[str]:
    return own.addresses


@pytest.fixture
def client(own: Cluster, connect: Connect) -> Client:
    return connect(own)


# ---- status


def test_status_shows_every_shard(here: list[str], client: Client, name: str) -> None:
    client.create_table(name, 4).push(np.array([1, -1, 7]), [[1.0] * 4] * 3)
    client.wait_durable()
    shown = psctl(here, "status")
    for word in ("2 of 2 shards ready", RELEASE, *here):
        assert word in shown
    assert max(map(len, shown.splitlines())) <= 80
    found = status(here)
    assert [(each.shard, each.address, each.state) for each in found] == [
        (0, here[0], "ready"),
        (1, here[1], "ready"),
    ]
    for each in found:
        assert each.log_bytes
        assert each.log_first_version == 1
        assert 0 < each.memory_bytes < each.memory_budget_bytes  # type: ignore[operator]
        assert 0 < each.flush_age_seconds < 3600  # type: ignore[operator]
        assert 0 < each.uptime_seconds < 3600  # type: ignore[operator]
        assert each.tables == len(client.list_tables())
    assert [each["state"] for each in json.loads(psctl(here, "status", "--output", "json"))] == [
        "ready",
        "ready",
    ]


def test_status_shows_shards_that_do_not_answer_beside_those_that_do(here: list[str]) -> None:
    gone = f"127.0.0.1:{free_ports(1)}"
    shown = psctl([here[0], gone], "status", "--timeout", "2", exit=Exit.UNREACHABLE)
    assert "1 of 2 shards ready\n\nshard" in shown
    assert f"\n\nshard 1 is unreachable: {gone}: " in shown
    found = json.loads(psctl([here[0], gone], "status", "--output", "json", exit=Exit.UNREACHABLE))
    assert [(each["state"], each["release"]) for each in found] == [
        ("ready", RELEASE),
        ("unreachable", None),
    ]


def test_a_command_ends_soon_if_a_shard_is_unreachable(here: list[str]) -> None:
    gone = f"127.0.0.1:{free_ports(1)}"
    started = time.monotonic()
    shown = psctl([here[0], gone], "tables", exit=Exit.UNREACHABLE)
    assert time.monotonic() - started < 10.0
    assert shown.startswith("psctl: shard 1 is unreachable: ")
    assert shown.count("\n") == 1


@pytest.mark.parametrize("address", ["nonsense", "no.such.host.example:1", ":::1", ""])
def test_status_of_a_bad_address_is_no_traceback(here: list[str], address: str) -> None:
    shown = psctl([here[0], address], "status", "--timeout", "1", exit=Exit.UNREACHABLE)
    assert "shard 1 is unreachable" in shown


@pytest.mark.parametrize("reason", ["STARTING", "DRAINING", "RESTORING"])
def test_status_shows_why_a_shard_refuses_work(
    monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    def refuse(*_: Any) -> bytes:
        error = Unavailable("a:1: refused")
        error.reason = reason
        raise error

    monkeypatch.setattr(states, "call_shard", refuse)
    [found] = status(["a:1"])
    assert (found.state, found.problem, found.ready) == (reason.lower(), "a:1: refused", False)
    assert found.version is None


@pytest.mark.parametrize("phase", pb.RestoreStatus.Phase.items(), ids=str)
def test_status_shows_a_restore_between_its_steps(
    monkeypatch: pytest.MonkeyPatch, phase: tuple[str, Any]
) -> None:
    def answer(_: Any, method: str, *__: Any) -> bytes:
        if method.endswith("GetStatus"):
            raise states.Unimplemented("a:1: an older release")
        if method.endswith("GetServerInfo"):
            return pb.GetServerInfoResponse(shard_map=pb.ShardMap(shards=1)).SerializeToString()
        return pb.RestoreStatus(name="monday", phase=phase[1]).SerializeToString()

    monkeypatch.setattr(states, "call_shard", answer)
    [found] = status(["a:1"])
    ready = phase[0] in {
        f"PHASE_{each}" for each in ("UNSPECIFIED", "PREPARED", "RELEASED", "ABORTED")
    }
    assert found.state == ("ready" if ready else "restoring")
    assert ready or "'monday'" in str(found.problem)
    assert found.durable_version is None  # it has no log


def test_status_notices_shards_out_of_order(here: list[str]) -> None:
    shown = psctl(here[::-1], "status", exit=Exit.FAILED)
    assert "0 of 2 shards ready" in shown
    assert f"shard 0 is misplaced: {here[1]} is shard 1 of 2, but is listed" in shown


def test_status_and_the_tables_agree(here: list[str], client: Client, name: str) -> None:
    client.create_table(name, 4).push(np.arange(9), np.ones((9, 4)))

    def agree() -> bool:
        """Other tables of this cluster may change meanwhile: rows are evicted."""
        found, tables = status(here), client.list_tables()
        versions = tables[0].versions
        return (
            tuple(each.version for each in found) == versions
            and tuple(each.durable_version for each in found) == versions
            and sum(each.rows or 0 for each in found) == sum(each.rows for each in tables)
        )

    assert eventually(agree)


# ---- tables


def test_tables_are_created_listed_shown_and_dropped(
    here: list[str], client: Client, name: str
) -> None:
    words = ["create", name, "--dim", "4", "--optimizer", "adam:lr=0.25,beta1=0.5", "--seed", "7"]
    words += ["--admission", "counter:threshold=2", "--eviction", "norm:threshold=0.5,grace=9"]
    words += ["--eviction", "step_ttl:steps=100", "--durability", "fsync", "--initializer", "zeros"]
    assert psctl(here, *words, "--serving-default", "1") == f"{name}: created\n"
    assert psctl(here, *words, "--serving-default", "1") == f"{name}: exists with these settings\n"
    assert "exists with dim 4" in psctl(here, "create", name, "--dim", "5", exit=Exit.FAILED)
    info = client.describe_table(name)
    assert (info.optimizer_args["lr"], info.optimizer_args["beta1"]) == (0.25, 0.5)
    assert (info.seed, info.serving_default, info.durability) == (7, 1.0, "fsync")
    assert info.eviction["norm"] == {"threshold": 0.5, "grace": 9.0}
    client.table(name).push([1, 1, 2, 2], [[1.0] * 4] * 4)
    [line] = [line for line in psctl(here, "tables").splitlines() if line.startswith(name)]
    assert line.split()[1:4] == ["4", "adam", "2"]
    assert line.split()[6:] == ["counter", "norm,", "step_ttl"]
    shown = psctl(here, "table", name)
    for word in ("adam:", "beta1=0.5", "norm:", "fsync", "serving default", "shard"):
        assert word in shown

    def told_alike() -> bool:
        tables = json.loads(psctl(here, "tables", "--output", "json"))
        [listed] = [each for each in tables if each["name"] == name]
        return json.loads(psctl(here, "table", name, "--output", "json")) == listed

    eventually(told_alike)  # a flush in between changes the figures
    kept = psctl(here, "drop", name, typed="n\n", exit=Exit.FAILED)
    assert f"Delete table {name} with 2 rows? [y/N]" in kept
    assert client.describe_table(name).rows == 2
    assert psctl(here, "drop", name, "--yes") == f"{name}: dropped, 2 rows deleted\n"
    with pytest.raises(TableNotFound):
        client.describe_table(name)
    for command in ("table", "drop", "evict"):
        assert "no table" in psctl(here, command, name, exit=Exit.FAILED)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer", "nothing"], "nothing"),
        (["--optimizer", "adam:lr"], "--optimizer must be RULE or RULE:PARAMETER=NUMBER"),
        (["--optimizer", "adam:lr=x"], "got 'adam:lr=x'"),
        (["--optimizer", "adam:lr=1,lr=2"], "--optimizer must be RULE"),
        (["--eviction", "step_ttl:ttl=3"], "no parameter 'ttl'"),
        (["--eviction", "norm", "--eviction", "norm"], "--eviction must not repeat a rule"),
        (["--dim", "0"], "dim must be"),
        (["--seed", "-1"], "seed must be"),
        (["--durability", "never"], "durability must be one of"),
        (["--lr", "nan"], "lr"),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    here: list[str], name: str, words: list[str], message: str
) -> None:
    shown = psctl(here, "create", name, "--dim", "4", *words, exit=Exit.FAILED)
    assert shown.startswith("psctl: ")
    assert shown.count("\n") == 1
    assert message in shown
    assert name not in psctl(here, "tables")


@pytest.mark.parametrize("text", ["adam", "adam:lr=0.01", "norm:grace=100,threshold=0.5"])
def test_rules_are_shown_as_they_are_typed(text: str) -> None:
    assert rule_text(*parse_rule("--x", text)) == text


@pytest.mark.parametrize("text", ["adam:", "adam:=1", "adam:lr=", "adam:lr=1,", "a:b=c=d"])
def test_bad_rules_are_refused_by_option(text: str) -> None:
    with pytest.raises(InvalidArgument, match="--x must be RULE"):
        parse_rule("--x", text)


@pytest.mark.slow
def test_a_table_that_some_shards_lack_can_be_dropped(
    start_cluster: Any, connect: Connect, name: str
) -> None:
    cluster = start_cluster(2)
    client = connect(cluster)
    client.create_table("t", 4)
    with Client(cluster.addresses) as other:
        link = other._connect().links[1]
        link.channel.call("/ps.v1.TableService/DropTable", b"\n\x01t", 9.0)
    eventually(lambda: client.list_tables() == [])
    assert psctl(cluster.addresses, "drop", "t", "--yes") == "t: dropped, 0 rows deleted\n"
    assert "no table" in psctl(cluster.addresses, "drop", "t", "--yes", exit=Exit.FAILED)


# ---- help


def commands() -> Iterator[tuple[str, Any]]:
    group: Any = typer.main.get_command(ctl.app)
    yield from group.commands.items()


@pytest.mark.parametrize(("command", "found"), list(commands()))
def test_every_help_text_stands_alone(command: str, found: Any) -> None:
    """Commands and options are described in sentences; the first line fits into the list."""
    assert found.help
    assert "\\" not in found.help.replace(" \\\n", "")
    first = found.help.splitlines()[0]
    assert first[0].isupper()
    assert first.endswith(".")
    assert len(found.get_short_help_str(65)) >= len(first.split(". ")[0].rstrip("."))
    for option in found.params:
        text = getattr(option, "help", None)
        assert text, f"{command} {option.name} has no help"
        assert text[0].isupper(), f"{command} {option.name}: {text}"
        assert text.rstrip(")").endswith((".", "...")), f"{command} {option.name}: {text}"
        assert len(text.split()) > 2


def test_the_help_lists_the_exit_statuses() -> None:
    shown = psctl([], "--help")
    for each in Exit:
        assert f"    {each.value} " in shown


def test_wrong_usage_ends_with_its_status(here: list[str]) -> None:
    psctl(here, "nothing", exit=Exit.USAGE)
    psctl(here, "create", "x", exit=Exit.USAGE)
    psctl(here, "restore", exit=Exit.USAGE)
    psctl(here, "checkpoint", "b", "--incremental-from", "", exit=Exit.USAGE)


@pytest.mark.parametrize("command", ["tables", "checkpoints"])
@pytest.mark.parametrize("servers", ["", "127.0.0.1", "127.0.0.1:x", "http://127.0.0.1:7000"])
def test_malformed_addresses_are_wrong_usage(command: str, servers: str) -> None:
    shown = psctl([], command, f"--servers={servers}", exit=Exit.USAGE)
    assert f"Invalid value for --servers: addresses: shard 0 at {servers!r}" in shown
