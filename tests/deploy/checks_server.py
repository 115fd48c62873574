"""Checks of the pod against the server: settings, variables, arguments, memory, grace period."""

from __future__ import annotations

import os
import re
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import typer
from checks_objects import container_of, template_of
from checks_pod import quantity
from rendering import Object, only

from psserver.cli import app
from psserver.config import CONFIG, PREFIX, ConfigError, ServerConfig, load
from psserver.memory import Limit
from psserver.process import CLOSE_SECONDS

FIELDS = re.compile(
    r"metadata\.(name|namespace|uid)|metadata\.(labels|annotations)\['[^']+'\]"
    r"|spec\.(nodeName|serviceAccountName)|status\.(hostIP|podIP|podIPs|hostIPs)"
)
SECRET = re.compile(r"-----BEGIN|://[^/\s:@]*:[^/\s]*@")
ORDINAL = "metadata.labels['apps.kubernetes.io/pod-index']"
OTHER_VARIABLES = {  # not read by the server
    *("PSCTL_SERVERS", "POD_NAMESPACE"),
    *("PSCLIENT_TLS_CA", "PSCLIENT_TLS_CERTIFICATE", "PSCLIENT_TLS_KEY"),
}
SPARE_SECONDS = 30  # for the end of the process after it has closed its files


def settings_text(objects: list[Object]) -> str:
    """Return the contents of the file with settings that the pods mount."""
    path = _variables(objects)[CONFIG]["value"]
    container, pod = container_of(objects), template_of(objects)["spec"]
    (mount,) = (m for m in container["volumeMounts"] if m["mountPath"] == str(Path(path).parent))
    (volume,) = (v for v in pod["volumes"] if v["name"] == mount["name"])
    (config,) = (o for o in objects if o["metadata"]["name"] == volume["configMap"]["name"])
    text: str = config["data"][Path(path).name]
    return text


def config_of(objects: list[Object], shard: int) -> ServerConfig:
    """Return the settings of one shard, as its server reads them in a pod with this memory limit.

    Raises ConfigError if the server would refuse to start.
    """
    container = container_of(objects)
    limit = int(quantity(container["resources"]["limits"]["memory"]))
    fields = {ORDINAL: str(shard), "metadata.namespace": container_namespace(objects)}
    variables = dict[str, str]()
    for name, each in _variables(objects).items():
        path = each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        value = each["value"] if "value" in each else fields.get(path, "")
        variables[name] = re.sub(r"\$\((\w+)\)", lambda of: variables[of[1]], value)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "psserver.toml"
        path.write_text(settings_text(objects))
        variables[CONFIG] = str(path)
        found = Limit(limit, "limit of the container")
        with (
            mock.patch("psserver.shardsettings.memory_limit", return_value=found),
            mock.patch.dict(os.environ, variables, clear=True),
        ):
            config = load(container["args"][1:])
            assert config.memory.limit == found
            return config


def container_namespace(objects: list[Object]) -> str:
    """Return the namespace of the pods."""
    return str(only(objects, "StatefulSet")["metadata"]["namespace"])


def _variables(objects: list[Object]) -> dict[str, dict[str, Any]]:
    """Return the environment variables of the container by name."""
    return {each["name"]: each for each in container_of(objects)["env"]}


def variables(objects: list[Object]) -> Iterator[str]:
    """Each variable exists once, is one that the server knows, and has a value."""
    known = {PREFIX + name.upper() for name in ServerConfig.model_fields}
    env = container_of(objects)["env"]
    for name in {each["name"] for each in env} - known - {CONFIG} - OTHER_VARIABLES:
        yield f"variable {name}: the server has no such setting"
    if len(env) != len(_variables(objects)):
        yield "a variable is set twice"
    for each in env:
        if "valueFrom" not in each:
            if not isinstance(each["value"], str):
                yield f"variable {each['name']}: the value must be a string"
            continue
        path = each["valueFrom"]["fieldRef"]["fieldPath"]
        if not FIELDS.fullmatch(path):
            yield f"variable {each['name']}: a pod has no field {path}"
    ordinal = _variables(objects).get("PSCONFIG_SHARD", {}).get("valueFrom", {})
    if ordinal.get("fieldRef", {}).get("fieldPath") != ORDINAL:
        yield f"PSCONFIG_SHARD must come from {ORDINAL}"
    name = only(objects, "Service")["metadata"]["name"]
    port = next(p["containerPort"] for p in container_of(objects)["ports"] if p["name"] == "grpc")
    if _variables(objects)["PSCTL_SERVERS"]["value"] != f"{name}:{port}":
        yield "PSCTL_SERVERS must be the service and its port"


def arguments(objects: list[Object]) -> Iterator[str]:
    """The container runs the image's program, with one of its commands."""
    container = container_of(objects)
    command = typer.main.get_command(app)
    if "command" in container:
        yield "command: the image's own program must run"
    if container["args"][0] not in command.commands:  # type: ignore[attr-defined]
        yield f"psserver has no command {container['args'][0]!r}"
    if container["args"][0] != "serve":
        yield f"a pod must run `psserver serve`, got {container['args']}"


def settings(objects: list[Object]) -> Iterator[str]:
    """The server of every shard starts with these settings, within this memory limit."""
    replicas = only(objects, "StatefulSet")["spec"]["replicas"]
    for shard in range(replicas):
        try:
            config = config_of(objects, shard)
        except ConfigError as error:
            yield f"shard {shard} would not start: {error}"
            return
    plan = config.memory
    if config.host_bytes + plan.reserve > plan.part:
        yield f"memory: tables of {config.host_bytes} bytes and the reserve exceed {plan.part}"
    if config.shards != replicas:
        yield f"shards = {config.shards} in psserver.toml, but replicas: {replicas}"


