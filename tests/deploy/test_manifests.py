"""The overlays: valid, consistent, strict YAML, and applicable one after the other."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
from checks_changes import refused
from checks_server import config_of
from crosscheck import problems
from rendering import DEPLOY, OVERLAYS, ROOT, Object, charted, kustomized, named, only, parse
from schema import violations
from tools import program, run

VERSIONS = ("1.28", "1.31", "1.37")  # of Kubernetes: the oldest supported, and newer ones


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_satisfies_the_schema(overlay: str, version: str) -> None:
    objects = parse(kustomized(overlay))
    assert len(objects) >= 8
    assert violations(objects, version) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_objects_fit_each_other_and_the_server(overlay: str) -> None:
    assert problems(parse(kustomized(overlay))) == []


def test_each_overlay_can_be_applied_where_the_other_runs() -> None:
    laptop, production = (parse(kustomized(overlay)) for overlay in OVERLAYS)
    assert laptop != production
    assert refused(laptop, production) == []
    assert refused(production, laptop) == []


def test_a_growing_checkpoint_claim_is_not_refused() -> None:
    old = parse(kustomized("production"))
    new = copy.deepcopy(old)
    only(new, "PersistentVolumeClaim")["spec"]["resources"]["requests"]["storage"] = "200Gi"
    assert refused(old, new) == []


def test_the_servers_of_both_overlays_get_the_same_settings() -> None:
    """Only TLS, and what follows from the memory limit, differs."""
    small, large = (config_of(parse(kustomized(overlay)), 2) for overlay in OVERLAYS)
    assert small.shard == large.shard == 2
    different = {
        name for name in type(small).model_fields if getattr(small, name) != getattr(large, name)
    }
    files = {"tls_ca", "tls_certificate", "tls_key"}
    assert different == {"host_bytes", "max_inflight_bytes", "plaintext"} | files
    assert large.tls
    assert small.host_bytes >= 256 << 20
    assert large.host_bytes >= 4 << 30


def test_yaml_has_no_key_twice_and_one_style() -> None:
    run(
        [program("yamllint"), "--strict", "-c", str(ROOT / "tests/deploy/yamllint.yaml"), *_files()]
    )


def test_no_file_of_an_overlay_is_left_out() -> None:
    """Each file of base and component is listed in its kustomization.yaml."""
    for directory in (DEPLOY / "base", *(DEPLOY / "components").iterdir()):
        listed = (directory / "kustomization.yaml").read_text()
        for path in directory.iterdir():
            if path.suffix in (".yaml", ".toml", ".json") and path.name != "kustomization.yaml":
                assert path.name in listed, path


def test_production_adds_only_monitoring() -> None:
    laptop, production = (named(parse(kustomized(overlay))) for overlay in OVERLAYS)
    assert {kind for kind, _ in production.keys() - laptop.keys()} == {
        *("PodMonitor", "PrometheusRule", "ConfigMap", "PersistentVolumeClaim")
    }


def test_cert_manager_creates_the_secret_that_the_pods_mount(tmp_path: Path) -> None:
    objects = _production_with("certificates", tmp_path)
    found = named(objects)
    assert found["Certificate", "ps"]["spec"]["secretName"] == "ps-tls"
    assert found["Certificate", "ps-ca"]["metadata"]["namespace"] == "ps"
    rendered = named(parse(charted("--set", "tls.certificates=true")))
    for kind in ("Certificate", "Issuer"):
        for name in {name for each, name in found if each == kind}:
            ours, theirs = found[kind, name], rendered[kind, name]
            for spec in (ours["spec"], theirs["spec"]):
                spec.get("dnsNames", []).sort()
            assert theirs == ours


def test_an_overlay_without_a_choice_does_not_start() -> None:
    wrong = problems(parse(_base()))
    assert any("plaintext: with host=0.0.0.0 other machines can reach" in each for each in wrong)


def _production_with(component: str, scratch: Path) -> list[Object]:
    """Return the objects of the overlay production with one more component; they have no problem.

    scratch  directory for a copy of deploy/
    """
    shutil.copytree(DEPLOY, scratch / "deploy", symlinks=True)
    path = scratch / "deploy" / "overlays" / "production"
    file, tls = path / "kustomization.yaml", "- ../../components/tls\n"
    file.write_text(file.read_text().replace(tls, tls + tls.replace("tls", component)))
    objects = parse(run([program("kubectl"), "kustomize", str(path)]))
    assert problems(objects) == []
    return objects


def _base() -> str:
    """Return the YAML text of the base."""
    return run([program("kubectl"), "kustomize", str(DEPLOY / "base")])


def _files() -> list[str]:
    """Return the YAML files that are not templates."""
    found = [*DEPLOY.rglob("*.yaml"), *(ROOT / "tests/deploy").glob("*.yaml")]
    return sorted(str(path) for path in found if "templates" not in path.parts)


def test_a_policy_is_mounted_from_a_secret(tmp_path: Path) -> None:
    """The component and the chart do the same."""
    objects = _production_with("policy", tmp_path)
    assert str(config_of(objects, 0).policy_file) == "/etc/ps-policy/policy.toml"
    rendered = parse(charted("--set", "policy.secret=ps-policy"))
    assert problems(rendered) == []
    _assert_same_pods(objects, rendered)


def test_prometheus_sends_the_token_that_the_pods_mount(tmp_path: Path) -> None:
    """The component and the chart do the same."""
    objects = _production_with("httptoken", tmp_path)
    assert str(config_of(objects, 0).http_token_file) == "/etc/ps-http/token"
    rendered = parse(charted("--set", "http.secret=ps-http-token"))
    assert problems(rendered) == []
    assert only(rendered, "PodMonitor") == only(objects, "PodMonitor")
    (endpoint,) = only(objects, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint.pop("authorization") == {
        "credentials": {"name": "ps-http-token", "key": "token"}
    }
    assert problems(objects) == [
        "http_token: PodMonitor: expected authorization with key token of Secret ps-http-token"
    ]
    _assert_same_pods(objects, rendered)
    rendered = parse(charted("--set", "http.secret=other"))
    (endpoint,) = only(rendered, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "other", "key": "token"}
    assert problems(rendered) == []


def test_without_a_token_prometheus_sends_none() -> None:
    objects = parse(charted())
    (endpoint,) = only(objects, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert "authorization" not in endpoint
    endpoint["authorization"] = {"credentials": {"name": "ps-http-token", "key": "token"}}
    assert problems(objects) == ["http_token: PodMonitor: expected authorization with none"]


def _assert_same_pods(objects: list[Object], rendered: list[Object]) -> None:
    """Compare the pods of the overlay and of the chart, in which lists may have another order."""
    ours, theirs = (only(each, "StatefulSet")["spec"]["template"] for each in (objects, rendered))
    (found,), (expected,) = ours["spec"].pop("containers"), theirs["spec"].pop("containers")
    for pair in ((found, expected), (ours["spec"], theirs["spec"])):
        for each in pair:
            for field in ("env", "volumeMounts", "volumes"):
                each.get(field, []).sort(key=lambda item: item["name"])
    assert found == expected
    assert ours["spec"]["volumes"] == theirs["spec"]["volumes"]
