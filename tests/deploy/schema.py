"""Check objects against the JSON schema of Kubernetes; unknown fields are errors."""

from __future__ import annotations

import json
from functools import cache

import kubernetes_validate
from rendering import Object

VERSION = "1.37"  # of Kubernetes
WITHOUT = {"PodMonitor", "PrometheusRule"}  # kinds of the Prometheus operator; see checks_objects


def violations(objects: list[Object], version: str = VERSION) -> list[str]:
    """Return the violations of the schema: (kind name: what)."""
    texts = [json.dumps(each) for each in objects if each["kind"] not in WITHOUT]
    return [what for text in texts for what in _violations(text, version)]


@cache
def _violations(text: str, version: str) -> list[str]:
    """Return the violations of one object, which is given as JSON."""
    each = json.loads(text)
    try:
        kubernetes_validate.validate(each, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{each['kind']} {each['metadata']['name']}: {error.message}"]
    return []
