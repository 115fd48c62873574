"""The Helm chart renders the objects of the overlays, and refuses unknown values."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from checks_server import config_of
from crosscheck import problems
from rendering import CHART, Object, charted, kustomized, named, only, parse
from schema import violations
from tools import program

VALUES = {"production": (), "laptop": ("--values", str(CHART / "values-laptop.yaml"))}
WITH_NAMESPACE = ("--set", "namespace.create=true")


@pytest.mark.parametrize("overlay", VALUES)
def test_the_chart_renders_the_objects_of_the_overlay(overlay: str) -> None:
    objects = parse(charted(*VALUES[overlay], *WITH_NAMESPACE))
    found = {key: _without_helms_own(each) for key, each in named(objects).items()}
    assert found == named(parse(kustomized(overlay)))


def test_without_the_namespace_it_renders_the_rest() -> None:
    everything, rest = named(parse(charted(*WITH_NAMESPACE))), named(parse(charted()))
    assert everything.keys() - rest.keys() == {("Namespace", "ps")}


def test_a_different_release_with_more_shards_is_consistent() -> None:
    options = ("--set", "shards=6", "--set", "settings.disk_bytes=40000000000")
    objects = parse(charted(*options, release="click", namespace="models"))
    assert problems(objects) == []
    assert violations(objects) == []
    config = config_of(objects, 5)
    assert (config.shards, config.disk_bytes) == (6, 40_000_000_000)
    names = {name for kind, name in named(objects) if kind != "PersistentVolumeClaim"}
    assert all(name.startswith("click") for name in names)


def test_settings_of_a_table_reach_the_server() -> None:
    objects = parse(charted("--set", "settings.tables.user.cache=lfu"))
    assert problems(objects) == []
    assert config_of(objects, 0).tables["user"].cache == "lfu"


def test_an_object_store_takes_the_place_of_the_claim_for_checkpoints() -> None:
    objects = parse(charted("--set", "checkpoints.url=s3://bucket/ps"))
    assert problems(objects) == []
    assert violations(objects) == []
    assert config_of(objects, 0).checkpoint_url == "s3://bucket/ps"
    assert all(each["kind"] != "PersistentVolumeClaim" for each in objects)
    pod = only(objects, "StatefulSet")["spec"]["template"]["spec"]
    assert "checkpoints" not in {volume["name"] for volume in pod["volumes"]}


def test_helm_keeps_the_settings_of_old_pods_and_the_checkpoints() -> None:
    kept = {
        each["kind"]
        for each in parse(charted())
        if each["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
    }
    assert kept == {"ConfigMap", "PersistentVolumeClaim"}


def test_alerts_are_about_the_claims_of_the_release() -> None:
    options = ("--set", "checkpoints.name=saved")
    rules = only(parse(charted(*options, release="click", namespace="models")), "PrometheusRule")
    text = json.dumps(rules["spec"])
    assert text.count('namespace=\\"models\\", persistentvolumeclaim=\\"saved\\"') == 2
    assert "ps-checkpoints" not in text


def test_storage_classes_are_used() -> None:
    options = ("--set", "data.storageClass=fast,checkpoints.storageClass=shared")
    objects = named(parse(charted(*options)))
    templates = objects["StatefulSet", "ps"]["spec"]["volumeClaimTemplates"]
    assert templates[0]["spec"]["storageClassName"] == "fast"
    claim = objects["PersistentVolumeClaim", "ps-checkpoints"]
    assert claim["spec"]["storageClassName"] == "shared"


def test_without_tls_plaintext_must_be_permitted() -> None:
    command = [program("helm"), "template", "ps", str(CHART), "--set", "tls.secret="]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "tls.secret: name a Secret with tls.crt, tls.key and ca.crt, or set" in done.stderr
    assert problems(parse(charted("--set", "tls.secret=,tls.plaintext=true"))) == []


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("shard=4", "shard"),
        ("shards=0", "shards"),
        ("resources.memory=8GB", "memory"),
        ("settings.port=7001", "settings"),
        ("settings.http_token_file=/x", "settings"),
        ("image.registry=x", "registry"),
        ("checkpoints.accessMode=ReadWriteOncePod", "accessMode"),
        ("checkpoints.url=file:///mnt", "url"),
        ("tls.ca=x", "ca"),
    ],
)
def test_an_unknown_or_invalid_value_is_refused(option: str, field: str) -> None:
    command = [program("helm"), "template", "ps", str(CHART), "--set", option]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "don't meet the specifications of the schema" in done.stderr
    assert field in done.stderr


def test_every_value_is_in_the_schema_and_used_by_a_template() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    templates = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    (values,) = parse((CHART / "values.yaml").read_text())
    for path in _paths(values):
        assert _known(schema, path.split(".")), f"{path} is not in values.schema.json"
        assert f".Values.{path}" in templates, f"no template uses {path}"


def test_helm_lint_finds_nothing() -> None:
    command = [program("helm"), "lint", "--strict", str(CHART)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _without_helms_own(each: Object) -> Object:
    """Return an object without the annotations that only helm reads."""
    metadata = dict(each["metadata"])
    annotations = metadata.pop("annotations", {})
    assert all(name.startswith("helm.sh/") for name in annotations), annotations
    return {**each, "metadata": metadata}


def _paths(values: dict[str, Any], above: str = "") -> list[str]:
    """Return the paths of all values that are not sections, for example "image.tag"."""
    found = []
    for name, value in values.items():
        path = f"{above}{name}"
        found += _paths(value, f"{path}.") if isinstance(value, dict) and value else [path]
    return found


def _known(schema: dict[str, Any], path: list[str]) -> bool:
    """Return whether a schema that forbids unknown properties has the property at ``path``."""
    if not path:
        return True
    inner = schema.get("properties", {}).get(path[0])
    strict = schema.get("additionalProperties") is False
    return inner is not None and strict and _known(inner, path[1:])
