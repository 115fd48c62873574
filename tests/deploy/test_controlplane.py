"""The simulator's control plane does what Kubernetes' own does, in the same order."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
from fakenodes import FakeCluster, Object

from tests.deploy.simulator.controlplane import Refused
from tests.deploy.simulator.objects import labels_of, quantity, revision_of

LABELS = {"app": "ps"}


def stateful(policy: str = "Parallel", **spec: object) -> Object:
    """Return a StatefulSet of three pods that are ready when they answer as ready."""
    container = {
        "name": "psserver",
        "args": ["good"],
        "readinessProbe": {"grpc": {"port": 1, "service": "readiness"}, "periodSeconds": 1},
    }
    template = {
        "metadata": {"labels": LABELS},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 30},
    }
    claim = {"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOncePod"]}}
    base = {"replicas": 3, "serviceName": "ps", "podManagementPolicy": policy}
    base |= {"selector": {"matchLabels": LABELS}, "template": template, "minReadySeconds": 5}
    base |= {"volumeClaimTemplates": [claim], **spec}
    return {"kind": "StatefulSet", "metadata": {"name": "ps"}, "spec": base}


def service(always: bool) -> Object:
    spec = {"clusterIP": "None", "selector": LABELS, "publishNotReadyAddresses": always}
    return {"kind": "Service", "metadata": {"name": "ps"}, "spec": spec}


def budget(**spec: object) -> Object:
    full = {"selector": {"matchLabels": LABELS}, **spec}
    return {"kind": "PodDisruptionBudget", "metadata": {"name": "ps"}, "spec": full}


def with_arguments(*arguments: str) -> Callable[[Object], None]:
    def edit(one: Object) -> None:
        one["spec"]["template"]["spec"]["containers"][0]["args"] = list(arguments)

    return edit


@pytest.fixture
def cluster() -> FakeCluster:
    cluster = FakeCluster(stateful(), service(True), budget(maxUnavailable=1))
    cluster.node.serves = lambda arguments, *_: "broken" not in arguments
    cluster.settle()
    cluster.forget()
    return cluster


@pytest.fixture
def ordered() -> FakeCluster:
    cluster = FakeCluster(stateful("OrderedReady"), budget(maxUnavailable=1))
    cluster.node.serves = lambda arguments, *_: "broken" not in arguments
    cluster.settle()
    return cluster


def change(cluster: FakeCluster, *arguments: str) -> None:
    cluster.control.change("StatefulSet", "ps", with_arguments(*arguments))


def test_parallel_creates_all_pods_at_once() -> None:
    cluster = FakeCluster(stateful())
    cluster.run(0.1)
    assert cluster.events() == ["create ps-0", "create ps-1", "create ps-2"]


def test_ordered_waits_until_each_pod_is_available(ordered: FakeCluster) -> None:
    creates = [one.at for one in ordered.control.events if one.act == "create"]
    assert ordered.events() == ["create ps-0", "create ps-1", "create ps-2"]
    assert all(5 <= later - earlier < 8 for earlier, later in itertools.pairwise(creates))


def test_a_pod_has_its_ordinal_names_and_claims(cluster: FakeCluster) -> None:
    pod = cluster.control.get("Pod", "ps-2")
    assert labels_of(pod)["apps.kubernetes.io/pod-index"] == "2"
    assert pod["metadata"]["namespace"] == "ps"
    assert (pod["spec"]["hostname"], pod["spec"]["subdomain"]) == ("ps-2", "ps")
    claimed = {"name": "data", "persistentVolumeClaim": {"claimName": "data-ps-2"}}
    assert pod["spec"]["volumes"] == [claimed]
    assert cluster.control.get("PersistentVolumeClaim", "data-ps-2")


@pytest.mark.parametrize("policy", ["Parallel", "OrderedReady"])
def test_an_update_goes_from_the_highest_pod_to_the_lowest_one_at_a_time(policy: str) -> None:
    cluster = FakeCluster(stateful(policy))
    cluster.settle()
    cluster.forget()
    cluster.control.restart("ps")
    cluster.settle()
    wanted = [f"{act} ps-{at}" for at in (2, 1, 0) for act in ("delete", "remove", "create")]
    assert cluster.events() == wanted
    deletes = [one.at for one in cluster.control.events if one.act == "delete"]
    assert all(later - earlier >= 6 for earlier, later in itertools.pairwise(deletes))


def test_an_update_leaves_pods_below_the_partition_on_the_old_revision(
    cluster: FakeCluster,
) -> None:
    old = revision_of(cluster.control.get("Pod", "ps-0"))
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"partition": 2}}
    cluster.control.change(
        "StatefulSet", "ps", lambda one: one["spec"].update(updateStrategy=rolling)
    )
    change(cluster, "good", "new")
    cluster.settle()
    assert cluster.events() == ["delete ps-2", "remove ps-2", "create ps-2"]
    cluster.control.delete("ps-0")  # it comes back as it was
    cluster.run(1.5)
    cluster.settle()
    revisions = [revision_of(cluster.control.get("Pod", f"ps-{at}")) for at in range(3)]
    assert revisions[0] == revisions[1] == old != revisions[2]


def test_an_update_stops_at_a_pod_that_does_not_become_ready(cluster: FakeCluster) -> None:
    change(cluster, "broken")
    cluster.run(100)
    assert cluster.events() == ["delete ps-2", "remove ps-2", "create ps-2"]


def test_undo_replaces_a_broken_pod_at_once_if_parallel(cluster: FakeCluster) -> None:
    change(cluster, "broken")
    cluster.run(20)
    cluster.forget()
    cluster.control.undo("ps")
    cluster.settle()
    assert cluster.events() == ["delete ps-2", "remove ps-2", "create ps-2"]
    assert cluster.control.get("Pod", "ps-2")["spec"]["containers"][0]["args"] == ["good"]


def test_undo_is_not_enough_if_ordered_until_the_broken_pod_is_deleted(
    ordered: FakeCluster,
) -> None:
    change(ordered, "broken")
    ordered.run(20)
    ordered.forget()
    ordered.control.undo("ps")
    ordered.run(60)
    assert ordered.events() == []
    ordered.control.delete("ps-2")
    ordered.settle()
    assert ordered.events() == ["delete ps-2", "remove ps-2", "create ps-2"]


def test_undo_of_an_undo_returns_to_the_newer_revision(cluster: FakeCluster) -> None:
    change(cluster, "good", "new")
    cluster.settle()
    cluster.control.undo("ps")
    cluster.settle()
    cluster.control.undo("ps")
    cluster.settle()
    assert cluster.control.get("Pod", "ps-0")["spec"]["containers"][0]["args"] == ["good", "new"]


def test_scaling_down_deletes_the_highest_pods_and_keeps_their_claims(cluster: FakeCluster) -> None:
    cluster.control.scale("ps", 1)
    cluster.settle()
    assert cluster.events()[:2] == ["delete ps-2", "delete ps-1"]
    assert sorted(cluster.events()[2:]) == ["remove ps-1", "remove ps-2"]
    assert cluster.control.get("PersistentVolumeClaim", "data-ps-2")


def test_the_first_eviction_is_allowed_and_the_second_refused(cluster: FakeCluster) -> None:
    cluster.control.evict("ps-0")
    with pytest.raises(Refused, match="429"):
        cluster.control.evict("ps-1")
    cluster.run(0.5)  # the first pod still stops
    with pytest.raises(Refused, match="429"):
        cluster.control.evict("ps-1")
    cluster.run(1)
    cluster.settle()
    cluster.control.evict("ps-1")


@pytest.mark.parametrize(
    ("spec", "allowed"),
    [
        ({"maxUnavailable": 1}, False),
        ({"maxUnavailable": 1, "unhealthyPodEvictionPolicy": "AlwaysAllow"}, True),
        ({"minAvailable": 2}, True),
        ({"minAvailable": "100%"}, False),
    ],
)
def test_a_broken_pod_can_be_evicted_if_the_budget_says_so(spec: Object, allowed: bool) -> None:
    cluster = FakeCluster(stateful(), budget(**spec))
    cluster.node.serves = lambda arguments, *_: "broken" not in arguments
    cluster.settle()
    change(cluster, "broken")
    cluster.run(20)
    if spec == {"maxUnavailable": 1}:  # healthy pods: 2, as many as desired, so that it is allowed
        cluster.control.delete("ps-1")
        cluster.run(5)
    if allowed:
        cluster.control.evict("ps-2")
    else:
        with pytest.raises(Refused, match="429"):
            cluster.control.evict("ps-2")


@pytest.mark.parametrize("always", [True, False])
def test_names_have_addresses_of_ready_pods_or_of_all(always: bool) -> None:
    cluster = FakeCluster(stateful(), service(always))
    cluster.node.serves = lambda *_: False
    cluster.run(5)
    zone = "ps.ps.svc.cluster.local"
    names = cluster.control.names()
    assert len(names[zone]) == (3 if always else 0)
    assert (f"ps-1.{zone}" in names) == always
    cluster.node.serves = lambda *_: True
    cluster.settle()
    addresses = cluster.control.names()[zone]
    cluster.control.delete("ps-1")
    cluster.run(0.5)  # it still runs
    assert len(cluster.control.names()[zone]) == (3 if always else 2)
    cluster.settle()
    assert set(cluster.control.names()[zone]) - set(addresses) == {"10.0.0.4"}


def test_a_pod_has_no_name_of_its_own_below_a_different_service() -> None:
    cluster = FakeCluster(stateful(serviceName="other"), service(True))
    cluster.settle()
    assert list(cluster.control.names()) == ["ps.ps.svc.cluster.local"]


@pytest.mark.parametrize("field", ["serviceName", "podManagementPolicy", "volumeClaimTemplates"])
def test_fields_of_a_set_that_cannot_change_are_refused(cluster: FakeCluster, field: str) -> None:
    changed = copy.deepcopy(stateful())
    changed["spec"][field] = "other"
    with pytest.raises(Refused, match=f"422: spec.{field}"):
        cluster.control.apply([changed])


def test_a_selector_that_does_not_match_is_refused() -> None:
    with pytest.raises(Refused, match="the labels of spec"):
        FakeCluster(stateful(selector={"matchLabels": {"app": "other"}}))


def test_force_deletion_replaces_a_pod_whose_node_is_lost(cluster: FakeCluster) -> None:
    cluster.kubelet.find("ps-1").lose()
    cluster.control.delete("ps-1")
    cluster.run(120)
    assert cluster.events() == ["delete ps-1"]  # nobody reports its end
    cluster.control.delete("ps-1", grace=0)
    cluster.settle()
    assert cluster.events() == ["delete ps-1", "remove ps-1", "create ps-1"]


def test_a_cordoned_node_keeps_new_pods_pending(cluster: FakeCluster) -> None:
    cluster.kubelet.cordoned = True
    cluster.control.delete("ps-1")
    cluster.run(30)
    assert "podIP" not in cluster.status("ps-1")
    assert "ps-1.ps.ps.svc.cluster.local" not in cluster.control.names()
    cluster.kubelet.cordoned = False
    cluster.settle()


def test_quantities_are_bytes() -> None:
    assert [quantity(one) for one in ("1Gi", "1.5Mi", "2k", 7)] == [1 << 30, 3 << 19, 2000, 7]
    with pytest.raises(ValueError, match="8GB"):
        quantity("8GB")
