"""The simulator's kubelet starts, probes, restarts and stops containers as Kubernetes' own does."""

from __future__ import annotations

import itertools

import pytest
from fakenodes import FakeCluster, Object

from tests.deploy.simulator.objects import restarts_of
from tests.deploy.simulator.probing import Backoff, Probe, numbered


def pod(*, inits: int = 0, **fields: object) -> Object:
    """Return a pod with one container, which has no probe."""
    container = {"name": "main", **fields}
    spec: Object = {"containers": [container], "terminationGracePeriodSeconds": 30}
    spec["initContainers"] = [{"name": f"init{at}"} for at in range(inits)]
    return {"kind": "Pod", "metadata": {"name": "p", "uid": "u"}, "spec": spec}


def probe(service: str, **fields: object) -> Object:
    return {"grpc": {"port": 1, "service": service}, "periodSeconds": 1, **fields}


def phase(cluster: FakeCluster) -> str:
    return str(cluster.status("p")["phase"])


def restarts(cluster: FakeCluster) -> int:
    return restarts_of(cluster.control.get("Pod", "p"))


def test_a_startup_probe_holds_the_others_back_and_may_fail_for_its_whole_budget() -> None:
    asked: list[str] = []
    cluster = FakeCluster(
        pod(
            startupProbe=probe("start", failureThreshold=60),
            readinessProbe=probe("ready"),
            livenessProbe=probe("live", failureThreshold=1),
        )
    )

    def serves(_: list[str], age: float, service: str) -> bool:
        asked.append(service)
        return age > 50

    cluster.node.serves = serves
    cluster.run(49)
    assert set(asked) == {"start"}
    assert restarts(cluster) == 0
    cluster.run(6)
    assert set(asked) == {"start", "ready", "live"}
    assert cluster.control.get("Pod", "p")["status"]["conditions"][0]["status"] == "True"


def test_a_probe_may_give_its_port_by_name() -> None:
    probe = {"httpGet": {"port": "metrics", "path": "/livez"}, "periodSeconds": 2}
    container = {"ports": [{"name": "metrics", "containerPort": 9400}], "livenessProbe": probe}
    assert numbered(container, "livenessProbe") == {
        "httpGet": {"port": 9400, "path": "/livez"},
        "periodSeconds": 2,
    }
    assert probe["httpGet"] == {"port": "metrics", "path": "/livez"}
    with pytest.raises(KeyError):
        numbered({"livenessProbe": probe}, "livenessProbe")


def test_a_startup_probe_that_fails_too_often_restarts_the_container() -> None:
    cluster = FakeCluster(pod(startupProbe=probe("start", failureThreshold=5)))
    cluster.node.serves = lambda *_: False
    cluster.run(8)
    assert restarts(cluster) == 1


def test_a_liveness_probe_restarts_only_after_its_threshold() -> None:
    cluster = FakeCluster(pod(livenessProbe=probe("live", failureThreshold=3)))
    bad = itertools.cycle([True, False, False])
    cluster.node.serves = lambda *_: next(bad)
    cluster.run(30)
    assert restarts(cluster) == 0
    cluster.node.serves = lambda *_: False
    cluster.until(lambda: restarts(cluster) == 1, 5)


def test_a_pod_is_not_ready_after_failed_readiness_probes_and_is_not_restarted() -> None:
    cluster = FakeCluster(pod(readinessProbe=probe("ready", failureThreshold=3)))
    cluster.run(2)
    ready = cluster.kubelet.find("p").containers[0]
    assert ready.ready
    cluster.node.serves = lambda *_: False
    cluster.run(2)
    assert ready.ready
    cluster.run(3)
    assert not ready.ready
    assert restarts(cluster) == 0


def test_a_container_that_ends_is_started_again_with_growing_delays() -> None:
    cluster = FakeCluster(pod())
    for _ in range(4):
        cluster.until(lambda: cluster.node.processes.get("p", None) is not None)
        cluster.until(lambda: cluster.node.processes["p"].status is None)
        cluster.node.processes["p"].status = 1
        cluster.run(0.1)
    cluster.until(lambda: cluster.node.processes["p"].status is None)
    times = [at for at, *_ in cluster.node.starts]
    delays = [round(later - earlier) for earlier, later in itertools.pairwise(times)]
    assert delays == [0, 10, 20, 40]


