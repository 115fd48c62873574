"""The OCI configuration of a container, from a pod's fields: what runc has to run.

All that a manifest says about the security of a container is here: user, groups, read-only root,
capabilities, privileges and system calls. So are its environment, mounts, and limits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.deploy.image import CALLS, Image
from tests.deploy.simulator.objects import Object, labels_of, name_of, quantity

# What container runtimes give to a container that drops no capability.
CAPABILITIES = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETGID"]
CAPABILITIES += ["SETPCAP", "SETUID", "SYS_CHROOT"]
NAMESPACES = ("pid", "ipc", "uts", "mount")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pod runs on this machine.

    namespace  name of its network namespace
    address    its IPv4 address
    volumes    name of each volume -> directory
    root       root directory of the image
    resolver   file for /etc/resolv.conf
    group      path of its control group
    """

    namespace: str
    address: str
    volumes: dict[str, Path]
    root: Path
    resolver: Path
    group: str


class CannotRun(Exception):
    """Raised if a container may not start: what a kubelet calls CreateContainerConfigError."""


def configuration(pod: Object, container: Object, image: Image, place: Place) -> Object:
    """Return the content of config.json for one container. Raises CannotRun."""
    security = {
        **pod["spec"].get("securityContext", {}),
        **container.get("securityContext", {}),
    }
    linux: Object = {
        "cgroupsPath": f"{place.group}/{container['name']}",
        "resources": _resources(container.get("resources", {})),
        "namespaces": [{"type": one} for one in NAMESPACES],
        "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
    }
    linux["namespaces"] += [{"type": "network", "path": f"/var/run/netns/{place.namespace}"}]
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        linux["namespaces"] += [{"type": "cgroup"}]
    profile = security.get("seccompProfile", {}).get("type", "Unconfined")
    if profile == "RuntimeDefault":
        linux["seccomp"] = _allowed_calls()
    return {
        "ociVersion": "1.0.2",
        "hostname": pod["spec"].get("hostname", name_of(pod)),
        "root": {
            "path": str(place.root),
            "readonly": security.get("readOnlyRootFilesystem", False),
        },
        "process": _process(pod, container, image, place, security),
        "mounts": _mounts(container, place),
        "linux": linux,
    }


def _process(
    pod: Object, container: Object, image: Image, place: Place, security: Object
) -> Object:
    uid = security.get("runAsUser", image.user[0])
    if security.get("runAsNonRoot") and uid == 0:
        raise CannotRun("runAsNonRoot is true, but the container runs as user 0")
    group = security.get("fsGroup")
    dropped = security.get("capabilities", {}).get("drop", [])
    kept = [one for one in CAPABILITIES if "ALL" not in dropped and one not in dropped]
    kept += security.get("capabilities", {}).get("add", [])
    names = [f"CAP_{one}" for one in kept]
    inherited = names if uid == 0 else []
    return {
        "terminal": False,
        "cwd": "/",
        "user": {
            "uid": uid,
            "gid": security.get("runAsGroup", image.user[1]),
            "additionalGids": [] if group is None else [group],
        },
        "args": _command(container, image),
        "env": [
            *image.environment,
            f"HOSTNAME={name_of(pod)}",
            *_environment(pod, container, place),
        ],
        "capabilities": {
            "bounding": names,
            "effective": inherited,
            "permitted": inherited,
            "inheritable": [],
            "ambient": [],
        },
        "noNewPrivileges": not security.get("allowPrivilegeEscalation", True),
    }


def _command(container: Object, image: Image) -> list[str]:
    """Return the command line: a pod's command also replaces the image's arguments."""
    if "command" in container:
        return [*container["command"], *container.get("args", [])]
    return [*image.entrypoint, *container.get("args", image.arguments)]


def _environment(pod: Object, container: Object, place: Place) -> list[str]:
    """Return "NAME=VALUE" for each variable. $(NAME) in a value is an earlier variable's value."""
    found: dict[str, str] = {}
    for variable in container.get("env", ()):
        value = variable.get("value", "")
        for name, earlier in found.items():
            value = value.replace(f"$({name})", earlier)
        if "valueFrom" in variable:
            value = field(pod, place.address, variable["valueFrom"]["fieldRef"]["fieldPath"])
        found[variable["name"]] = value
    return [f"{name}={value}" for name, value in found.items()]


def field(pod: Object, address: str, path: str) -> str:
    """Return a field of a pod that an environment variable may refer to. Raises CannotRun."""
    if path.startswith("metadata.labels['"):
        return labels_of(pod).get(path.removeprefix("metadata.labels['").removesuffix("']"), "")
    fields = {
        "metadata.name": name_of(pod),
        "metadata.namespace": pod["metadata"].get("namespace", ""),
        "metadata.uid": pod["metadata"]["uid"],
        "status.podIP": address,
    }
    if path not in fields:
        raise CannotRun(f"fieldRef to an unknown field: {path}")
    return str(fields[path])


def _resources(fields: Object) -> Object:
    found: Object = {"devices": [{"allow": False, "access": "rwm"}], "pids": {"limit": 4096}}
    limits, requests = fields.get("limits", {}), fields.get("requests", {})
    if "memory" in limits:
        found["memory"] = {"limit": quantity(limits["memory"])}
    found["cpu"] = {"shares": max(2, int(_cores(requests.get("cpu", 0)) * 1024))}
    if "cpu" in limits:
        found["cpu"] |= {"period": 100_000, "quota": int(_cores(limits["cpu"]) * 100_000)}
    return found


def _cores(value: str | float) -> float:
    text = str(value)
    return float(text.removesuffix("m")) / 1000 if text.endswith("m") else float(text)


def _mounts(container: Object, place: Place) -> list[Object]:
    found = [
        _mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "mode=0620"),
        _mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),  # noqa: S108
        _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        _mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "ro"),
        _mount("/etc/resolv.conf", "bind", str(place.resolver), "bind", "ro"),
    ]
    for one in container.get("volumeMounts", ()):
        if one["name"] not in place.volumes:
            raise CannotRun(f"volumeMounts names an unknown volume: {one['name']}")
        mode = "ro" if one.get("readOnly") else "rw"
        found.append(
            _mount(one["mountPath"], "bind", str(place.volumes[one["name"]]), "rbind", mode)
        )
    return found


def _mount(destination: str, kind: str, source: str, *options: str) -> Object:
    return {
        "destination": destination,
        "type": kind,
        "source": source,
        "options": list(options),
    }


@cache
def _allowed_calls() -> Object:
    """Return the default profile of system calls, for a container without capabilities."""
    profile = json.loads(CALLS.read_text())
    rules = []
    for rule in profile["syscalls"]:
        need, unless = rule.get("includes") or {}, rule.get("excludes") or {}
        if need.get("caps") or "amd64" not in (need.get("arches") or ["amd64"]):
            continue
        if "amd64" in (unless.get("arches") or []):
            continue
        kept = {key: rule[key] for key in ("names", "action", "args", "errnoRet") if rule.get(key)}
        rules.append(kept)
    found = {"defaultAction": profile["defaultAction"], "syscalls": rules}
    found["architectures"] = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    return found | {key: profile[key] for key in ("defaultErrnoRet",) if key in profile}
