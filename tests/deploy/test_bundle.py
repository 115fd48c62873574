"""What the simulator tells runc is what the manifest says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.image import Image
from tests.deploy.simulator.bundle import CannotRun, Place, configuration
from tests.deploy.simulator.objects import Object

IMAGE = Image("id", ["psserver"], ["serve"], ["PATH=/bin"], (10001, 10002))
PLACE = Place("net", "10.0.0.9", {"data": Path("/d")}, Path("/root"), Path("/resolv"), "/g")


def pod(**security: object) -> Object:
    metadata = {"name": "ps-1", "namespace": "ps", "uid": "u"}
    metadata |= {"labels": {"apps.kubernetes.io/pod-index": "1"}}  # type: ignore[dict-item]
    return {"metadata": metadata, "spec": {"securityContext": security}}


def made(container: Object, **security: object) -> Object:
    return configuration(pod(**security), {"name": "c", **container}, IMAGE, PLACE)


def test_the_image_names_the_user_unless_the_pod_does() -> None:
    user = made({})["process"]["user"]
    assert user == {"uid": 10001, "gid": 10002, "additionalGids": []}
    named = {"runAsUser": 5, "runAsGroup": 6, "fsGroup": 7}
    assert made({}, **named)["process"]["user"] == {"uid": 5, "gid": 6, "additionalGids": [7]}
    own = made({"securityContext": {"runAsUser": 8}}, **named)
    assert own["process"]["user"]["uid"] == 8


def test_root_is_refused_if_the_pod_must_not_run_as_root() -> None:
    with pytest.raises(CannotRun, match="user 0"):
        made({}, runAsNonRoot=True, runAsUser=0)


def test_a_locked_container_has_no_capability_and_a_read_only_root() -> None:
    locked = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True}
    found = made({"securityContext": {**locked, "capabilities": {"drop": ["ALL"]}}})
    assert set(map(len, found["process"]["capabilities"].values())) == {0}
    assert found["process"]["noNewPrivileges"] is True
    assert found["root"]["readonly"] is True
    loose = made({})
    assert "CAP_CHOWN" in loose["process"]["capabilities"]["bounding"]
    assert loose["process"]["noNewPrivileges"] is False
    assert loose["root"]["readonly"] is False


@pytest.mark.parametrize(
    ("container", "words"),
    [
        ({}, ["psserver", "serve"]),
        ({"args": ["warm"]}, ["psserver", "warm"]),
        ({"command": ["psctl"]}, ["psctl"]),
        ({"command": ["psctl"], "args": ["status"]}, ["psctl", "status"]),
    ],
)
def test_a_command_replaces_the_entrypoint_and_the_arguments(
    container: Object, words: list[str]
) -> None:
    assert made(container)["process"]["args"] == words


def test_variables_refer_to_fields_and_to_earlier_variables() -> None:
    index = {"fieldRef": {"fieldPath": "metadata.labels['apps.kubernetes.io/pod-index']"}}
    space = {"fieldRef": {"fieldPath": "metadata.namespace"}}
    variables = [
        {"name": "SHARD", "valueFrom": index},
        {"name": "SPACE", "valueFrom": space},
        {"name": "CLUSTER", "value": "$(SPACE)/ps-$(SHARD)"},
    ]
    found = made({"env": variables})["process"]["env"]
    assert found[-3:] == ["SHARD=1", "SPACE=ps", "CLUSTER=ps/ps-1"]
    unknown = {"name": "X", "valueFrom": {"fieldRef": {"fieldPath": "metadata.index"}}}
    with pytest.raises(CannotRun, match="unknown field"):
        made({"env": [unknown]})


def test_limits_become_limits_of_the_control_group() -> None:
    resources = {"limits": {"memory": "1Gi", "cpu": "500m"}, "requests": {"cpu": "2"}}
    found = made({"resources": resources})["linux"]["resources"]
    assert found["memory"] == {"limit": 1 << 30}
    assert found["cpu"] == {"shares": 2048, "period": 100_000, "quota": 50_000}


def test_volumes_are_mounted_and_unknown_ones_refused() -> None:
    mounts = [{"name": "data", "mountPath": "/data", "readOnly": True}]
    last = made({"volumeMounts": mounts})["mounts"][-1]
    assert (last["source"], last["destination"], last["options"]) == (
        "/d",
        "/data",
        ["rbind", "ro"],
    )
    with pytest.raises(CannotRun, match="other"):
        made({"volumeMounts": [{"name": "other", "mountPath": "/other"}]})
