"""Broken variants of the manifests. Each must be caught before it reaches a cluster.

A mutation is a function that breaks a list of objects in place. MUTATIONS has, for each, its name
and the check that must catch it: SCHEMA, CROSS or CHANGE. RUNNING has those that no check of text
sees; only running them shows the fault (test_pods.py).

    SCHEMA  the JSON schema of Kubernetes, in strict mode
    CROSS   crosscheck.problems
    CHANGE  checks_changes.refused: applying it where the correct manifest runs is refused
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from checks_objects import config_hash
from rendering import Object, only

SCHEMA, CROSS, CHANGE = "schema", "cross-check", "change check"
Mutation = Callable[[list[Object]], object]
Part = dict[str, Any]


def _spec(change: Callable[[Part], object]) -> Mutation:
    """Return the mutation that changes the spec of the StatefulSet."""
    return lambda objects: change(only(objects, "StatefulSet")["spec"])


def _pod(change: Callable[[Part], object]) -> Mutation:
    """Return the mutation that changes the spec of the pods."""
    return _spec(lambda spec: change(spec["template"]["spec"]))


def _container(change: Callable[[Part], object]) -> Mutation:
    """Return the mutation that changes the container of the pods."""
    return _pod(lambda pod: change(pod["containers"][0]))


def _of(kind: str, change: Callable[[Part], object]) -> Mutation:
    """Return the mutation that changes the only object of a kind."""
    return lambda objects: change(only(objects, kind))


def _volume(pod: Part, name: str) -> Part:
    (found,) = (each for each in pod["volumes"] if each["name"] == name)
    assert isinstance(found, dict)
    return found


def _secret(mode: int, **mount: Any) -> Mutation:
    """Return the mutation that mounts one more Secret.

    mount  further fields of the volumeMount
    """

    def change(pod: Part) -> None:
        secret = {"secretName": "more", "defaultMode": mode}
        pod["volumes"].append({"name": "more", "secret": secret})
        mounts = pod["containers"][0]["volumeMounts"]
        mounts.append({"name": "more", "mountPath": "/more", **mount})

    return _pod(change)


def _settings(old: str, new: str) -> Mutation:
    """Return the mutation that replaces a text in psserver.toml."""

    def change(objects: list[Object]) -> None:
        (config,) = (each for each in objects if "psserver.toml" in each.get("data", {}))
        assert old in config["data"]["psserver.toml"]
        config["data"]["psserver.toml"] = config["data"]["psserver.toml"].replace(old, new)

    return change


MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "misspelled field": (_pod(lambda p: p.update(terminationGracePeriodSecond=3)), SCHEMA),
    "selector does not match the pods": (
        _spec(lambda s: s["selector"]["matchLabels"].update({"app.kubernetes.io/name": "x"})),
        CROSS,
    ),
    "mount of an unknown volume": (
        _container(lambda c: c["volumeMounts"].append({"name": "no", "mountPath": "/n"})),
        CROSS,
    ),
    "volume of an unknown ConfigMap": (
        _pod(lambda p: _volume(p, "config")["configMap"].update(name="no")),
        CROSS,
    ),
    "two mounts at one path": (
        _container(lambda c: c["volumeMounts"].append({"name": "tmp", "mountPath": "/data"})),
        CROSS,
    ),
    "two ports with one name": (
        _container(lambda c: c["ports"].append({"name": "grpc", "containerPort": 7001})),
        CROSS,
    ),
    "port name of more than 15 characters": (
        _container(lambda c: c["ports"].append({"name": "replication-port", "containerPort": 1})),
        CROSS,
    ),
    "quantity with the unit GB": (
        _container(lambda c: c["resources"]["limits"].update(memory="8GB")),
        CROSS,
    ),
    "request above the limit": (
        _container(lambda c: c["resources"]["requests"].update(memory="9Gi")),
        CROSS,
    ),
    "probe with two handlers": (
        _container(lambda c: c["readinessProbe"].update(tcpSocket={"port": 9400})),
        CROSS,
    ),
    "liveness needs two successes": (
        _container(lambda c: c["livenessProbe"].update(successThreshold=2)),
        CROSS,
    ),
    "variable from a field that pods do not have": (
        _container(
            lambda c: c["env"].append(
                {
                    "name": "PSCONFIG_PORT",
                    "valueFrom": {"fieldRef": {"fieldPath": "metadata.index"}},
                }
            )
        ),
        CROSS,
    ),
    "sleep before stopping longer than the grace period": (
        _container(lambda c: c.update(lifecycle={"preStop": {"sleep": {"seconds": 500}}})),
        CROSS,
    ),
    "claim with ReadWriteOncePod and another access mode": (
        _spec(
            lambda s: s["volumeClaimTemplates"][0]["spec"].update(
                accessModes=["ReadWriteOncePod", "ReadWriteOnce"]
            )
        ),
        CROSS,
    ),
    "pods are never restarted": (_pod(lambda p: p.update(restartPolicy="Never")), CROSS),
    "root in a restricted namespace": (
        _pod(lambda p: p["securityContext"].update(runAsNonRoot=False, runAsUser=0)),
        CROSS,
    ),
    "capabilities in a restricted namespace": (
        _container(lambda c: c["securityContext"].update(capabilities={"drop": []})),
        CROSS,
    ),
    "serviceName of no service": (_spec(lambda s: s.update(serviceName="no")), CROSS),
    "disruption budget with minimum and maximum": (
        _of("PodDisruptionBudget", lambda d: d["spec"].update(minAvailable=2)),
        CROSS,
    ),
    "misspelled eviction policy": (
        _of("PodDisruptionBudget", lambda d: d["spec"].update(unhealthyPodEvictionPolicy="Always")),
        CROSS,
    ),
    "network policy for an unknown port": (
        _of("NetworkPolicy", lambda d: d["spec"]["ingress"][0]["ports"][0].update(port="grcp")),
        CROSS,
    ),
    "service with an unknown targetPort": (
        _of("Service", lambda d: d["spec"]["ports"][0].update(targetPort="grcp")),
        CROSS,
    ),
    "label value with a space": (
        _of("StatefulSet", lambda d: d["metadata"]["labels"].update(a="b c")),
        CROSS,
    ),
    # faults of this server
    "liveness depends on recovery": (
        _container(lambda c: c["livenessProbe"]["httpGet"].update(path="/readyz")),
        CROSS,
    ),
    "probe for a page that the server does not have": (
        _container(lambda c: c["readinessProbe"]["httpGet"].update(path="/ready")),
        CROSS,
    ),
    "probe of the port with TLS": (
        _container(lambda c: c["readinessProbe"]["httpGet"].update(port="grpc")),
        CROSS,
    ),
    "neither TLS nor permission for plaintext": (
        _container(
            lambda c: c.update(
                env=[e for e in c["env"] if "PLAINTEXT" not in e["name"] and "TLS" not in e["name"]]
            )
        ),
        CROSS,
    ),
    "Secret that every user of the pod can read": (_secret(0o444, readOnly=True), CROSS),
    "Secret that the server can write": (_secret(0o440), CROSS),
    "Secret in a variable": (
        _container(
            lambda c: c["env"].append(
                {"name": "WORD", "valueFrom": {"secretKeyRef": {"name": "x", "key": "y"}}}
            )
        ),
        CROSS,
    ),
    "password in a ConfigMap": (_settings("file:///", "ftp://user:s3cret@host/"), CROSS),
    "more pods than shards": (_spec(lambda s: s.update(replicas=4)), CROSS),
    "memory limit that leaves nothing for tables": (
        _container(
            lambda c: [c["resources"][of].update(memory="384Mi") for of in ("limits", "requests")]
        ),
        CROSS,
    ),
    "setting with an unknown name": (_settings("drain_seconds", "drain_second"), CROSS),
    "settings changed without a new ConfigMap": (_settings("30.0", "31.0"), CROSS),
    "draining takes longer than the grace period": (
        _pod(lambda p: p.update(terminationGracePeriodSeconds=30)),
        CROSS,
    ),
    "server listens on another port": (_settings("port = 7000", "port = 7007"), CROSS),
    "unknown variable for the server": (
        _container(lambda c: c["env"].append({"name": "PSCONFIG_SHARD_COUNT", "value": "3"})),
        CROSS,
    ),
    "data on a volume that is lost with the pod": (
        _container(
            lambda c: [
                mount.update(name={"data": "tmp", "tmp": "data"}.get(mount["name"], mount["name"]))
                for mount in c["volumeMounts"]
            ]
        ),
        CROSS,
    ),
    "service without the addresses of pods that recover": (
        _of("Service", lambda d: d["spec"].update(publishNotReadyAddresses=False)),
        CROSS,
    ),
    "disruption budget for the pods of another release": (
        _of(
            "PodDisruptionBudget",
            lambda d: d["spec"]["selector"]["matchLabels"].update(
                {"app.kubernetes.io/instance": "other"}
            ),
        ),
        CROSS,
    ),
    "startup probe too short for a recovery": (
        _container(lambda c: c["startupProbe"].update(failureThreshold=30)),
        CROSS,
    ),
    "claims are deleted with the StatefulSet": (
        _spec(lambda s: s["persistentVolumeClaimRetentionPolicy"].update(whenDeleted="Delete")),
        CROSS,
    ),
    "larger claim in the template": (
        _spec(
            lambda s: s["volumeClaimTemplates"][0]["spec"]["resources"]["requests"].update(
                storage="80Gi"
            )
        ),
        CHANGE,
    ),
    "changed selector": (
        lambda objects: _rename(objects, "app.kubernetes.io/instance", "ps", "two"),
        CHANGE,
    ),
    "smaller claim for checkpoints": (
        _of(
            "PersistentVolumeClaim",
            lambda d: d["spec"]["resources"].update(requests={"storage": "1Gi"}),
        ),
        CHANGE,
    ),
}


def _hide(path: str) -> Mutation:
    """Return the mutation that mounts an empty volume over a directory of the image."""

    def change(pod: Part) -> None:
        pod["volumes"].append({"name": "hides", "emptyDir": {"sizeLimit": "64Mi"}})
        pod["containers"][0]["volumeMounts"].append({"name": "hides", "mountPath": path})

    return _pod(change)


def _fourth_shard(objects: list[Object]) -> None:
    """Change both numbers and the name of the ConfigMap, as a person would."""
    _spec(lambda s: s.update(replicas=4))(objects)
    _settings("shards = 3", "shards = 4")(objects)
    (config,) = (each for each in objects if "psserver.toml" in each.get("data", {}))
    config["metadata"]["name"] = f"ps-config-{config_hash(config['data'])}"
    _pod(lambda p: _volume(p, "config")["configMap"].update(name=config["metadata"]["name"]))(
        objects
    )


# name -> (mutation, what the log of a pod, or `psserver warm --check` in it, then says)
RUNNING: dict[str, tuple[Mutation, str]] = {
    "volume over the program": (_hide("/opt/ps/lib"), "No module named"),
    "volume over the compiled kernels": (
        _hide("/opt/ps/kernels"),
        "kernels would be compiled at each start",
    ),
    "more shards, although there are rows": (_fourth_shard, "belongs to shard 2 of 3"),
}


def _rename(value: Any, label: str, old: str, new: str) -> None:
    """Give a label a new value, in all labels and selectors of all objects."""
    if isinstance(value, dict):
        if value.get(label) == old:
            value[label] = new
        for inner in value.values():
            _rename(inner, label, old, new)
    elif isinstance(value, list):
        for inner in value:
            _rename(inner, label, old, new)
