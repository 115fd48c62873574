"""What the controller of StatefulSets does in one pass: the order of Kubernetes' own.

``next_steps`` is a pure function of the set and its pods. It returns the pods to create and to
delete now. The controller calls it again after each change of a pod.

* Parallel: creates and deletes all pods at once. OrderedReady: one after the other, and nothing
  else while a pod is not available. This includes updates, so a broken revision stays, even after
  it is undone, until somebody deletes the broken pod.
* An update deletes the pod with the highest ordinal that has a different revision, and waits until
  its successor is available. It does not wait before it deletes a pod that is broken and outdated.
* Pods below the partition keep the current revision, also if they are created again.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass, field

from tests.deploy.simulator.objects import (
    Object,
    is_available,
    is_terminating,
    labels_of,
    name_of,
    phase_of,
    revision_of,
)

INDEX = "apps.kubernetes.io/pod-index"


@dataclass(frozen=True, slots=True)
class Steps:
    """Pods to create, as (ordinal, revision), and names of pods to delete."""

    create: list[tuple[int, str]] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Rules:
    """The fields of a StatefulSet that decide what happens to its pods."""

    name: str
    replicas: int
    ordered: bool
    rolling: bool  # False: pods are updated only after somebody deleted them (OnDelete)
    partition: int
    seconds: float  # minReadySeconds

    @classmethod
    def of(cls, stateful: Object) -> Rules:
        spec = stateful["spec"]
        strategy = spec.get("updateStrategy", {})
        return cls(
            name=name_of(stateful),
            replicas=spec.get("replicas", 1),
            ordered=spec.get("podManagementPolicy", "OrderedReady") == "OrderedReady",
            rolling=strategy.get("type", "RollingUpdate") == "RollingUpdate",
            partition=(strategy.get("rollingUpdate") or {}).get("partition", 0),
            seconds=spec.get("minReadySeconds", 0),
        )


def revision(stateful: Object) -> str:
    """Return the name of the revision of a set: equal templates have equal names."""
    text = json.dumps(stateful["spec"]["template"], sort_keys=True)
    return f"{name_of(stateful)}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def new_pod(stateful: Object, template: Object, ordinal: int, made_from: str) -> Object:
    """Return the pod of an ordinal, without uid.

    template   template of the revision ``made_from``, which may differ from the set's own
    """
    name = f"{name_of(stateful)}-{ordinal}"
    pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
    metadata, spec = pod["metadata"], pod["spec"]
    metadata["name"] = name
    metadata["labels"] = {
        **labels_of(pod),
        INDEX: str(ordinal),
        "statefulset.kubernetes.io/pod-name": name,
        "controller-revision-hash": made_from,
    }
    metadata["ownerReferences"] = [
        {"kind": "StatefulSet", "name": name_of(stateful), "controller": True}
    ]
    spec["hostname"], spec["subdomain"] = name, stateful["spec"].get("serviceName", "")
    claims = [
        {"name": one, "persistentVolumeClaim": {"claimName": f"{one}-{name}"}}
        for one in map(name_of, stateful["spec"].get("volumeClaimTemplates", ()))
    ]
    kept = [each for each in spec.get("volumes", ()) if each["name"] not in _names(claims)]
    spec["volumes"] = [*kept, *claims]
    return pod


def _names(volumes: list[Object]) -> set[str]:
    return {volume["name"] for volume in volumes}


def ordinal_of(stateful: Object, pod: Object) -> int | None:
    """Return the ordinal of a pod that belongs to the set; None for other pods."""
    owners = pod["metadata"].get("ownerReferences", ())
    if not any(one["kind"] == "StatefulSet" and one["name"] == name_of(stateful) for one in owners):
        return None
    return int(name_of(pod).rpartition("-")[2])


def next_steps(
    rules: Rules, pods: dict[int, Object], current: str, update: str, now: float
) -> Steps:
    """Return what to do now.

    pods     by ordinal, terminating ones included
    current  revision of pods below the partition
    update   revision of the set's template
    """
    steps = Steps()
    wait = _replicas(rules, pods, current, update, now, steps)
    if wait or _condemned(rules, pods, steps) or not rules.rolling:
        return steps
    for ordinal in reversed(range(rules.partition, rules.replicas)):
        pod = pods.get(ordinal)
        if pod is None:
            break
        if revision_of(pod) != update and not is_terminating(pod):
            steps.delete.append(name_of(pod))
            break
        if is_terminating(pod) or not is_available(pod, rules.seconds, now):
            break
    return steps


def _replicas(
    rules: Rules, pods: dict[int, Object], current: str, update: str, now: float, steps: Steps
) -> bool:
    """Add the creation of missing pods to ``steps``. Return True if all else has to wait."""
    for ordinal in range(rules.replicas):
        pod = pods.get(ordinal)
        if pod is not None and phase_of(pod) in ("Failed", "Succeeded"):
            if not is_terminating(pod):
                steps.delete.append(name_of(pod))
            if rules.ordered:
                return True
        elif pod is None:
            old = rules.rolling and ordinal < rules.partition
            steps.create.append((ordinal, current if old else update))
            if rules.ordered:
                return True
        elif rules.ordered and (is_terminating(pod) or not is_available(pod, rules.seconds, now)):
            return True
    return False


def _condemned(rules: Rules, pods: dict[int, Object], steps: Steps) -> bool:
    """Add the deletion of pods beyond the replicas to ``steps``, highest ordinal first.

    Returns True if all else has to wait.
    """
    for ordinal in sorted((one for one in pods if one >= rules.replicas), reverse=True):
        pod = pods[ordinal]
        if not is_terminating(pod):
            steps.delete.append(name_of(pod))
        if rules.ordered:
            return True
    return False


def is_rolled_out(rules: Rules, pods: dict[int, Object], update: str, now: float) -> bool:
    """Return whether the set has exactly its replicas, all updated and available."""
    return sorted(pods) == list(range(rules.replicas)) and all(
        not is_terminating(pod)
        and is_available(pod, rules.seconds, now)
        and (ordinal < rules.partition or revision_of(pod) == update)
        for ordinal, pod in pods.items()
    )
