"""The Runtime of a simulator: runc runs the containers, each pod in its own network."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from tests.deploy.image import Image
from tests.deploy.simulator.bundle import CannotRun, Place, configuration
from tests.deploy.simulator.kubelet import Process
from tests.deploy.simulator.network import NODE_ADDRESS, Network
from tests.deploy.simulator.objects import Object, name_of
from tests.deploy.simulator.volumes import Volumes


class Runc:
    """One container, run by a process of runc that ends with the container's exit status.

    command  runc and its global options
    name     the container's name
    """

    def __init__(self, command: list[str], name: str, bundle: Path, log: Path) -> None:
        self._command, self._name = command, name
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*command, "run", "--bundle", str(bundle), name],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C does not reach it
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        self._signal("TERM")

    def kill(self) -> None:
        self._signal("KILL")

    def _signal(self, name: str) -> None:
        """Send a signal to the container's first process; a container that ended gets none."""
        command = [*self._command, "kill", self._name, name]
        subprocess.run(command, capture_output=True, check=False)

    def execute(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, like ``kubectl exec``."""
        command = [*self._command, "exec", self._name, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)


class Failed:
    """A container that could not be started; it counts as one that ended at once."""

    def poll(self) -> int | None:
        return 128

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class RuncRuntime:
    """Runs the containers of all pods.

    directory  for volumes, logs and bundles
    root       root directory of the image
    """

    def __init__(
        self, directory: Path, image: Image, root: Path, network: Network, volumes: Volumes
    ) -> None:
        self._directory, self._image, self._root = directory, image, root
        self._network, self._volumes = network, volumes
        self._places: dict[str, Place] = {}  # uid of a pod -> its place
        self._running: dict[str, Runc] = {}  # uid of a pod -> its newest container
        self._command = ["runc", "--root", str(directory / "runc")]

    def set_up(self, pod: Object) -> str:
        uid = pod["metadata"]["uid"]
        volumes = self._volumes.set_up(pod)
        namespace, address = self._network.connect()
        home = self._directory / "pods" / uid
        home.mkdir(parents=True, exist_ok=True)
        resolver = home / "resolv.conf"
        zone = f"{pod['metadata'].get('namespace', 'default')}.svc.cluster.local"
        resolver.write_text(
            f"nameserver {NODE_ADDRESS}\nsearch {zone} svc.cluster.local cluster.local\n"
            "options ndots:5\n"
        )
        self._places[uid] = Place(
            namespace=namespace,
            address=address,
            volumes=volumes,
            root=self._root,
            resolver=resolver,
            group=f"/{self._network.node}/{uid}",
        )
        return address

    def start(self, pod: Object, container: Object, attempt: int) -> Process:
        uid, place = pod["metadata"]["uid"], self._places[pod["metadata"]["uid"]]
        bundle = self._directory / "pods" / uid / f"{container['name']}-{attempt}"
        bundle.mkdir(parents=True)
        try:
            content = configuration(pod, container, self._image, place)
        except CannotRun as error:
            with self.log(name_of(pod)).open("a") as log:
                log.write(f"{error}\n")
            return Failed()
        if not content["root"]["readonly"]:
            content["root"]["path"] = str(self._writable(bundle))
        (bundle / "config.json").write_text(json.dumps(content))
        name = f"{self._network.node}-{uid}-{container['name']}-{attempt}"
        self._running[uid] = Runc(self._command, name, bundle, self.log(name_of(pod)))
        return self._running[uid]

    def _writable(self, bundle: Path) -> Path:
        """Return a copy of the image's root directory that belongs to one container."""
        copied = bundle / "root"
        shutil.copytree(self._root, copied, symlinks=True)
        return copied

    def log(self, name: str) -> Path:
        """Return the file with the output of all containers of pods of this name."""
        return self._directory / f"{name}.log"

    def running(self, uid: str) -> Runc:
        """Return the newest container of a pod."""
        return self._running[uid]

    def lose(self, pod: Object) -> None:
        self._network.cut(self._places[pod["metadata"]["uid"]].namespace)

    def tear_down(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        place = self._places.pop(uid, None)
        self._running.pop(uid, None)
        if place is not None:
            self._network.disconnect(place.namespace)
        self._volumes.tear_down(uid)
        shutil.rmtree(self._directory / "pods" / uid, ignore_errors=True)
