"""`psctl doctor`: every finding about a cluster, made to happen."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_server, info
from pods import Pod
from servers import Cluster, free_ports
from typer.testing import CliRunner

from deploy.components.monitoring import thresholds
from psclient import discovery
from psclient.status import ShardStatus, status
from psclient.tools import ctl, doctor, resources
from psclient.tools.commands.shell import Exit
from psclient.tools.doctor import Finding, examine
from psproto import RELEASE
from psproto import ps_pb2 as pb
from psserver.errors import NotAShard

OWN = {"release", "number", "memory", "open files", "processor", "kernels", "disk", "fsync"}
LIVE = {"limits", "subscribers", "flush"}


def psctl(servers: list[str], *words: str) -> tuple[int, str]:
    """Run psctl doctor; return its exit status and output."""
    environment = {"PSCTL_SERVERS": ",".join(servers), "COLUMNS": "100"}
    done = CliRunner().invoke(ctl.app, ["doctor", *words], env=environment)
    return done.exit_code, done.output


def answering(**fields: Any) -> Any:
    """Return a method that answers Diagnose."""
    data = pb.DiagnoseResponse(**fields).SerializeToString()
    return {"InfoService/Diagnose": lambda _, __: data, "CheckpointService/Restore": idle}


def idle(_: bytes, __: Any) -> bytes:
    return bytes(pb.RestoreStatus().SerializeToString())


def only(found: list[Finding], check: str) -> Finding:
    [one] = [each for each in found if each.check == check]
    return one


def test_a_cluster_in_order(cluster2: Cluster) -> None:
    found = examine(cluster2.addresses)
    assert [each for each in found if each.state == "error"] == []
    for shard in range(2):
        checks = {each.check for each in found if each.shard == shard}
        assert OWN | LIVE | {"shard", "data directory", "clock", "time", "TLS"} == checks
    status, text = psctl(cluster2.addresses, "--json")
    listed = json.loads(text)
    assert status == Exit.OK
    assert [each["check"] for each in listed] == [each.check for each in found]
    assert set(listed[0]) == {"shard", "check", "state", "found", "advice"}
    status, text = psctl(cluster2.addresses)
    assert status == Exit.OK
    assert "0 errors" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_shard_that_is_gone(cluster1: Cluster) -> None:
    gone = f"127.0.0.1:{free_ports(1)}"
    status, text = psctl([*cluster1.addresses, gone], "--timeout", "2")
    assert status == Exit.UNREACHABLE
    assert text.startswith("error ")
    assert "What to do: check that its server runs" in text


def test_a_shard_in_a_wrong_place(cluster2: Cluster) -> None:
    status, text = psctl(cluster2.addresses[::-1], "--json")
    assert status == Exit.FAILED
    wrong = [each for each in json.loads(text) if each["state"] == "error"]
    assert [each["found"].split(":")[0] for each in wrong] == ["misplaced"] * 2


def test_a_name_that_is_gone_or_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    found = examine(["no.such.host.example:7000"], timeout=1.0)
    assert (only(found, "name").state, only(found, "shard").state) == ("error", "error")
    assert doctor._name("nonsense").state == "error"
    monkeypatch.setattr(doctor, "look_up", lambda _: time.sleep(0.6) or ["a", "b"])
    one = doctor._name("ps:7000")
    assert (one.state, "2 addresses" in one.found) == ("warning", True)


def test_different_releases() -> None:
    def shard(number: int, release: str) -> ShardStatus:
        return ShardStatus(shard=number, address="a:1", state="ready", release=release)

    assert doctor._releases([shard(0, RELEASE), shard(1, RELEASE)]).state == "ok"
    one = doctor._releases([shard(0, RELEASE), shard(1, "9.9")])
    assert (one.state, "9.9" in one.found) == ("warning", True)


def test_damaged_blocks() -> None:
    shard = ShardStatus(shard=1, address="a:1", state="ready", damaged_blocks=2)
    one = doctor._state(shard)
    assert (one.shard, one.state, "psctl verify" in one.advice) == (1, "error", True)


@pytest.mark.parametrize("state", doctor.ADVICE)
def test_every_state_that_is_not_ready_has_advice(state: str) -> None:
    one = doctor._state(ShardStatus(shard=0, address="a:1", state=state, problem="why"))
    assert (one.state, one.found) == ("error", f"{state}: why")
    assert one.advice


def test_what_a_shard_finds_is_an_error_of_the_cluster() -> None:
    finding = pb.Finding(
        check="memory", state=pb.Finding.STATE_ERROR, found="too little", advice="more"
    )
    with fake_server(answering(findings=[finding], time=time.time())) as address:
        found = examine([address])
        assert only(found, "memory") == Finding(0, "memory", "error", "too little", "more")
        assert psctl([address])[0] == Exit.FAILED


@pytest.mark.parametrize(
    ("ahead", "state"), [(0.0, "ok"), (-20.0, "warning"), (20.0, "warning"), (300.0, "error")]
)
def test_clocks_that_differ(ahead: float, state: str) -> None:
    with fake_server(answering(time=time.time() + ahead)) as address:
        assert only(examine([address]), "time").state == state


def test_a_server_of_an_older_release() -> None:
    told = pb.GetServerInfoResponse.FromString(info())
    told.release = "0.2.0"
    data = told.SerializeToString()
    methods = {"InfoService/GetServerInfo": lambda _, __: data, "CheckpointService/Restore": idle}
    with fake_server(methods) as address:
        found = examine([address])
    assert only(found, "release").state == "warning"
    one = only(found, "machine")
    assert (one.state, one.advice) == ("warning", doctor.UPGRADE)


def test_a_shard_whose_checks_take_long() -> None:
    methods = {"InfoService/Diagnose": lambda _, __: time.sleep(1) or b""}
    with fake_server(methods | {"CheckpointService/Restore": idle}) as address:
        one = only(examine([address], timeout=0.5), "machine")
    assert (one.state, one.advice) == ("warning", doctor.AGAIN)


def test_a_server_too_many_behind_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pod = Pod("127.0.0.9", free_ports(1), NotAShard(3, 1))
    with fake_server(answering(time=time.time())) as address:
        for module in (discovery, doctor):
            monkeypatch.setattr(module, "look_up", lambda _: [address, pod.address])
        shards = [(each.address, each.state) for each in status("ps.test:7000")]
        assert shards == [(address, "ready"), (pod.address, "misplaced")]
        [one] = [each for each in examine("ps.test:7000") if each.state == "error"]
    pod.stop()
    assert (one.shard, one.check) == (1, "shard")
    assert "this server has number 3, but the cluster has 1 shards" in one.found
    assert one.advice.startswith("start only as many servers as there are shards")


def test_a_socket_has_no_name_to_look_up(tmp_path: Path) -> None:
    found = examine([f"unix:{tmp_path}/socket"], timeout=0.5)
    assert [each.check for each in found] == ["shard", "release"]


# ---- live figures


def live(**fields: Any) -> pb.GetStatusResponse:
    """Return the live figures of a shard in order."""
    figures = pb.GetStatusResponse(phase=pb.PHASE_READY, shards=1, time=time.time())
    figures.storage.flush_age_seconds = 10
    figures.subscribers.subscribers = 0
    for name, value in fields.items():
        part, _, field = name.partition("__")
        setattr(getattr(figures, part) if field else figures, field or part, value)
    return figures


def findings(figures: pb.GetStatusResponse) -> dict[str, tuple[str, str]]:
    """Return {check: (state, facts)} of the findings. Those that are not ok have advice."""
    found = list(resources.examine(figures))
    assert all(bool(advice) == (state != "ok") for _, state, _, advice in found)
    return {check: (state, facts) for check, state, facts, _ in found}


def test_figures_of_a_shard_in_order() -> None:
    assert {check: state for check, (state, _) in findings(live()).items()} == dict.fromkeys(
        ("limits", "subscribers", "flush"), "ok"
    )


@pytest.mark.parametrize("name", [*resources.ADVICE, "host_bytes"])
def test_a_limit_that_is_nearly_reached(name: str) -> None:
    figures = live()
    if name == "host_bytes":
        figures.ClearField("storage")  # rows have no disk to go to
    budget = figures.budgets.add(name=name, used=89, limit=100)
    assert findings(figures)["limits"][0] == "ok"
    budget.used = 90
    state, facts = findings(figures)["limits"]
    assert (state, facts.startswith(f"{name}: 90")) == ("warning", True)


def test_memory_for_rows_may_be_full_if_they_have_a_disk() -> None:
    figures = live()
    figures.budgets.add(name="host_bytes", used=100, limit=100)
    figures.budgets.add(name="max_tables", used=5, limit=0)
    assert findings(figures)["limits"][0] == "ok"


@pytest.mark.parametrize(
    ("check", "fields", "state"),
    [
        ("flush", {"storage__flush_age_seconds": 901}, "warning"),
        ("flush", {"storage__flush_failure": "disk full"}, "error"),
        ("subscribers", {"subscribers__subscribers": 1, "subscribers__lag_seconds": 59}, "ok"),
        ("subscribers", {"subscribers__subscribers": 1, "subscribers__lag_seconds": 61}, "warning"),
        ("certificate", {"certificate_expires": time.time() + 15 * 86_400}, "ok"),
        ("certificate", {"certificate_expires": time.time() + 13 * 86_400}, "warning"),
        ("certificate", {"certificate_expires": time.time() - 1}, "error"),
    ],
)
def test_figures_that_are_out_of_order(check: str, fields: dict[str, float], state: str) -> None:
    assert findings(live(**fields))[check][0] == state


def test_the_thresholds_are_those_of_the_alerts() -> None:
    assert resources.LAG_SECONDS == thresholds.SUBSCRIBER_LAG_SECONDS
    assert resources.FLUSH_SECONDS == thresholds.FLUSH_SECONDS
    assert resources.CERTIFICATE_SECONDS == thresholds.CERTIFICATE_DAYS * 86_400
    assert pytest.approx(thresholds.MEMORY_HEADROOM) == 1 - resources.FULL


def test_doctor_reports_the_figures_of_a_ready_shard() -> None:
    figures = live(storage__flush_failure="disk full").SerializeToString()
    methods = answering(time=time.time()) | {"InfoService/GetStatus": lambda _, __: figures}
    with fake_server(methods) as address:
        assert only(examine([address]), "flush").state == "error"
        assert psctl([address])[0] == Exit.FAILED
