"""Render the manifests with kustomize and with helm, as lists of objects."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from tools import program, run

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "chart"
OVERLAYS = ("laptop", "production")

Object = dict[str, Any]  # one Kubernetes object, as YAML is parsed


class StrictLoader(yaml.SafeLoader):
    """Loads YAML, and refuses a mapping that has the same key twice."""


def _mapping(loader: StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"keys {twice} twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse(text: str) -> list[Object]:
    """Return the objects of a YAML text. Raises yaml.YAMLError."""
    found = yaml.load_all(text, Loader=StrictLoader)
    return [document for document in found if document]


@cache
def kustomized(overlay: str) -> str:
    """Return the YAML text of an overlay."""
    return run([program("kubectl"), "kustomize", str(DEPLOY / "overlays" / overlay)])


@cache
def charted(*options: str, release: str = "ps", namespace: str = "ps") -> str:
    """Return the YAML text of the chart.

    options  further options of ``helm template``
    """
    command = [program("helm"), "template", release, str(CHART), "--namespace", namespace]
    return run([*command, *options])


def named(objects: list[Object]) -> dict[tuple[str, str], Object]:
    """Return the objects by kind and name. Fails if two have the same."""
    found = {(each["kind"], each["metadata"]["name"]): each for each in objects}
    assert len(found) == len(objects), "two objects have the same kind and name"
    return found


def only(objects: list[Object], kind: str) -> Object:
    """Return the only object of a kind."""
    (found,) = (each for each in objects if each["kind"] == kind)
    return found