def addresses(objects: list[Object]) -> Iterator[str]:
    """The server listens where the ports, probes and mounts expect it."""
    config, container = config_of(objects, 0), container_of(objects)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    if ports["grpc"] != config.port:
        yield f"the server listens on port {config.port}, the container has {ports['grpc']}"
    if ports["metrics"] != config.metrics_port:
        yield f"metrics are on port {config.metrics_port}, the container has {ports['metrics']}"
    if config.host not in ("0.0.0.0", "::"):  # noqa: S104
        yield f"host = {config.host}: other pods could not connect"
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    claimed = {
        each["metadata"]["name"]
        for each in only(objects, "StatefulSet")["spec"]["volumeClaimTemplates"]
    }
    data = mounts.get(str(config.data_dir), {})
    if data.get("name") not in claimed or data.get("readOnly"):
        yield f"data_dir {config.data_dir} is not on a volume of the pod's own that can be written"
    url = config.checkpoint_url or ""
    checkpoints = mounts.get(url.removeprefix("file://"), {"readOnly": True})
    if url.startswith("file://") and checkpoints.get("readOnly"):
        yield f"checkpoint_url {url} is not on a volume that can be written"


def security(objects: list[Object]) -> Iterator[str]:
    """The files for TLS are those of a mounted Secret; without TLS, plaintext is permitted."""
    config = config_of(objects, 0)
    for field, name in (("ca", "ca.crt"), ("certificate", "tls.crt"), ("key", "tls.key")):
        path = getattr(config, f"tls_{field}")
        if path is None:
            continue
        volume, mount = _mounted(objects, path)
        if path.name != name or "secret" not in volume:
            yield f"tls_{field} {path} is not the key {name} of a mounted Secret"
        elif not mount.get("readOnly") or "subPath" in mount:
            yield f"volumeMount {mount['name']}: must be read-only, without subPath, to be renewed"
        psctl = _variables(objects).get(f"PSCLIENT_TLS_{field.upper()}", {}).get("value")
        if psctl != str(path):
            yield f"PSCLIENT_TLS_{field.upper()} must be {path}, for psctl in the pod"
    if config.tls and config.plaintext:
        yield "plaintext is permitted, but the servers have TLS"


def http_token(objects: list[Object]) -> Iterator[str]:
    """The token of the HTTP port is a key of a mounted Secret, and Prometheus sends that key."""
    path, sent, what = config_of(objects, 0).http_token_file, None, "none"
    if path is not None:
        volume, mount = _mounted(objects, path)
        if "secret" not in volume:
            yield f"http_token_file {path} is not on a mounted Secret"
            return
        if not mount.get("readOnly") or "subPath" in mount:
            yield f"volumeMount {mount['name']}: must be read-only, without subPath, to be renewed"
        secret = volume["secret"]["secretName"]
        sent = {"credentials": {"name": secret, "key": path.name}}
        what = f"key {path.name} of Secret {secret}"
    for monitor in (each for each in objects if each["kind"] == "PodMonitor"):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if endpoint.get("authorization") != sent:
                yield f"PodMonitor: expected authorization with {what}"


def secrets(objects: list[Object]) -> Iterator[str]:
    """Secrets are files for the group of the server alone, which nobody can write; no variable and
    no ConfigMap has one.
    """
    container, policy = container_of(objects), config_of(objects, 0).policy_file
    if policy is not None and "secret" not in _mounted(objects, policy)[0]:
        yield f"policy_file {policy} is not on a mounted Secret"
    for volume in template_of(objects)["spec"]["volumes"]:
        if "secret" not in volume:
            continue
        if volume["secret"].get("defaultMode") != 0o440:
            yield f"volume {volume['name']}: defaultMode must be 0440"
        for mount in container["volumeMounts"]:
            if mount["name"] == volume["name"] and not mount.get("readOnly"):
                yield f"volumeMount {mount['name']}: must be read-only"
    for variable in container["env"]:
        if "secretKeyRef" in variable.get("valueFrom", {}):
            yield f"variable {variable['name']}: whoever sees the process sees it; mount a file"
    for config in (each for each in objects if each["kind"] == "ConfigMap"):
        for name, text in config["data"].items():
            if SECRET.search(text):
                yield f"ConfigMap {config['metadata']['name']}: {name} has a key or a password"


def _mounted(objects: list[Object], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (volume, mount) of the directory of a file; {} if there is none."""
    mounts = {mount["mountPath"]: mount for mount in container_of(objects)["volumeMounts"]}
    volumes = {each["name"]: each for each in template_of(objects)["spec"]["volumes"]}
    mount = mounts.get(str(path.parent), {})
    return volumes.get(mount.get("name"), {}), mount


def grace(objects: list[Object]) -> Iterator[str]:
    """The grace period is longer than draining and closing take."""
    seconds = template_of(objects)["spec"]["terminationGracePeriodSeconds"]
    needed = config_of(objects, 0).drain_seconds + CLOSE_SECONDS + SPARE_SECONDS
    if seconds < needed:
        yield f"terminationGracePeriodSeconds: {seconds} s, but a stop can take {needed:g} s"


def file_of_settings(objects: list[Object]) -> Iterator[str]:
    """The file is TOML whose keys are settings."""
    for name in tomllib.loads(settings_text(objects)).keys() - ServerConfig.model_fields.keys():
        yield f"psserver.toml: unknown setting {name}"


CHECKS = (
    *(variables, arguments, settings, addresses, security, http_token, secrets),
    grace,
    file_of_settings,
)