def test_the_delay_is_forgotten_after_a_long_run() -> None:
    backoff = Backoff()
    delays = [backoff.delay(1.0) for _ in range(8)]
    assert delays == [0, 10, 20, 40, 80, 160, 300, 300]
    assert [backoff.delay(600.0), backoff.delay(1.0)] == [0, 10]


def test_init_containers_run_one_after_the_other_before_the_container() -> None:
    cluster = FakeCluster(pod(inits=2))
    for name in ("init0", "init1", "main"):
        cluster.until(
            lambda name=name: cluster.node.starts[-1:] != [] and cluster.node.starts[-1][2] == name
        )
        assert phase(cluster) == ("Running" if name == "main" else "Pending")
        cluster.run(1)
        cluster.node.processes["p"].status = 0
    assert [name for *_, name in cluster.node.starts] == ["init0", "init1", "main"]


def test_an_init_container_that_fails_is_started_again() -> None:
    cluster = FakeCluster(pod(inits=1))
    cluster.run(1)
    cluster.node.processes["p"].status = 1
    cluster.run(12)
    assert [name for *_, name in cluster.node.starts] == ["init0", "init0"]


def test_a_pod_waits_until_its_volumes_exist() -> None:
    cluster = FakeCluster(pod())
    cluster.node.blocked = "there is no ConfigMap c"
    cluster.run(5)
    assert phase(cluster) == "Pending"
    assert cluster.status("p")["reason"] == "there is no ConfigMap c"
    cluster.node.blocked = ""
    cluster.run(1)
    assert phase(cluster) == "Running"


@pytest.mark.parametrize(("takes", "ends"), [(3.0, 3), (100.0, 30)])
def test_a_deleted_pod_is_killed_after_its_grace_period(takes: float, ends: int) -> None:
    cluster = FakeCluster(pod())
    cluster.node.stops = takes
    cluster.run(1)
    process = cluster.node.processes["p"]
    cluster.control.delete("p")
    took = cluster.until(lambda: cluster.events()[-1:] == ["remove p"])
    assert round(took) == ends
    assert [name for _, name in process.signals] == ["TERM", "KILL"][: 1 if takes < 30 else 2]
    assert cluster.node.gone == ["p"]


def test_a_prestop_pause_counts_towards_the_grace_period() -> None:
    cluster = FakeCluster(pod(lifecycle={"preStop": {"sleep": {"seconds": 20}}}))
    cluster.node.stops = 100
    cluster.run(1)
    process, start = cluster.node.processes["p"], cluster.clock.now
    cluster.control.delete("p")
    cluster.until(lambda: cluster.events()[-1:] == ["remove p"])
    assert [(round(at - start), name) for at, name in process.signals] == [
        (20, "TERM"),
        (30, "KILL"),
    ]


def test_a_killed_container_is_replaced_in_the_same_pod() -> None:
    cluster = FakeCluster(pod())
    cluster.run(1)
    cluster.kubelet.find("p").kill()
    cluster.run(1)
    assert restarts(cluster) == 1
    assert cluster.events() == []


def test_a_pod_that_runs_once_succeeds_or_fails() -> None:
    for status, wanted in ((0, "Succeeded"), (3, "Failed")):
        once = pod()
        once["spec"]["restartPolicy"] = "Never"
        cluster = FakeCluster(once)
        cluster.run(1)
        cluster.node.processes["p"].status = status
        cluster.run(1)
        assert phase(cluster) == wanted


def test_a_probe_needs_as_many_good_results_in_a_row_as_its_threshold() -> None:
    counted = Probe({"successThreshold": 2, "failureThreshold": 2}, 0.0, passed=False)
    verdicts = []
    for good in (True, False, True, True, False, False):
        counted.record(good)
        verdicts.append(counted.passed)
    assert verdicts == [False, False, False, True, True, False]


def test_a_probe_waits_for_its_delay_and_then_for_its_period() -> None:
    counted = Probe({"initialDelaySeconds": 5, "periodSeconds": 10}, 100.0, passed=True)
    due = [at for at in range(100, 130) if counted.is_due(at)]
    assert due == [105, 115, 125]
