"""helm installs the chart, upgrades it and rolls it back, against the API server of the tests."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from apiserver import Api
from rendering import CHART, Object
from tools import program

Helm = Callable[..., str]


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api(lambda: None, lambda *_: None)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def helm(api: Api, tmp_path: Path) -> Helm:
    """Run helm in the namespace ps; return its output. Fail if it fails."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "main",
        "clusters": [{"name": "main", "cluster": {"server": api.url}}],
        "contexts": [{"name": "main", "context": {"cluster": "main", "user": ""}}],
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "KUBECONFIG": str(tmp_path / "kubeconfig"),
    }

    def run(*words: str) -> str:
        command = [program("helm"), *words, "--namespace", "ps"]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    return run


def mounted(api: Api) -> str:
    """Return the name of the ConfigMap that the pods mount."""
    found: Object = api.store.get(("StatefulSet", "ps", "ps"))["spec"]["template"]["spec"]
    (name,) = (each["configMap"]["name"] for each in found["volumes"] if "configMap" in each)
    return str(name)


@pytest.mark.slow
def test_a_rollback_mounts_the_old_settings_again(api: Api, helm: Helm) -> None:
    options = (
        "ps",
        str(CHART),
        "--disable-openapi-validation",
        "--set",
        "monitoring.enabled=false",
    )
    helm("install", *options)
    first = mounted(api)
    helm("upgrade", *options, "--set", "settings.disk_bytes=40000000000")
    second = mounted(api)
    both = {("ConfigMap", "ps", first), ("ConfigMap", "ps", second)}
    assert len(both) == 2
    assert both <= api.store.objects.keys()  # pods of the old revision may start once more
    helm("rollback", "ps", "1")
    assert mounted(api) == first
    assert both <= api.store.objects.keys()
    helm("uninstall", "ps")
    assert both <= api.store.objects.keys()
    assert ("PersistentVolumeClaim", "ps", "ps-checkpoints") in api.store.objects
    assert ("StatefulSet", "ps", "ps") not in api.store.objects
