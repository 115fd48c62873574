"""Three shards run from the manifests, and a trainer works while things happen that clusters do.

In each test a trainer pushes known gradients. It must see no error, and at the end all sums must be
exact. Needs root, runc and buildah; where they are missing, the tests are skipped, except in CI.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checks_changes import refused
from crosscheck import problems
from mutations import RUNNING
from schema import violations

from psclient.discovery import LOOK_SECONDS
from psclient.retry import LONGEST_PAUSE
from tests.deploy import image
from tests.deploy.simulator.controlplane import Refused
from tests.deploy.simulator.objects import Object, is_ready, phase_of, restarts_of
from tests.deploy.simulator.pods import Simulator, rendered
from tests.deploy.simulator.training import Trainer, run_once

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONNECT = 1.0  # seconds: grpc.max_reconnect_backoff_ms of the client
# Seconds that a stall may be longer than the shard was away: in the worst case, the client connects
# in vain, looks the name up, asks the address, and pauses before its next attempt.
EXTRA = CONNECT + 2 * LOOK_SECONDS + LONGEST_PAUSE
DISK = 256  # mebibytes of the disk of shard 1
PULL = (
    "from psclient import Client; print(Client('ps:7000').table('full').pull([1, 2, 3, 4]).shape)"
)
LOST = 20.0  # seconds after which clients and servers know that a node is lost


@pytest.fixture(scope="module")
def pods() -> Iterator[Simulator]:
    reason = image.missing()
    if reason and not os.environ.get("CI"):
        pytest.skip(f"pods: {reason}")
    image.build()
    with Simulator(sizes={"data-ps-1": DISK}) as simulator:
        simulator.apply(prepared(rendered("laptop")))
        simulator.wait("three shards serve", lambda: settled(simulator), 180)
        yield simulator


def prepared(objects: list[Object]) -> list[Object]:
    """Make shards that can be slowed down at their start, and that soon notice a full disk.

    A shard reserves space for the log in units of segment_bytes.
    """
    script = Path(__file__).with_name("slowstart") / "sitecustomize.py"
    data = {script.name: script.read_text()}
    for one in objects:
        if one["kind"] == "ConfigMap" and "psserver.toml" in one["data"]:
            one["data"]["psserver.toml"] += f"segment_bytes = {1 << 20}\n"
        if one["kind"] == "StatefulSet":
            spec = one["spec"]["template"]["spec"]
            container = spec["containers"][0]
            container["env"].append({"name": "PYTHONPATH", "value": "/slowstart"})
            container["volumeMounts"].append({"name": "slowstart", "mountPath": "/slowstart"})
            spec["volumes"].append({"name": "slowstart", "configMap": {"name": "slowstart"}})
    return [*objects, {"kind": "ConfigMap", "metadata": {"name": "slowstart"}, "data": data}]


def settled(pods: Simulator) -> bool:
    return pods.control.is_rolled_out("ps")


def wait_until_settled(pods: Simulator) -> None:
    time.sleep(0.3)  # until the control plane has seen what was just done
    pods.wait("all shards serve again", lambda: settled(pods), 200)


def restarts(pods: Simulator, name: str) -> int:
    return restarts_of(pods.control.get("Pod", name))


def away(pods: Simulator, name: str, since: float) -> tuple[float, float]:
    """Return (when a pod stopped, when it was ready again) after a time."""
    events = [one for one in pods.control.events if one.name == name and one.at >= since]
    stopped = next(one.at for one in events if one.act in ("delete", "remove", "unready"))
    return stopped, [one.at for one in events if one.act == "ready"][-1]


def check(trainer: Trainer) -> None:
    report = trainer.report
    assert report.errors == []
    assert report.exact, f"{report.off} rows have wrong sums"


def test_a_pod_is_locked_as_its_manifest_says_and_compiles_nothing(pods: Simulator) -> None:
    said = pods.execute("ps-0", "sh", "-c", "id -u; id -g; id -G; cat /proc/1/status; touch /x")
    lines = said.stdout.splitlines()
    assert lines[:3] == ["10001", "10001", "10001"]
    status = dict(line.split(":", 1) for line in lines[3:])
    assert {status[f"Cap{one}"].strip() for one in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {
        "0" * 16
    }
    assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")
    assert "Read-only file system" in said.stderr
    warm = pods.execute("ps-0", "psserver", "warm", "--check")
    assert warm.returncode == 0, warm.stdout + warm.stderr
    assert '"compiled": 0' in pods.log("ps-0")


def test_the_demo_runs_from_the_image_against_the_pods(pods: Simulator) -> None:
    servers = ",".join(f"ps-{at}.ps:7000" for at in range(3))
    command = ["python", "/opt/ps/examples/clickstream.py", "--servers", servers]
    command += ["--steps", "200", "--batch", "512", "--min-share", "0.3"]
    pods.apply(run_once("demo", command))
    over = ("Succeeded", "Failed")
    pods.wait("the demo has ended", lambda: phase_of(pods.control.get("Pod", "demo")) in over, 120)
    assert phase_of(pods.control.get("Pod", "demo")) == "Succeeded", pods.log("demo")
    assert "share (AUC - 0.5) / (best - 0.5)" in pods.log("demo")
    pods.control.delete("demo")


def test_a_rolling_restart_stalls_each_shard_only_while_it_restarts(pods: Simulator) -> None:
    before = [pods.control.get("Pod", f"ps-{at}")["metadata"]["uid"] for at in range(3)]
    with Trainer(pods, "rolling") as trainer:
        start = time.monotonic()
        pods.control.restart("ps")
        wait_until_settled(pods)
    after = [pods.control.get("Pod", f"ps-{at}")["metadata"]["uid"] for at in range(3)]
    assert not set(before) & set(after)
    deleted = [one.name for one in pods.control.events if one.act == "delete" and one.at >= start]
    assert deleted[:3] == ["ps-2", "ps-1", "ps-0"]
    check(trainer)
    for name in deleted[:3]:
        stopped, ready = away(pods, name, start)
        assert trainer.report.stall(stopped - 1, ready + EXTRA) <= ready - stopped + EXTRA


def test_a_killed_and_an_evicted_pod_come_back(pods: Simulator) -> None:
    count = restarts(pods, "ps-0")
    with Trainer(pods, "killed") as trainer:
        start = time.monotonic()
        pods.kill("ps-0")
        pods.wait("ps-0 was restarted", lambda: restarts(pods, "ps-0") == count + 1)
        wait_until_settled(pods)
        middle = time.monotonic()
        pods.control.evict("ps-1")
        with pytest.raises(Refused, match="429"):
            pods.control.evict("ps-2")
        wait_until_settled(pods)
    check(trainer)
    for name, since in (("ps-0", start), ("ps-1", middle)):
        stopped, ready = away(pods, name, since)
        assert trainer.report.stall(stopped - 1, ready + EXTRA) <= ready - stopped + EXTRA


def test_a_lost_node_is_survived_after_its_pod_was_deleted_by_force(pods: Simulator) -> None:
    with Trainer(pods, "lost") as trainer:
        start = time.monotonic()
        pods.lose("ps-1")
        time.sleep(1)
        pods.control.delete("ps-1", grace=0)
        wait_until_settled(pods)
        _, ready = away(pods, "ps-1", start)
        time.sleep(max(0.0, start + LOST - time.monotonic()))
    check(trainer)
    longest = max(LOST, ready - start) + EXTRA
    assert trainer.report.stall(start - 1, ready + EXTRA) <= longest


def test_a_name_that_is_gone_for_a_minute_and_a_recovery_longer_than_every_probe_allows(
    pods: Simulator,
) -> None:
    """Shard 2 has no pod for a minute. Meanwhile shard 0 recovers for longer than that."""
    mark = pods.volumes.claim("ps-checkpoints-laptop") / "slow-0"
    with Trainer(pods, "gone") as trainer:
        start = time.monotonic()
        mark.touch()
        pods.control.delete("ps-0")
        pods.wait("ps-0 stops", lambda: "ps-0" not in running(pods))
        pods.wait("ps-0 recovers", lambda: "ps-0" in running(pods), 120)
        pods.cordon()
        pods.control.delete("ps-2")
        pods.wait("ps-2 is pending", lambda: "ps-2.ps.ps.svc.cluster.local" not in names(pods))
        time.sleep(60)
        pods.cordon(False)
        pods.wait("ps-2 is ready", lambda: is_ready(pods.control.get("Pod", "ps-2")), 120)
        pods.wait("ps-0 is ready", lambda: is_ready(pods.control.get("Pod", "ps-0")), 120)
        ready = time.monotonic()
        assert ready - start > 70
        assert [restarts(pods, name) for name in ("ps-0", "ps-2")] == [0, 0]
        time.sleep(EXTRA + 1)
        mark.unlink()
    check(trainer)
    ends = [at + took for at, took in trainer.report.stalls]
    assert all(end <= ready + EXTRA for end in ends)
    wait_until_settled(pods)


def names(pods: Simulator) -> set[str]:
    return {name for name, addresses in pods.control.names().items() if addresses}


def test_a_broken_revision_stops_at_one_shard_and_can_be_undone(pods: Simulator) -> None:
    def breaks(one: Object) -> None:
        one["spec"]["template"]["spec"]["containers"][0]["args"] = ["serve", "--no-such-flag"]

    with Trainer(pods, "broken") as trainer:
        pods.control.change("StatefulSet", "ps", breaks)
        pods.wait("ps-2 fails again and again", lambda: fails(pods, "ps-2"))
        assert [restarts(pods, name) for name in ("ps-0", "ps-1")] == [0, 0]
        pods.control.undo("ps")
        wait_until_settled(pods)
    check(trainer)


def fails(pods: Simulator, name: str) -> bool:
    try:
        return restarts(pods, name) >= 2
    except Refused:  # the pod is just being replaced
        return False


def test_a_pod_beyond_the_shards_stays_not_ready_and_disturbs_nobody(pods: Simulator) -> None:
    with Trainer(pods, "scaled") as trainer:
        pods.control.scale("ps", 4)
        pods.wait("ps-3 runs", lambda: "ps-3" in running(pods), 120)
        time.sleep(10)
        pod = pods.control.get("Pod", "ps-3")
        assert not is_ready(pod)
        assert restarts_of(pod) == 0
        assert "checkpoint" in pods.log("ps-3")
        pods.control.scale("ps", 3)
        pods.wait("ps-3 is gone", lambda: "ps-3" not in running(pods))
    check(trainer)  # a trainer that followed the pod would have stalled while it was there, 10 s
    assert all(took < EXTRA for _, took in trainer.report.stalls)


def running(pods: Simulator) -> set[str]:
    started = [one for one in pods.control.snapshot() if "status" in one]
    return {
        one["metadata"]["name"]
        for one in started
        if any(each["started"] for each in one["status"]["containerStatuses"])
    }


def test_a_full_disk_stalls_pushes_until_space_is_free_even_over_a_restart(pods: Simulator) -> None:
    filler = pods.volumes.claim("data-ps-1") / "filler"
    try:
        with Trainer(pods, "full") as trainer:
            subprocess.run(
                ["dd", "if=/dev/zero", f"of={filler}", "bs=64k"], check=False, capture_output=True
            )
            full = time.monotonic()
            pods.wait("shard 1 refuses pushes", trainer.is_waiting, 60)
            pods.kill("ps-1")
            time.sleep(0.3)
            pods.wait("ps-1 is ready", lambda: is_ready(pods.control.get("Pod", "ps-1")), 60)
            assert trainer.is_waiting()
            pulled = pods.execute("ps-1", "python", "-c", PULL)
            assert pulled.returncode == 0, pulled.stdout + pulled.stderr
            filler.unlink()
            freed = time.monotonic()
            time.sleep(5)
        check(trainer)
        assert trainer.report.stall(full - 1, freed) >= 1
        assert all(at + took <= freed + EXTRA + 2 for at, took in trainer.report.stalls)
    finally:
        filler.unlink(missing_ok=True)
    wait_until_settled(pods)


@pytest.mark.parametrize("name", RUNNING)
def test_what_no_check_of_the_manifests_finds_stops_at_the_first_pod(
    pods: Simulator, name: str
) -> None:
    mutate, said = RUNNING[name]
    good, bad = rendered("laptop"), rendered("laptop")
    mutate(bad)
    assert (violations(bad), problems(bad), refused(good, bad)) == ([], [], [])
    counts = [restarts(pods, each) for each in ("ps-0", "ps-1")]
    before, mark = pods.control.get("Pod", "ps-2")["metadata"]["uid"], len(pods.log("ps-2"))

    def shown() -> bool:
        try:
            if pods.control.get("Pod", "ps-2")["metadata"]["uid"] == before:
                return False
            checked = pods.execute("ps-2", "psserver", "warm", "--check")
        except (LookupError, Refused):  # it is just being replaced
            return False
        return said in pods.log("ps-2")[mark:] + checked.stderr

    with Trainer(pods, f"mutated-{list(RUNNING).index(name)}") as trainer:
        pods.apply(prepared(bad))
        pods.wait(f"ps-2 says: {said}", shown, 200)
        assert [restarts(pods, each) for each in ("ps-0", "ps-1")] == counts
        pods.apply(prepared(good))
        pods.control.delete("ps-2", grace=0)  # it may ignore SIGTERM while it compiles
        wait_until_settled(pods)
    check(trainer)
