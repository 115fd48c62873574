"""Find changes that Kubernetes refuses, because a field cannot be changed once an object exists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from checks_pod import quantity
from rendering import Object, named

# kind -> fields of spec that can be changed; all fields of other kinds can
CHANGEABLE = {
    "StatefulSet": {
        *("replicas", "ordinals", "template", "updateStrategy", "minReadySeconds"),
        *("persistentVolumeClaimRetentionPolicy", "revisionHistoryLimit"),
    },
    "PersistentVolumeClaim": {"resources"},
}
FIXED = {"Service": {"clusterIP", "clusterIPs"}}  # kind -> fields of spec that cannot be changed


def refused(old: list[Object], new: list[Object]) -> list[str]:
    """Return why Kubernetes would refuse to apply ``new`` where ``old`` exists; [] if it would not.

    Objects that are only in one of them are created, or left alone.
    """
    before, after = named(old), named(new)
    return [
        f"{kind} {name}: {what}"
        for kind, name in sorted(before.keys() & after.keys())
        for what in _changes(kind, before[kind, name], after[kind, name])
    ]


def _changes(kind: str, old: Object, new: Object) -> Iterator[str]:
    """Yield the changes of one object that are refused."""
    if old["apiVersion"] != new["apiVersion"]:
        yield "apiVersion cannot be changed"
    if kind == "ConfigMap" and old.get("immutable"):
        if old["data"] != new["data"] or not new.get("immutable"):
            yield "an immutable ConfigMap cannot be changed"
        return
    before, after = old.get("spec", {}), new.get("spec", {})
    for field in sorted(before.keys() | after.keys()):
        if before.get(field) == after.get(field):
            continue
        if field in FIXED.get(kind, ()) or field not in CHANGEABLE.get(kind, {field}):
            yield f"spec.{field} cannot be changed"
    if kind == "PersistentVolumeClaim" and _storage(after) < _storage(before):
        yield "a claim cannot shrink"


def _storage(spec: dict[str, Any]) -> Any:
    return quantity(spec["resources"]["requests"]["storage"])
