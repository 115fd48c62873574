"""Checks of the pod: volumes, ports, probes, resources, security."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from checks_objects import container_of, template_of
from rendering import Object, only

PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")
QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
UNITS = {"": Decimal(1), "m": Decimal("0.001")} | {
    unit + binary: Decimal((1024 if binary else 1000) ** power)
    for power, unit in enumerate("kMGTPE", 1)
    for binary in ("", "i")
}
UNITS["Ki"] = UNITS.pop("ki")
HANDLERS = {"grpc", "httpGet", "tcpSocket", "exec"}
LEAST_START_SECONDS = 600  # minimum time that a pod may take to listen
# field -> the values that Kubernetes accepts and that fit a server with data on its disk
VALUES = {
    ("spec", "podManagementPolicy"): "Parallel",
    ("spec", "updateStrategy", "type"): "RollingUpdate",
    ("spec", "persistentVolumeClaimRetentionPolicy", "whenDeleted"): "Retain",
    ("spec", "persistentVolumeClaimRetentionPolicy", "whenScaled"): "Retain",
    ("spec", "template", "spec", "enableServiceLinks"): False,
    ("spec", "template", "spec", "securityContext", "fsGroupChangePolicy"): "OnRootMismatch",
}
SPREAD = {"DoNotSchedule", "ScheduleAnyway"}
PULL = {"Always", "IfNotPresent", "Never"}
VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret", "downwardAPI"}


def quantity(value: Any) -> Decimal:
    """Return the number of a Kubernetes quantity, for example 8589934592 for "8Gi"."""
    match = QUANTITY.fullmatch(str(value))
    if match is None:
        raise ValueError(f"{value!r} is not a quantity")
    return Decimal(match[1]) * UNITS[match[2] or ""]


def fixed_values(objects: list[Object]) -> Iterator[str]:
    """Fields whose other values would lose data, leave pods waiting, or slow a start."""
    for path, expected in VALUES.items():
        value: Any = only(objects, "StatefulSet")
        for field in path:
            value = value.get(field) if isinstance(value, dict) else None
        if value != expected:
            yield f"{'.'.join(path)}: expected {expected!r}, got {value!r}"
    pod = template_of(objects)["spec"]
    if pod.get("restartPolicy", "Always") != "Always":
        yield f"restartPolicy: expected Always, got {pod['restartPolicy']!r}"
    if container_of(objects).get("lifecycle"):
        yield "lifecycle: the server drains after SIGTERM, so a hook only delays it"
    for each in pod["topologySpreadConstraints"]:
        if each["whenUnsatisfiable"] not in SPREAD:
            yield f"whenUnsatisfiable: unknown value {each['whenUnsatisfiable']!r}"


def image(objects: list[Object]) -> Iterator[str]:
    """The image has a tag that is not reused; it is pulled at most once per node."""
    container = container_of(objects)
    _, colon, tag = container["image"].rpartition("/")[2].partition(":")
    if not colon or tag in ("", "latest"):
        yield f"image {container['image']!r} must have a tag other than latest"
    if container.get("imagePullPolicy") not in PULL:
        yield f"imagePullPolicy: unknown value {container.get('imagePullPolicy')!r}"


def mounts(objects: list[Object]) -> Iterator[str]:
    """Each mount has a volume, each volume a mount and an existing source, each path one mount."""
    claims = only(objects, "StatefulSet")["spec"]["volumeClaimTemplates"]
    pod, container = template_of(objects)["spec"], container_of(objects)
    volumes = [each["name"] for each in pod["volumes"]]
    volumes += [each["metadata"]["name"] for each in claims]
    used = [each["name"] for each in container["volumeMounts"]]
    yield from (f"two volumes are named {name}" for name in _twice(volumes))
    yield from (f"volumeMount {name!r} has no volume" for name in set(used) - set(volumes))
    yield from (f"volume {name!r} is not mounted" for name in set(volumes) - set(used))
    paths = [each["mountPath"].rstrip("/") for each in container["volumeMounts"]]
    yield from (f"two mounts are at {path}" for path in _twice(paths))
    exists = {(each["kind"], each["metadata"]["name"]) for each in objects}
    for each in pod["volumes"]:
        sources = each.keys() - {"name"}
        for kind in sources - VOLUMES:
            yield f"volume {each['name']}: the level restricted forbids {kind}"
        if len(sources) != 1:
            yield f"volume {each['name']}: expected one source, got {sorted(sources)}"
        config = each.get("configMap", {}).get("name")
        if config and ("ConfigMap", config) not in exists:
            yield f"volume {each['name']}: there is no ConfigMap {config}"
        claim = each.get("persistentVolumeClaim", {}).get("claimName")
        if claim and ("PersistentVolumeClaim", claim) not in exists:
            yield f"volume {each['name']}: there is no claim {claim}"
        if "emptyDir" in each and "sizeLimit" not in each["emptyDir"]:
            yield f"volume {each['name']}: an emptyDir without sizeLimit can fill the node"


def claims(objects: list[Object]) -> Iterator[str]:
    """A shard's claim is used by one pod only; the claim for checkpoints is shared."""
    for each in only(objects, "StatefulSet")["spec"]["volumeClaimTemplates"]:
        if each["spec"]["accessModes"] != ["ReadWriteOncePod"]:
            yield f"claim {each['metadata']['name']}: accessModes must be [ReadWriteOncePod]"
        quantity(each["spec"]["resources"]["requests"]["storage"])
    shared = [each["spec"] for each in objects if each["kind"] == "PersistentVolumeClaim"]
    volumes = [v for v in template_of(objects)["spec"]["volumes"] if "persistentVolumeClaim" in v]
    if len(shared) > 1 or len(shared) != len(volumes):  # 0: checkpoints are in an object store
        yield f"{len(shared)} claims for checkpoints, but {len(volumes)} volumes of them"
    for claim in shared:
        if claim["accessModes"] not in (["ReadWriteMany"], ["ReadWriteOnce"]):
            yield f"claim for checkpoints: {claim['accessModes']} cannot be shared by pods"
        quantity(claim["resources"]["requests"]["storage"])


