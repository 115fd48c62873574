"""Checks of names, labels, selectors, services and monitors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from rendering import Object, only

NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL_NAME = re.compile(
    r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
)
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
CLUSTERWIDE = {"Namespace"}
# fields of the objects for which there is no schema
MONITOR_FIELDS = {"selector", "podMetricsEndpoints"}
ENDPOINT_FIELDS = {"port", "interval", "relabelings", "authorization"}
GROUP_FIELDS = {"name", "rules"}
ALERT_FIELDS = {"alert", "expr", "for", "labels", "annotations"}
RECORD_FIELDS = {"record", "expr"}
KINDS = {
    "Namespace": "v1",
    "ServiceAccount": "v1",
    "Service": "v1",
    "ConfigMap": "v1",
    "PersistentVolumeClaim": "v1",
    "StatefulSet": "apps/v1",
    "PodDisruptionBudget": "policy/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "Certificate": "cert-manager.io/v1",
    "Issuer": "cert-manager.io/v1",
    "PodMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
}


def template_of(objects: list[Object]) -> dict[str, Any]:
    """Return the pod template of the StatefulSet."""
    template: dict[str, Any] = only(objects, "StatefulSet")["spec"]["template"]
    return template


def container_of(objects: list[Object]) -> dict[str, Any]:
    """Return the only container of the pods."""
    (container,) = template_of(objects)["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def pod_labels(objects: list[Object]) -> dict[str, str]:
    """Return the labels of the pods."""
    labels: dict[str, str] = template_of(objects)["metadata"]["labels"]
    return labels


def kinds(objects: list[Object]) -> Iterator[str]:
    """Each object has a known kind and version, and no two have the same kind and name."""
    seen = set()
    for each in objects:
        kind, name = each["kind"], each["metadata"]["name"]
        if KINDS.get(kind) != each["apiVersion"]:
            yield f"{each['apiVersion']} {kind} is not among the kinds of this manifest"
        if (kind, name) in seen:
            yield f"two objects are {kind} {name}"
        seen.add((kind, name))
    optional = {"Namespace", "PersistentVolumeClaim", "PodMonitor", "PrometheusRule"}
    optional |= {"Certificate", "Issuer"}
    for kind in KINDS.keys() - optional - {kind for kind, _ in seen}:
        yield f"there is no {kind}"


def names(objects: list[Object]) -> Iterator[str]:
    """Names are DNS labels; those of pods too, also with the number of the largest shard."""
    for each in objects:
        if not NAME.fullmatch(each["metadata"]["name"]):
            yield f"{each['kind']}: name {each['metadata']['name']!r} is not a DNS label"
    replica = f"{only(objects, 'StatefulSet')['metadata']['name']}-1023-0123456789"
    if not NAME.fullmatch(replica):
        yield f"names of pods and revisions, for example {replica!r}, are too long"


def labels(objects: list[Object]) -> Iterator[str]:
    """Names and values of labels are valid, wherever labels are."""
    for each in objects:
        for where in _label_sets(each):
            for name, value in where.items():
                if not LABEL_NAME.fullmatch(name):
                    yield f"{each['kind']}: label name {name!r} is invalid"
                if not (isinstance(value, str) and LABEL.fullmatch(value)):
                    yield f"{each['kind']}: label {name} has the invalid value {value!r}"


def _label_sets(value: Any) -> Iterator[dict[str, Any]]:
    """Yield all dicts that are labels, at any depth."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in ("labels", "matchLabels") and isinstance(inner, dict):
                yield inner
            yield from _label_sets(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _label_sets(inner)


def namespaces(objects: list[Object]) -> Iterator[str]:
    """All objects are in one namespace; if it is among them, it enforces the level restricted."""
    found = {o["metadata"].get("namespace") for o in objects if o["kind"] not in CLUSTERWIDE}
    if len(found) != 1 or None in found:
        yield f"objects are in the namespaces {found}"
    for each in objects:
        if each["kind"] != "Namespace":
            continue
        if each["metadata"]["name"] not in found:
            yield f"no object is in the namespace {each['metadata']['name']}"
        level = each["metadata"]["labels"].get("pod-security.kubernetes.io/enforce")
        if level != "restricted":
            yield f"the namespace enforces the pod security level {level}"


def selectors(objects: list[Object]) -> Iterator[str]:
    """Each selector is the one of the StatefulSet, and that matches its pods."""
    chosen = only(objects, "StatefulSet")["spec"]["selector"]["matchLabels"]
    if not chosen.items() <= pod_labels(objects).items():
        yield f"StatefulSet: the selector {chosen} does not match its pods"
    others = {
        "Service": only(objects, "Service")["spec"]["selector"],
        "PodDisruptionBudget": only(objects, "PodDisruptionBudget")["spec"]["selector"][
            "matchLabels"
        ],
        "NetworkPolicy": only(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    }
    for each in objects:
        if each["kind"] == "PodMonitor":
            others["PodMonitor"] = each["spec"]["selector"]["matchLabels"]
    for at, spread in enumerate(template_of(objects)["spec"]["topologySpreadConstraints"]):
        others[f"topologySpreadConstraints {at}"] = spread["labelSelector"]["matchLabels"]
    for where, selector in others.items():
        if selector != chosen:
            yield f"{where}: the selector is {selector}, that of the StatefulSet {chosen}"
    allowed = only(objects, "NetworkPolicy")["spec"]["ingress"][0]["from"]
    if {"podSelector": {"matchLabels": chosen}} not in allowed:
        yield "NetworkPolicy: the pods may not talk to each other"
    clients = {"podSelector": {"matchLabels": {"embedding-ps/client": "true"}}}
    if {**clients, "namespaceSelector": {}} not in allowed:
        yield "NetworkPolicy: clients in other namespaces may not connect"


def service(objects: list[Object]) -> Iterator[str]:
    """The service of the StatefulSet is headless and names pods that are not ready."""
    found = only(objects, "Service")
    spec = found["spec"]
    if only(objects, "StatefulSet")["spec"]["serviceName"] != found["metadata"]["name"]:
        yield "StatefulSet: serviceName is the name of no service"
    if spec.get("clusterIP") != "None":
        yield "Service: clusterIP must be None, so that the name resolves to all pods"
    if spec.get("publishNotReadyAddresses") is not True:
        yield "Service: publishNotReadyAddresses must be true"
    container = container_of(objects)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for port in spec["ports"]:
        target = port["targetPort"]
        if target not in ports:
            yield f"Service: targetPort {target!r} is no port of the container"
        elif port["port"] != ports[target]:  # a headless service does not translate ports
            yield f"Service: port {port['port']} != {ports[target]}, the port of the container"


def policies(objects: list[Object]) -> Iterator[str]:
    """NetworkPolicy and PodDisruptionBudget allow what clients, Prometheus and drains need."""
    ports = {port["name"] for port in container_of(objects)["ports"]}
    spec = only(objects, "NetworkPolicy")["spec"]
    if spec["policyTypes"] != ["Ingress"]:
        yield f"NetworkPolicy: policyTypes is {spec['policyTypes']}; replies and DNS need egress"
    open_ports = [port["port"] for rule in spec["ingress"] for port in rule["ports"]]
    for port in open_ports:
        if port not in ports:
            yield f"NetworkPolicy: port {port!r} is no port of the container"
    for port in ports - set(open_ports):
        yield f"NetworkPolicy: nobody may connect to the port {port}"
    for rule in spec["ingress"]:
        if not rule.get("from"):
            yield "NetworkPolicy: a rule without `from` lets everybody in"
    budget = only(objects, "PodDisruptionBudget")["spec"]
    if budget.get("maxUnavailable") != 1 or "minAvailable" in budget:
        yield "PodDisruptionBudget: must have maxUnavailable 1, and no minAvailable"
    if budget.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
        yield "PodDisruptionBudget: unhealthyPodEvictionPolicy must be AlwaysAllow"


def account(objects: list[Object]) -> Iterator[str]:
    """The pods use the ServiceAccount of the manifest, and get no token."""
    found, pod = only(objects, "ServiceAccount"), template_of(objects)["spec"]
    if pod.get("serviceAccountName") != found["metadata"]["name"]:
        yield f"serviceAccountName {pod.get('serviceAccountName')!r} is no account"
    for where, of in (("ServiceAccount", found), ("pod", pod)):
        if of.get("automountServiceAccountToken") is not False:
            yield f"{where}: automountServiceAccountToken must be false"


def config_hash(data: dict[str, str]) -> str:
    """Return the hash with which kustomize ends the name of a ConfigMap with these contents."""
    content = {"kind": "ConfigMap", "name": "", "data": data}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    for char in "&<>":
        text = text.replace(char, f"\\u{ord(char):04x}")
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return digest.translate(str.maketrans("013ae", "ghkmt"))


def config_names(objects: list[Object]) -> Iterator[str]:
    """The name of a ConfigMap with settings ends with the hash of its contents."""
    for each in objects:
        if each["kind"] != "ConfigMap" or "psserver.toml" not in each["data"]:
            continue
        expected = config_hash(each["data"])
        if not each["metadata"]["name"].endswith(f"-{expected}"):
            yield f"ConfigMap {each['metadata']['name']}: expected a name that ends with {expected}"
        if each.get("immutable") is not True:
            yield f"ConfigMap {each['metadata']['name']}: immutable must be true"


def monitors(objects: list[Object]) -> Iterator[str]:
    """PodMonitor and PrometheusRule, which have no schema, have known fields and existing ports."""
    ports = {port["name"] for port in container_of(objects)["ports"]}
    for each in objects:
        spec = each.get("spec", {})
        if each["kind"] == "PodMonitor":
            yield from _unknown("PodMonitor", spec, MONITOR_FIELDS)
            for endpoint in spec["podMetricsEndpoints"]:
                yield from _unknown("PodMonitor endpoint", endpoint, ENDPOINT_FIELDS)
                if endpoint["port"] not in ports:
                    yield f"PodMonitor: port {endpoint['port']!r} is no port of the container"
        if each["kind"] == "PrometheusRule":
            yield from _unknown("PrometheusRule", spec, {"groups"})
            for group in spec["groups"]:
                yield from _unknown("rule group", group, GROUP_FIELDS)
                for rule in group["rules"]:
                    known = RECORD_FIELDS if "record" in rule else ALERT_FIELDS
                    yield from _unknown(f"rule {rule.get('alert')}", rule, known)


def _unknown(where: str, value: dict[str, Any], known: set[str]) -> Iterator[str]:
    for field in sorted(value.keys() - known):
        yield f"{where}: unknown field {field}"


CHECKS = (
    *(kinds, names, labels, namespaces, selectors, service),
    *(policies, account, config_names, monitors),
)
