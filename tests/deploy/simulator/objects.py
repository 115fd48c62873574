"""Kubernetes objects as plain dictionaries, and the few rules for reading them.

An Object has the fields of one YAML document: kind, metadata, spec and, for pods, status.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Object = dict[str, Any]

_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
_UNITS |= {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def name_of(thing: Object) -> str:
    return str(thing["metadata"]["name"])


def labels_of(thing: Object) -> dict[str, str]:
    return dict(thing["metadata"].get("labels") or {})


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Return whether a selector with matchLabels, or a Service's plain one, matches labels.

    An empty selector of a Service selects nothing.
    """
    wanted = selector.get("matchLabels", selector)
    return bool(wanted) and wanted.items() <= labels.items()


def quantity(text: str | int) -> int:
    """Return the number of bytes of a Kubernetes quantity such as "8Gi". Raises ValueError."""
    words = str(text)
    for unit, factor in _UNITS.items():
        if words.endswith(unit):
            return int(float(words.removesuffix(unit)) * factor)
    return int(words)


def is_terminating(pod: Object) -> bool:
    """Return whether the pod was deleted, although its containers may still run."""
    return "deletionTimestamp" in pod["metadata"]


def phase_of(pod: Object) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def ready_since(pod: Object) -> float | None:
    """Return the time at which a pod became ready, or None if it is not ready."""
    for condition in pod.get("status", {}).get("conditions", ()):
        if condition["type"] == "Ready" and condition["status"] == "True":
            return float(condition["lastTransitionTime"])
    return None


def is_ready(pod: Object) -> bool:
    """Return whether a pod runs and is ready. A terminating pod may still be ready."""
    return phase_of(pod) == "Running" and ready_since(pod) is not None


def is_available(pod: Object, seconds: float, now: float) -> bool:
    """Return whether a pod has been ready for ``seconds``, the set's minReadySeconds."""
    since = ready_since(pod)
    return phase_of(pod) == "Running" and since is not None and now - since >= seconds


def revision_of(pod: Object) -> str:
    """Return the name of the revision of the StatefulSet from which a pod was made."""
    return labels_of(pod).get("controller-revision-hash", "")


def restarts_of(pod: Object) -> int:
    """Return how often the containers of a pod were started again."""
    statuses = pod.get("status", {}).get("containerStatuses", ())
    return sum(int(status["restartCount"]) for status in statuses)
