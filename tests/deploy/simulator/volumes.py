"""Directories for the volumes of pods. Claims outlive their pods; other volumes end with them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.deploy.simulator.controlplane import ControlPlane, Refused
from tests.deploy.simulator.kubelet import NotYet
from tests.deploy.simulator.objects import Object, quantity

SINGLE = "ReadWriteOncePod"


class Volumes:
    """The volumes of all pods below one directory.

    sizes  mebibytes of the file system of some claims, by name; all other claims share this
           machine's disk
    """

    def __init__(self, directory: Path, control: ControlPlane, sizes: dict[str, int]) -> None:
        self._directory, self._control, self._sizes = directory, control, sizes
        self._users: dict[str, str] = {}  # name of a claim with SINGLE -> uid of its pod
        self._mounted: list[Path] = []

    def claim(self, name: str) -> Path:
        """Return the directory of a claim."""
        return self._directory / "claims" / name

    def set_up(self, pod: Object) -> dict[str, Path]:
        """Make the volumes of a pod. Returns {name: directory}. Raises NotYet."""
        uid, group = pod["metadata"]["uid"], pod["spec"].get("securityContext", {}).get("fsGroup")
        found = {}
        for volume in pod["spec"].get("volumes", ()):
            path = self._directory / "pods" / uid / volume["name"]
            if "persistentVolumeClaim" in volume:
                path = self._claimed(volume["persistentVolumeClaim"]["claimName"], uid)
            elif "configMap" in volume:
                self._configure(path, volume["configMap"])
            elif "emptyDir" in volume:
                self._empty(path, volume["emptyDir"])
            else:
                raise NotImplementedError(f"the simulator has no volume {sorted(volume)}")
            if group is not None and "configMap" not in volume:
                os.chown(path, 0, group)
                path.chmod(0o2775)
            found[volume["name"]] = path
        return found

    def _claimed(self, name: str, uid: str) -> Path:
        try:
            claim = self._control.get("PersistentVolumeClaim", name)
        except Refused as error:
            raise NotYet(str(error)) from None
        if SINGLE in claim["spec"]["accessModes"] and self._users.setdefault(name, uid) != uid:
            raise NotYet(f"a different pod uses the claim {name}")
        path = self.claim(name)
        if not path.exists():
            path.mkdir(parents=True)
            if name in self._sizes:
                self._mount(path, self._sizes[name])
        return path

    def _mount(self, path: Path, mebibytes: int) -> None:
        """Mount a new file system of its own on the directory of a claim."""
        file = path.with_suffix(".ext4")
        with file.open("wb") as disk:
            disk.truncate(mebibytes << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(file)], check=True)
        subprocess.run(["mount", "-o", "loop", str(file), str(path)], check=True)
        self._mounted.append(path)

    def _configure(self, path: Path, fields: Object) -> None:
        """Write the files of a ConfigMap."""
        try:
            data = self._control.get("ConfigMap", fields["name"])["data"]
        except Refused as error:
            raise NotYet(str(error)) from None
        names = {one["key"]: one["path"] for one in fields.get("items", ())} or dict.fromkeys(data)
        path.mkdir(parents=True, exist_ok=True)
        for key, name in names.items():
            if key not in data:
                raise NotYet(f"the ConfigMap {fields['name']} has no key {key}")
            (path / (name or key)).write_text(data[key])

    def _empty(self, path: Path, fields: Object) -> None:
        """Make an empty directory; in memory, or with a size limit, as a file system of its own."""
        if path.exists():
            return
        path.mkdir(parents=True)
        if "sizeLimit" in fields:
            options = f"size={quantity(fields['sizeLimit'])},mode=0777"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
            self._mounted.append(path)
        path.chmod(0o777)

    def tear_down(self, uid: str) -> None:
        """Remove the volumes of a pod, and let others use its claims."""
        self._users = {name: user for name, user in self._users.items() if user != uid}
        below = self._directory / "pods" / uid
        for path in [one for one in self._mounted if below in one.parents]:
            self._unmount(path)
        shutil.rmtree(below, ignore_errors=True)

    def _unmount(self, path: Path) -> None:
        subprocess.run(["umount", "-l", str(path)], check=True)
        self._mounted.remove(path)

    def close(self) -> None:
        for path in list(self._mounted):
            self._unmount(path)