def ports(objects: list[Object]) -> Iterator[str]:
    """Ports of the container have distinct valid names and numbers, and none is the node's."""
    found = container_of(objects)["ports"]
    yield from (f"two ports are named {name}" for name in _twice([p["name"] for p in found]))
    numbers = [port["containerPort"] for port in found]
    yield from (f"two ports have the number {number}" for number in _twice(numbers))
    for port in found:
        if len(port["name"]) > 15 or not PORT_NAME.fullmatch(port["name"]):
            yield f"port name {port['name']!r} is not valid: at most 15 of a-z, 0-9 and -"
        if "hostPort" in port:
            yield f"port {port['name']}: the level restricted forbids hostPort"


def probes(objects: list[Object]) -> Iterator[str]:
    """Each probe asks the HTTP port, which has no TLS, for what it is about."""
    container = container_of(objects)
    numbers = {port["name"]: port["containerPort"] for port in container["ports"]}
    asked = {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    for name, path in asked.items():
        probe = container[name]
        if probe.keys() & HANDLERS != {"httpGet"}:
            yield f"{name}: expected only httpGet, got {sorted(probe.keys() & HANDLERS)}"
            continue
        if probe["httpGet"]["port"] not in ("metrics", numbers["metrics"]):
            yield f"{name}: port {probe['httpGet']['port']} is not the port metrics"
        if probe["httpGet"].keys() != {"path", "port"}:
            yield f"{name}: needs path and port, got {sorted(probe['httpGet'])}"
        if probe["httpGet"].get("path") != path:
            yield f"{name}: must ask for {path}"
        if name != "readinessProbe" and probe.get("successThreshold", 1) != 1:
            yield f"{name}: successThreshold must be 1"
        if probe.get("initialDelaySeconds", 0):
            yield f"{name}: initialDelaySeconds only delays; the startup probe waits long enough"
    startup = container["startupProbe"]
    if startup["periodSeconds"] != 1:
        yield "startupProbe: periodSeconds must be 1, so that a start is noticed at once"
    if startup["failureThreshold"] * startup["periodSeconds"] < LEAST_START_SECONDS:
        yield f"startupProbe: allows less than {LEAST_START_SECONDS} s"
    alive = container["livenessProbe"]
    if alive["failureThreshold"] * alive["periodSeconds"] < 30 or alive["timeoutSeconds"] < 5:
        yield "livenessProbe: a busy server must have 30 s, and 5 s for one answer"


def resources(objects: list[Object]) -> Iterator[str]:
    """Requests are quantities and not above limits; memory's are equal, and the disk's too."""
    found = container_of(objects)["resources"]
    requests = {name: quantity(value) for name, value in found["requests"].items()}
    limits = {name: quantity(value) for name, value in found["limits"].items()}
    for name in requests.keys() & limits.keys():
        if requests[name] > limits[name]:
            yield f"{name}: the request is above the limit"
    for name in ("memory", "ephemeral-storage"):
        if name not in limits or requests.get(name) != limits[name]:
            yield f"{name}: request and limit must be equal"
    if "cpu" not in requests or "cpu" in limits:
        yield "cpu: needs a request; a limit would stop the server in the middle of requests"


def restricted(objects: list[Object]) -> Iterator[str]:
    """The pod satisfies the pod security level restricted, and its root is read-only."""
    pod, container = template_of(objects)["spec"], container_of(objects)
    both = {**pod["securityContext"], **container["securityContext"]}
    if pod.get("hostNetwork") or pod.get("hostPID") or pod.get("hostIPC"):
        yield "the level restricted forbids namespaces of the host"
    if pod.get("initContainers") or pod.get("ephemeralContainers"):
        yield "expected one container"
    if both.get("runAsNonRoot") is not True or not both.get("runAsUser"):
        yield "must run as a user other than root"
    if both.get("fsGroup") != both.get("runAsGroup"):
        yield "fsGroup must be runAsGroup, so that the server can write its volumes"
    if both.get("allowPrivilegeEscalation") is not False or both.get("privileged"):
        yield "allowPrivilegeEscalation must be false, and privileged unset"
    if both.get("readOnlyRootFilesystem") is not True:
        yield "readOnlyRootFilesystem must be true"
    capabilities = both.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield "must drop ALL capabilities"
    if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "seccompProfile must be RuntimeDefault"


def _twice(values: list[Any]) -> list[Any]:
    """Return the values that occur more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


CHECKS = (
    *(fixed_values, image, mounts, claims, ports),
    *(probes, resources, restricted),
)
